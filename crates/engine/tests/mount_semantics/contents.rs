//! Contents: holes, maps, descriptors, copies, and what is written through.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::lab::{Lab, Medium, Session};
use crate::tools::{Map, stat};

const TEXT: &str = "contents of a file of the base\n";
const HOLE: u64 = 32 << 20;

fn sparse(path: &Path) {
    let file = File::create(path).unwrap();
    file.write_all_at(b"middle", HOLE / 2).unwrap();
    file.set_len(HOLE).unwrap();
}

pub(crate) fn fill(base: &Path) {
    fs::create_dir(base.join("contents")).unwrap();
    for name in ["mapped", "mapped-for-writing", "open", "direct", "counted"] {
        fs::write(base.join("contents").join(name), TEXT.repeat(300)).unwrap();
    }
    sparse(&base.join("contents/sparse"));
}

pub(crate) fn sparse_files_stay_sparse_on_the_node(lab: &Lab) {
    let session = lab.session();
    sparse(&session.path("new"));
    let check = |view: &Session<'_>, path: &str, takes: std::ops::Range<u64>| {
        let stat = stat(view.path(path));
        assert_eq!(stat.st_size as u64, HOLE);
        let bytes = stat.st_blocks as u64 * 512;
        assert!(takes.contains(&bytes), "{path} takes {bytes} bytes");
        let mut middle = [0; 8];
        File::open(view.path(path)).unwrap().read_exact_at(&mut middle, HOLE / 2 - 1).unwrap();
        assert_eq!(&middle, b"\0middle\0");
    };
    let (elsewhere, fork) = (session.elsewhere(), session.fork(&[]));
    check(&session, "new", 1..1 << 20);
    check(&fork, "new", 1..1 << 20);
    check(&elsewhere, "new", HOLE..2 * HOLE);
    check(&session, "contents/sparse", HOLE..2 * HOLE);
}

pub(crate) fn unnamed_files_can_be_given_a_name(lab: &Lab) {
    let session = lab.session();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let open = || File::from(rustix::fs::open(session.path("contents"), flags, Mode::RUSR | Mode::WUSR).unwrap());
    let (mut named, mut unnamed) = (open(), open());
    named.write_all(b"named").unwrap();
    unnamed.write_all(b"unnamed").unwrap();
    let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&named));
    rustix::fs::linkat(CWD, own, CWD, session.path("named"), AtFlags::SYMLINK_FOLLOW).unwrap();
    drop(named);
    let names = |view: &Path| fs::read_dir(view.join("contents")).unwrap().count();
    let before = names(session.view());
    for view in [session.elsewhere(), session.fork(&[])] {
        assert_eq!(fs::read_to_string(view.path("named")).unwrap(), "named");
        assert_eq!(names(view.view()), before);
    }
    let mut contents = String::new();
    unnamed.seek(SeekFrom::Start(0)).unwrap();
    unnamed.read_to_string(&mut contents).unwrap();
    assert_eq!(contents, "unnamed");
}

pub(crate) fn removed_files_stay_readable_while_open(lab: &Lab) {
    let session = lab.session();
    fs::write(session.path("new"), "new").unwrap();
    let mut open = [File::open(session.path("new")).unwrap(), File::open(session.path("contents/open")).unwrap()];
    fs::remove_file(session.path("new")).unwrap();
    fs::remove_file(session.path("contents/open")).unwrap();
    for view in [session.elsewhere(), session.fork(&[])] {
        assert!(!view.path("new").exists() && !view.path("contents/open").exists());
    }
    for (file, wanted) in open.iter_mut().zip(["new".to_owned(), TEXT.repeat(300)]) {
        let mut contents = String::new();
        file.read_to_string(&mut contents).unwrap();
        assert_eq!(contents, wanted);
    }
}

pub(crate) fn shared_maps_taken_before_a_write_stay_old(lab: &Lab) {
    let session = lab.session();
    let path = session.path("contents/mapped");
    let file = File::open(&path).unwrap();
    let map = Map::new(&file, false);
    assert_eq!(map.read(8), b"contents");
    OpenOptions::new().write(true).open(&path).unwrap().write_all(b"CONTENTS").unwrap();
    assert_eq!(map.read(8), b"contents", "the old map stays on the base");
    let again = Map::new(&File::open(&path).unwrap(), false);
    assert_eq!(again.read(8), b"CONTENTS", "a new one sees the write");
    // From now on the file is the session's own, and its maps follow.
    OpenOptions::new().write(true).open(&path).unwrap().write_all(b"cOnTeNtS").unwrap();
    assert_eq!(again.read(8), b"cOnTeNtS");
}

pub(crate) fn shared_maps_for_writing_are_coherent(lab: &Lab) {
    let session = lab.session();
    let path = session.path("contents/mapped-for-writing");
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let map = Map::new(&file, true);
    map.write(b"by a map");
    assert!(fs::read_to_string(&path).unwrap().starts_with("by a map"));
    file.write_all_at(b"by write", 0).unwrap();
    assert_eq!(map.read(8), b"by write");
    map.write(b"not sync");
    // A copy holds what a map wrote, synced or not.
    for view in [session.elsewhere(), session.fork(&[])] {
        assert!(fs::read_to_string(view.path("contents/mapped-for-writing")).unwrap().starts_with("not sync"));
    }
}

pub(crate) fn descriptors_opened_before_a_write_see_it(lab: &Lab) {
    let session = lab.session();
    let path = session.path("contents/open");
    let before = File::open(&path).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().write_all(b"CONTENTS").unwrap();
    let mut read = [0; 8];
    before.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(&read, b"CONTENTS");
}

pub(crate) fn syncs_are_not_ignored(lab: &Lab) {
    let session = lab.session();
    let table = aether_engine::mount::table().unwrap();
    let entry = table.iter().find(|entry| entry.target == session.view()).unwrap();
    let options = String::from_utf8_lossy(&entry.super_options).into_owned();
    assert!(entry.fs_type == "overlay" && options.contains("upperdir="), "{options}");
    assert!(!options.contains("volatile"), "{options}");
    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .custom_flags(libc::O_DSYNC)
        .open(session.path("new"))
        .unwrap();
    file.write_all(b"x").unwrap();
    file.sync_data().unwrap();
    file.sync_all().unwrap();
    File::open(session.view()).unwrap().sync_all().unwrap();
    rustix::fs::syncfs(&file).unwrap();
}

pub(crate) fn copies_share_space_on_btrfs(lab: &Lab) {
    let session = lab.session();
    fs::write(session.path("new"), vec![7; 1 << 20]).unwrap();
    let clone = |name: &str| {
        let to = File::create(session.path(name)).unwrap();
        rustix::fs::ioctl_ficlone(&to, File::open(session.path("new")).unwrap())
    };
    match lab.medium {
        Medium::Btrfs | Medium::Memory => {
            clone("cloned").unwrap();
            assert_eq!(fs::read(session.path("cloned")).unwrap(), vec![7; 1 << 20]);
        }
        // The tests' disk is whatever it is; ext4 cannot.
        Medium::Directory => match clone("cloned") {
            Ok(()) => assert_eq!(fs::read(session.path("cloned")).unwrap(), vec![7; 1 << 20]),
            Err(error) => assert_eq!(error, Errno::OPNOTSUPP),
        },
    }
    // The standard library uses copy_file_range(2), as cp(1) does where a clone is refused.
    fs::copy(session.path("new"), session.path("copied")).unwrap();
    assert_eq!(fs::read(session.path("copied")).unwrap(), vec![7; 1 << 20]);
}

pub(crate) fn direct_io_works(lab: &Lab) {
    let session = lab.session();
    fs::write(session.path("new"), TEXT.repeat(300)).unwrap();
    for path in ["contents/direct", "new"] {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(session.path(path)).unwrap();
        // Aligned as a direct read must be.
        let mut buffer = vec![0_u8; 3 * 4096];
        let skip = buffer.as_ptr().align_offset(4096);
        file.read_exact_at(&mut buffer[skip..skip + 8192], 0).unwrap();
        assert_eq!(&buffer[skip..skip + TEXT.len()], TEXT.as_bytes(), "{path}");
    }
}

pub(crate) fn base_files_count_with_their_size(lab: &Lab) {
    let session = lab.session();
    let stat = stat(session.path("contents/counted"));
    assert_eq!(stat.st_size as usize, TEXT.len() * 300);
    assert!(stat.st_blocks * 512 >= stat.st_size, "{} blocks for {} bytes", stat.st_blocks, stat.st_size);
}

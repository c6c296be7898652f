//! Real kernel: images, overlays, pools.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use aether_cas::tree::{Attributes, Directory, MemoryDirectories, Mtime, Name, Node, Owner};
use aether_cas::{Blob, Digest};
use aether_engine::mount::{self, Overlay};
use aether_engine::pool::{self, Limits, Medium, PoolConfig};
use aether_engine::state::ImageId;
use aether_engine::testing::isolated;
use aether_engine::{Error, image};

fn attributes(mode: u32) -> Attributes {
    Attributes { mode, mtime: Mtime { seconds: -5, nanos: 987_654_321 }, ..Attributes::default() }
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes().to_vec()).unwrap()
}

fn blob(bytes: &[u8]) -> Blob {
    Blob { digest: Digest::of(bytes), size: bytes.len() as u64 }
}

/// Puts a content where the data-only layer expects it.
fn put(objects: &Path, bytes: &[u8]) -> Blob {
    let blob = blob(bytes);
    let path = objects.join(blob.digest.object_path());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
    blob
}

#[test]
fn an_image_shows_a_tree_exactly() {
    isolated("an_image_shows_a_tree_exactly", |root| {
        let directories = MemoryDirectories::new();
        let objects = root.join("objects");
        let content = put(&objects, b"hello\n");
        let large = put(&objects, &vec![7; 3 << 20]);
        let file = |content, group, mode| Node::File { content, attributes: attributes(mode), link_group: group };
        let mut deep = Directory { attributes: attributes(0o700), entries: BTreeMap::new() };
        deep.entries.insert(name("linked"), file(content, Some(9), 0o644));
        deep.attributes.owner = Some(Owner { uid: 70_000, gid: 5 });
        let deep = directories.insert(deep);
        let mut xattrs = attributes(0o640);
        xattrs.xattrs.insert(b"user.note".to_vec(), b"a\0b".to_vec());
        let mut top = Directory { attributes: attributes(0o1755), entries: BTreeMap::new() };
        // Names of the data-only layer's own directories must not be hidden.
        top.entries.insert(name("ab"), file(content, Some(9), 0o644));
        top.entries.insert(name("deep"), Node::Directory(deep));
        top.entries.insert(name("empty"), file(blob(b""), None, 0o600));
        top.entries.insert(name("large"), file(large, None, 0o755));
        top.entries.insert(name("note"), Node::File { content, attributes: xattrs, link_group: None });
        top.entries.insert(
            name("link"),
            Node::Symlink { target: b"deep/linked".to_vec(), attributes: attributes(0o777), link_group: None },
        );
        top.entries.insert(name("pipe"), Node::Fifo { attributes: attributes(0o620), link_group: None });
        for n in 0..300 {
            top.entries.insert(name(&format!("many-{n:03}")), file(content, None, 0o644));
        }
        let tree = directories.insert(top);

        let images = root.join("images");
        fs::create_dir(&images).unwrap();
        let id = ImageId::new(tree, Owner { uid: 1000, gid: 1001 });
        let (bytes, summary) = image::build(&images, id, &directories).unwrap();
        assert_eq!(bytes, fs::metadata(image::path(&images, id)).unwrap().len());
        assert_eq!((summary.files, summary.directories), (305, 2));
        let (again, _) = image::build(&images, id, &directories).unwrap();
        assert_eq!(again, bytes);

        for directory in ["image", "view", "upper", "work"] {
            fs::create_dir(root.join(directory)).unwrap();
        }
        mount::mount_erofs(&image::path(&images, id), &root.join("image")).unwrap();
        let overlay = Overlay {
            name: "test".into(),
            lower: root.join("image").join(image::TREE),
            data: vec![objects],
            upper: None,
        };
        overlay.mount(&root.join("view")).unwrap();
        let view = root.join("view");
        assert_eq!(fs::read_dir(&view).unwrap().count(), 307);
        assert_eq!(fs::read(view.join("ab")).unwrap(), b"hello\n");
        assert_eq!(fs::read(view.join("deep/linked")).unwrap(), b"hello\n");
        assert_eq!(fs::read(view.join("large")).unwrap(), vec![7; 3 << 20]);
        assert_eq!(fs::read(view.join("empty")).unwrap(), b"");
        assert_eq!(fs::read_link(view.join("link")).unwrap(), Path::new("deep/linked"));
        assert_eq!(mount::xattr(&view.join("note"), "user.note").unwrap().unwrap(), b"a\0b");
        // What older kernels need: a loop device and mount(2).
        for directory in ["loop", "legacy"] {
            fs::create_dir(root.join(directory)).unwrap();
        }
        mount::mount_erofs_through_loop(&image::path(&images, id), &root.join("loop")).unwrap();
        let legacy = Overlay { lower: root.join("loop").join(image::TREE), ..overlay };
        legacy.mount_legacy(&root.join("legacy")).unwrap();
        assert_eq!(fs::read(root.join("legacy/deep/linked")).unwrap(), b"hello\n");
        let entry = mount::find_mount(&root.join("legacy")).unwrap().unwrap();
        assert!(entry.options.contains("nosuid") && entry.options.contains("nodev"), "{entry:?}");

        let stat = |path: &str| fs::symlink_metadata(view.join(path)).unwrap();
        assert_eq!((stat("large").size(), stat("large").mode() & 0o7777), (3 << 20, 0o755));
        assert_eq!((stat("ab").ino(), stat("ab").nlink()), (stat("deep/linked").ino(), 2));
        for path in ["ab", "deep", "empty", "large", "link", "pipe"] {
            assert_eq!((stat(path).mtime(), stat(path).mtime_nsec()), (-5, 987_654_321), "{path}");
        }
        assert_eq!((stat("deep").uid(), stat("deep").gid()), (70_000, 5));
        assert_eq!((stat("large").uid(), stat("large").gid()), (1000, 1001));
        assert!(std::os::unix::fs::FileTypeExt::is_fifo(&stat("pipe").file_type()));
    });
}

#[test]
fn a_used_upper_is_noticed_wherever_it_is_mounted() {
    isolated("a_used_upper_is_noticed_wherever_it_is_mounted", |root| {
        for directory in ["lower", "upper", "work", "view", "copy"] {
            fs::create_dir(root.join(directory)).unwrap();
        }
        let upper = root.join("upper");
        let before: Vec<_> = mount::xattrs(&upper).unwrap();
        assert!(!mount::upper_in_use(&upper).unwrap());
        assert_eq!(mount::xattrs(&upper).unwrap(), before, "asking must leave no trace");
        let overlay = Overlay {
            name: "test".into(),
            lower: root.join("lower"),
            data: vec![],
            upper: Some((upper.clone(), root.join("work"))),
        };
        overlay.mount(&root.join("view")).unwrap();
        assert!(mount::upper_in_use(&upper).unwrap());
        assert_eq!(mount::holders(&upper).len(), 1);
        mount::bind(&root.join("view"), &root.join("copy"), true).unwrap();
        let copy = mount::find_mount(&root.join("copy")).unwrap().unwrap();
        assert!(copy.is_read_only() && copy.options.contains("nosuid") && copy.options.contains("nodev"));
        mount::unmount(&root.join("view")).unwrap();
        assert!(mount::upper_in_use(&upper).unwrap(), "the bind mount still holds it");
        let open = fs::File::open(root.join("copy")).unwrap();
        mount::unmount_lazy(&root.join("copy")).unwrap();
        assert!(mount::upper_in_use(&upper).unwrap(), "an open file still holds it, and no mount table says so");
        assert_eq!(mount::holders(&upper).len(), 0);
        drop(open);
        assert!(!mount::upper_in_use(&upper).unwrap());
    });
}

fn exercise(pool: &dyn pool::Pool) {
    pool.create("a", Medium::Disk).unwrap();
    let upper = pool.upper("a");
    fs::write(upper.join("file"), "one").unwrap();
    mount::set_xattr(&upper, "trusted.overlay.opaque", b"y").unwrap();
    pool.flush("a", Limits::default()).unwrap();
    pool.snapshot("a", "s").unwrap();
    pool.finish_snapshot("s").unwrap();
    fs::write(upper.join("file"), "two").unwrap();
    assert_eq!(fs::read(pool.snapshot_upper("s").join("file")).unwrap(), b"one");
    pool.fork("s", "b").unwrap();
    assert_eq!(fs::read(pool.upper("b").join("file")).unwrap(), b"one");
    assert_eq!(mount::xattr(&pool.upper("b"), "trusted.overlay.opaque").unwrap().unwrap(), b"y");
    assert!(pool.work("b").is_dir());
    fs::write(pool.upper("b").join("file"), "three").unwrap();
    pool.delete_snapshot("s").unwrap();
    assert_eq!(fs::read(upper.join("file")).unwrap(), b"two");
    assert_eq!(pool.listing().unwrap().sessions, ["a", "b"]);
    pool.delete_session("a").unwrap();
    pool.delete_session("a").unwrap();
    assert_eq!(pool.listing().unwrap().sessions, ["b"]);
    assert!(pool.listing().unwrap().snapshots.is_empty());
    fs::create_dir(pool.root().join("sessions/.new-x")).unwrap();
    assert_eq!(pool.sweep().unwrap(), 1);
    assert!(pool.space_of(Medium::Disk).unwrap().available_bytes > 0);
    assert_eq!(fs::read(pool.upper("b").join("file")).unwrap(), b"three");
}

#[test]
fn the_btrfs_pool_keeps_its_contract_and_its_device() {
    isolated("the_btrfs_pool_keeps_its_contract_and_its_device", |root| {
        let config = PoolConfig::Image { bytes: 300 << 20 };
        let pool = pool::open(root, &config, None).unwrap();
        let image = fs::metadata(root.join("pool.img")).unwrap();
        exercise(&*pool);
        let after = fs::metadata(root.join("pool.img")).unwrap();
        assert!(after.blocks() >= image.blocks() && image.blocks() * 512 >= 300 << 20, "the image is preallocated");
        drop(pool);
        // A second opening finds the mount; one after an unmount finds the loop device, or makes one.
        let pool = pool::open(root, &config, None).unwrap();
        assert_eq!(pool.listing().unwrap().sessions, ["b"]);
        let held = fs::File::open(pool.upper("b").join("file")).unwrap();
        let device = mount::find_mount(&root.join("pool")).unwrap().unwrap().source;
        drop(pool);
        mount::unmount_lazy(&root.join("pool")).unwrap();
        let pool = pool::open(root, &PoolConfig::Auto, None).unwrap();
        assert_eq!(mount::find_mount(&root.join("pool")).unwrap().unwrap().source, device, "one device per image");
        assert_eq!(fs::read(pool.upper("b").join("file")).unwrap(), b"three");
        drop(held);
        let refused = pool::open(root, &PoolConfig::Directory, None).err().unwrap();
        assert!(matches!(&refused, Error::Invalid { .. }) && refused.to_string().contains("image"), "{refused}");
    });
}

#[test]
fn a_container_without_the_node_of_a_loop_device_gets_it() {
    isolated("a_container_without_the_node_of_a_loop_device_gets_it", |root| {
        // A container's own /dev: only what there was when it started.
        let control = fs::metadata("/dev/loop-control").unwrap().rdev();
        let made = std::process::Command::new("mount").args(["-t", "tmpfs", "dev"]).arg("/dev").status().unwrap();
        assert!(made.success());
        let kind = rustix::fs::FileType::CharacterDevice;
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, "/dev/loop-control", kind, mode, control).unwrap();
        let null = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(rustix::fs::CWD, "/dev/null", kind, mode, null).unwrap();
        let pool = pool::open(&root.join("engine"), &PoolConfig::Image { bytes: 256 << 20 }, None).unwrap();
        pool.create("a", Medium::Disk).unwrap();
        let device = mount::find_mount(&root.join("engine/pool")).unwrap().unwrap().source;
        assert!(device.starts_with("/dev") && device.exists());
    });
}

#[test]
fn the_directory_pool_keeps_the_same_contract() {
    isolated("the_directory_pool_keeps_the_same_contract", |root| {
        exercise(&*pool::open(root, &PoolConfig::Directory, None).unwrap());
    });
}

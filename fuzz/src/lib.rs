//! Fuzz targets: one for each kind of bytes that come from outside and are decoded.
//!
//! A target panics when a decoder breaks a promise: it never panics itself, takes memory only in proportion to its
//! input, and what it accepts has one encoding. `tests/fuzz_targets.rs` runs all of them for seconds, `make fuzz` one after the
//! other with libFuzzer, which sees which branches an input takes (`FUZZ=name` for one, `FUZZ_SECONDS=` each).
//!
//! A failing input is kept in `target/fuzz/`; `FUZZ_INPUT=file cargo test --test fuzz_targets` runs its target on it.

use aether_cas::{
    Blob, ContentName, Digest, Sha256Blob,
    durable::{format, roots, scrub, terms},
    remote::resource::{Form, ReadName, UploadName, parse_read, parse_upload},
    testing::{directory, file},
    tree::{Directory, Node},
};
use aether_store_node::page_token::PageToken;
use bytes::Bytes;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Most memory of a decoder: as many bytes for each byte of its input …
const BYTES_PER_BYTE: usize = 400;
/// … and as many for none.
const BYTES_ANYWAY: usize = 256 << 10;

/// A decoder under test.
pub struct Target {
    /// As in `FUZZ=name`.
    pub name: &'static str,
    /// Checks the promises on one input.
    check: fn(&[u8]),
    /// Inputs that the decoder accepts, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

impl Target {
    /// Checks the promises on one input, and how much memory it took.
    ///
    /// # Panics
    /// When a promise is broken.
    pub fn run(&self, input: &[u8]) {
        MEMORY.reset_peak_usage();
        let before = MEMORY.current_usage();
        (self.check)(input);
        let taken = MEMORY.peak_usage().saturating_sub(before);
        let allowed = BYTES_ANYWAY + BYTES_PER_BYTE * input.len();
        assert!(taken <= allowed, "{taken} bytes of memory for {} bytes, more than {allowed}", input.len());
    }
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "directory", check: check_directory, seeds: directories },
    Target { name: "digest", check: check_digest, seeds: digests },
    Target { name: "resource", check: check_resource, seeds: resources },
    Target { name: "page-token", check: check_page_token, seeds: page_tokens },
    Target { name: "index-row", check: aether_cas::local::rows::decode, seeds: rows },
    Target { name: "pack", check: check_pack, seeds: packs },
    Target { name: "record", check: check_record, seeds: records },
    Target { name: "lazy-message", check: aether_lazy::testing::decode, seeds: messages },
    Target { name: "audit", check: aether_audit::chain::check, seeds: chains },
];

fn check_directory(input: &[u8]) {
    if let Ok(directory) = Directory::decode(input) {
        assert_eq!(directory.encode(), input, "a directory has one encoding");
        directory.check().expect("what is decoded keeps the rules");
    }
}

fn directories() -> Vec<Vec<u8>> {
    let content = Blob::of(b"content");
    let one = directory([("a file", file(content))]);
    let below = directory([("below", Node::Directory(one.blob())), ("gr\u{fc}n", file(Blob::EMPTY))]);
    let mut all = directory([("d", Node::Directory(below.blob())), ("f", file(content))]);
    let attributes = || {
        let mut attributes = all.attributes.clone();
        attributes.xattrs.insert(b"user.x".to_vec(), vec![0, 255, b'\\']);
        attributes
    };
    let link = Node::Symlink { target: b"../\xff".to_vec(), attributes: attributes(), link_group: Some(7) };
    let fifo = Node::Fifo { attributes: attributes(), link_group: None };
    for (name, node) in [("link", link), ("pipe", fifo)] {
        all.entries.extend(directory([(name, node)]).entries);
    }
    [Directory::default(), one, below, all].iter().map(|directory| directory.encode().to_vec()).collect()
}

fn check_digest(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(blob) = text.parse::<Blob>() {
        assert_eq!(blob.to_string(), text);
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Some((hash, size)) = text.split_once('/')
        && let Some(name) = Sha256Blob::from_parts(hash, size)
    {
        assert_eq!(name.to_string(), text);
    }
}

fn digests() -> Vec<Vec<u8>> {
    let texts = [
        Blob::of(b"x").to_string(),
        Blob::EMPTY.to_string(),
        Sha256Blob::of(b"x").to_string(),
        Digest::EMPTY.to_string(),
    ];
    texts.into_iter().map(String::into_bytes).collect()
}

fn contents() -> [ContentName; 2] {
    [ContentName::Blake3(Blob::of(b"x")), ContentName::Sha256(Sha256Blob::of(b"x"))]
}

fn check_resource(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(name) = parse_read(text) {
        assert_eq!(name.to_string(), text, "a name for reading has one text");
    }
    if let Ok(name) = parse_upload(text) {
        let plain = name.to_string();
        assert!(text == plain || text.starts_with(&format!("{plain}/")), "only metadata may follow: {text} {plain}");
    }
}

fn resources() -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    for content in contents() {
        for (form, instance) in [(Form::Plain, ""), (Form::Zstd, "an/instance")] {
            let instance = instance.to_owned();
            names.push(ReadName { instance: instance.clone(), form, content }.to_string());
            names.push(format!("{}/meta", UploadName { instance, id: "id".to_owned(), form, content }));
        }
    }
    names.into_iter().map(String::into_bytes).collect()
}

fn check_page_token(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Some(token) = PageToken::parse(text) {
        assert_eq!(token.to_string(), text);
    }
}

fn page_tokens() -> Vec<Vec<u8>> {
    contents().map(|root| PageToken { root, skip: 42 }.to_string().into_bytes()).into()
}

fn rows() -> Vec<Vec<u8>> {
    let root = format!("uid\0kind\0a name of as many bytes as the value has, which is{:>30} {} 1", "", Blob::of(b"x"));
    vec![vec![1, 0, 0, 0, 0, 0, 0, 1, 0], vec![7; 40], vec![9; 16], root.into_bytes()]
}

/// The input is the end of a pack, or a footer, or the stored bytes of a blob.
fn check_pack(input: &[u8]) {
    let _ = format::decode_tail(input, input.len() as u64);
    if let Ok(entries) = format::decode_footer(input) {
        assert_eq!(format::encode_footer(&entries), input, "a footer has one encoding");
        for pair in entries.windows(2) {
            assert_eq!(pair[0].range().end, pair[1].range().start, "without gaps");
        }
    }
    let stored = Bytes::copy_from_slice(input);
    for compression in [format::Compression::None, format::Compression::Zstd] {
        let blob = Blob { size: (input.len() as u64 * 4).min(format::MAX_SHARED_BLOB), ..Blob::of(input) };
        let entry = format::Entry {
            blob,
            offset: format::HEADER_BYTES,
            stored: input.len() as u64,
            compression,
            directory: false,
        };
        if let Ok(data) = format::decode_blob(&entry, &stored) {
            assert!(blob.matches(&data));
        }
    }
}

/// The input is a record of a bucket.
fn check_record(input: &[u8]) {
    let _ = roots::decode_record(input);
    let _ = scrub::decode_damaged(input);
    if let Ok(packs) = terms::decode_condemned(input) {
        assert!(packs.len() < input.len());
    }
    if let Ok(leases) = terms::decode_leases(input) {
        assert!(leases.blobs.len() < input.len());
    }
}

fn records() -> Vec<Vec<u8>> {
    let (blob, pack) = (Blob::of(b"x"), "1700000000000-0123456789abcdef-00000001");
    [
        format!(r#"{{"version":1,"owner_uid":"u","kind":"k","name":"n","tree":"{blob}","pinned_at":5}}"#),
        format!(r#"{{"version":1,"packs":["{pack}"]}}"#),
        format!(r#"{{"version":1,"until":5,"blobs":["{blob}"]}}"#),
        format!(r#"{{"version":1,"blob":"{blob}","pack":"{pack}","reason":"r","found_at":5}}"#),
    ]
    .map(String::into_bytes)
    .into()
}

fn packs() -> Vec<Vec<u8>> {
    let blobs: Vec<_> = [&b"one"[..], &[7; 5000]].map(|data| (Blob::of(data), Bytes::copy_from_slice(data))).into();
    let (pieces, entries) = format::encode_pack(&blobs, false);
    vec![pieces.concat(), format::encode_footer(&entries).to_vec()]
}

fn messages() -> Vec<Vec<u8>> {
    vec![vec![0; 104], (0..40).collect(), vec![0xff; 32]]
}

fn chains() -> Vec<Vec<u8>> {
    let (nothing, of) = (Digest::EMPTY, |line: &str| Digest::of(line.as_bytes()));
    let line = |sequence: u8, previous: Digest, root: &str| {
        let object = r#"{"kind":"AetherCommit","namespace":"n","name":"c","uid":"u"}"#;
        format!(
            r#"{{"sequence":{sequence},"previous":"{previous}","time":"2026-01-01T00:00:00Z","actor":"a","verb":"Approved","object":{object}{root}}}"#
        )
    };
    let first = line(1, nothing, "");
    let second = line(2, of(&first), r#","root":"r/1","occasion":2"#);
    vec![Vec::new(), format!("{first}\n").into_bytes(), format!("{first}\n{second}\n").into_bytes()]
}

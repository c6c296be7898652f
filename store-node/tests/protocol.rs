//! The protocol itself, spoken without our client: what other REAPI clients may send.

mod common;

use std::time::Duration;

use aether_cas::{
    Blob, ContentName, Digest, Sha256Blob, Store,
    remote::resource::{Form, ReadName, UploadName, read_name, upload_name},
    testing::{blob, bytes, directory, file},
};
use aether_proto::store::v1::{
    FsckRequest, GetStatisticsRequest, ListRootsRequest, PinRootRequest, Root, UnpinRootsRequest,
    store_admin_client::StoreAdminClient,
};
use aether_store_node::limits::DECOMPRESSORS;
use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{
        self as reapi, batch_update_blobs_request, capabilities_client::CapabilitiesClient, compressor,
        content_addressable_storage_client::ContentAddressableStorageClient, digest_function,
    },
    google::bytestream::{QueryWriteStatusRequest, ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient},
};
use common::Node;
use tokio_stream::StreamExt;
use tonic::{Code, transport::Channel};

const BLAKE3: i32 = digest_function::Value::Blake3 as i32;
const SHA256: i32 = digest_function::Value::Sha256 as i32;
const ZSTD: i32 = compressor::Value::Zstd as i32;

#[tokio::test]
async fn capabilities_say_what_is_served() {
    let node = Node::start().await;
    let mut client = CapabilitiesClient::new(node.channel().await);
    let answer = client.get_capabilities(reapi::GetCapabilitiesRequest::default()).await.unwrap().into_inner();
    let cache = answer.cache_capabilities.unwrap();
    assert_eq!(cache.digest_functions, [BLAKE3, SHA256]);
    assert!(cache.supported_compressors.contains(&ZSTD) && cache.supported_batch_update_compressors.contains(&ZSTD));
    assert!(cache.max_batch_total_size_bytes > 3 << 20 && cache.max_batch_total_size_bytes < 4 << 20);
    assert_eq!(answer.low_api_version.unwrap().major, 2);
    let named = reapi::GetCapabilitiesRequest { instance_name: "other".into() };
    assert_eq!(client.get_capabilities(named).await.unwrap_err().code(), Code::InvalidArgument);
    node.stop().await;
}

#[tokio::test]
async fn other_digest_functions_are_refused() {
    let node = Node::start().await;
    let mut client = ContentAddressableStorageClient::new(node.channel().await);
    for (function, words) in [(digest_function::Value::Sha512 as i32, "SHA512 is not supported"), (4711, "4711")] {
        let digests = vec![reapi::Digest::from(Blob::of(b"x"))];
        let find = reapi::FindMissingBlobsRequest {
            blob_digests: digests.clone(),
            digest_function: function,
            ..Default::default()
        };
        let read = reapi::BatchReadBlobsRequest { digests, digest_function: function, ..Default::default() };
        let update = reapi::BatchUpdateBlobsRequest { digest_function: function, ..Default::default() };
        let tree = reapi::GetTreeRequest { digest_function: function, ..Default::default() };
        for status in [
            client.find_missing_blobs(find).await.unwrap_err(),
            client.batch_read_blobs(read).await.unwrap_err(),
            client.batch_update_blobs(update).await.unwrap_err(),
            client.get_tree(tree).await.unwrap_err(),
        ] {
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().contains(words), "{}", status.message());
        }
    }
    node.stop().await;
}

#[tokio::test]
async fn each_blob_of_a_batch_has_its_own_outcome() {
    let node = Node::start().await;
    let mut client = ContentAddressableStorageClient::new(node.channel().await);
    let (good, good_data) = blob(1, 100);
    let (wrong, _) = blob(2, 100);
    let request = |digest: Option<reapi::Digest>, data: &[u8], compressor| batch_update_blobs_request::Request {
        digest,
        data: data.to_vec(),
        compressor,
    };
    let bad_hash = reapi::Digest { hash: "zz".into(), size_bytes: 2 };
    let update = reapi::BatchUpdateBlobsRequest {
        requests: vec![
            request(Some(wrong.into()), b"something else", 0),
            request(Some(good.into()), &good_data, 0),
            request(Some(bad_hash.clone()), b"zz", 0),
            request(Some(blob(3, 5).0.into()), b"12345", ZSTD),
            request(Some(blob(3, 5).0.into()), b"12345", compressor::Value::Brotli as i32),
            request(None, b"", 0),
        ],
        digest_function: BLAKE3,
        ..Default::default()
    };
    let answer = client.batch_update_blobs(update).await.unwrap().into_inner();
    let codes: Vec<Code> = answer.responses.iter().map(|r| Code::from(r.status.as_ref().unwrap().code)).collect();
    let refused = Code::InvalidArgument;
    assert_eq!(codes, [refused, Code::Ok, refused, refused, refused, refused]);
    assert_eq!(answer.responses[2].digest, Some(bad_hash));
    let message = &answer.responses[0].status.as_ref().unwrap().message;
    assert!(message.contains(&wrong.to_string()), "{message}");

    let read = reapi::BatchReadBlobsRequest {
        digests: vec![wrong.into(), good.into(), Blob::EMPTY.into()],
        digest_function: BLAKE3,
        ..Default::default()
    };
    let answer = client.batch_read_blobs(read).await.unwrap().into_inner();
    let codes: Vec<Code> = answer.responses.iter().map(|r| Code::from(r.status.as_ref().unwrap().code)).collect();
    assert_eq!(codes, [Code::NotFound, Code::Ok, Code::Ok]);
    assert_eq!(answer.responses[1].data, good_data);
    node.stop().await;
}

#[tokio::test]
async fn oversize_batches_are_refused_with_the_way_out() {
    let node = Node::start().await;
    let mut client = ContentAddressableStorageClient::new(node.channel().await);
    let (large, data) = blob(1, 4 << 20);
    let update = reapi::BatchUpdateBlobsRequest {
        requests: vec![batch_update_blobs_request::Request {
            digest: Some(large.into()),
            data: data.to_vec(),
            ..Default::default()
        }],
        digest_function: BLAKE3,
        ..Default::default()
    };
    let read =
        reapi::BatchReadBlobsRequest { digests: vec![large.into()], digest_function: BLAKE3, ..Default::default() };
    for status in
        [client.batch_update_blobs(update).await.unwrap_err(), client.batch_read_blobs(read).await.unwrap_err()]
    {
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("ByteStream"), "{}", status.message());
    }
    assert_eq!(node.store.find_missing(&[large]).await.unwrap(), [large]);
    node.stop().await;
}

#[tokio::test]
async fn reads_take_offset_and_limit() {
    let node = Node::start().await;
    let mut client = ByteStreamClient::new(node.channel().await);
    for length in [1000, 3 << 20] {
        let (blob, data) = blob(length as u64, length);
        node.store.write(blob, data.clone()).await.unwrap();
        let third = length / 3;
        for (offset, limit, expected) in [
            (0, 0, &data[..]),
            (third, 0, &data[third..]),
            (third, 10, &data[third..third + 10]),
            (length - 1, 100, &data[length - 1..]),
            (length, 0, &[]),
        ] {
            let request =
                ReadRequest { resource_name: read_name(&blob), read_offset: offset as i64, read_limit: limit };
            let mut stream = client.read(request).await.unwrap().into_inner();
            let mut found = Vec::new();
            while let Some(piece) = stream.message().await.unwrap() {
                found.extend(piece.data);
            }
            assert!(found == expected, "{offset} {limit}: {} bytes", found.len());
        }
        for (offset, limit, code) in
            [(-1, 0, Code::OutOfRange), (length as i64 + 1, 0, Code::OutOfRange), (0, -1, Code::InvalidArgument)]
        {
            let request = ReadRequest { resource_name: read_name(&blob), read_offset: offset, read_limit: limit };
            assert_eq!(client.read(request).await.unwrap_err().code(), code);
        }
    }
    let absent = Blob::of(b"absent");
    for (name, code) in [
        (read_name(&absent), Code::NotFound),
        // By SHA-256 there may be such a blob.
        (format!("blobs/{}/6", absent.digest), Code::NotFound),
        (format!("blobs/md5/{}/6", absent.digest), Code::InvalidArgument),
        (format!("compressed-blobs/brotli/blake3/{}/6", absent.digest), Code::InvalidArgument),
        (format!("compressed-blobs/zstd/blake3/{}/6", absent.digest), Code::NotFound),
        (format!("other/{}", read_name(&absent)), Code::InvalidArgument),
        ("nonsense".to_owned(), Code::InvalidArgument),
    ] {
        let request = ReadRequest { resource_name: name, ..Default::default() };
        assert_eq!(client.read(request).await.unwrap_err().code(), code);
    }
    node.stop().await;
}

fn piece(name: &str, offset: usize, data: &[u8], finish_write: bool) -> WriteRequest {
    WriteRequest { resource_name: name.to_owned(), write_offset: offset as i64, finish_write, data: data.to_vec() }
}

#[tokio::test]
async fn writes_go_on_where_they_ended() {
    let node = Node::start().await;
    let mut client = ByteStreamClient::new(node.channel().await);
    for length in [1000, 2 << 20] {
        let (blob, data) = blob(length as u64, length);
        let name = upload_name("an-id", &blob);
        let query = || QueryWriteStatusRequest { resource_name: name.clone() };
        assert_eq!(client.query_write_status(query()).await.unwrap_err().code(), Code::NotFound);

        let first = vec![piece(&name, 0, &data[..300], false), piece("", 300, &data[300..500], false)];
        let answer = client.write(tokio_stream::iter(first)).await.unwrap().into_inner();
        assert_eq!(answer.committed_size, 500);
        let answer = client.query_write_status(query()).await.unwrap().into_inner();
        assert_eq!((answer.committed_size, answer.complete), (500, false));

        // A gap is refused and costs nothing; what is sent twice is skipped.
        let gap = vec![piece(&name, 501, &data[501..], true)];
        let status = client.write(tokio_stream::iter(gap)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("500 bytes"), "{}", status.message());
        let rest = vec![piece(&name, 400, &data[400..450], false), piece("", 450, &data[450..], true)];
        let answer = client.write(tokio_stream::iter(rest)).await.unwrap().into_inner();
        assert_eq!(answer.committed_size, length as i64);
        assert_eq!(node.store.read_blob(&blob).unwrap(), data);
        let answer = client.query_write_status(query()).await.unwrap().into_inner();
        assert_eq!((answer.committed_size, answer.complete), (length as i64, true));

        // Whoever writes it again is told that it is there, at the first piece.
        let again = upload_name("other", &blob);
        let answer = client.write(tokio_stream::iter(vec![piece(&again, 0, &data[..10], false)])).await.unwrap();
        assert_eq!(answer.into_inner().committed_size, length as i64);
    }
    node.stop().await;
}

#[tokio::test]
async fn wrong_writes_are_refused_and_forgotten() {
    let node = Node::start().await;
    let mut client = ByteStreamClient::new(node.channel().await);
    for length in [1000, 100 << 10] {
        let (blob, data) = blob(length as u64, length);
        let name = upload_name("id", &blob);
        let mut flipped = data.to_vec();
        flipped[7] ^= 1;
        let mut longer = data.to_vec();
        longer.push(0);
        for (bad, finish) in [(&flipped[..], true), (&longer[..], true), (&data[..999], true)] {
            let requests = vec![piece(&name, 0, bad, finish)];
            let status = client.write(tokio_stream::iter(requests)).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{}", status.message());
            assert!(status.message().contains(&blob.to_string()), "{}", status.message());
            let query = QueryWriteStatusRequest { resource_name: name.clone() };
            assert_eq!(client.query_write_status(query).await.unwrap_err().code(), Code::NotFound);
        }
        let other = upload_name("id2", &blob);
        let changed = vec![piece(&name, 0, &data[..10], false), piece(&other, 10, &data[10..], true)];
        let status = client.write(tokio_stream::iter(changed)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(node.store.find_missing(&[blob]).await.unwrap(), [blob]);
    }
    for name in ["", "uploads/x", "blobs/blake3/00/1"] {
        let status = client.write(tokio_stream::iter(vec![piece(name, 0, b"", true)])).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let status = client.write(tokio_stream::iter(Vec::new())).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    node.stop().await;
}

async fn pages_of(
    client: &mut ContentAddressableStorageClient<Channel>,
    request: reapi::GetTreeRequest,
) -> Vec<reapi::GetTreeResponse> {
    let mut stream = client.get_tree(request).await.unwrap().into_inner();
    let mut pages = Vec::new();
    while let Some(page) = stream.message().await.unwrap() {
        pages.push(page);
    }
    pages
}

#[tokio::test]
async fn trees_come_in_pages_without_what_is_missing() {
    let node = Node::start().await;
    let store = node.store.clone();
    let put = |entries: Vec<(&str, aether_cas::tree::Node)>| store.put_directory(&directory(entries)).unwrap();
    let leaf = |n: u8| put(vec![("f", file(Blob::of(&[n])))]);
    let dir = aether_cas::tree::Node::Directory;
    let absent = Blob { digest: Digest::of(b"absent"), size: 77 };
    let root = put(vec![("a", dir(leaf(1))), ("b", dir(leaf(2))), ("again", dir(leaf(1))), ("gone", dir(absent))]);
    let mut client = ContentAddressableStorageClient::new(node.channel().await);
    let request = |page_size, page_token: &str| reapi::GetTreeRequest {
        root_digest: Some(root.into()),
        page_size,
        page_token: page_token.to_owned(),
        digest_function: BLAKE3,
        ..Default::default()
    };
    let mut whole = Vec::new();
    for (page_size, pages) in [(0, 1), (2, 2), (1, 3)] {
        let found = pages_of(&mut client, request(page_size, "")).await;
        assert_eq!((found.len(), found.iter().map(|p| p.directories.len()).sum::<usize>()), (pages, 3));
        let (last, others) = found.split_last().unwrap();
        assert!(last.next_page_token.is_empty() && others.iter().all(|page| !page.next_page_token.is_empty()));
        whole = found;
    }
    // A token holds over a restart of the node, and with another size of pages.
    let token = whole[0].next_page_token.clone();
    let other_root = leaf(1);
    drop(store);
    let node = Node::start_in(node.keep().await).await;
    let mut client = ContentAddressableStorageClient::new(node.channel().await);
    let rest = pages_of(&mut client, request(0, &token)).await;
    assert_eq!(rest.len(), 1);
    assert_eq!(rest[0].directories, [&whole[1].directories[..], &whole[2].directories[..]].concat());
    let other = reapi::GetTreeRequest { root_digest: Some(other_root.into()), ..request(0, &token) };
    for bad in [other, request(0, "nonsense"), request(0, &token.replace("1:1:", "1:-1:"))] {
        assert_eq!(client.get_tree(bad).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let (no_directory, data) = blob(5, 50);
    node.store.write(no_directory, data).await.unwrap();
    for (root, code) in [(absent, Code::NotFound), (no_directory, Code::InvalidArgument)] {
        let request =
            reapi::GetTreeRequest { root_digest: Some(root.into()), digest_function: BLAKE3, ..Default::default() };
        assert_eq!(client.get_tree(request).await.unwrap_err().code(), code);
    }
    node.stop().await;
}

#[tokio::test]
async fn roots_statistics_and_checks_are_administered() {
    let node = Node::start().await;
    let mut client = StoreAdminClient::new(node.channel().await);
    let (content, data) = blob(1, 20 << 10);
    node.store.write(content, data).await.unwrap();
    let tree = node.store.put_directory(&directory([("f", file(content))])).unwrap();
    let root = |name: &str, tree: String| Root {
        owner_uid: "uid-1".into(),
        kind: "Checkpoint".into(),
        name: name.into(),
        tree,
        pinned_at: 0,
    };
    for name in ["", "a", "b"] {
        let request = PinRootRequest { root: Some(root(name, tree.to_string())) };
        client.pin_root(request).await.unwrap();
    }
    for (bad, code) in [
        (None, Code::InvalidArgument),
        (Some(root("x", "nonsense".into())), Code::InvalidArgument),
        (Some(root("x", Blob::of(b"absent").to_string())), Code::NotFound),
        (Some(Root { owner_uid: String::new(), ..root("x", tree.to_string()) }), Code::InvalidArgument),
    ] {
        assert_eq!(client.pin_root(PinRootRequest { root: bad }).await.unwrap_err().code(), code);
    }
    let list = ListRootsRequest { owner_uid: "uid-1".into(), ..Default::default() };
    let roots = client.list_roots(list.clone()).await.unwrap().into_inner().roots;
    let names: Vec<&str> = roots.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["", "a", "b"]);
    assert!(roots[0].tree == tree.to_string() && roots[0].pinned_at > 0);

    let held = client.get_statistics(GetStatisticsRequest {}).await.unwrap().into_inner();
    assert_eq!((held.inline_blobs, held.file_blobs, held.file_bytes, held.roots), (1, 1, 20 << 10, 3));

    let report = client.fsck(FsckRequest { repair: false }).await.unwrap().into_inner();
    assert_eq!((report.blobs, report.incomplete_roots.len()), (2, 0));
    node.store.remove(&[content]).unwrap();
    let report = client.fsck(FsckRequest { repair: true }).await.unwrap().into_inner();
    assert!(report.repaired);
    assert_eq!(report.incomplete_roots.len(), 3);
    let problem = &report.incomplete_roots[0].problem;
    assert!(problem.contains(&content.to_string()), "{problem}");

    let unpin = |name: Option<&str>| UnpinRootsRequest {
        owner_uid: "uid-1".into(),
        kind: String::new(),
        name: name.map(Into::into),
    };
    assert_eq!(client.unpin_roots(unpin(Some(""))).await.unwrap().into_inner().removed, 1);
    assert_eq!(client.unpin_roots(unpin(None)).await.unwrap().into_inner().removed, 2);
    assert_eq!(client.unpin_roots(unpin(None)).await.unwrap().into_inner().removed, 0);
    let everybody = UnpinRootsRequest::default();
    assert_eq!(client.unpin_roots(everybody).await.unwrap_err().code(), Code::InvalidArgument);
    node.stop().await;
}

fn zstd_read_name(content: ContentName) -> String {
    ReadName { instance: String::new(), form: Form::Zstd, content }.to_string()
}

fn zstd_upload_name(id: &str, content: ContentName) -> String {
    UploadName { instance: String::new(), id: id.to_owned(), form: Form::Zstd, content }.to_string()
}

async fn read_all(client: &mut ByteStreamClient<Channel>, request: ReadRequest) -> Vec<u8> {
    let mut stream = client.read(request).await.unwrap().into_inner();
    let mut found = Vec::new();
    while let Some(piece) = stream.message().await.unwrap() {
        found.extend(piece.data);
    }
    found
}

/// Text, in which zstd finds something, and what looks random, in which it does not.
fn mixed(length: usize) -> Vec<u8> {
    let text = (0..).flat_map(|n: u32| format!("line {n} of a file\n").into_bytes());
    let mut data: Vec<u8> = text.take(length / 2).collect();
    data.extend_from_slice(&bytes(length as u64, length - length / 2));
    data
}

#[tokio::test]
async fn compressed_reads_begin_at_any_offset() {
    let node = Node::start().await;
    let mut client = ByteStreamClient::new(node.channel().await);
    for length in [1000, 3 << 20] {
        let data = mixed(length);
        let blob = Blob::of(&data);
        node.store.write(blob, data.clone().into()).await.unwrap();
        let name = zstd_read_name(ContentName::Blake3(blob));
        for offset in [0, 1, length / 3, length - 1, length] {
            let request = ReadRequest { resource_name: name.clone(), read_offset: offset as i64, read_limit: 0 };
            let frame = read_all(&mut client, request).await;
            assert!(offset > 0 || frame.len() < length * 2 / 3, "{} of {length}", frame.len());
            assert!(zstd::decode_all(&frame[..]).unwrap() == data[offset..], "{offset} of {length}");
        }
        let limited = ReadRequest { resource_name: name, read_offset: 0, read_limit: 10 };
        assert_eq!(client.read(limited).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let empty = ReadRequest { resource_name: zstd_read_name(ContentName::Blake3(Blob::EMPTY)), ..Default::default() };
    let frame = read_all(&mut client, empty).await;
    assert!(!frame.is_empty() && zstd::decode_all(&frame[..]).unwrap().is_empty());
    node.stop().await;
}

#[tokio::test]
async fn compressed_writes_are_verified_and_go_on() {
    let node = Node::start().await;
    let mut client = ByteStreamClient::new(node.channel().await);
    for length in [1000, 2 << 20] {
        let data = mixed(length);
        let frame = zstd::encode_all(&data[..], 3).unwrap();
        for content in [ContentName::Blake3(Blob::of(&data)), ContentName::Sha256(Sha256Blob::of(&data))] {
            let name = zstd_upload_name("id", content);
            let mut flipped = data.clone();
            flipped[length / 2] ^= 1;
            let mut broken = frame.clone();
            broken[0] ^= 1;
            let other = zstd::encode_all(&flipped[..], 3).unwrap();
            let longer = [&frame[..], &zstd::encode_all(&b"x"[..], 3).unwrap()[..]].concat();
            for bad in [&broken[..], &other, &longer, &frame[..frame.len() - 1], &data] {
                let mut pieces: Vec<_> =
                    bad.chunks(1 << 20).enumerate().map(|(n, p)| piece(&name, n << 20, p, false)).collect();
                pieces.last_mut().unwrap().finish_write = true;
                let status = client.write(tokio_stream::iter(pieces)).await.unwrap_err();
                assert_eq!(status.code(), Code::InvalidArgument, "{}", status.message());
            }

            // The first part breaks off within its frame. What came of it counts; the second frame begins there.
            let name = zstd_upload_name("another", content);
            let half = zstd::encode_all(&data[..length / 2], 3).unwrap();
            let cut = half.len() / 2;
            let parts = vec![piece(&name, 0, &half[..cut], false), piece("", cut, &half[cut..half.len() - 4], false)];
            client.write(tokio_stream::iter(parts)).await.unwrap();
            let query = QueryWriteStatusRequest { resource_name: name.clone() };
            let answer = client.query_write_status(query).await.unwrap().into_inner();
            let at = answer.committed_size as usize;
            assert!(!answer.complete && at <= length / 2);
            let rest = zstd::encode_all(&data[at..], 3).unwrap();
            let parts = vec![piece(&name, at, &rest[..50], false), piece("", at + 50, &rest[50..], true)];
            let answer = client.write(tokio_stream::iter(parts)).await.unwrap().into_inner();
            assert_eq!(answer.committed_size, (at + rest.len()) as i64);
            assert_eq!(node.store.read_blob(&Blob::of(&data)).unwrap(), data);

            // There already: compressed uploads hear -1, plain ones the size.
            let name = zstd_upload_name("late", content);
            let answer = client.write(tokio_stream::iter(vec![piece(&name, 0, &frame[..10], false)])).await.unwrap();
            assert_eq!(answer.into_inner().committed_size, -1);
            node.store.remove(&[Blob::of(&data)]).unwrap();
        }
    }
    node.stop().await;
}

#[tokio::test]
async fn an_upload_ends_when_another_client_was_quicker() {
    let node = Node::start().await;
    let mut client = ByteStreamClient::new(node.channel().await);
    let (blob, data) = blob(1, 1 << 20);
    for (name, expected) in [(upload_name("a", &blob), 1 << 20), (zstd_upload_name("b", ContentName::Blake3(blob)), -1)]
    {
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let compressed = zstd::encode_all(&data[..], 1).unwrap();
        let sent = if expected < 0 { compressed } else { data.to_vec() };
        let (store, data, first) = (node.store.clone(), data.clone(), name.clone());
        tokio::spawn(async move {
            sender.send(piece(&first, 0, &sent[..1000], false)).await.unwrap();
            store.write(blob, data).await.unwrap();
            // It does not matter what comes now; the answer is there after the next piece.
            let _ = sender.send(piece("", 1000, &sent[1000..2000], false)).await;
            std::future::pending::<()>().await;
        });
        let answer = client.write(tokio_stream::wrappers::ReceiverStream::new(receiver)).await.unwrap();
        assert_eq!(answer.into_inner().committed_size, expected);
        node.store.remove(&[blob]).unwrap();
        let query = QueryWriteStatusRequest { resource_name: name };
        assert_eq!(client.query_write_status(query).await.unwrap_err().code(), Code::NotFound, "nothing is left of it");
    }
    node.stop().await;
}

#[tokio::test]
async fn messages_without_contents_are_small() {
    let node = Node::start().await;
    let mut client = CapabilitiesClient::new(node.channel().await);
    let named = reapi::GetCapabilitiesRequest { instance_name: "x".repeat(8 << 10) };
    assert_eq!(client.get_capabilities(named).await.unwrap_err().code(), Code::OutOfRange);
    let mut client = StoreAdminClient::new(node.channel().await);
    let list = ListRootsRequest { owner_uid: "x".repeat(128 << 10), ..Default::default() };
    assert_eq!(client.list_roots(list).await.unwrap_err().code(), Code::OutOfRange);
    node.stop().await;
}

#[tokio::test]
async fn an_upload_brings_something_with_each_piece() {
    let node = Node::start().await;
    let mut client = ByteStreamClient::new(node.channel().await);
    let (blob, data) = blob(1, 1 << 20);
    let name = upload_name("id", &blob);
    let pieces = vec![piece(&name, 0, &data[..1000], false), piece("", 1000, &[], false)];
    assert_eq!(client.write(tokio_stream::iter(pieces)).await.unwrap_err().code(), Code::InvalidArgument);
    // The name alone may come first, and the end last.
    let pieces = vec![piece(&name, 0, &[], false), piece("", 0, &data, false), piece("", data.len(), &[], true)];
    let answer = client.write(tokio_stream::iter(pieces)).await.unwrap().into_inner();
    assert_eq!(answer.committed_size, 1 << 20);
    node.stop().await;
}

#[tokio::test]
async fn who_finds_no_decompressor_hears_so_soon() {
    let node = Node::start().await;
    let client = ByteStreamClient::new(node.channel().await);
    let mut writes = tokio::task::JoinSet::new();
    for n in 0..=DECOMPRESSORS {
        let name = zstd_upload_name("id", ContentName::Blake3(blob(n as u64, 9 << 20).0));
        let mut client = client.clone();
        let first = piece(&name, 0, &zstd::encode_all(&b"the beginning"[..], 1).unwrap(), false);
        writes.spawn(async move {
            client.write(tokio_stream::iter([first]).chain(tokio_stream::pending())).await.unwrap_err().code()
        });
    }
    let first = tokio::time::timeout(Duration::from_secs(10), writes.join_next()).await.expect("one is refused");
    assert_eq!(first.unwrap().unwrap(), Code::Unavailable);
    writes.shutdown().await;
    node.stop().await;
}

#[tokio::test]
async fn batches_are_compressed_for_who_takes_it() {
    let node = Node::start().await;
    let mut client = ContentAddressableStorageClient::new(node.channel().await);
    let text = mixed(50_000);
    let (random, random_data) = blob(9, 50_000);
    let request = |data: &[u8], plain: Blob| batch_update_blobs_request::Request {
        digest: Some(plain.into()),
        data: zstd::encode_all(data, 3).unwrap(),
        compressor: ZSTD,
    };
    let update = reapi::BatchUpdateBlobsRequest {
        requests: vec![
            request(&text, Blob::of(&text)),
            request(&random_data, random),
            // As a bomb would be.
            request(&vec![0; 9 << 20], Blob { digest: Digest::of(b"bomb"), size: 10 }),
        ],
        digest_function: BLAKE3,
        ..Default::default()
    };
    let answer = client.batch_update_blobs(update).await.unwrap().into_inner();
    let codes: Vec<Code> = answer.responses.iter().map(|r| Code::from(r.status.as_ref().unwrap().code)).collect();
    assert_eq!(codes, [Code::Ok, Code::Ok, Code::InvalidArgument]);
    for (acceptable, compressed) in [(vec![], 0), (vec![compressor::Value::Brotli as i32], 0), (vec![0, ZSTD], ZSTD)] {
        let read = reapi::BatchReadBlobsRequest {
            digests: vec![Blob::of(&text).into(), random.into(), Blob::EMPTY.into()],
            acceptable_compressors: acceptable,
            digest_function: BLAKE3,
            ..Default::default()
        };
        let found = client.batch_read_blobs(read).await.unwrap().into_inner().responses;
        assert_eq!((found[0].compressor, found[1].compressor), (compressed, 0), "what gets no smaller stays plain");
        let plain =
            if compressed == ZSTD { zstd::decode_all(&found[0].data[..]).unwrap() } else { found[0].data.clone() };
        assert!(plain == text && found[1].data == random_data && found[2].data.is_empty());
    }
    // As many bytes as are announced count, not as many as are sent.
    let large = vec![0; 4 << 20];
    let update = reapi::BatchUpdateBlobsRequest {
        requests: vec![request(&large, Blob::of(&large))],
        digest_function: BLAKE3,
        ..Default::default()
    };
    let status = client.batch_update_blobs(update).await.unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().contains("max_batch_total_size_bytes"));
    node.stop().await;
}

/// What a client with SHA-256 stores is the same blob, once, for everybody.
#[tokio::test]
async fn sha256_names_the_same_contents() {
    let node = Node::start().await;
    let mut cas = ContentAddressableStorageClient::new(node.channel().await);
    let mut stream = ByteStreamClient::new(node.channel().await);
    let (small, small_data) = blob(1, 100);
    let (large, large_data) = blob(2, 300_000);
    let names = [Sha256Blob::of(&small_data), Sha256Blob::of(&large_data)].map(ContentName::Sha256);
    // Stored by BLAKE3, it is there under that name only: nobody knows the other one.
    node.store.write(large, large_data.clone()).await.unwrap();
    let find = |function, digests: Vec<reapi::Digest>| reapi::FindMissingBlobsRequest {
        blob_digests: digests,
        digest_function: function,
        ..Default::default()
    };
    let empty = reapi::Digest::from(ContentName::Sha256(Sha256Blob::EMPTY));
    let asked: Vec<reapi::Digest> = names.iter().map(|name| (*name).into()).chain([empty.clone()]).collect();
    for function in [SHA256, 0] {
        let missing = cas.find_missing_blobs(find(function, asked.clone())).await.unwrap().into_inner();
        assert_eq!(missing.missing_blob_digests, asked[..2]);
    }
    // As BLAKE3 digests they are others.
    let missing = cas.find_missing_blobs(find(BLAKE3, asked[..2].to_vec())).await.unwrap().into_inner();
    assert_eq!(missing.missing_blob_digests, asked[..2]);
    let status = cas.find_missing_blobs(find(BLAKE3, vec![empty.clone()])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "not the empty blob");

    let request = |name: ContentName, data: &[u8]| batch_update_blobs_request::Request {
        digest: Some(name.into()),
        data: data.to_vec(),
        ..Default::default()
    };
    let update = reapi::BatchUpdateBlobsRequest {
        requests: vec![request(names[0], &small_data), request(names[1], &small_data)],
        ..Default::default()
    };
    let answer = cas.batch_update_blobs(update).await.unwrap().into_inner();
    let codes: Vec<Code> = answer.responses.iter().map(|r| Code::from(r.status.as_ref().unwrap().code)).collect();
    assert_eq!(codes, [Code::Ok, Code::InvalidArgument]);

    let name =
        UploadName { instance: String::new(), id: "id".into(), form: Form::Plain, content: names[1] }.to_string();
    let mut wrong = large_data.to_vec();
    wrong[1] ^= 1;
    let status = stream.write(tokio_stream::iter(vec![piece(&name, 0, &wrong, true)])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let parts = vec![piece(&name, 0, &large_data[..1000], false), piece("", 1000, &large_data[1000..], true)];
    let answer = stream.write(tokio_stream::iter(parts)).await.unwrap().into_inner();
    assert_eq!(answer.committed_size, 300_000);
    let missing = cas.find_missing_blobs(find(SHA256, asked.clone())).await.unwrap().into_inner();
    assert!(missing.missing_blob_digests.is_empty());
    assert_eq!(node.store.find_missing(&[small, large]).await.unwrap(), []);
    assert_eq!(node.store.statistics().file_blobs, 1, "the large one is there once");

    // The names survive a restart, and say nothing of a blob that is gone.
    let folder = node.keep().await;
    let node = Node::start_in(folder).await;
    let mut cas = ContentAddressableStorageClient::new(node.channel().await);
    let mut stream = ByteStreamClient::new(node.channel().await);
    let read = reapi::BatchReadBlobsRequest { digests: asked.clone(), ..Default::default() };
    let found = cas.batch_read_blobs(read.clone()).await.unwrap().into_inner().responses;
    assert!(found[0].data == small_data && found[1].data == large_data && found[2].data.is_empty());
    assert_eq!(found[1].digest.as_ref(), Some(&asked[1]));
    let name = ReadName { instance: String::new(), form: Form::Plain, content: names[1] }.to_string();
    let request = ReadRequest { resource_name: name, read_offset: 7, read_limit: 9 };
    assert_eq!(read_all(&mut stream, request).await, large_data[7..16]);
    node.store.remove(&[large]).unwrap();
    let found = cas.batch_read_blobs(read).await.unwrap().into_inner().responses;
    assert_eq!(Code::from(found[1].status.as_ref().unwrap().code), Code::NotFound);
    node.stop().await;
}

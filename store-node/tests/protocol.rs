//! The protocol itself, spoken without our client: what other REAPI clients may send.

mod common;

use aether_cas::{
    Blob, Digest, Store,
    remote::resource::{read_name, upload_name},
    testing::{blob, directory, file},
};
use aether_proto::store::v1::{
    FsckRequest, GetStatisticsRequest, ListRootsRequest, PinRootRequest, Root, UnpinRootsRequest,
    store_admin_client::StoreAdminClient,
};
use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{
        self as reapi, batch_update_blobs_request, capabilities_client::CapabilitiesClient,
        content_addressable_storage_client::ContentAddressableStorageClient, digest_function,
    },
    google::bytestream::{QueryWriteStatusRequest, ReadRequest, WriteRequest, byte_stream_client::ByteStreamClient},
};
use common::Node;
use tonic::Code;

const BLAKE3: i32 = digest_function::Value::Blake3 as i32;

#[tokio::test]
async fn capabilities_say_what_is_served() {
    let node = Node::start().await;
    let mut client = CapabilitiesClient::new(node.channel().await);
    let answer = client.get_capabilities(reapi::GetCapabilitiesRequest::default()).await.unwrap().into_inner();
    let cache = answer.cache_capabilities.unwrap();
    assert_eq!(cache.digest_functions, [BLAKE3]);
    assert!(cache.max_batch_total_size_bytes > 3 << 20 && cache.max_batch_total_size_bytes < 4 << 20);
    assert_eq!(answer.low_api_version.unwrap().major, 2);
    let named = reapi::GetCapabilitiesRequest { instance_name: "other".into() };
    assert_eq!(client.get_capabilities(named).await.unwrap_err().code(), Code::InvalidArgument);
    node.stop().await;
}

#[tokio::test]
async fn only_blake3_is_accepted() {
    let node = Node::start().await;
    let mut client = ContentAddressableStorageClient::new(node.channel().await);
    for (function, words) in
        [(0, "not set"), (digest_function::Value::Sha256 as i32, "SHA256 is not supported"), (4711, "4711")]
    {
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
            request(Some(blob(3, 5).0.into()), b"12345", 1),
            request(None, b"", 0),
        ],
        digest_function: BLAKE3,
        ..Default::default()
    };
    let answer = client.batch_update_blobs(update).await.unwrap().into_inner();
    let codes: Vec<Code> = answer.responses.iter().map(|r| Code::from(r.status.as_ref().unwrap().code)).collect();
    let refused = Code::InvalidArgument;
    assert_eq!(codes, [refused, Code::Ok, refused, refused, refused]);
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
        (format!("blobs/{}/6", absent.digest), Code::InvalidArgument),
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

#[tokio::test]
async fn trees_come_in_pages_without_what_is_missing() {
    let node = Node::start().await;
    let put = |entries: Vec<(&str, aether_cas::tree::Node)>| node.store.put_directory(&directory(entries)).unwrap();
    let leaf = |n: u8| put(vec![("f", file(Blob::of(&[n])))]);
    let dir = aether_cas::tree::Node::Directory;
    let absent = Blob { digest: Digest::of(b"absent"), size: 77 };
    let root = put(vec![("a", dir(leaf(1))), ("b", dir(leaf(2))), ("again", dir(leaf(1))), ("gone", dir(absent))]);
    let mut client = ContentAddressableStorageClient::new(node.channel().await);
    for (page_size, pages) in [(0, 1), (2, 2), (1, 3)] {
        let request = reapi::GetTreeRequest {
            root_digest: Some(root.into()),
            page_size,
            digest_function: BLAKE3,
            ..Default::default()
        };
        let mut stream = client.get_tree(request).await.unwrap().into_inner();
        let mut sizes = Vec::new();
        while let Some(page) = stream.message().await.unwrap() {
            sizes.push(page.directories.len());
        }
        assert_eq!((sizes.len(), sizes.iter().sum::<usize>()), (pages, 3));
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

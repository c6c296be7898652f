//! Hand-made frames, real clients, and noise.

use std::collections::HashMap;
use std::path::PathBuf;

use aether_api::names::CSI_DRIVER;
use aether_proto::csi::v1::identity_client::IdentityClient;
use aether_proto::csi::v1::identity_server::IdentityServer;
use aether_proto::csi::v1::{GetPluginInfoRequest, ProbeRequest};
use aether_runtime::Readiness;
use loona_hpack::decoder::DecoderError;
use loona_hpack::{Decoder, Encoder};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server, Uri};

use super::authority::{Authority, HIGH_WATER, MAX_BLOCK, MAX_FRAME, MAX_LIST, Violation};
use super::frame::{CONTINUATION, END_HEADERS, END_STREAM, HEADERS, Header, PADDED, PRIORITY};
use super::*;
use crate::identity::IdentityService;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SOCKET: &[u8] = b"/var/lib/kubelet/plugins_registry/csi.aether.dev-reg.sock";

type Field = (Vec<u8>, Vec<u8>);

fn fields(authority: &[u8]) -> Vec<Field> {
    [
        (&b":method"[..], &b"POST"[..]),
        (b":scheme", b"http"),
        (b":path", b"/csi.v1.Identity/Probe"),
        (b":authority", authority),
        (b"te", b"trailers"),
        (b"grpc-timeout", b"120S"),
    ]
    .map(|(name, value)| (name.to_vec(), value.to_vec()))
    .to_vec()
}

fn encoded(encoder: &mut Encoder<'_>, fields: &[Field]) -> Vec<u8> {
    encoder.encode(fields.iter().map(|(name, value)| (&name[..], &value[..])))
}

/// The request of RFC 7541, appendix C.4.1: `www.example.com`, compressed with Huffman's code and added to the table.
const HUFFMAN: &[u8] =
    &[0x82, 0x86, 0x84, 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Header { length: payload.len(), kind, flags, stream }.write(&mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

/// Pushes everything, in pieces of `piece` bytes.
fn pushed(authority: &mut Authority, input: &[u8], piece: usize) -> Result<Vec<u8>, Violation> {
    let mut all = Vec::new();
    for piece in input.chunks(piece) {
        let mut rest = piece;
        while !rest.is_empty() {
            let mut out = Vec::new();
            rest = &rest[authority.push(rest, &mut out)?..];
            all.append(&mut out);
        }
    }
    Ok(all)
}

/// The preface, then these frames.
fn rewritten(frames: &[Vec<u8>]) -> Result<Vec<u8>, Violation> {
    let input = [PREFACE, &frames.concat()].concat();
    let out = pushed(&mut Authority::new(), &input, input.len())?;
    Ok(out.strip_prefix(PREFACE).expect("the preface passes").to_vec())
}

fn split(mut bytes: &[u8]) -> Vec<(Header, Vec<u8>)> {
    let mut frames = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<9>() {
        let header = Header::parse(*header);
        frames.push((header, rest[..header.length].to_vec()));
        bytes = &rest[header.length..];
    }
    assert!(bytes.is_empty(), "whole frames");
    frames
}

/// What a reader without a dynamic table makes of a header block.
fn decoded(block: &[u8]) -> Vec<Field> {
    let mut decoder = Decoder::new();
    decoder.set_max_table_size(0);
    decoder.decode(block).expect("it needs no table")
}

#[test]
fn authority_is_replaced_and_nothing_else() {
    let block = encoded(&mut Encoder::new(), &fields(SOCKET));
    let out = rewritten(&[frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)]).unwrap();
    let [(header, payload)] = &split(&out)[..] else { panic!("one frame") };
    assert_eq!((header.kind, header.flags, header.stream), (HEADERS, END_HEADERS | END_STREAM, 1));
    assert_eq!(decoded(payload), fields(b"localhost"));
}

#[test]
fn compressed_strings_are_understood() {
    let out = rewritten(&[frame(HEADERS, END_HEADERS, 1, HUFFMAN), frame(HEADERS, END_HEADERS, 3, &[0xbe])]).unwrap();
    let [(_, first), (_, second)] = &split(&out)[..] else { panic!("two frames") };
    let authority = (b":authority".to_vec(), b"localhost".to_vec());
    assert_eq!(decoded(first)[3], authority);
    assert_eq!(decoded(second), [authority], "also when it is named by its index in the table");
}

#[test]
fn any_fragmentation_gives_the_same_bytes() {
    let mut encoder = Encoder::new();
    let frames = [
        frame(4, 0, 0, &[0, 1, 0, 0, 16, 0]),
        frame(HEADERS, END_HEADERS, 1, &encoded(&mut encoder, &fields(SOCKET))),
        frame(0, END_STREAM, 1, &[0; 5]),
        frame(HEADERS, END_HEADERS | END_STREAM, 3, &encoded(&mut encoder, &fields(SOCKET))),
    ];
    let input = [PREFACE, &frames.concat()].concat();
    let whole = pushed(&mut Authority::new(), &input, input.len()).unwrap();
    for piece in 1..40 {
        assert_eq!(pushed(&mut Authority::new(), &input, piece).unwrap(), whole, "pieces of {piece}");
    }
}

#[test]
fn the_dynamic_table_lasts_over_requests() {
    let mut encoder = Encoder::new();
    let mut frames = Vec::new();
    for request in 0..5 {
        let block = encoded(&mut encoder, &[fields(SOCKET), vec![(b"x-volume".to_vec(), b"a".to_vec())]].concat());
        // From the second on, fields that were literals are indices.
        assert!(request == 0 || block.contains(&(0x80 | 62)), "the table is used");
        frames.push(frame(HEADERS, END_HEADERS, 1 + 2 * request, &block));
    }
    for (_, payload) in split(&rewritten(&frames).unwrap()) {
        assert_eq!(decoded(&payload)[..6], fields(b"localhost"));
    }
}

#[test]
fn a_size_update_empties_the_table() {
    let mut encoder = Encoder::new();
    let first = encoded(&mut encoder, &[(b"x-a".to_vec(), b"1".to_vec())]);
    // Index 62 is the first of the dynamic table; 0x20 sets its size to 0.
    let again = |update: &[u8]| {
        rewritten(&[
            frame(HEADERS, END_HEADERS, 1, &first),
            frame(HEADERS, END_HEADERS, 3, &[update, &[0xbe]].concat()),
        ])
    };
    assert!(again(&[]).is_ok());
    assert!(matches!(again(&[0x20]), Err(Violation::Compression(DecoderError::HeaderIndexOutOfBounds))));
    // 0x3f 0xe1 0x1f sets it to 4096, which is allowed; one more is not.
    assert!(again(&[0x3f, 0xe1, 0x1f]).is_ok());
    assert!(matches!(again(&[0x3f, 0xe2, 0x1f]), Err(Violation::Compression(DecoderError::InvalidMaxDynamicSize))));
}

#[test]
fn padding_goes_and_priority_stays() {
    let block = encoded(&mut Encoder::new(), &fields(SOCKET));
    let priority = [0x80, 0, 0, 7, 15];
    let payload = [&[3][..], &priority, &block, &[0; 3]].concat();
    let out = rewritten(&[frame(HEADERS, END_HEADERS | PADDED | PRIORITY, 5, &payload)]).unwrap();
    let [(header, payload)] = &split(&out)[..] else { panic!("one frame") };
    assert_eq!(header.flags, END_HEADERS | PRIORITY);
    assert_eq!(payload[..5], priority);
    assert_eq!(decoded(&payload[5..]), fields(b"localhost"));
}

#[test]
fn padding_and_priority_must_fit() {
    for (flags, payload) in
        [(PADDED, &[][..]), (PADDED, &[4, 0, 0]), (PRIORITY, &[0; 4]), (PADDED | PRIORITY, &[1, 0, 0, 0, 0, 0])]
    {
        assert_eq!(
            rewritten(&[frame(HEADERS, END_HEADERS | flags, 1, payload)]),
            Err(Violation::Padding),
            "{payload:?}"
        );
    }
}

#[test]
fn continuations_are_joined_wherever_they_are_cut() {
    let block = encoded(&mut Encoder::new(), &fields(SOCKET));
    for cut in 0..=block.len() {
        let (head, tail) = block.split_at(cut);
        let frames = [
            frame(HEADERS, END_STREAM, 1, head),
            frame(CONTINUATION, 0, 1, &[]),
            frame(CONTINUATION, END_HEADERS, 1, tail),
        ];
        let out = rewritten(&frames).unwrap();
        let [(header, payload)] = &split(&out)[..] else { panic!("one frame") };
        assert_eq!(header.flags, END_HEADERS | END_STREAM);
        assert_eq!(decoded(payload), fields(b"localhost"));
    }
}

#[test]
fn continuations_out_of_order_are_refused() {
    let head = frame(HEADERS, 0, 1, &[]);
    for frames in [
        vec![frame(CONTINUATION, END_HEADERS, 1, &[])],
        vec![head.clone(), frame(CONTINUATION, END_HEADERS, 3, &[])],
        vec![head.clone(), frame(HEADERS, END_HEADERS, 1, &[])],
        vec![head, frame(0, 0, 1, &[1])],
    ] {
        assert_eq!(rewritten(&frames), Err(Violation::Continuation));
    }
}

#[test]
fn a_long_list_is_written_as_continuations() {
    let mut long = fields(SOCKET);
    long.push((b"x-long".to_vec(), vec![b'a'; 40_000]));
    let block = encoded(&mut Encoder::new(), &long);
    let mut frames: Vec<_> = block.chunks(MAX_FRAME).map(|fragment| frame(CONTINUATION, 0, 1, fragment)).collect();
    let last = frames.len() - 1;
    (frames[0][3], frames[last][4]) = (HEADERS, END_HEADERS);
    let out = split(&rewritten(&frames).unwrap());
    assert_eq!(out.iter().map(|(header, _)| header.kind).collect::<Vec<_>>(), [HEADERS, CONTINUATION, CONTINUATION]);
    assert_eq!(out.iter().map(|(header, _)| header.has(END_HEADERS)).collect::<Vec<_>>(), [false, false, true]);
    assert!(out.iter().all(|(header, _)| header.length <= MAX_FRAME));
    long[3].1 = b"localhost".to_vec();
    assert_eq!(decoded(&out.iter().flat_map(|(_, payload)| payload.clone()).collect::<Vec<_>>()), long);
}

#[test]
fn sizes_are_bounded() {
    let mut big = Vec::new();
    Header { length: MAX_FRAME + 1, kind: HEADERS, flags: END_HEADERS, stream: 1 }.write(&mut big);
    assert_eq!(rewritten(&[big]), Err(Violation::FrameSize(MAX_FRAME + 1)), "before its payload has come");

    let block = |count: usize, length: usize| {
        let mut frames = vec![frame(HEADERS, 0, 1, &[])];
        frames.extend((0..count).map(|_| frame(CONTINUATION, 0, 1, &vec![0; length])));
        rewritten(&frames)
    };
    assert!(block(MAX_BLOCK / MAX_FRAME, MAX_FRAME).is_ok());
    assert_eq!(block(MAX_BLOCK / MAX_FRAME + 1, MAX_FRAME), Err(Violation::BlockSize));
    assert!(block(64, 0).is_ok());
    assert_eq!(block(65, 0), Err(Violation::BlockSize), "a flood of empty frames");

    // A bomb: one large entry of the table, named by one byte over and over.
    let entry = encoded(&mut Encoder::new(), &[(b"x".to_vec(), vec![b'a'; 4000])]);
    let fits = MAX_LIST / (4000 + 1 + 32);
    let bomb =
        |count: usize| rewritten(&[frame(HEADERS, END_HEADERS, 1, &[&entry[..], &vec![0xbe; count - 1]].concat())]);
    assert!(bomb(fits).is_ok());
    assert_eq!(bomb(fits + 1), Err(Violation::ListSize));
    assert_eq!(bomb(10_000), Err(Violation::ListSize));
}

#[test]
fn output_is_handed_over_piecemeal() {
    let entry = encoded(&mut Encoder::new(), &[(b"x".to_vec(), vec![b'a'; 4000])]);
    let mut input = [PREFACE, &frame(HEADERS, END_HEADERS, 1, &entry)].concat();
    for stream in 1..500 {
        input.extend(frame(HEADERS, END_HEADERS, 1 + 2 * stream, &[0xbe; 15]));
    }
    let mut authority = Authority::new();
    let (mut rest, mut turns) = (&input[..], 0);
    while !rest.is_empty() {
        let mut out = Vec::new();
        rest = &rest[authority.push(rest, &mut out).unwrap()..];
        assert!(out.len() < HIGH_WATER + MAX_LIST + 1024, "{} bytes at once", out.len());
        turns += 1;
    }
    assert!(turns > 100, "{turns} turns for {} bytes", input.len());
}

#[test]
fn other_protocols_are_refused_at_their_first_byte() {
    let mut out = Vec::new();
    assert_eq!(Authority::new().push(b"GET / HTTP/1.1\r\n", &mut out), Err(Violation::Preface));
    assert_eq!(out, b"");
}

/// A small generator, so that a failure can be repeated from its seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % below
    }
}

/// Damaged and invented connections never panic, and never make the rewriter hold or emit more than it promises.
#[test]
fn noise_is_survived() {
    let mut encoder = Encoder::new();
    let mut good = PREFACE.to_vec();
    good.extend(frame(4, 0, 0, &[0, 1, 0, 0, 16, 0]));
    for stream in [1, 3, 5] {
        let block = encoded(&mut encoder, &fields(SOCKET));
        let (head, tail) = block.split_at(block.len() / 2);
        good.extend(frame(HEADERS, PADDED | PRIORITY, stream, &[&[2, 0, 0, 0, 0, 9][..], head, &[0, 0]].concat()));
        good.extend(frame(CONTINUATION, END_HEADERS, stream, tail));
        good.extend(frame(0, END_STREAM, stream, &[0; 30]));
    }
    good.extend(frame(HEADERS, END_HEADERS | END_STREAM, 7, HUFFMAN));
    pushed(&mut Authority::new(), &good, 7).expect("undamaged it passes");
    let (mut passed, mut refused) = (0, 0);
    for seed in 1..=20_000_u64 {
        let mut noise = Noise(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut input = good.clone();
        for _ in 0..1 + noise.next(8) {
            let at = PREFACE.len() + noise.next(input.len() - PREFACE.len());
            match noise.next(5) {
                0 => input[at] = noise.next(256) as u8,
                1 => input[at] ^= 1 << noise.next(8),
                2 => input.insert(at, noise.next(256) as u8),
                3 => {
                    input.truncate((at + 1).max(PREFACE.len() + 1));
                }
                _ => {
                    let invented = (0..noise.next(60)).map(|_| noise.next(256) as u8).collect::<Vec<_>>();
                    let kind = [HEADERS, CONTINUATION, 4, 0][noise.next(4)];
                    input.extend(frame(kind, noise.next(256) as u8, noise.next(6) as u32, &invented));
                }
            }
        }
        let mut authority = Authority::new();
        let mut rest = &input[..];
        let verdict = loop {
            if rest.is_empty() {
                break Ok(());
            }
            let piece = &rest[..rest.len().min(1 + noise.next(64))];
            let mut out = Vec::new();
            match authority.push(piece, &mut out) {
                Ok(taken) => {
                    assert!(taken > 0, "seed {seed} stands still");
                    rest = &rest[taken..];
                }
                Err(violation) => break Err(violation),
            }
            assert!(out.len() <= HIGH_WATER + MAX_LIST + 1024, "seed {seed} emits {}", out.len());
        };
        if verdict.is_ok() { passed += 1 } else { refused += 1 }
    }
    assert!(passed > 1000 && refused > 1000, "{passed} passed, {refused} refused: the noise does not reach both sides");
}

/// A directory of this test's own.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("aether-transport-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A tonic server behind the adapter, or without it.
async fn served(path: &Path, adapted: bool, token: CancellationToken) {
    let service = IdentityServer::new(IdentityService::new(Readiness::new()));
    let server = Server::builder().add_service(service);
    if adapted {
        let (incoming, _file) = Socket::bind(path).unwrap().into_incoming();
        server.serve_with_incoming_shutdown(incoming, token.cancelled()).await.unwrap();
    } else {
        let incoming = UnixListenerStream::new(UnixListener::bind(path).unwrap());
        server.serve_with_incoming_shutdown(incoming, token.cancelled()).await.unwrap();
    }
}

/// Connects as soon as somebody listens.
async fn connected(path: &Path) -> UnixStream {
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return stream,
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

/// A tonic client's connection to the socket.
async fn channel(path: PathBuf) -> Channel {
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { Ok::<_, io::Error>(hyper_util::rt::TokioIo::new(connected(&path).await)) }
    });
    Endpoint::from_static("http://unix").connect_with_connector(connector).await.unwrap()
}

/// A connection of the `h2` library to the socket, driven in the background.
async fn dialled(path: &Path, table: u32) -> h2::client::SendRequest<bytes::Bytes> {
    let stream = connected(path).await;
    let (send, connection) = h2::client::Builder::new().header_table_size(table).handshake(stream).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    send
}

/// Calls Probe as the kubelet does, but for the value of `:authority`, which the `http` library checks.
async fn probed(send: &mut h2::client::SendRequest<bytes::Bytes>, authority: &str) -> Result<bytes::Bytes, h2::Error> {
    let request = http::Request::post(format!("http://{authority}/csi.v1.Identity/Probe"))
        .header("te", "trailers")
        .header("content-type", "application/grpc")
        .header("user-agent", "grpc-go/1.27.1")
        .body(())
        .unwrap();
    let mut ready = send.clone().ready().await?;
    let (response, mut body) = ready.send_request(request, false)?;
    body.send_data(bytes::Bytes::from_static(&[0; 5]), true)?;
    let mut received = response.await?.into_body();
    let data = received.data().await.expect("a message")?;
    let trailers = received.trailers().await?.expect("trailers");
    assert_eq!(trailers["grpc-status"], "0");
    Ok(data)
}

/// A ready Probe: 5 bytes of prefix, then `ready { value: true }`.
const READY: &[u8] = &[0, 0, 0, 0, 4, 10, 2, 8, 1];

#[tokio::test]
async fn a_real_client_reuses_its_dynamic_table() {
    for table in [0, 100, 4096, 1 << 16] {
        let scratch = Scratch::new(&format!("table-{table}"));
        let (path, token) = (scratch.0.join("csi.sock"), CancellationToken::new());
        let server = tokio::spawn({
            let (path, token) = (path.clone(), token.clone());
            async move { served(&path, true, token).await }
        });
        let mut send = dialled(&path, table).await;
        for _ in 0..20 {
            assert_eq!(probed(&mut send, "some.host:1234").await.unwrap(), READY);
        }
        drop(send);
        token.cancel();
        server.await.unwrap();
    }
}

/// Bytes as the kubelet's gRPC library sends them: `:authority` is the path of the socket. `h2` would refuse to send it.
fn kubelet(stream: u32, encoder: &mut Encoder<'_>, path: &Path) -> Vec<u8> {
    let mut fields = fields(path.as_os_str().as_encoded_bytes());
    fields.push((b"content-type".to_vec(), b"application/grpc".to_vec()));
    let mut bytes = frame(HEADERS, END_HEADERS, stream, &encoded(encoder, &fields));
    bytes.extend(frame(0, END_STREAM, stream, &[0; 5]));
    bytes
}

/// Sends what the kubelet sends and returns the kinds and payloads of the frames that come back on stream 1 and 3, until
/// both have ended.
async fn answers(path: &Path) -> HashMap<u32, Vec<(u8, Vec<u8>)>> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = connected(path).await;
    let mut encoder = Encoder::new();
    let first = kubelet(1, &mut encoder, path);
    let second = kubelet(3, &mut encoder, path);
    assert!(second.len() < first.len(), "the second request uses the table");
    let hello = [PREFACE, &frame(4, 0, 0, &[]), &first, &second].concat();
    stream.write_all(&hello).await.unwrap();
    let (mut answers, mut ended) = (HashMap::<_, Vec<_>>::new(), 0);
    while ended < 2 {
        let mut header = [0; 9];
        stream.read_exact(&mut header).await.unwrap();
        let header = Header::parse(header);
        let mut payload = vec![0; header.length];
        stream.read_exact(&mut payload).await.unwrap();
        if header.stream != 0 {
            ended += usize::from(header.kind == 3 || (header.kind <= HEADERS && header.has(END_STREAM)));
            answers.entry(header.stream).or_default().push((header.kind, payload));
        }
    }
    answers
}

#[tokio::test]
async fn a_socket_path_as_authority_works_with_the_adapter_and_only_with_it() {
    const RESET: u8 = 3;
    for adapted in [true, false] {
        let scratch = Scratch::new(&format!("kubelet-{adapted}"));
        let (path, token) = (scratch.0.join("csi.sock"), CancellationToken::new());
        let server = tokio::spawn({
            let (path, token) = (path.clone(), token.clone());
            async move { served(&path, adapted, token).await }
        });
        let answers = answers(&path).await;
        for stream in [1, 3] {
            let frames = &answers[&stream];
            let data = frames.iter().find(|(kind, _)| *kind == 0).map(|(_, payload)| &payload[..]);
            assert_eq!(data, adapted.then_some(READY), "adapted: {adapted}, {frames:?}");
            assert_eq!(frames.iter().any(|(kind, _)| *kind == RESET), !adapted, "{frames:?}");
        }
        token.cancel();
        server.await.unwrap();
    }
}

#[tokio::test]
async fn a_tonic_client_works_and_the_socket_goes_with_its_server() {
    let scratch = Scratch::new("tonic");
    let (path, token) = (scratch.0.join("deep/er/csi.sock"), CancellationToken::new());
    let server = tokio::spawn({
        let (path, token) = (path.clone(), token.clone());
        async move { served(&path, true, token).await }
    });
    let mut client = IdentityClient::new(channel(path.clone()).await);
    assert_eq!(client.get_plugin_info(GetPluginInfoRequest {}).await.unwrap().into_inner().name, CSI_DRIVER);
    assert_eq!(client.probe(ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(client);
    token.cancel();
    server.await.unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn a_broken_client_does_not_disturb_others() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let scratch = Scratch::new("broken");
    let (path, token) = (scratch.0.join("csi.sock"), CancellationToken::new());
    let server = tokio::spawn({
        let (path, token) = (path.clone(), token.clone());
        async move { served(&path, true, token).await }
    });
    let mut good = dialled(&path, 4096).await;
    probed(&mut good, "a").await.unwrap();
    let mut broken = UnixStream::connect(&path).await.unwrap();
    broken.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    // The server hangs up: an end or a reset, but no waiting.
    let _ = broken.read_to_end(&mut rest).await;
    probed(&mut good, "a").await.unwrap();
    drop(good);
    token.cancel();
    server.await.unwrap();
}

#[tokio::test]
async fn only_sockets_that_nobody_serves_are_replaced() {
    let scratch = Scratch::new("stale");
    let path = scratch.0.join("csi.sock");
    // A listener that is gone leaves its file behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let socket = Socket::bind(&path).unwrap();
    assert_eq!(Socket::bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);

    // Another process has replaced the file: it stays when ours goes.
    fs::remove_file(&path).unwrap();
    let successor = Socket::bind(&path).unwrap();
    drop(socket);
    assert!(path.exists());
    drop(successor);
    assert!(!path.exists());

    fs::write(&path, "precious").unwrap();
    let error = Socket::bind(&path).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn registration_answers_and_reports_a_refusal() {
    use crate::registration::{Paths, serve};
    use aether_proto::registration::registration_client::RegistrationClient;
    use aether_proto::registration::{InfoRequest, RegistrationStatus};

    for refusal in [None, Some("driver name already taken")] {
        let scratch = Scratch::new(&format!("registration-{}", refusal.is_some()));
        let paths = Paths::below(&scratch.0);
        let token = CancellationToken::new();
        let server = tokio::spawn({
            let (paths, token) = (paths.clone(), token.clone());
            async move { serve(&paths, token).await }
        });
        let target = paths.registration.clone();
        let mut client = RegistrationClient::new(channel(target).await);
        let info = client.get_info(InfoRequest {}).await.unwrap().into_inner();
        assert_eq!((&*info.r#type, &*info.name), ("CSIPlugin", CSI_DRIVER));
        assert_eq!(info.endpoint, scratch.0.join("plugins/csi.aether.dev/csi.sock").display().to_string());
        let status =
            RegistrationStatus { plugin_registered: refusal.is_none(), error: refusal.unwrap_or_default().into() };
        client.notify_registration_status(status).await.expect("the answer arrives, also before the end");
        match refusal {
            None => {
                assert!(!server.is_finished());
                token.cancel();
                server.await.unwrap().unwrap();
            }
            Some(reason) => {
                let error = server.await.unwrap().unwrap_err();
                assert!(error.to_string().contains(reason), "{error}");
            }
        }
        assert!(!paths.registration.exists());
    }
}

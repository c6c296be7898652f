//! Replaces `:authority` in the client's half of an HTTP/2 connection. Does no I/O: bytes in, bytes out.
//!
//! Header blocks are decoded with the client's dynamic table and written anew as literals without indexing, so the reader
//! behind needs no table of its own and the client's indices stay right. All other frames pass unchanged, also while their
//! payload is still arriving.
//!
//! Promises: at most [`MAX_FRAME`] + [`MAX_BLOCK`] bytes of a header block and [`MAX_LIST`] of its decoded form are held,
//! whatever the client sends; a client that breaks a rule needed to find its header blocks gets an error, and with it the
//! end of its connection.

use loona_hpack::Decoder;
use loona_hpack::decoder::DecoderError;
use loona_hpack::encoder::encode_integer_into;

use super::frame::{self, Header};

/// What stands in place of the client's value.
const AUTHORITY: &[u8] = b"localhost";

/// First bytes of every client (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Longest payload of a frame with headers, and of those written: SETTINGS_MAX_FRAME_SIZE as every endpoint starts with
/// it, and tonic does not raise it.
pub(super) const MAX_FRAME: usize = 16 * 1024;

/// Longest header block, encoded, over a HEADERS frame and its CONTINUATIONs.
pub(super) const MAX_BLOCK: usize = 64 * 1024;

/// Longest header list, decoded, counted as SETTINGS_MAX_HEADER_LIST_SIZE does: 32 bytes for each field beside its text.
pub(super) const MAX_LIST: usize = 64 * 1024;

/// Most CONTINUATION frames of a block; short ones could go on forever within the other bounds.
const MAX_CONTINUATIONS: usize = 64;

/// The client may not use a larger dynamic table: SETTINGS_HEADER_TABLE_SIZE as every endpoint starts with it. Tonic does
/// not announce another. (What the *client* announces bounds our answers, which do not pass here.)
const MAX_TABLE: usize = 4096;

/// With so much written, [`Authority::push`] hands back the rest of its input.
pub(super) const HIGH_WATER: usize = 32 * 1024;

/// Why a connection cannot go on.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum Violation {
    /// Something else than HTTP/2 with prior knowledge.
    #[error("the client does not speak HTTP/2")]
    Preface,
    /// Of a frame with headers.
    #[error("a frame of {0} bytes with headers exceeds {MAX_FRAME}")]
    FrameSize(usize),
    /// The encoded block.
    #[error("a header block exceeds {MAX_BLOCK} bytes or {MAX_CONTINUATIONS} continuations")]
    BlockSize,
    /// The decoded fields.
    #[error("a header list exceeds {MAX_LIST} bytes")]
    ListSize,
    /// Padding, or the priority fields, do not fit into the frame.
    #[error("a HEADERS frame is shorter than its padding and priority")]
    Padding,
    /// A header block was interrupted, or continued without a beginning.
    #[error("CONTINUATION frames are out of order")]
    Continuation,
    /// The block cannot be decoded.
    #[error("header compression: {0}")]
    Compression(DecoderError),
}

/// The state of one connection.
pub(super) struct Authority {
    decoder: Decoder<'static>,
    state: State,
    /// The header block of which frames are still to come.
    block: Option<Block>,
    /// Scratch for the payload of one frame with headers.
    payload: Vec<u8>,
}

enum State {
    /// So many bytes of the preface have come.
    Preface(usize),
    /// So many bytes of a frame header have come.
    Header([u8; frame::HEADER], usize),
    /// So many bytes are left of a payload that passes unchanged.
    Pass(usize),
    /// The payload of a frame with headers is being gathered.
    Gather(Header),
}

struct Block {
    stream: u32,
    end_stream: bool,
    /// Dependency and weight, as they came.
    priority: Option<[u8; 5]>,
    fragments: Vec<u8>,
    continuations: usize,
}

impl Authority {
    pub(super) fn new() -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(MAX_TABLE);
        Authority { decoder, state: State::Preface(0), block: None, payload: Vec::new() }
    }

    /// Takes bytes from the client, appends what the server shall see to `out`, and returns how many it took: all, or
    /// fewer once `out` holds [`HIGH_WATER`] bytes. After an error the connection is of no more use.
    pub(super) fn push(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<usize, Violation> {
        let mut rest = input;
        while !rest.is_empty() && out.len() < HIGH_WATER {
            let taken = self.step(rest, out)?;
            rest = &rest[taken..];
        }
        Ok(input.len() - rest.len())
    }

    /// Takes at least one byte.
    fn step(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<usize, Violation> {
        match &mut self.state {
            State::Preface(seen) => {
                let taken = input.len().min(PREFACE.len() - *seen);
                if input[..taken] != PREFACE[*seen..*seen + taken] {
                    return Err(Violation::Preface);
                }
                out.extend_from_slice(&input[..taken]);
                *seen += taken;
                if *seen == PREFACE.len() {
                    self.state = State::next();
                }
                Ok(taken)
            }
            State::Header(bytes, seen) => {
                let taken = input.len().min(frame::HEADER - *seen);
                bytes[*seen..*seen + taken].copy_from_slice(&input[..taken]);
                *seen += taken;
                if *seen == frame::HEADER {
                    let header = Header::parse(*bytes);
                    self.begin(header, out)?;
                }
                Ok(taken)
            }
            State::Pass(left) => {
                let taken = input.len().min(*left).min(HIGH_WATER);
                out.extend_from_slice(&input[..taken]);
                *left -= taken;
                if *left == 0 {
                    self.state = State::next();
                }
                Ok(taken)
            }
            State::Gather(header) => {
                let header = *header;
                let taken = input.len().min(header.length - self.payload.len());
                self.payload.extend_from_slice(&input[..taken]);
                if self.payload.len() == header.length {
                    self.end(header, out)?;
                }
                Ok(taken)
            }
        }
    }

    /// A frame header is complete.
    fn begin(&mut self, header: Header, out: &mut Vec<u8>) -> Result<(), Violation> {
        let continues = self.block.as_ref().is_some_and(|block| block.stream == header.stream);
        match header.kind {
            frame::CONTINUATION if continues => {}
            frame::HEADERS if self.block.is_none() => {}
            frame::CONTINUATION => return Err(Violation::Continuation),
            _ if self.block.is_some() => return Err(Violation::Continuation),
            _ => {
                header.write(out);
                self.state = if header.length == 0 { State::next() } else { State::Pass(header.length) };
                return Ok(());
            }
        }
        if header.length > MAX_FRAME {
            return Err(Violation::FrameSize(header.length));
        }
        self.payload.clear();
        if header.length == 0 {
            return self.end(header, out);
        }
        self.state = State::Gather(header);
        Ok(())
    }

    /// The payload of a frame with headers is complete.
    fn end(&mut self, header: Header, out: &mut Vec<u8>) -> Result<(), Violation> {
        let block = match self.block.take() {
            Some(mut block) => {
                block.continuations += 1;
                if block.continuations > MAX_CONTINUATIONS || block.fragments.len() + self.payload.len() > MAX_BLOCK {
                    return Err(Violation::BlockSize);
                }
                block.fragments.extend_from_slice(&self.payload);
                block
            }
            None => Block::open(header, &self.payload)?,
        };
        if header.has(frame::END_HEADERS) {
            let fields = self.rewrite(&block.fragments)?;
            block.write(&fields, out);
        } else {
            self.block = Some(block);
        }
        self.state = State::next();
        Ok(())
    }

    /// Decodes a header block and encodes it anew.
    fn rewrite(&mut self, block: &[u8]) -> Result<Vec<u8>, Violation> {
        let mut fields = Vec::with_capacity(block.len());
        let mut size = 0_usize;
        self.decoder
            .decode_with_cb(block, |name, value| {
                let value: &[u8] = if &*name == b":authority" { AUTHORITY } else { &value };
                size = size.saturating_add(name.len() + value.len() + 32);
                // Decoding goes on for the sake of the table, but nothing more is kept.
                if size <= MAX_LIST {
                    literal(&name, value, &mut fields);
                }
            })
            .map_err(Violation::Compression)?;
        if size > MAX_LIST { Err(Violation::ListSize) } else { Ok(fields) }
    }
}

impl State {
    /// Between two frames.
    fn next() -> State {
        State::Header([0; frame::HEADER], 0)
    }
}

impl Block {
    /// Begins with a HEADERS frame, whose padding goes.
    fn open(header: Header, mut payload: &[u8]) -> Result<Block, Violation> {
        if header.has(frame::PADDED) {
            let (&padding, rest) = payload.split_first().ok_or(Violation::Padding)?;
            let length = rest.len().checked_sub(padding.into()).ok_or(Violation::Padding)?;
            payload = &rest[..length];
        }
        let mut priority = None;
        if header.has(frame::PRIORITY) {
            let (fields, rest) = payload.split_first_chunk::<5>().ok_or(Violation::Padding)?;
            (priority, payload) = (Some(*fields), rest);
        }
        Ok(Block {
            stream: header.stream,
            end_stream: header.has(frame::END_STREAM),
            priority,
            fragments: payload.to_vec(),
            continuations: 0,
        })
    }

    /// As one HEADERS frame, and CONTINUATIONs when it is too long for one.
    fn write(&self, fields: &[u8], out: &mut Vec<u8>) {
        let priority = self.priority.as_ref().map_or(&[][..], |fields| fields);
        let (mut fragment, mut rest) = fields.split_at(fields.len().min(MAX_FRAME - priority.len()));
        let mut header =
            Header { length: priority.len() + fragment.len(), kind: frame::HEADERS, flags: 0, stream: self.stream };
        if self.end_stream {
            header.flags |= frame::END_STREAM;
        }
        if self.priority.is_some() {
            header.flags |= frame::PRIORITY;
        }
        let mut prefix = priority;
        loop {
            if rest.is_empty() {
                header.flags |= frame::END_HEADERS;
            }
            header.write(out);
            out.extend_from_slice(prefix);
            out.extend_from_slice(fragment);
            if rest.is_empty() {
                return;
            }
            prefix = &[];
            (fragment, rest) = rest.split_at(rest.len().min(MAX_FRAME));
            header = Header { length: fragment.len(), kind: frame::CONTINUATION, flags: 0, ..header };
        }
    }
}

/// A literal field without indexing, neither name nor value compressed (RFC 7541, section 6.2.2).
fn literal(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    out.push(0);
    for text in [name, value] {
        encode_integer_into(text.len(), 7, 0, out).expect("writing to a vector cannot fail");
        out.extend_from_slice(text);
    }
}

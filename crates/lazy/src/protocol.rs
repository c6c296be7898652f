//! The little of the FUSE protocol (`linux/fuse.h`, version 7) that the exchange reads and writes itself. Everything else
//! passes through it as it is.

/// `sizeof(struct fuse_in_header)`.
const IN_HEADER: usize = 40;
/// `sizeof(struct fuse_out_header)`.
const OUT_HEADER: usize = 16;
/// Room for any request to a file system that nobody writes to; the kernel takes no buffer below 8 KiB and none that is
/// too small for a write of the size that was agreed on.
pub(crate) const BUFFER: usize = MOST_BYTES as usize + 64 * 1024;
/// Most bytes of one read, and of the write that never comes.
pub(crate) const MOST_BYTES: u32 = 128 * 1024;

pub(crate) const FORGET: u32 = 2;
pub(crate) const OPEN: u32 = 14;
pub(crate) const RELEASE: u32 = 18;
const INIT: u32 = 26;
pub(crate) const INTERRUPT: u32 = 36;
pub(crate) const BATCH_FORGET: u32 = 42;

const FOPEN_PASSTHROUGH: u32 = 1 << 7;

/// The number of a request of ours, whose answer nobody waits for. The kernel's are even.
const OURS: u64 = u64::MAX;

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

/// What the exchange wants to know of a request.
pub(crate) struct Request {
    pub(crate) opcode: u32,
    /// Its number, by which it is answered.
    pub(crate) unique: u64,
    pub(crate) node: u64,
    /// The thread that waits; 0 if it is in another PID namespace.
    pub(crate) pid: u32,
    /// For an interrupt, the request that is meant.
    pub(crate) target: u64,
}

impl Request {
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        Some(Self {
            opcode: u32_at(packet, 4)?,
            unique: u64_at(packet, 8)?,
            node: u64_at(packet, 16)?,
            pid: u32_at(packet, 32)?,
            target: u64_at(packet, IN_HEADER).unwrap_or_default(),
        })
    }
}

/// What the exchange wants to know of an answer.
pub(crate) struct Answer {
    /// 0, or the negative error number.
    pub(crate) error: i32,
    /// Of the request that it answers; 0 for a notice.
    pub(crate) unique: u64,
}

impl Answer {
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        Some(Self { error: u32_at(packet, 4)? as i32, unique: u64_at(packet, 8)? })
    }
}

/// The handle in the answer to an open, and the backing file that the kernel reads by itself, if any.
pub(crate) fn opened(packet: &[u8]) -> Option<(u64, Option<u32>)> {
    let handle = u64_at(packet, OUT_HEADER)?;
    let flags = u32_at(packet, OUT_HEADER + 8)?;
    let backing = u32_at(packet, OUT_HEADER + 12)?;
    Some((handle, (flags & FOPEN_PASSTHROUGH != 0).then_some(backing)))
}

/// Answers a request with an error.
pub(crate) fn refusal(unique: u64, errno: i32) -> Vec<u8> {
    let mut packet = Vec::with_capacity(OUT_HEADER);
    packet.extend_from_slice(&(OUT_HEADER as u32).to_ne_bytes());
    packet.extend_from_slice(&(-errno).to_ne_bytes());
    packet.extend_from_slice(&unique.to_ne_bytes());
    packet
}

fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(IN_HEADER + body.len());
    packet.extend_from_slice(&((IN_HEADER + body.len()) as u32).to_ne_bytes());
    packet.extend_from_slice(&opcode.to_ne_bytes());
    packet.extend_from_slice(&unique.to_ne_bytes());
    packet.extend_from_slice(&node.to_ne_bytes());
    // uid, gid, pid, and the length of extensions.
    packet.extend_from_slice(&[0; 16]);
    packet.extend_from_slice(body);
    packet
}

/// Takes back an open that the kernel will never hear of.
pub(crate) fn release(node: u64, handle: u64) -> Vec<u8> {
    let mut body = handle.to_ne_bytes().to_vec();
    body.extend_from_slice(&[0; 16]);
    request(RELEASE, OURS, node, &body)
}

/// The kernel's greeting once more, for a server that comes to a connection that has been opened long ago. Which
/// abilities it names decides nothing any more.
pub(crate) fn greeting() -> Vec<u8> {
    // major, minor, max_readahead, flags, flags2 and eleven unused words: struct fuse_init_in.
    let mut body = Vec::new();
    for word in [7, 31, MOST_BYTES, u32::MAX, u32::MAX] {
        body.extend_from_slice(&u32::to_ne_bytes(word));
    }
    body.extend_from_slice(&[0; 44]);
    request(INIT, 2, 0, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_read_back() {
        let packet = release(77, 5);
        assert_eq!(u32_at(&packet, 0), Some(packet.len() as u32));
        let request = Request::parse(&packet).unwrap();
        assert_eq!((request.opcode, request.unique, request.node), (RELEASE, OURS, 77));
        assert_eq!(request.target, 5, "the handle is the first word of the body");
        let answer = Answer::parse(&refusal(8, libc::EIO)).unwrap();
        assert_eq!((answer.error, answer.unique), (-libc::EIO, 8));
        assert_eq!(greeting().len(), 104);
        assert!(Request::parse(&packet[..20]).is_none());
    }
}

//! zstd in both directions, in pieces and in bounded memory.

use std::io::{self, Write};

use tonic::Status;
use zstd::stream::{
    raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer},
    write::Encoder,
};

use crate::limits::BATCH_WINDOW_LOG;

/// Fast: the network is faster than the higher levels.
const LEVEL: i32 = 1;
const PIECE: usize = 128 << 10;

/// Takes frames apart.
pub(crate) struct Decompressor {
    decoder: Decoder<'static>,
    between_frames: bool,
    buffer: Vec<u8>,
}

impl Decompressor {
    pub(crate) fn new(window_log: u32) -> Result<Self, Status> {
        let mut decoder = Decoder::new().map_err(internal)?;
        decoder.set_parameter(DParameter::WindowLogMax(window_log)).map_err(internal)?;
        Ok(Self { decoder, between_frames: true, buffer: vec![0; PIECE] })
    }

    /// Takes the next bytes of the frames, and hands out what they were, in pieces.
    pub(crate) fn feed(
        &mut self,
        data: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let mut input = InBuffer::around(data);
        while !(self.between_frames && input.pos() == data.len()) {
            let mut output = OutBuffer::around(&mut self.buffer[..]);
            let wanted = self
                .decoder
                .run(&mut input, &mut output)
                .map_err(|error| Status::invalid_argument(format!("this is not zstd: {error}")))?;
            // The decoder wants nothing more when a frame has ended and all of it is out.
            self.between_frames = wanted == 0;
            let more = output.pos() == PIECE;
            take(output.as_slice())?;
            if input.pos() == data.len() && !more {
                break;
            }
        }
        Ok(())
    }

    /// Whether the last frame is whole.
    pub(crate) fn is_done(&self) -> bool {
        self.between_frames
    }
}

/// Makes one frame.
pub(crate) struct Compressor(Encoder<'static, Vec<u8>>);

impl Compressor {
    pub(crate) fn new() -> Result<Self, Status> {
        Encoder::new(Vec::new(), LEVEL).map(Self).map_err(internal)
    }

    /// Takes a piece, and returns what there is of the frame and was not returned before.
    pub(crate) fn feed(&mut self, data: &[u8]) -> Result<Vec<u8>, Status> {
        self.0.write_all(data).map_err(internal)?;
        Ok(std::mem::take(self.0.get_mut()))
    }

    /// The rest of the frame.
    pub(crate) fn finish(self) -> Result<Vec<u8>, Status> {
        self.0.finish().map_err(internal)
    }
}

/// One blob of a batch, compressed if it gets smaller by that.
pub(crate) fn compress(data: &[u8]) -> Option<Vec<u8>> {
    let compressed = zstd::bulk::compress(data, LEVEL).ok()?;
    (compressed.len() < data.len()).then_some(compressed)
}

/// One blob of a batch, which has `size` bytes.
pub(crate) fn decompress(data: &[u8], size: usize) -> Result<Vec<u8>, Status> {
    let mut whole = Vec::with_capacity(size);
    let mut decompressor = Decompressor::new(BATCH_WINDOW_LOG)?;
    decompressor.feed(data, |piece| {
        if whole.len() + piece.len() > size {
            return Err(Status::invalid_argument(format!("it is longer than its {size} bytes when decompressed")));
        }
        whole.extend_from_slice(piece);
        Ok(())
    })?;
    if decompressor.is_done() { Ok(whole) } else { Err(Status::invalid_argument("its zstd frame is not whole")) }
}

fn internal(error: io::Error) -> Status {
    Status::internal(format!("zstd: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(data: &[u8], piece: usize) -> Vec<u8> {
        let mut compressor = Compressor::new().unwrap();
        let mut frame: Vec<u8> = data.chunks(piece).flat_map(|piece| compressor.feed(piece).unwrap()).collect();
        frame.extend(compressor.finish().unwrap());
        frame
    }

    #[test]
    fn frames_come_back_in_any_pieces() {
        let zeros = vec![0; 3 * PIECE];
        let mixed: Vec<u8> =
            (0..1_000_000u32).flat_map(|n| (n.wrapping_mul(2_654_435_761) >> (n % 25)).to_le_bytes()).collect();
        for data in [&b""[..], b"a", &zeros, &zeros[..2 * PIECE], &mixed] {
            let two_frames = [frame(data, 70_000), frame(b"", 1), frame(b"the end", 2)].concat();
            for piece in [1, 4093, usize::MAX] {
                let mut decompressor = Decompressor::new(23).unwrap();
                let mut out = Vec::new();
                for piece in two_frames.chunks(piece.min(two_frames.len())) {
                    assert!(out.len() < data.len() + 7, "it ends with the last byte");
                    decompressor
                        .feed(piece, |piece| {
                            out.extend_from_slice(piece);
                            Ok(())
                        })
                        .unwrap();
                }
                assert!(decompressor.is_done() && out == [data, b"the end"].concat());
                decompressor.feed(b"", |_| Ok(())).unwrap();
                assert!(decompressor.is_done(), "nothing changes nothing");
            }
            let whole = frame(data, data.len().max(1));
            assert_eq!(decompress(&whole, data.len()).unwrap(), data);
            assert!(decompress(&whole[..whole.len() - 1], data.len()).is_err(), "a frame that was cut off");
        }
        assert!(decompress(&frame(b"longer", 10), 5).is_err());
        assert!(decompress(b"no zstd at all", 14).is_err());
        // 64 MiB of window, for one byte over 8 MiB.
        let mut wide = Encoder::new(Vec::new(), 1).unwrap();
        wide.window_log(26).unwrap();
        wide.long_distance_matching(true).unwrap();
        wide.write_all(&vec![1; (8 << 20) + 1]).unwrap();
        assert!(decompress(&wide.finish().unwrap(), (8 << 20) + 1).is_err());
    }
}

//! The decoders of messages, for fuzzing.

use crate::protocol::{Answer, Request, opened, refusal, release};

/// Reads `packet` as everything that it may be.
///
/// # Panics
/// When a decoder breaks a promise: what it reads is what was written, and a packet that is cut short is refused.
pub fn decode(packet: &[u8]) {
    if let Some(request) = Request::parse(packet) {
        assert!(packet.len() >= 36, "a request was read out of too few bytes");
        let written = release(request.node, request.target);
        let read = Request::parse(&written).expect("what is written can be read");
        assert_eq!((read.node, read.target), (request.node, request.target));
    }
    if let Some(answer) = Answer::parse(packet) {
        assert!(packet.len() >= 16, "an answer was read out of too few bytes");
        if let Some(errno) = answer.error.checked_neg() {
            let read = Answer::parse(&refusal(answer.unique, errno)).expect("what is written can be read");
            assert_eq!((read.unique, read.error), (answer.unique, answer.error));
        }
    }
    assert!(opened(packet).is_none() || packet.len() >= 32, "an open was read out of too few bytes");
}

//! Whatever is done to a chain is found: every bit that is flipped, every line that is removed, doubled or moved, and an end that
//! was cut off.

use aether_audit::chain::{MAX_LINE, Verifier, append, check};
use aether_audit::{Broken, Entry, Head, Object, Verb};
use proptest::prelude::*;

fn entry(number: usize) -> Entry {
    Entry {
        time: format!("2026-01-01T00:00:{:02}Z", number % 60).parse().unwrap(),
        actor: format!("ada {number}"),
        verb: [Verb::Requested, Verb::Approved, Verb::Released][number % 3],
        object: Object {
            kind: "AetherCommit".into(),
            namespace: "demo".into(),
            name: "c".into(),
            uid: format!("uid \"{number}\""),
        },
        root: number.is_multiple_of(2).then(|| "r/1".into()),
        occasion: number as u64 % 4,
    }
}

fn chain(count: usize) -> (Vec<u8>, Head, Vec<Head>) {
    let (mut text, mut head, mut heads) = (Vec::new(), Head::EMPTY, Vec::new());
    for number in 0..count {
        head = append(&mut text, head, &entry(number)).unwrap();
        heads.push(head);
    }
    (text, head, heads)
}

fn verify(text: &[u8], head: Head) -> Result<Head, Broken> {
    let mut verifier = Verifier::awaiting([head]);
    verifier.segment(text)?;
    verifier.end()
}

#[test]
fn a_whole_chain_is_read_as_it_was_written_in_any_segments() {
    let (text, head, heads) = chain(7);
    assert_eq!(verify(&text, head), Ok(head));
    let ends: Vec<usize> = text.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1).collect();
    let mut verifier = Verifier::awaiting(heads);
    let mut entries = verifier.segment(&text[..ends[2]]).unwrap();
    entries.extend(verifier.segment(&text[ends[2]..]).unwrap());
    assert_eq!(entries, (0..7).map(entry).collect::<Vec<_>>());
    assert_eq!(verifier.end(), Ok(head));
    assert_eq!(verify(b"", Head::EMPTY), Ok(Head::EMPTY));
}

#[test]
fn every_flipped_bit_is_found() {
    let (text, head, _) = chain(5);
    for at in 0..text.len() {
        for bit in 0..8 {
            let mut other = text.clone();
            other[at] ^= 1 << bit;
            assert!(verify(&other, head).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn every_line_that_is_removed_doubled_or_moved_is_found() {
    let (text, head, _) = chain(6);
    let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
    for from in 0..lines.len() {
        let mut removed = lines.clone();
        let line = removed.remove(from);
        assert!(verify(&removed.concat(), head).is_err(), "line {from} removed");
        for to in 0..=removed.len() {
            let mut moved = removed.clone();
            moved.insert(to, line);
            assert_eq!(verify(&moved.concat(), head).is_ok(), to == from, "line {from} moved to {to}");
            let mut doubled = lines.clone();
            doubled.insert(to, line);
            assert!(verify(&doubled.concat(), head).is_err(), "line {from} again at {to}");
        }
    }
}

#[test]
fn a_chain_that_was_cut_off_or_written_anew_is_found_by_a_head_that_was_written_down() {
    let (text, head, heads) = chain(4);
    let short = &text[..text.iter().take(text.len() - 1).rposition(|byte| *byte == b'\n').unwrap() + 1];
    let mut alone = Verifier::default();
    alone.segment(short).unwrap();
    assert_eq!(alone.end(), Ok(heads[2]), "by itself it is a chain");
    assert!(verify(short, head).unwrap_err().problem.contains("there were more lines once"));
    // The last three lines were forged, and more were written behind them.
    let (mut forged, mut end) = (Vec::new(), Head::EMPTY);
    for number in [0, 11, 12, 13, 14] {
        end = append(&mut forged, end, &entry(number)).unwrap();
    }
    assert_eq!(verify(&forged, end), Ok(end));
    let found = verify(&forged, heads[2]).unwrap_err();
    assert_eq!((found.line, found.problem), (3, "it was another when it was written down elsewhere"));
}

#[test]
fn a_line_has_one_encoding_and_a_bound() {
    let (text, head, _) = chain(1);
    let line = String::from_utf8(text).unwrap();
    for other in [
        line.replace(":1,", ": 1,"),
        line.replace("00Z", "00.0Z"),
        line.replace("}\n", ",\"occasion\":0}\n"),
        line.replace("\"actor\"", "\"more\":1,\"actor\""),
        line.replace('\n', "\r\n"),
        format!("\n{line}"),
        line.replace("ada 0", "\\u0061da 0"),
    ] {
        assert_ne!(other, line);
        assert!(verify(other.as_bytes(), head).is_err(), "{other}");
    }
    let long = Entry { actor: "a".repeat(MAX_LINE), ..entry(0) };
    assert!(append(&mut Vec::new(), Head::EMPTY, &long).is_err());
}

#[test]
fn a_head_is_read_as_it_was_printed() {
    let (_, head, _) = chain(3);
    assert_eq!(head.to_string().parse(), Ok(head));
    for bad in ["", "3", "3:", "x:00", ":", "3:00"] {
        assert!(bad.parse::<Head>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_have_one_encoding(input in prop::collection::vec(any::<u8>(), 0..300)) {
        check(&input);
    }

    #[test]
    fn any_names_survive(actor in ".{0,40}", name in ".{0,40}", count in 1..5usize) {
        let (mut text, mut head) = (Vec::new(), Head::EMPTY);
        let mut written = entry(0);
        written.actor = actor;
        written.object.name = name;
        for _ in 0..count {
            head = append(&mut text, head, &written).unwrap();
        }
        let mut verifier = Verifier::awaiting([head]);
        prop_assert_eq!(verifier.segment(&text).unwrap(), vec![written; count]);
        prop_assert_eq!(verifier.end(), Ok(head));
    }
}

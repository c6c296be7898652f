//! Lines that were not touched are found, touched ones are gone, moved ones are followed: over random files and edits.

use std::time::{Duration, Instant};

use aether_review::follow::{Place, follow};
use proptest::prelude::*;

/// What becomes of one line.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Kept,
    Removed,
    Replaced,
    /// So many new ones are put before it.
    Preceded(u8),
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        6 => Just(Fate::Kept),
        1 => Just(Fate::Removed),
        1 => Just(Fate::Replaced),
        1 => (1..4u8).prop_map(Fate::Preceded),
    ]
}

fn range(length: usize) -> impl Strategy<Value = (usize, usize)> {
    (0..length).prop_flat_map(move |from| (Just(from), from..length))
}

fn text(lines: &[String]) -> Vec<u8> {
    lines.iter().flat_map(|line| format!("{line}\n").into_bytes()).collect()
}

fn place(old: &[String], new: &[String], from: usize, to: usize) -> Place {
    let number = |index: usize| u32::try_from(index + 1).unwrap();
    follow(&text(old), &text(new), number(from), number(to), Instant::now() + Duration::from_secs(60))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn untouched_lines_are_found_and_touched_ones_are_gone(
        (fates, (from, to)) in prop::collection::vec(fate(), 1..60).prop_flat_map(|fates| {
            let length = fates.len();
            (Just(fates), range(length))
        })
    ) {
        let old: Vec<String> = (0..fates.len()).map(|n| format!("line {n}")).collect();
        let (mut new, mut at) = (Vec::new(), Vec::new());
        for (n, fate) in fates.iter().enumerate() {
            match fate {
                Fate::Preceded(count) => new.extend((0..*count).map(|k| format!("fresh {n} {k}"))),
                Fate::Replaced => new.push(format!("other {n}")),
                Fate::Kept | Fate::Removed => {}
            }
            let stays = matches!(fate, Fate::Kept | Fate::Preceded(_));
            at.push(stays.then_some(new.len()));
            new.extend(stays.then(|| old[n].clone()));
        }
        let expected = match at[from..=to].iter().copied().collect::<Option<Vec<usize>>>() {
            Some(places) => {
                let number = |index: usize| u32::try_from(index + 1).unwrap();
                Place::At { from: number(places[0]), to: number(places[places.len() - 1]) }
            }
            None => Place::Gone,
        };
        prop_assert_eq!(place(&old, &new, from, to), expected);
    }

    #[test]
    fn moved_lines_are_followed(
        (length, (from, to), to_where) in (2..40usize).prop_flat_map(|n| (Just(n), range(n), 0..n))
    ) {
        let old: Vec<String> = (0..length).map(|n| format!("line {n}")).collect();
        let mut new = old.clone();
        let block: Vec<String> = new.drain(from..=to).collect();
        let start = to_where.min(new.len());
        new.splice(start..start, block.clone());
        let number = |index: usize| u32::try_from(index + 1).unwrap();
        let expected = Place::At { from: number(start), to: number(start + block.len() - 1) };
        prop_assert_eq!(place(&old, &new, from, to), expected);
    }

    #[test]
    fn what_is_said_of_any_files_is_so(
        old in prop::collection::vec("[ab}]?", 1..30), new in prop::collection::vec("[ab}]?", 0..30),
        seed in any::<(usize, usize)>()
    ) {
        let from = seed.0 % old.len();
        let to = from + seed.1 % (old.len() - from);
        if let Place::At { from: first, to: last } = place(&old, &new, from, to) {
            let mut found = new[first as usize - 1..last as usize].iter();
            prop_assert!(old[from..=to].iter().all(|line| found.any(|other| other == line)), "{first}-{last}");
        }
    }
}

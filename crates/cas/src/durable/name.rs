//! Names of objects in the bucket: unique, and sorted by the time at which they were given.

use std::{
    fmt,
    str::FromStr,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The name of a pack or a record: when it was named, by whom, and the how manieth of its namer.
///
/// Displays as `1700000000000-0123456789abcdef-00000001`; texts, bytes and values sort alike.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackName {
    millis: u64,
    namer: u64,
    number: u32,
}

/// Bytes of a name in an index.
pub(super) const NAME_BYTES: usize = 20;
/// Digits of the time: enough until the year 2286.
const MILLIS_DIGITS: usize = 13;
const MAX_MILLIS: u64 = 9_999_999_999_999;

impl PackName {
    /// A name that is not before any that was given `margin` before `now`, for whoever lists from there on.
    pub(super) fn lowest(now: SystemTime, margin: Duration) -> Self {
        Self {
            millis: millis(now).saturating_sub(u64::try_from(margin.as_millis()).unwrap_or(u64::MAX)),
            namer: 0,
            number: 0,
        }
    }

    /// A name right behind this one, as `namer` would give it.
    pub(super) fn next(self, namer: &PackName) -> Self {
        Self { millis: (self.millis + 1).min(MAX_MILLIS), ..*namer }
    }

    /// When it was given, by the clock of the node that did.
    pub fn time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.millis)
    }

    pub(super) fn to_bytes(self) -> [u8; NAME_BYTES] {
        let mut bytes = [0; NAME_BYTES];
        bytes[..8].copy_from_slice(&self.millis.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.namer.to_be_bytes());
        bytes[16..].copy_from_slice(&self.number.to_be_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (millis, rest) = bytes.split_at_checked(8)?;
        let (namer, number) = rest.split_at_checked(8)?;
        Some(Self {
            millis: u64::from_be_bytes(millis.try_into().ok()?),
            namer: u64::from_be_bytes(namer.try_into().ok()?),
            number: u32::from_be_bytes(number.try_into().ok()?),
        })
    }
}

pub(super) fn millis(time: SystemTime) -> u64 {
    let millis = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    u64::try_from(millis).unwrap_or(MAX_MILLIS).min(MAX_MILLIS)
}

impl fmt::Display for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0MILLIS_DIGITS$}-{:016x}-{:08x}", self.millis, self.namer, self.number)
    }
}

impl fmt::Debug for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not the name of a pack.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not a name that this program gives")]
pub struct ParseNameError;

impl FromStr for PackName {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.splitn(3, '-');
        let mut part = || parts.next().ok_or(ParseNameError);
        let name = Self {
            millis: part()?.parse().map_err(|_| ParseNameError)?,
            namer: u64::from_str_radix(part()?, 16).map_err(|_| ParseNameError)?,
            number: u32::from_str_radix(part()?, 16).map_err(|_| ParseNameError)?,
        };
        // One text for each name.
        if name.to_string() == text { Ok(name) } else { Err(ParseNameError) }
    }
}

/// Gives names that no other namer gives: each has a random number of its own.
pub(super) struct Namer {
    namer: u64,
    next: AtomicU32,
}

impl Namer {
    pub(super) fn new() -> Self {
        Self { namer: rand::random(), next: AtomicU32::new(0) }
    }

    pub(super) fn name(&self) -> PackName {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        PackName { millis: millis(SystemTime::now()), namer: self.namer, number }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_time_as_text_and_as_bytes() {
        let name = |millis, namer, number| PackName { millis, namer, number };
        let sorted =
            [name(5, 9, 9), name(77, 1, 2), name(1_700_000_000_000, 0, 0), name(1_700_000_000_000, u64::MAX, 0)];
        for pair in sorted.windows(2) {
            assert!(pair[0] < pair[1]);
            assert!(pair[0].to_string() < pair[1].to_string());
            assert!(pair[0].to_bytes() < pair[1].to_bytes());
        }
        for name in sorted {
            assert_eq!(name.to_string().parse(), Ok(name));
            assert_eq!(PackName::from_bytes(&name.to_bytes()), Some(name));
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for bad in [
            "",
            "1",
            "1-2-3",
            "1700000000000-0123456789ABCDEF-00000001",
            "+700000000000-0123456789abcdef-00000001",
            "1700000000000-0123456789abcdef-00000001.pack",
            "1700000000000-0123456789abcdef-000000001",
        ] {
            assert_eq!(bad.parse::<PackName>(), Err(ParseNameError), "{bad}");
        }
        assert!("1700000000000-0123456789abcdef-00000001".parse::<PackName>().is_ok());
    }
}

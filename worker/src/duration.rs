//! Durations as people write them: `500ms`, `5s`, `1.5h`, `1m30s`, or bare seconds.

use std::time::Duration;

const UNITS: [(&str, f64); 5] = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86400.0)];

/// `None` when the text is no duration, is negative, or is longer than the machine can count.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    if text.is_empty() {
        return None;
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let seconds = match &rest[..end] {
            // Only the last part, which is the whole text then, may go without its unit.
            "" if total.is_zero() => 1.0,
            unit => UNITS.iter().find(|(name, _)| *name == unit)?.1,
        };
        rest = &rest[end..];
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_duration() {
        for (text, milliseconds) in [
            ("0", 0),
            ("7", 7_000),
            ("0.25", 250),
            ("500ms", 500),
            ("5s", 5_000),
            ("1.5h", 5_400_000),
            ("1m30s", 90_000),
            ("1h0m1s", 3_601_000),
            ("2d", 172_800_000),
        ] {
            assert_eq!(parse(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
    }

    #[test]
    fn what_is_none() {
        for text in ["", "s", "-1s", "1x", "1 s", "1s30", "..s", "1e400", "99999999999999999999999s", "inf", "NaN"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}

//! Numbers of bytes as Kubernetes writes them.

/// What [`parse`] reads, as a pattern for schemas.
pub const PATTERN: &str = "^[1-9][0-9]*(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$";

/// Reads a number of bytes such as `10Gi`, `500M` or `1048576`.
///
/// # Errors
/// Says what is wrong with the text, which it quotes.
pub fn parse(text: &str) -> Result<u64, String> {
    let split = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        _ => {
            return Err(format!(
                "{text:?} is not a whole number of bytes with one of the units Ki, Mi, Gi, Ti, Pi, k, M, G, T, P, such as 10Gi"
            ));
        }
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} does not begin with a number, such as 10Gi"))?;
    number.checked_mul(factor).filter(|bytes| *bytes > 0).ok_or_else(|| format!("{text:?} is no size a disk can have"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_kubernetes_writes_them() {
        assert_eq!(parse("20Gi"), Ok(20 << 30));
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("2G"), Ok(2_000_000_000));
        for (text, word) in [
            ("20GB", "20GB"),
            ("Gi", "number"),
            ("1.5Gi", "whole"),
            ("0", "disk"),
            ("99999999Pi", "disk"),
            ("-1", "whole"),
        ] {
            assert!(parse(text).unwrap_err().contains(word), "{text}");
        }
    }
}

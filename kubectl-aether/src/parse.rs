//! Words of the command line into typed values, with errors that show the right form.

use std::collections::BTreeMap;
use std::time::Duration;

use aether_api::command::Variable;
use aether_api::session::AutomaticCheckpoints;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// A source as typed: `[NAMESPACE/]NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) namespace: Option<String>,
    pub(crate) name: String,
}

/// Amounts of resources by name.
pub(crate) type Quantities = BTreeMap<String, Quantity>;

/// The name of an object that also names a claim: an RFC 1123 label, of 63 characters at most because it becomes a label's value.
pub(crate) fn name(text: &str) -> Result<String, String> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    let edge = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let bytes = text.as_bytes();
    if bytes.len() > 63 {
        return Err(format!("a name has 63 characters at most, this one has {}", bytes.len()));
    }
    if !(edge(bytes.first()) && edge(bytes.last()) && bytes.iter().copied().all(inner)) {
        return Err(
            "a name is lowercase letters, digits, '-' and '.', and begins and ends with a letter or digit".into()
        );
    }
    Ok(text.into())
}

pub(crate) fn source(text: &str) -> Result<Source, String> {
    let form = |_| format!("a source is NAME or NAMESPACE/NAME, not {text:?}");
    let (namespace, source) = match text.split_once('/') {
        Some((namespace, source)) => (Some(name(namespace).map_err(form)?), source),
        None => (None, text),
    };
    Ok(Source { namespace, name: name(source).map_err(form)? })
}

/// A duration as Kubernetes writes it (Go's form), not negative and not nothing.
pub(crate) fn duration(text: &str) -> Result<kube::core::Duration, String> {
    let duration: kube::core::Duration = text.parse().map_err(|error| match error {
        kube::core::duration::ParseError::InvalidUnit | kube::core::duration::ParseError::NoUnit => {
            "a time is a number with a unit ms, s, m or h, such as 90s or 1h30m (a day is 24h)".to_owned()
        }
        other => other.to_string(),
    })?;
    if duration.is_negative() || Duration::from(duration).is_zero() {
        return Err("a time is more than nothing, such as 90s or 1h30m".into());
    }
    Ok(duration)
}

pub(crate) fn span(text: &str) -> Result<Duration, String> {
    duration(text).map(Duration::from)
}

pub(crate) fn automatic(text: &str) -> Result<AutomaticCheckpoints, String> {
    let (interval, keep) = text.split_once(':').unwrap_or((text, "3"));
    let keep = keep
        .parse()
        .ok()
        .filter(|keep| (1..=1000).contains(keep))
        .ok_or("KEEP is a number, 1 to 1000, such as in 5m:10")?;
    Ok(AutomaticCheckpoints { interval: duration(interval)?, keep })
}

pub(crate) fn variable(text: &str) -> Result<Variable, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, value.to_owned()),
        None => (text, std::env::var(text).map_err(|_| format!("{text} has no value here: say {text}=VALUE"))?),
    };
    if name.is_empty() {
        return Err("a variable has a name: NAME=VALUE".into());
    }
    Ok(Variable { name: name.into(), value })
}

pub(crate) fn quantities(text: &str) -> Result<Quantities, String> {
    text.split(',')
        .map(|part| match part.split_once('=') {
            Some((name, amount)) if !name.is_empty() && is_quantity(amount) => {
                Ok((name.to_owned(), Quantity(amount.to_owned())))
            }
            _ => Err(format!("{part:?} is no amount of a resource: say for example cpu=1,memory=2Gi")),
        })
        .collect()
}

/// Kubernetes' grammar of quantities: a decimal number with an optional suffix or exponent.
fn is_quantity(text: &str) -> bool {
    let digits = text.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b'.').count();
    let (number, suffix) = text.split_at(digits);
    let exponent = |rest: &str| rest.parse::<i16>().is_ok();
    number.parse::<f64>().is_ok()
        && (matches!(
            suffix,
            "" | "n" | "u" | "m" | "k" | "M" | "G" | "T" | "P" | "E" | "Ki" | "Mi" | "Gi" | "Ti" | "Pi" | "Ei"
        ) || suffix.strip_prefix(['e', 'E']).is_some_and(exponent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_as_kubernetes_writes_them() {
        let parsed = quantities("cpu=500m,memory=2Gi,nvidia.com/gpu=1").unwrap();
        assert_eq!(parsed["memory"], Quantity("2Gi".into()));
        assert_eq!(parsed.len(), 3);
        for bad in ["cpu", "cpu=", "cpu=x", "=1", "cpu=1,", "memory=2GB"] {
            assert!(quantities(bad).is_err(), "{bad}");
        }
        assert!(quantities("memory=1e9").is_ok());
    }

    #[test]
    fn times() {
        assert_eq!(span("1h30m").unwrap(), Duration::from_secs(5400));
        for bad in ["", "0s", "5", "1d", "-1h"] {
            assert!(span(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_variable_without_a_value_is_the_one_of_here() {
        assert_eq!(variable("PATH").unwrap().value, std::env::var("PATH").unwrap());
        assert!(variable("AETHER_TEST_SURELY_UNSET").is_err());
        assert_eq!(variable("A=").unwrap().value, "");
    }
}

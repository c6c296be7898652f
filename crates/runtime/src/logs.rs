//! Logs on standard error: for people when it is a terminal, one JSON object a line otherwise.

use std::io::{IsTerminal, stderr};

use anyhow::{Context, anyhow};
use tracing_subscriber::{EnvFilter, fmt};

/// Names the environment variable with the level (`debug`) or the levels by module (`info,aether_engine=trace`).
pub const VARIABLE: &str = "AETHER_LOG";

/// What applies when the variable is unset or empty: changes of state, and nothing of the libraries but warnings.
pub const DEFAULT: &str = "info,h2=warn,hyper=warn,tower=warn,loona_hpack=warn,kube=warn";

/// Starts logging for the whole process.
///
/// # Errors
/// When the variable cannot be understood, or logging has been started before.
pub fn init() -> anyhow::Result<()> {
    let filter = filter(std::env::var(VARIABLE).ok().as_deref())?;
    let logs = fmt().with_env_filter(filter).with_writer(stderr);
    let started = if stderr().is_terminal() {
        logs.try_init()
    } else {
        logs.json().flatten_event(true).with_current_span(false).try_init()
    };
    started.map_err(|error| anyhow!("cannot start logging: {error}"))
}

fn filter(value: Option<&str>) -> anyhow::Result<EnvFilter> {
    let value = value.map(str::trim).filter(|value| !value.is_empty()).unwrap_or(DEFAULT);
    EnvFilter::try_new(value)
        .with_context(|| format!("{VARIABLE}='{value}' is no log level: use error, warn, info, debug or trace, also by module as in 'info,aether_engine=debug'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels() {
        assert_eq!(filter(Some("debug")).unwrap().to_string(), "debug");
        for unset in [None, Some(""), Some(" ")] {
            assert!(filter(unset).unwrap().to_string().contains("h2=warn"));
        }
        let message = filter(Some("info,aether=loud")).unwrap_err().to_string();
        assert!(message.contains(VARIABLE) && message.contains("loud"), "{message}");
    }
}

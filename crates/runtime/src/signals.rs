//! SIGTERM and SIGINT as a token; the second of them ends the process at once.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Cancelled at the first SIGTERM or SIGINT. At the second the process exits with 128 plus the signal's number, as if it
/// had not caught it.
///
/// # Errors
/// When the handlers cannot be installed.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn shutdown() -> io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        loop {
            let (name, kind) = tokio::select! {
                _ = terminate.recv() => ("SIGTERM", SignalKind::terminate()),
                _ = interrupt.recv() => ("SIGINT", SignalKind::interrupt()),
            };
            if cancelled.is_cancelled() {
                warn!("{name} again: exiting at once");
                std::process::exit(128 + kind.as_raw_value());
            }
            info!("{name} received");
            cancelled.cancel();
        }
    });
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, getpid, kill_process};

    /// Set in the process that this test starts of itself.
    const INNER: &str = "AETHER_TEST_SIGNALS_INNER";

    #[tokio::test]
    async fn the_first_asks_and_the_second_ends() {
        if std::env::var_os(INNER).is_some() {
            let token = shutdown().unwrap();
            kill_process(getpid(), Signal::TERM).unwrap();
            token.cancelled().await;
            println!("asked");
            kill_process(getpid(), Signal::INT).unwrap();
            return std::future::pending().await;
        }
        let name = "signals::tests::the_first_asks_and_the_second_ends";
        let output = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(INNER, "1")
            .output()
            .await
            .unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("asked"));
        assert_eq!(output.status.code(), Some(130));
    }
}

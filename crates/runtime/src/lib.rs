//! What every long-running part of Aether has in common, and nothing of what it is for:
//!
//! - [`tasks`]: tasks with a name and an owner, shut down in order and within a deadline;
//! - [`signals`]: the wish to end, as a token;
//! - [`logs`]: for people on a terminal, JSON elsewhere;
//! - [`readiness`]: which parts are not ready, and why;
//! - [`metrics`]: a table of metrics with labels from closed sets;
//! - [`http`]: `/healthz`, `/readyz` and `/metrics`;
//! - `certificate` (a feature): a serving certificate of our own authority, kept in a Secret, and with it `tls`, a server under such.
//!
//! A `main` reads: start logs, parse configuration, make [`tasks::Tasks`], spawn, and end with [`tasks::Tasks::run`].

#[cfg(feature = "certificate")]
pub mod certificate;
pub mod http;
pub mod logs;
pub mod metrics;
pub mod readiness;
pub mod signals;
pub mod tasks;
#[cfg(feature = "certificate")]
pub mod tls;

pub use metrics::Metrics;
pub use readiness::{Part, Readiness};
pub use tasks::{Stage, Tasks};

/// A clonable wish to end: cancelled once, never taken back.
pub use tokio_util::sync::CancellationToken;

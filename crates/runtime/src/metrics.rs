//! Metrics as a table: each has a name, a kind, a unit, a help text and labels whose values come from closed sets.
//!
//! Names follow the Prometheus conventions: prefix `aether_`, base units, and no suffix, since `_total` and the unit are
//! added here. Every combination of labels is there from the start with 0, so a missing series means a missing process.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter as PlainCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge as PlainGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

pub use prometheus_client::registry::Unit;

/// Only ever goes up.
pub type Counter = PlainCounter;
/// Goes up and down.
pub type Gauge = PlainGauge;
/// Seconds, in the buckets of [`SECONDS`].
pub type Timer = Histogram;

/// Upper bounds of the buckets of a timer: from the half millisecond of a mount to the minute of an import.
pub const SECONDS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// A label with all of its values. Declare one with [`label!`](crate::label).
pub trait Label: Copy + 'static {
    /// Its name in the exposition.
    const NAME: &'static str;
    /// Every value it can have.
    const ALL: &'static [Self];
    /// The text of this value.
    fn value(self) -> &'static str;
}

/// Declares an enum that is a closed set of values for a label.
///
/// ```
/// aether_runtime::label! {
///     /// How a call ended.
///     pub enum Outcome: "outcome" {
///         /// As asked.
///         Ok = "ok",
///         /// With an error.
///         Failed = "failed",
///     }
/// }
/// let metrics = aether_runtime::Metrics::new();
/// let calls = metrics.counters::<(Outcome,)>("aether_csi_calls", "CSI calls answered");
/// calls.of((Outcome::Ok,)).inc();
/// assert!(metrics.render().contains("aether_csi_calls_total{outcome=\"ok\"} 1"));
/// ```
#[macro_export]
macro_rules! label {
    ($(#[$attribute:meta])* $visibility:vis enum $name:ident: $label:literal {
        $($(#[$value_attribute:meta])* $value:ident = $text:literal),+ $(,)?
    }) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        $visibility enum $name { $($(#[$value_attribute])* $value),+ }

        impl $crate::metrics::Label for $name {
            const NAME: &'static str = $label;
            const ALL: &'static [Self] = &[$(Self::$value),+];
            fn value(self) -> &'static str {
                match self { $(Self::$value => $text),+ }
            }
        }
    };
}

type Pairs = Vec<(&'static str, &'static str)>;

/// The labels of one metric: a tuple of one or two [`Label`]s.
pub trait Labels: Copy + 'static {
    /// Their names, in order.
    fn names() -> Vec<&'static str>;
    /// Every combination.
    fn all() -> Vec<Self>;
    /// Names with values.
    fn pairs(self) -> Vec<(&'static str, &'static str)>;
}

impl<A: Label> Labels for (A,) {
    fn names() -> Vec<&'static str> {
        vec![A::NAME]
    }
    fn all() -> Vec<Self> {
        A::ALL.iter().map(|a| (*a,)).collect()
    }
    fn pairs(self) -> Pairs {
        vec![(A::NAME, self.0.value())]
    }
}

impl<A: Label, B: Label> Labels for (A, B) {
    fn names() -> Vec<&'static str> {
        vec![A::NAME, B::NAME]
    }
    fn all() -> Vec<Self> {
        A::ALL.iter().flat_map(|a| B::ALL.iter().map(|b| (*a, *b))).collect()
    }
    fn pairs(self) -> Pairs {
        vec![(A::NAME, self.0.value()), (B::NAME, self.1.value())]
    }
}

/// A metric for each combination of labels.
#[derive(Clone, Debug)]
pub struct Labelled<L, M> {
    metrics: Arc<BTreeMap<Pairs, M>>,
    labels: std::marker::PhantomData<fn(L)>,
}

impl<L: Labels, M> Labelled<L, M> {
    /// The metric of these labels.
    ///
    /// # Panics
    /// When a [`Label`] written by hand leaves this value out of its `ALL`; one declared with `label!` cannot.
    #[must_use]
    pub fn of(&self, labels: L) -> &M {
        self.metrics.get(&labels.pairs()).expect("every combination was made at the start")
    }
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// As exposed, without suffixes.
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// `seconds`, `bytes`, or nothing for a plain number.
    pub unit: &'static str,
    /// Names of its labels.
    pub labels: Vec<&'static str>,
    /// What it counts.
    pub help: String,
}

/// The metrics of a process. Clones are handles to the same table.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    registry: Registry,
    rows: Vec<Row>,
}

impl Metrics {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a counter.
    ///
    /// # Panics
    /// Like every method that adds: when the name is taken or is no metric name.
    #[must_use]
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.add("counter", name, None, vec![], help, Counter::default())
    }

    /// Adds a gauge.
    #[must_use]
    pub fn gauge(&self, name: &str, unit: Option<Unit>, help: &str) -> Gauge {
        self.add("gauge", name, unit, vec![], help, Gauge::default())
    }

    /// Adds a histogram of seconds.
    #[must_use]
    pub fn timer(&self, name: &str, help: &str) -> Timer {
        self.add("histogram", name, Some(Unit::Seconds), vec![], help, timer())
    }

    /// Adds a counter for each combination of labels.
    #[must_use]
    pub fn counters<L: Labels>(&self, name: &str, help: &str) -> Labelled<L, Counter> {
        self.family("counter", name, None, help, Counter::default)
    }

    /// Adds a gauge for each combination of labels.
    #[must_use]
    pub fn gauges<L: Labels>(&self, name: &str, unit: Option<Unit>, help: &str) -> Labelled<L, Gauge> {
        self.family("gauge", name, unit, help, Gauge::default)
    }

    /// Adds a histogram of seconds for each combination of labels.
    #[must_use]
    pub fn timers<L: Labels>(&self, name: &str, help: &str) -> Labelled<L, Timer> {
        self.family("histogram", name, Some(Unit::Seconds), help, timer)
    }

    /// The table, in the order of adding.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        self.inner().rows.clone()
    }

    /// The OpenMetrics text exposition.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.inner().registry).expect("writing to a string cannot fail");
        text
    }

    fn family<L, M>(
        &self,
        kind: &'static str,
        name: &str,
        unit: Option<Unit>,
        help: &str,
        new: fn() -> M,
    ) -> Labelled<L, M>
    where
        L: Labels,
        M: Clone,
        Family<Pairs, M, fn() -> M>: Metric,
    {
        let family =
            self.add(kind, name, unit, L::names(), help, Family::<Pairs, M, fn() -> M>::new_with_constructor(new));
        let metrics = L::all().into_iter().map(|labels| (labels.pairs(), family.get_or_create_owned(&labels.pairs())));
        Labelled { metrics: Arc::new(metrics.collect()), labels: std::marker::PhantomData }
    }

    fn add<M: Metric + Clone>(
        &self,
        kind: &'static str,
        name: &str,
        unit: Option<Unit>,
        labels: Vec<&'static str>,
        help: &str,
        metric: M,
    ) -> M {
        let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(name.starts_with("aether_") && name.chars().all(valid), "'{name}' is no metric name of ours");
        let mut inner = self.inner();
        assert!(inner.rows.iter().all(|row| row.name != name), "metric '{name}' is there already");
        let shown = match &unit {
            None => "",
            Some(Unit::Seconds) => "seconds",
            Some(Unit::Bytes) => "bytes",
            Some(unit) => panic!("metric '{name}': {unit:?} is no base unit"),
        };
        match unit {
            None => inner.registry.register(name, help.trim_end_matches('.'), metric.clone()),
            Some(unit) => inner.registry.register_with_unit(name, help.trim_end_matches('.'), unit, metric.clone()),
        }
        inner.rows.push(Row { name: name.to_owned(), kind, unit: shown, labels, help: help.to_owned() });
        metric
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn timer() -> Timer {
    Histogram::new(SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    label! {
        enum Call: "call" { Publish = "publish", Unpublish = "unpublish" }
    }
    label! {
        enum Outcome: "outcome" { Ok = "ok", Failed = "failed" }
    }

    #[test]
    fn every_combination_is_there_from_the_start() {
        let metrics = Metrics::new();
        let calls = metrics.counters::<(Call, Outcome)>("aether_calls", "Calls answered.");
        calls.of((Call::Unpublish, Outcome::Failed)).inc_by(3);
        let text = metrics.render();
        for line in [
            "# HELP aether_calls Calls answered.",
            "aether_calls_total{call=\"publish\",outcome=\"ok\"} 0",
            "aether_calls_total{call=\"publish\",outcome=\"failed\"} 0",
            "aether_calls_total{call=\"unpublish\",outcome=\"ok\"} 0",
            "aether_calls_total{call=\"unpublish\",outcome=\"failed\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn units_are_part_of_the_name() {
        let metrics = Metrics::new();
        metrics.gauge("aether_cache", Some(Unit::Bytes), "Bytes in the cache").set(7);
        metrics.timer("aether_mount", "Time to mount").observe(0.002);
        let text = metrics.render();
        assert!(text.contains("aether_cache_bytes 7\n"), "{text}");
        assert!(text.contains("aether_mount_seconds_bucket{le=\"0.001\"} 0\n"), "{text}");
        assert!(text.contains("aether_mount_seconds_bucket{le=\"0.0025\"} 1\n"), "{text}");
        assert_eq!(
            metrics.rows().iter().map(|row| (row.kind, row.unit)).collect::<Vec<_>>(),
            [("gauge", "bytes"), ("histogram", "seconds")]
        );
    }

    #[test]
    #[should_panic(expected = "there already")]
    fn names_are_unique() {
        let metrics = Metrics::new();
        let _ = (metrics.counter("aether_a", "a"), metrics.counter("aether_a", "b"));
    }

    #[test]
    #[should_panic(expected = "no metric name")]
    fn names_are_checked() {
        let _ = Metrics::new().counter("sessions", "Sessions");
    }
}

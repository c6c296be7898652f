//! The options of collection and scrub.

use std::{num::NonZeroU64, time::Duration};

use aether_cas::collect::Pace;
use clap::Args;

use super::Schedule;

/// When and how fast the node looks after its disk, or the bucket behind it; of several nodes, one collects at a time.
#[derive(Clone, Copy, Debug, Args)]
pub struct UpkeepArgs {
    /// How often what neither a pin nor a lease keeps is deleted, such as 30m, 6h or 1d; `off` for only when asked.
    #[arg(long, env = "AETHER_GC_INTERVAL", default_value = "6h", value_name = "TIME", value_parser = interval)]
    pub gc_interval: Interval,
    /// For how long a client may build on an upload or an answer "present" without pinning it; at least half of it is kept.
    #[arg(long, env = "AETHER_GC_LEASE", default_value = "24h", value_name = "TIME", value_parser = time)]
    pub gc_lease: Duration,
    /// Blobs deleted per second at most.
    #[arg(long, env = "AETHER_GC_RATE", default_value = "1000", value_name = "BLOBS")]
    pub gc_rate: NonZeroU64,
    /// How often everything is read and compared with its digests, from one begin to the next; `off` for never.
    #[arg(long, env = "AETHER_SCRUB_INTERVAL", default_value = "7d", value_name = "TIME", value_parser = interval)]
    pub scrub_interval: Interval,
    /// Bytes read per second at most, for that.
    #[arg(long, env = "AETHER_SCRUB_RATE", default_value = "20971520", value_name = "BYTES")]
    pub scrub_rate: NonZeroU64,
}

/// A time between two begins, if there is to be a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval(Option<Duration>);

impl UpkeepArgs {
    /// When to collect.
    pub fn collections(&self) -> Option<Schedule> {
        self.gc_interval.0.map(|interval| Schedule { interval, pace: Pace::new(Some(self.gc_rate)) })
    }

    /// When to scrub.
    pub fn scrubs(&self) -> Option<Schedule> {
        self.scrub_interval.0.map(|interval| Schedule { interval, pace: Pace::new(Some(self.scrub_rate)) })
    }
}

fn interval(text: &str) -> Result<Interval, String> {
    if text == "off" { Ok(Interval(None)) } else { time(text).map(|time| Interval(Some(time))) }
}

/// A time such as 90s, 15m, 6h or 7d.
fn time(text: &str) -> Result<Duration, String> {
    let units = [("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)];
    let seconds = units.iter().find_map(|(unit, seconds)| {
        let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(*seconds)
    });
    match seconds {
        Some(seconds @ 1..=315_360_000) => Ok(Duration::from_secs(seconds)),
        _ => Err("a time such as 90s, 15m, 6h or 7d is expected, of ten years at most".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(time("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(time("7d"), Ok(Duration::from_secs(604_800)));
        assert_eq!(interval("off"), Ok(Interval(None)));
        for bad in ["", "0s", "10", "h", "-1h", "1w", "11111111111111111111d", "4000d", "1.5h"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}

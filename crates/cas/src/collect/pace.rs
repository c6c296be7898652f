//! How fast things may be done in the background.

use std::{
    num::NonZeroU64,
    thread,
    time::{Duration, Instant},
};

/// A number of things per second, kept on the average; time that was not used is not saved up for more than a second.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    per_second: Option<NonZeroU64>,
    /// When the next thing is due.
    due: Option<Instant>,
}

impl Pace {
    /// At most so many per second; `None` is as fast as can be.
    pub fn new(per_second: Option<NonZeroU64>) -> Self {
        Self { per_second, due: None }
    }

    /// How many may be done in one step so that a step is no longer than a second.
    pub(crate) fn step(&self) -> usize {
        self.per_second.map_or(usize::MAX, |rate| usize::try_from(rate.get()).unwrap_or(usize::MAX))
    }

    /// How long to wait after `count` things were done.
    pub fn delay(&mut self, count: u64) -> Duration {
        let Some(rate) = self.per_second else { return Duration::ZERO };
        let now = Instant::now();
        let earliest = now.checked_sub(Duration::from_secs(1)).unwrap_or(now);
        let due = self.due.map_or(now, |due| due.max(earliest));
        #[expect(clippy::cast_precision_loss, reason = "a pace need not be exact")]
        let due = due + Duration::from_secs_f64(count as f64 / rate.get() as f64);
        self.due = Some(due);
        due.saturating_duration_since(now)
    }

    /// Waits as [`Pace::delay`] says.
    pub(crate) fn wait(&mut self, count: u64) {
        thread::sleep(self.delay(count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_kept_on_the_average() {
        let mut pace = Pace::new(NonZeroU64::new(1000));
        let begin = Instant::now();
        for _ in 0..20 {
            pace.wait(10);
        }
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(190) && took < Duration::from_secs(5), "{took:?}");
        assert_eq!(Pace::new(None).delay(1 << 40), Duration::ZERO);
    }
}

//! A bound on the bandwidth of what is fetched with nobody waiting for it.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::lock;

/// Lets so many bytes pass in a second, on average over contents: each comes as fast as it can, and the next waits until
/// it is paid for.
pub(crate) struct Pace {
    /// 0: no bound.
    bytes_per_second: u64,
    /// When what has passed is paid for.
    paid: Mutex<Instant>,
}

impl Pace {
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, paid: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` may pass.
    pub(crate) async fn pay(&self, bytes: u64) {
        if self.bytes_per_second == 0 {
            return;
        }
        let turn = {
            let mut paid = lock(&self.paid);
            // Time in which nothing passed is not saved up.
            let turn = (*paid).max(Instant::now());
            *paid = turn + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
            turn
        };
        sleep_until(turn).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_bound_holds_over_all_who_pay() {
        let pace = Pace::new(50_000);
        let all = |count| futures::future::join_all((0..count).map(|_| pace.pay(1000)));
        let began = Instant::now();
        all(10).await;
        assert!(began.elapsed() >= Duration::from_millis(180), "the last waits for nine: {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(200)).await;
        let began = Instant::now();
        all(6).await;
        assert!(began.elapsed() >= Duration::from_millis(100), "nothing is saved up: {:?}", began.elapsed());
        tokio::time::timeout(Duration::from_secs(10), Pace::new(0).pay(u64::MAX)).await.expect("no bound");
    }
}

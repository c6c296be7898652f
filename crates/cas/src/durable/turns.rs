//! Whose turn it is to do what one node does for all: collect, or scrub.
//!
//! A turn is a record in the bucket with the time in its name. It saves work and promises nothing: two nodes that take a turn
//! at the same moment may both do it.

use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::{Durable, name::PackName};
use crate::store::Result;

impl Durable {
    /// Whether this node is the first to do `task` in this interval. If not, how long to wait.
    ///
    /// # Errors
    /// Those of the bucket.
    pub async fn take_turn(&self, task: &str, interval: Duration) -> Result<Option<Duration>> {
        let folder = format!("turns/{task}");
        if let Some(last) = self.turns(&folder).await?.last() {
            let since = SystemTime::now().duration_since(last.time()).unwrap_or_default();
            if since < interval {
                return Ok(Some(interval - since));
            }
        }
        let mine = self.0.writer.name();
        self.0.bucket.put(&format!("{folder}/{mine}"), vec![Bytes::from_static(b"{}")]).await?;
        let turns = self.turns(&folder).await?;
        for old in turns.iter().filter(|turn| **turn < mine) {
            if mine.time().duration_since(old.time()).unwrap_or_default() < interval {
                // Somebody else was as fast.
                return Ok(Some(interval));
            }
            self.0.bucket.delete(&format!("{folder}/{old}")).await?;
        }
        Ok(None)
    }

    async fn turns(&self, folder: &str) -> Result<Vec<PackName>> {
        let listed = self.0.bucket.list(folder, None).await?;
        Ok(listed.iter().filter_map(|(name, _)| name.parse().ok()).collect())
    }
}

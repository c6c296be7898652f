//! What was learnt a short while ago, by the hash of a token: never more than so much, and never for longer than was said.

use std::collections::HashMap;
use std::time::Instant;

use aether_cas::Digest;

pub(super) struct Cache<V> {
    limit: usize,
    entries: HashMap<Digest, (Instant, V)>,
}

impl<V: Clone> Cache<V> {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, entries: HashMap::new() }
    }

    pub(super) fn get(&self, key: &Digest, now: Instant) -> Option<V> {
        self.entries.get(key).filter(|(until, _)| *until > now).map(|(_, value)| value.clone())
    }

    /// Whether this is known, or was until a short while ago.
    pub(super) fn remembers(&self, key: &Digest) -> bool {
        self.entries.contains_key(key)
    }

    pub(super) fn insert(&mut self, key: Digest, value: V, until: Instant, now: Instant) {
        if self.entries.len() >= self.limit {
            self.entries.retain(|_, (until, _)| *until > now);
        }
        if self.entries.len() >= self.limit {
            let first = self.entries.iter().min_by_key(|(_, (until, _))| *until).map(|(key, _)| *key);
            first.and_then(|key| self.entries.remove(&key));
        }
        self.entries.insert(key, (until, value));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_forgets_in_time_and_what_would_end_first_when_it_is_full() {
        let mut cache = Cache::new(2);
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let key = |name: &str| Digest::of(name.as_bytes());
        cache.insert(key("a"), 'a', at(10), now);
        cache.insert(key("b"), 'b', at(5), now);
        assert_eq!((cache.get(&key("a"), at(9)), cache.get(&key("a"), at(10))), (Some('a'), None));
        assert!(cache.remembers(&key("a")) && !cache.remembers(&key("c")));
        cache.insert(key("c"), 'c', at(20), now);
        assert_eq!((cache.get(&key("a"), now), cache.get(&key("b"), now)), (Some('a'), None));
        cache.insert(key("d"), 'd', at(30), at(11));
        assert_eq!((cache.entries.len(), cache.get(&key("c"), at(11))), (2, Some('c')));
    }
}

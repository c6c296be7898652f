//! Waiting for a state of an object: by a watch, with a deadline, saying what is waited for.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Resource;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watch_object};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until};

use crate::cluster::explain;
use crate::output::Progress;

/// What a look at the object says.
pub(crate) enum Verdict<T> {
    /// The state is reached.
    Done(T),
    /// Not yet; the text says what is missing.
    Waiting(String),
    /// Not yet, and it will not be unless somebody does something. Fails soon.
    Stuck(String),
    /// Never.
    Failed(anyhow::Error),
}

/// How long an object may look stuck: whoever works on it may not have seen yet what it depends on.
const STUCK_GRACE: Duration = Duration::from_secs(3);

/// Ends a wait that took too long, at one moment however many waits share it.
#[derive(Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    patience: Duration,
    grace: Duration,
}

impl Deadline {
    pub(crate) fn after(patience: Duration) -> Self {
        Self { at: Instant::now() + patience, patience, grace: STUCK_GRACE }
    }

    /// The end of a wait that did not reach its state.
    pub(crate) fn passed(&self, what: &str, missing: &str) -> anyhow::Error {
        let missing = if missing.is_empty() { String::new() } else { format!(": {missing}") };
        anyhow!(
            "waited {} for {what}{missing}. It goes on without this command; --timeout waits longer",
            crate::output::span(self.patience)
        )
    }
}

/// Watches the object `name` until `judge` is done with it. `judge` gets `None` while there is no such object.
pub(crate) async fn until<K, T>(
    api: Api<K>,
    name: &str,
    what: &str,
    deadline: Deadline,
    progress: &Progress,
    mut judge: impl FnMut(Option<&K>) -> Verdict<T>,
) -> Result<T>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let stream = watch_object(api, name).default_backoff();
    watch_until(stream, what, deadline, progress, |object| judge(object.as_ref())).await
}

/// The same for any stream of states.
pub(crate) async fn watch_until<S, T>(
    stream: impl Stream<Item = Result<S, watcher::Error>>,
    what: &str,
    deadline: Deadline,
    progress: &Progress,
    mut judge: impl FnMut(S) -> Verdict<T>,
) -> Result<T> {
    let mut stream = std::pin::pin!(stream);
    let mut missing = String::new();
    let mut stuck: Option<Instant> = None;
    loop {
        let give_up = stuck.unwrap_or(deadline.at).min(deadline.at);
        let next = tokio::select! {
            next = stream.next() => next,
            () = sleep_until(give_up) => {
                if stuck.is_some_and(|at| at < deadline.at) {
                    bail!("{missing}");
                }
                return Err(deadline.passed(what, &missing));
            }
        };
        match next {
            Some(Ok(state)) => match judge(state) {
                Verdict::Done(value) => return Ok(value),
                Verdict::Failed(error) => return Err(error),
                Verdict::Waiting(text) => {
                    stuck = None;
                    missing = text;
                }
                Verdict::Stuck(text) => {
                    stuck.get_or_insert_with(|| Instant::now() + deadline.grace);
                    missing = text;
                }
            },
            Some(Err(error)) => missing = tolerate(error, what)?,
            None => bail!("the watch of {what} ended: {missing}"),
        }
        progress.say(&format!("waiting for {what}{}{missing}", if missing.is_empty() { "" } else { ": " }));
    }
}

/// A watch is resumed after every error but those that trying again does not mend.
fn tolerate(error: watcher::Error, what: &str) -> Result<String> {
    let inner = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => error,
        watcher::Error::WatchError(status) => kube::Error::Api(status),
        other @ watcher::Error::NoResourceVersion => bail!("cannot watch {what}: {other}"),
    };
    let hopeless = matches!(&inner, kube::Error::Api(status) if matches!(status.code, 401 | 403 | 404));
    let explained = explain(inner, &format!("watch {what}"));
    if hopeless { Err(explained) } else { Ok(format!("{explained:#}")) }
}

/// A stream of all objects of a kind that `name` picks, as they are and as they change.
pub(crate) fn named<K>(api: Api<K>, wanted: impl Fn(&K) -> bool) -> impl Stream<Item = Result<K, watcher::Error>>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher::watcher(api, watcher::Config::default())
        .default_backoff()
        .applied_objects()
        .try_filter(move |object| std::future::ready(wanted(object)))
}

/// A condition in words: its reason, and its message if it has one.
pub(crate) fn in_words(condition: &Condition) -> String {
    if condition.message.is_empty() {
        condition.reason.clone()
    } else {
        format!("{} ({})", condition.message, condition.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;

    fn forever<S>(items: Vec<S>) -> impl Stream<Item = Result<S, watcher::Error>> {
        stream::iter(items).map(Ok).chain(stream::pending())
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_state() {
        let judge = |n| if n == 3 { Verdict::Done(n) } else { Verdict::Waiting(format!("only {n}")) };
        let got = watch_until(
            forever(vec![1, 2, 3]),
            "three",
            Deadline::after(Duration::from_secs(1)),
            &Progress::silent(),
            judge,
        )
        .await;
        assert_eq!(got.unwrap(), 3);
    }

    #[tokio::test]
    async fn a_wait_that_takes_too_long_says_what_is_missing() {
        let judge = |n: i32| Verdict::<()>::Waiting(format!("only {n}"));
        let deadline =
            Deadline { at: Instant::now() + Duration::from_millis(20), ..Deadline::after(Duration::from_secs(90)) };
        let error =
            watch_until(forever(vec![1]), "three", deadline, &Progress::silent(), judge).await.unwrap_err().to_string();
        assert!(error.contains("1m30s") && error.contains("three") && error.contains("only 1"), "{error}");
    }

    #[tokio::test]
    async fn stuck_fails_long_before_the_deadline_unless_it_moves_on() {
        let judge = |n| match n {
            1 => Verdict::Stuck("no such source".to_owned()),
            2 => Verdict::Waiting("importing".into()),
            _ => Verdict::Done(n),
        };
        // Long, so that a stall between two items is none of it.
        let grace = Duration::from_millis(700);
        let deadline = Deadline { grace, ..Deadline::after(Duration::from_secs(300)) };
        let error = watch_until(forever(vec![1]), "it", deadline, &Progress::silent(), judge).await.unwrap_err();
        assert_eq!(error.to_string(), "no such source");
        // It became unstuck, and then took longer than the grace.
        let slow = forever(vec![1, 2]).take(2).chain(stream::once(async {
            tokio::time::sleep(grace * 2).await;
            Ok(3)
        }));
        assert_eq!(watch_until(slow, "it", deadline, &Progress::silent(), judge).await.unwrap(), 3);
    }

    #[tokio::test]
    async fn forbidden_ends_a_wait_and_other_errors_do_not() {
        let status =
            |code| Err(watcher::Error::WatchError(kube::core::Status::failure("no", "").with_code(code).boxed()));
        let deadline = Deadline::after(Duration::from_secs(300));
        let stream = stream::iter(vec![status(500), Ok(1)]).chain(stream::pending());
        assert_eq!(watch_until(stream, "it", deadline, &Progress::silent(), Verdict::Done).await.unwrap(), 1);
        let stream = stream::iter(vec![status(403), Ok(1)]).chain(stream::pending());
        assert!(watch_until(stream, "it", deadline, &Progress::silent(), Verdict::Done).await.is_err());
    }
}

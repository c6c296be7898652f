//! Waiting for states: every wait says what it awaits, and on a time-out what it saw last.

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt, pin_mut};
use kube::{
    Api, Resource,
    runtime::{WatchStreamExt, watcher},
};
use serde::{Serialize, de::DeserializeOwned};

/// A kind of object that can be watched, and shown when a wait fails.
pub trait Watched: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + 'static {}

impl<K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + 'static> Watched for K {}

/// Asks until there is an answer. A failed question is asked again; the last failure is told at the time-out.
pub async fn until<T>(what: &str, limit: Duration, mut ask: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let begun = Instant::now();
    loop {
        let answer = ask().await;
        if let Ok(Some(answer)) = answer {
            return Ok(answer);
        }
        if begun.elapsed() > limit {
            let awaited = format!("waited {} s until {what}", limit.as_secs());
            return match answer {
                Err(error) => Err(error.context(awaited)),
                Ok(_) => bail!(awaited),
            };
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Watches an object until it is as wished, and gives it. It may not exist yet.
pub async fn object<K>(api: &Api<K>, name: &str, what: &str, limit: Duration, wished: impl Fn(&K) -> bool) -> Result<K>
where
    K: Watched,
{
    let mut last: Option<K> = None;
    let watch = watcher::watch_object(api.clone(), name).default_backoff();
    pin_mut!(watch);
    let found = tokio::time::timeout(limit, async {
        while let Some(event) = watch.next().await {
            // A refused or broken watch is begun again by the watcher.
            let Ok(Some(object)) = event else { continue };
            if wished(&object) {
                return Some(object);
            }
            last = Some(object);
        }
        None
    })
    .await;
    match found {
        Ok(Some(object)) => Ok(object),
        _ => {
            let seen = match last {
                Some(object) => serde_yaml::to_string(&object).context("cannot print the object")?,
                None => "it does not exist".to_owned(),
            };
            bail!("waited {} s until {} {name} {what}; last seen:\n{seen}", limit.as_secs(), K::kind(&()))
        }
    }
}

/// Watches until an object is gone.
pub async fn gone<K>(api: &Api<K>, name: &str, limit: Duration) -> Result<()>
where
    K: Watched,
{
    let mut last: Option<K> = None;
    let watch = watcher::watch_object(api.clone(), name).default_backoff();
    pin_mut!(watch);
    let gone = tokio::time::timeout(limit, async {
        loop {
            match watch.try_next().await {
                Ok(Some(None)) => return,
                Ok(Some(object)) => last = object,
                Ok(None) | Err(_) => {}
            }
        }
    });
    if gone.await.is_ok() {
        return Ok(());
    }
    bail!(
        "waited {} s until {} {name} is gone; last seen:\n{}",
        limit.as_secs(),
        K::kind(&()),
        serde_yaml::to_string(&last)?
    )
}

//! Tasks with a name, an owner and an end.
//!
//! Promises: a panic or an early end of an essential task ends the process, with the reason; a shutdown asks stage after
//! stage to end, and what is still there at the deadline is aborted and named.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// When a task is asked to end. A stage begins to end when every task of the one before has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Takes work in: servers, watchers. Ends first.
    Intake,
    /// Does the work: control loops, uploads.
    Work,
    /// What work leans on: leases, clients, health and metrics. Ends last.
    Foundation,
}

impl Stage {
    const ALL: [Stage; 3] = [Stage::Intake, Stage::Work, Stage::Foundation];
}

/// What a stage gets even when those before it have used up the deadline, so that leases are still given back.
const LEAST: Duration = Duration::from_millis(500);

/// A running task, as listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// What it does.
    pub name: String,
    /// On whose behalf: a part of the program, or an object.
    pub owner: String,
    /// When it will be asked to end.
    pub stage: Stage,
    /// When it was started.
    pub since: Instant,
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (of {})", self.name, self.owner)
    }
}

/// The tasks of a process. Clones are handles to the same set.
#[derive(Clone)]
pub struct Tasks(Arc<Inner>);

struct Inner {
    /// Cancelled when shutdown begins, whatever the stage.
    stopping: CancellationToken,
    stages: [CancellationToken; Stage::ALL.len()],
    running: Mutex<Running>,
    /// Tells that `running` has changed.
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct Running {
    next: u64,
    tasks: BTreeMap<u64, (Info, AbortHandle)>,
    /// The first reason an essential task gave for ending.
    failure: Option<anyhow::Error>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Tasks {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Tasks(Arc::new(Inner {
            stopping: CancellationToken::new(),
            stages: Stage::ALL.map(|_| CancellationToken::new()),
            running: Mutex::default(),
            changed: watch::Sender::new(()),
        }))
    }

    /// Cancelled when tasks of this stage are to end.
    #[must_use]
    pub fn token(&self, stage: Stage) -> CancellationToken {
        self.0.stages[stage as usize].clone()
    }

    /// Begins the shutdown, as a signal would.
    pub fn stop(&self) {
        self.0.stopping.cancel();
    }

    /// Starts a task without which the process is of no use: when it ends before shutdown, however it ends, the process
    /// shuts down and [`run`](Self::run) returns the reason. The future gets the token of its stage.
    pub fn essential<F>(&self, stage: Stage, name: &str, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.start(stage, name, "the process", true, task(self.token(stage)));
    }

    /// Starts a task on behalf of `owner`; an error or a panic is logged and concerns nobody else.
    pub fn spawn<F>(&self, stage: Stage, name: &str, owner: &str, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.start(stage, name, owner, false, task(self.token(stage)));
    }

    /// What runs now, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<Info> {
        self.running().tasks.values().map(|(info, _)| info.clone()).collect()
    }

    /// Waits for `shutdown`, [`stop`](Self::stop) or the end of an essential task, then ends all stages in order. What
    /// has not ended `deadline` after that is aborted; a stage that begins to end later still gets half a second.
    ///
    /// # Errors
    /// The reason an essential task ended for, or else the names of the tasks that had to be aborted.
    pub async fn run(&self, shutdown: CancellationToken, deadline: Duration) -> anyhow::Result<()> {
        tokio::select! {
            () = shutdown.cancelled() => info!("shutting down"),
            () = self.0.stopping.cancelled() => {}
        }
        self.0.stopping.cancel();
        let deadline = tokio::time::Instant::now() + deadline;
        let mut late = Vec::new();
        for stage in Stage::ALL {
            self.0.stages[stage as usize].cancel();
            let deadline = deadline.max(tokio::time::Instant::now() + LEAST);
            if tokio::time::timeout_at(deadline, self.drained(stage)).await.is_err() {
                late.extend(self.abort(stage));
            }
        }
        if let Some(failure) = self.running().failure.take() {
            return Err(failure);
        }
        if late.is_empty() {
            return Ok(());
        }
        Err(anyhow!("aborted at the end of the grace period: {}", late.join(", ")))
    }

    fn start(
        &self,
        stage: Stage,
        name: &str,
        owner: &str,
        essential: bool,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let info = Info { name: name.to_owned(), owner: owner.to_owned(), stage, since: Instant::now() };
        debug!(task = name, owner, "task started");
        let handle = tokio::spawn(task);
        let id = {
            let mut running = self.running();
            running.next += 1;
            let id = running.next;
            running.tasks.insert(id, (info.clone(), handle.abort_handle()));
            id
        };
        let tasks = self.clone();
        tokio::spawn(async move {
            let outcome = match handle.await {
                Ok(outcome) => outcome,
                Err(error) if error.is_cancelled() => Ok(()),
                Err(error) => Err(anyhow!("panicked: {}", message(error.into_panic()))),
            };
            tasks.ended(id, &info, essential, outcome);
        });
    }

    fn ended(&self, id: u64, info: &Info, essential: bool, outcome: anyhow::Result<()>) {
        let early = !self.0.stopping.is_cancelled();
        match &outcome {
            Ok(()) => debug!(task = info.name, owner = info.owner, "task ended"),
            Err(reason) if essential && early => error!(task = info.name, "essential task failed: {reason:#}"),
            Err(reason) => warn!(task = info.name, owner = info.owner, "task failed: {reason:#}"),
        }
        {
            let mut running = self.running();
            running.tasks.remove(&id);
            if essential && early {
                let reason = match outcome {
                    Ok(()) => anyhow!("{} ended, which it must not before shutdown", info.name),
                    Err(reason) => reason.context(format!("{} failed", info.name)),
                };
                running.failure.get_or_insert(reason);
            }
        }
        if essential && early {
            self.0.stopping.cancel();
        }
        self.0.changed.send_replace(());
    }

    /// Waits until no task of this stage, or of one before it, runs.
    async fn drained(&self, stage: Stage) {
        let mut changed = self.0.changed.subscribe();
        while self.running().tasks.values().any(|(info, _)| info.stage <= stage) {
            // The sender is in `self`, so it cannot be gone.
            let _ = changed.changed().await;
        }
    }

    /// Aborts and forgets what [`drained`](Self::drained) has waited for in vain.
    fn abort(&self, stage: Stage) -> Vec<String> {
        let mut running = self.running();
        let late = running.tasks.iter().filter(|(_, (info, _))| info.stage <= stage);
        let late: Vec<u64> = late.map(|(id, _)| *id).collect();
        let late = late.into_iter().filter_map(|id| running.tasks.remove(&id));
        late.map(|(info, handle)| {
            warn!(task = info.name, owner = info.owner, "task aborted: it did not end in time");
            handle.abort();
            info.to_string()
        })
        .collect()
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        // Nothing in here panics halfway through a change.
        self.0.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn message(panic: Box<dyn std::any::Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => panic.downcast::<&str>().map_or_else(|_| "without a message".into(), |message| (*message).into()),
    }
}

/// Runs blocking work on tokio's blocking threads; a panic becomes an error that names `what`.
///
/// # Errors
/// What `work` returns, or its panic.
pub async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.with_context(|| format!("{what}: the work panicked"))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use tokio::sync::oneshot;

    const LONG: Duration = Duration::from_secs(60);

    fn run(
        tasks: &Tasks,
        shutdown: &CancellationToken,
        deadline: Duration,
    ) -> impl Future<Output = anyhow::Result<()>> {
        let (tasks, shutdown) = (tasks.clone(), shutdown.clone());
        async move { tasks.run(shutdown, deadline).await }
    }

    #[tokio::test]
    async fn stages_end_in_order() {
        let tasks = Tasks::new();
        let order = Arc::new(Mutex::new(Vec::new()));
        for stage in [Stage::Foundation, Stage::Intake, Stage::Work] {
            let order = order.clone();
            tasks.spawn(stage, "step", "test", |token| async move {
                token.cancelled().await;
                for _ in 0..10 {
                    tokio::task::yield_now().await;
                }
                order.lock().unwrap().push(stage);
                Ok(())
            });
        }
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        run(&tasks, &shutdown, LONG).await.unwrap();
        assert_eq!(*order.lock().unwrap(), Stage::ALL);
        assert_eq!(tasks.list(), []);
    }

    #[tokio::test]
    async fn the_end_of_an_essential_task_is_the_end() {
        for (end, words) in
            [("return", "server ended"), ("error", "server failed: broken pipe"), ("panic", "panicked: at the disco")]
        {
            let tasks = Tasks::new();
            let (asked, others) = oneshot::channel();
            tasks.spawn(Stage::Work, "other", "test", |token| async move {
                token.cancelled().await;
                asked.send(()).unwrap();
                Ok(())
            });
            tasks.essential(Stage::Intake, "server", |_| async move {
                match end {
                    "return" => Ok(()),
                    "error" => Err(anyhow!("broken pipe")),
                    _ => panic!("at the disco"),
                }
            });
            let error = run(&tasks, &CancellationToken::new(), LONG).await.unwrap_err();
            assert!(format!("{error:#}").contains(words), "{error:#}");
            others.await.expect("the others were asked to end");
        }
    }

    #[tokio::test]
    async fn the_failure_of_another_task_is_its_own() {
        let tasks = Tasks::new();
        tasks.spawn(Stage::Work, "upload", "session a", |_| async { Err(anyhow!("no route")) });
        tasks.spawn(Stage::Work, "upload", "session b", |_| async { panic!("ouch") });
        let mut changed = tasks.0.changed.subscribe();
        while !tasks.list().is_empty() {
            changed.changed().await.unwrap();
        }
        tasks.stop();
        run(&tasks, &CancellationToken::new(), LONG).await.unwrap();
    }

    #[tokio::test]
    async fn what_does_not_end_is_aborted_and_named() {
        let tasks = Tasks::new();
        let (dropped, aborted) = oneshot::channel::<()>();
        tasks.spawn(Stage::Intake, "listen", "socket x", |_| async move {
            let _held = dropped;
            pending().await
        });
        let (ended, last) = oneshot::channel();
        tasks.spawn(Stage::Foundation, "lease", "leader", |token| async move {
            token.cancelled().await;
            ended.send(()).unwrap();
            Ok(())
        });
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        let error = run(&tasks, &shutdown, Duration::from_millis(50)).await.unwrap_err();
        assert!(error.to_string().contains("listen (of socket x)"), "{error}");
        aborted.await.expect_err("the future was dropped");
        last.await.expect("later stages are still asked");
    }

    #[tokio::test]
    async fn an_error_during_shutdown_is_no_failure() {
        let tasks = Tasks::new();
        tasks.essential(Stage::Intake, "server", |token| async move {
            token.cancelled().await;
            Err(anyhow!("connection reset"))
        });
        tasks.stop();
        run(&tasks, &CancellationToken::new(), LONG).await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_in_blocking_work_is_an_error() {
        let error = blocking::<()>("hash", || panic!("no")).await.unwrap_err();
        assert!(error.to_string().contains("hash"), "{error}");
        assert_eq!(blocking("sum", || Ok(1 + 1)).await.unwrap(), 2);
    }
}

//! Control loops: each acts on the objects that concern sessions this node holds, and leaves all others alone. A loop
//! keeps no memory; what it finds in the API, in the records and in the engine tells it where it was.

mod automatic;
mod checkpoints;
mod forks;
mod housekeeping;
mod restores;
mod sessions;
mod sources;

use std::sync::Arc;

use aether_runtime::{CancellationToken, Stage, Tasks};

use crate::cluster;
use crate::driver::Driver;

pub(crate) use self::checkpoints::stamp_all_kept;

#[cfg(test)]
pub(crate) use self::{
    automatic::checkpoint_if_changed,
    forks::reconcile as fork,
    housekeeping::{drop_snapshots, drop_unrecorded, tidy},
    restores::reconcile as restore,
    sessions::{reconcile as session, release},
};

/// Starts the watches and, when they are up to date, the loops. Each is a named task.
pub(crate) fn start(driver: &Arc<Driver>, tasks: &Tasks) {
    macro_rules! watch {
        ($cache:ident) => {
            let watching = driver.clone();
            tasks.essential(Stage::Intake, concat!("watch ", stringify!($cache)), move |stop| async move {
                watching.cluster.$cache.follow(stop).await;
                Ok(())
            });
        };
    }
    watch!(sessions);
    watch!(checkpoints);
    watch!(restores);
    watch!(sources);

    macro_rules! control {
        ($name:literal, $cache:ident, $reconcile:path) => {
            let controlling = driver.clone();
            tasks.essential(Stage::Work, $name, move |stop| async move {
                if ready(&controlling, &stop).await {
                    cluster::run($name, &controlling.cluster.$cache, controlling.clone(), $reconcile, stop).await;
                }
                Ok(())
            });
        };
    }
    control!("sessions", sessions, sessions::reconcile);
    control!("forks", sessions, forks::reconcile);
    control!("releases", sessions, sessions::release);
    control!("checkpoints", checkpoints, checkpoints::reconcile);
    control!("restores", restores, restores::reconcile);
    control!("restores of checkpoints", checkpoints, restores::wake);
    control!("sources", sources, sources::reconcile);

    macro_rules! periodic {
        ($name:literal, $run:path) => {
            let running = driver.clone();
            tasks.essential(Stage::Work, $name, move |stop| async move {
                if ready(&running, &stop).await {
                    $run(running, stop).await;
                }
                Ok(())
            });
        };
    }
    periodic!("automatic checkpoints", automatic::run);
    periodic!("housekeeping", housekeeping::run);
}

/// Waits for the first lists; `false` when the process ends before.
async fn ready(driver: &Driver, stop: &CancellationToken) -> bool {
    tokio::select! {
        biased;
        () = stop.cancelled() => false,
        // It also comes back when the watches have ended.
        () = driver.cluster.ready() => !stop.is_cancelled() && !driver.stop.is_cancelled(),
    }
}

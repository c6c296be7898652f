//! StoreAdmin.Collect: a collection that somebody asked for, and what it says meanwhile.

use std::{
    num::NonZeroU64,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use aether_cas::{
    Blob, StoreError,
    collect::{Pace, Phase, Progress, Verdict},
};
use aether_proto::store::v1::{
    BlobVerdict, CollectProgress, CollectRequest, CollectResponse, blob_verdict, collect_progress,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{admin::incomplete, status};
use crate::{
    tiered::TieredStore,
    upkeep::{self, UpkeepMetrics},
};

/// Answers that wait to be sent.
const ANSWERS: usize = 4;
/// How often it is said how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// Verdicts in one answer.
const VERDICTS: usize = 1000;

/// What a collection says.
pub(crate) type Answers = ReceiverStream<Result<CollectResponse, Status>>;

/// Begins a collection, or a dry run, which ends when nobody listens any more.
pub(crate) fn answer(store: TieredStore, request: CollectRequest, metrics: UpkeepMetrics) -> Result<Answers, Status> {
    if request.explain && !request.dry_run {
        return Err(Status::invalid_argument("explain needs dry_run"));
    }
    let (sender, receiver) = mpsc::channel(ANSWERS);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = run(&store, &request, &metrics, &sender) {
            let _ = sender.blocking_send(Err(error));
        }
    });
    Ok(ReceiverStream::new(receiver))
}

fn run(
    store: &TieredStore,
    request: &CollectRequest,
    metrics: &UpkeepMetrics,
    answers: &mpsc::Sender<Result<CollectResponse, Status>>,
) -> Result<(), Status> {
    let send = |answer| match answers.blocking_send(Ok(answer)) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    let mut told = (Phase::Done, Instant::now());
    let mut watch = |progress: &Progress| {
        let last = progress.phase == Phase::Done;
        if answers.is_closed() {
            return ControlFlow::Break(());
        }
        if last || (told.0 == progress.phase && told.1.elapsed() < TELL_EVERY) {
            return ControlFlow::Continue(());
        }
        told = (progress.phase, Instant::now());
        send(CollectResponse { progress: Some(self::progress(progress)), verdicts: Vec::new() })
    };
    let done = if request.dry_run {
        let mut verdicts = Vec::new();
        let mut tell = |blob, verdict| {
            if !request.explain {
                return ControlFlow::Continue(());
            }
            verdicts.push(self::verdict(blob, verdict));
            if verdicts.len() < VERDICTS {
                return ControlFlow::Continue(());
            }
            send(CollectResponse { progress: None, verdicts: std::mem::take(&mut verdicts) })
        };
        let done = store.explain(&mut tell, &mut watch).map_err(refused)?;
        if !verdicts.is_empty() {
            let _ = send(CollectResponse { progress: None, verdicts });
        }
        done
    } else {
        upkeep::collect(store, Pace::new(NonZeroU64::new(request.rate)), metrics, &mut watch).map_err(refused)?
    };
    let _ = send(CollectResponse { progress: Some(progress(&done)), verdicts: Vec::new() });
    Ok(())
}

/// A store that cannot be collected, or is already.
fn refused(error: StoreError) -> Status {
    match error {
        StoreError::Invalid(reason) | StoreError::Busy(reason) => Status::failed_precondition(reason),
        other => status(other),
    }
}

fn progress(progress: &Progress) -> CollectProgress {
    use collect_progress::Phase as Said;
    let phase = match progress.phase {
        Phase::Mark => Said::Mark,
        Phase::Condemn => Said::Condemn,
        Phase::Adopt => Said::Adopt,
        Phase::Rescue => Said::Rescue,
        Phase::Sweep => Said::Sweep,
        Phase::Reclaim => Said::Reclaim,
        Phase::Done => Said::Done,
    };
    CollectProgress {
        phase: phase.into(),
        directories: progress.directories,
        examined_blobs: progress.examined.blobs,
        examined_bytes: progress.examined.bytes,
        condemned_blobs: progress.condemned.blobs,
        condemned_bytes: progress.condemned.bytes,
        rescued_blobs: progress.rescued,
        deleted_blobs: progress.deleted.blobs,
        deleted_bytes: progress.deleted.bytes,
        incomplete_roots: progress.incomplete.iter().cloned().map(|i| incomplete(i.root, i.problem)).collect(),
        protected_until: progress.protected_until.unwrap_or(0),
    }
}

fn verdict(blob: Blob, verdict: Verdict) -> BlobVerdict {
    let verdict = match verdict {
        Verdict::Pinned(root) => blob_verdict::Verdict::KeptBy(super::admin::root(root)),
        Verdict::Leased(until) => blob_verdict::Verdict::LeasedUntil(until),
        Verdict::Condemned(since) => blob_verdict::Verdict::CondemnedSince(since),
        Verdict::Unreachable => blob_verdict::Verdict::Unreachable(true),
    };
    BlobVerdict { blob: blob.to_string(), verdict: Some(verdict) }
}

//! Whether to import now, later, or to follow the import that runs. Pure.

use std::time::Duration;

use aether_api::AetherSource;
use aether_api::names::REFRESH_ANNOTATION;
use kube::ResourceExt;

use crate::objects;

/// The pause after the first failed import; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(15);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30 * 60);
/// When an import has failed.
pub(super) const FAILED_PHASE: &str = "Failed";
/// When an import has succeeded.
pub(super) const DONE_PHASE: &str = "Done";

/// What to do about a source's imports.
#[derive(Debug, PartialEq)]
pub(super) enum Plan {
    /// Import, after so many failures in a row.
    Start { failures: u32 },
    /// An import runs.
    Follow,
    /// Nothing, for so long or until something changes.
    Rest(Option<Duration>),
}

/// Digest of where the source comes from: an import is worth repeating when it changes.
pub(super) fn origin(source: &AetherSource) -> String {
    let mut spec = source.spec.clone();
    if let Some(git) = &mut spec.git {
        // What commits are pushed by changes nothing of what is imported.
        git.push_secret_ref = None;
    }
    let parts = match &spec.s3 {
        // Without it the digest stays what it was when there was no such kind: nothing is imported again.
        None => serde_json::json!([spec.git, spec.claim, spec.empty]),
        Some(s3) => serde_json::json!({ "s3": s3 }),
    };
    objects::short_hash(&[&parts.to_string()])
}

/// Decides from what is known. `secret` is the resource version of the Secret, if one is named and exists.
pub(super) fn plan(source: &AetherSource, secret: Option<&str>) -> Plan {
    let Some(import) = source.status.as_ref().and_then(|status| status.import.as_ref()) else {
        return Plan::Start { failures: 0 };
    };
    if import.origin != origin(source) {
        return Plan::Start { failures: 0 };
    }
    let Some(finished) = &import.finished else { return Plan::Follow };
    if source.annotations().get(REFRESH_ANNOTATION) != import.requested.as_ref() {
        return Plan::Start { failures: import.failures };
    }
    let rested = objects::since(finished);
    let pause = if import.phase == FAILED_PHASE {
        if import.secret_version.as_deref() != secret {
            return Plan::Start { failures: import.failures };
        }
        Some(pause(import.failures))
    } else {
        source.spec.refresh.map(Duration::from)
    };
    match pause {
        Some(pause) if rested >= pause => Plan::Start { failures: import.failures },
        Some(pause) => Plan::Rest(Some(pause - rested)),
        None => Plan::Rest(None),
    }
}

/// How long to wait after that many failures in a row.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1))).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::source::{EmptySource, Import};
    use aether_api::{AetherSourceSpec, AetherSourceStatus};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn source(phase: &str, finished_ago: Option<i64>, failures: u32) -> AetherSource {
        let mut source = AetherSource::new(
            "s",
            AetherSourceSpec { empty: Some(EmptySource {}), revisions_to_keep: 1, ..Default::default() },
        );
        let import = Import {
            job: "j".into(),
            job_uid: None,
            generation: 1,
            requested: None,
            origin: origin(&source),
            secret_version: Some("7".into()),
            failures,
            phase: phase.into(),
            files: 0,
            bytes: 0,
            started: objects::now(),
            finished: finished_ago
                .map(|seconds| Time(jiff::Timestamp::now() - jiff::SignedDuration::from_secs(seconds))),
        };
        source.status = Some(AetherSourceStatus { import: Some(import), ..Default::default() });
        source
    }

    #[test]
    fn an_import_is_made_once_and_followed() {
        let fresh = AetherSource { status: None, ..source("Done", None, 0) };
        assert_eq!(plan(&fresh, Some("7")), Plan::Start { failures: 0 });
        assert_eq!(plan(&source("Cloning", None, 0), Some("7")), Plan::Follow);
        assert_eq!(plan(&source(DONE_PHASE, Some(5), 0), Some("7")), Plan::Rest(None));
        assert_eq!(
            plan(&source(DONE_PHASE, Some(5), 0), Some("8")),
            Plan::Rest(None),
            "a Secret that works may change"
        );
    }

    #[test]
    fn a_changed_origin_or_annotation_asks_for_another() {
        let mut changed = source("Cloning", None, 3);
        changed.spec.empty = None;
        changed.spec.claim = Some(Default::default());
        assert_eq!(plan(&changed, Some("7")), Plan::Start { failures: 0 }, "also while one runs");
        let mut annotated = source(DONE_PHASE, Some(5), 0);
        annotated.annotations_mut().insert(REFRESH_ANNOTATION.into(), "now".into());
        assert_eq!(plan(&annotated, Some("7")), Plan::Start { failures: 0 });
        let mut other = source(DONE_PHASE, Some(5), 0);
        other.spec.allowed_namespaces = vec!["*".into()];
        assert_eq!(plan(&other, Some("7")), Plan::Rest(None), "who may use it is no reason to import it again");
    }

    #[test]
    fn a_failed_one_is_tried_again_ever_more_slowly_or_when_the_secret_changes() {
        assert!(
            matches!(plan(&source(FAILED_PHASE, Some(5), 1), Some("7")), Plan::Rest(Some(left)) if left <= FIRST_PAUSE)
        );
        assert_eq!(plan(&source(FAILED_PHASE, Some(5), 1), Some("8")), Plan::Start { failures: 1 });
        assert_eq!(plan(&source(FAILED_PHASE, Some(16), 1), Some("7")), Plan::Start { failures: 1 });
        assert!(matches!(plan(&source(FAILED_PHASE, Some(16), 2), Some("7")), Plan::Rest(Some(_))));
        assert_eq!(pause(40), LONGEST_PAUSE);
    }

    #[test]
    fn a_refresh_interval_counts_from_the_last_import() {
        let mut source = source(DONE_PHASE, Some(30), 0);
        source.spec.refresh = Some(Duration::from_secs(60).into());
        assert!(matches!(plan(&source, None), Plan::Rest(Some(left)) if left <= Duration::from_secs(30)));
        source.spec.refresh = Some(Duration::from_secs(20).into());
        assert_eq!(plan(&source, None), Plan::Start { failures: 0 });
    }
}

//! The rules of a session's spec, said again for API servers that drop CEL rules.

use aether_api::AetherSessionSpec;

/// The first rule that the spec breaks, for people.
pub(super) fn violation(spec: &AetherSessionSpec) -> Option<String> {
    let starts = [spec.source.is_some(), spec.checkpoint.is_some(), spec.session.is_some()];
    match starts.into_iter().filter(|said| *said).count() {
        0 => return Some("spec says not what to start from: say exactly one of source, checkpoint and session".into()),
        1 => {}
        _ => {
            return Some(
                "spec says more than one thing to start from: say exactly one of source, checkpoint and session".into(),
            );
        }
    }
    if spec.source.as_ref().is_some_and(|source| source.name.is_empty()) {
        return Some("spec.source.name is empty: name an AetherSource".into());
    }
    if [&spec.checkpoint, &spec.session].into_iter().flatten().any(String::is_empty) {
        return Some("the checkpoint or session to start from has an empty name".into());
    }
    if spec.time_to_live.is_some_and(|time| time.is_negative()) {
        return Some("spec.timeToLive is negative: say a duration such as 8h".into());
    }
    if let Some(limits) = &spec.limits {
        if let Err(wrong) = limits.parsed_bytes() {
            return Some(format!("spec.limits.bytes: {wrong}"));
        }
        if limits.inodes.is_some_and(|inodes| inodes < 1) {
            return Some("spec.limits.inodes is under 1: leave it out for no limit".into());
        }
    }
    if let Some(checkpoints) = &spec.checkpoints {
        if checkpoints.interval.is_negative() || std::time::Duration::from(checkpoints.interval).as_secs() < 1 {
            return Some("spec.checkpoints.interval is under a second: say a duration such as 5m".into());
        }
        if checkpoints.keep < 1 {
            return Some("spec.checkpoints.keep is 0: keep at least one automatic checkpoint".into());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::session::{Limits, SourceReference};

    #[test]
    fn exactly_one_start_is_asked_for() {
        let source = SourceReference { name: "linux".into(), ..Default::default() };
        let mut spec = AetherSessionSpec { source: Some(source), ..Default::default() };
        assert_eq!(violation(&spec), None);
        spec.checkpoint = Some("before".into());
        assert!(violation(&spec).unwrap().contains("more than one"));
        assert!(
            violation(&AetherSessionSpec::default()).unwrap().contains("exactly one of source, checkpoint and session")
        );
        let limited = |bytes: &str, inodes| AetherSessionSpec {
            limits: Some(Limits { bytes: Some(bytes.into()), inodes }),
            checkpoint: Some("before".into()),
            ..Default::default()
        };
        assert_eq!(violation(&limited("10Gi", Some(1))), None);
        assert!(violation(&limited("10GB", None)).unwrap().contains("spec.limits.bytes"));
        assert!(violation(&limited("1Gi", Some(0))).unwrap().contains("spec.limits.inodes"));
        let empty = AetherSessionSpec { session: Some(String::new()), ..Default::default() };
        assert!(violation(&empty).unwrap().contains("empty name"));
    }
}

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
    use aether_api::session::SourceReference;

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
        let empty = AetherSessionSpec { session: Some(String::new()), ..Default::default() };
        assert!(violation(&empty).unwrap().contains("empty name"));
    }
}

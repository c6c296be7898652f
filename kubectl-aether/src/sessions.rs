//! `create` and `fork`: new sessions, and waiting until pods can mount them.

use std::collections::BTreeMap;
use std::time::Instant;

use aether_api::conditions::{self, reason};
use aether_api::session::{Consistency, SourceReference};
use aether_api::{AetherSession, AetherSessionSpec};
use anyhow::{Result, anyhow, bail};
use futures::{StreamExt, stream};
use kube::ResourceExt;
use kube::api::PostParams;

use crate::cli::{Create, Fork};
use crate::cluster::{Cluster, explain};
use crate::output::{self, Progress};
use crate::wait::{self, Deadline, Verdict, in_words};

/// Creates of one `fork --count` that are under way at once.
const CREATES_AT_ONCE: usize = 16;

pub(crate) async fn create(cluster: &Cluster, args: &Create) -> Result<()> {
    let spec = AetherSessionSpec {
        source: args.source.as_ref().map(|source| SourceReference {
            namespace: source.namespace.clone(),
            name: source.name.clone(),
            revision: args.revision.clone(),
        }),
        checkpoint: args.checkpoint.clone(),
        owner: args.owner,
        checkpoints: args.checkpoints.clone(),
        time_to_live: args.ttl,
        ..Default::default()
    };
    let start = Instant::now();
    let deadline = Deadline::after(args.patience.timeout);
    let mut session = post(cluster, AetherSession::new(&args.name, spec)).await?;
    if !args.no_wait {
        let what = format!("session {} to be bound", args.name);
        let progress = Progress::new(cluster.quiet);
        session =
            wait::until(cluster.api(), &args.name, &what, deadline, &progress, |session| bound(&args.name, session))
                .await?;
    }
    if let Some(format) = args.print.output {
        return output::object(&session, format);
    }
    if args.no_wait {
        return output::print(&format!("session {} created\n", args.name));
    }
    let claim =
        session.status.as_ref().and_then(|status| status.claim_name.clone()).unwrap_or_else(|| args.name.clone());
    output::print(&format!(
        "session {} is ready after {:.1} s: mount claim {claim} (from {})\n",
        args.name,
        start.elapsed().as_secs_f64(),
        crate::get::origin(&session, false)
    ))
}

pub(crate) async fn fork(cluster: &Cluster, args: &Fork) -> Result<()> {
    let parent = cluster.session(&args.parent).await?;
    let deadline = Deadline::after(args.patience.timeout);
    let wanted: Vec<AetherSession> = fork_names(args.name.as_deref(), args.count)
        .into_iter()
        .map(|name| {
            let spec = AetherSessionSpec {
                session: Some(args.parent.clone()),
                owner: args.owner,
                // Else a fork would be a way around them.
                limits: parent.spec.limits.clone(),
                time_to_live: args.ttl,
                ..Default::default()
            };
            let mut session = AetherSession::new(name.as_deref().unwrap_or_default(), spec);
            if name.is_none() {
                session.metadata.name = None;
                session.metadata.generate_name = Some(format!("{}-", args.parent));
            }
            session
        })
        .collect();
    let mut created: BTreeMap<String, AetherSession> = BTreeMap::new();
    let mut errors = Vec::new();
    let posts =
        stream::iter(wanted).map(|session| post(cluster, session)).buffered(CREATES_AT_ONCE).collect::<Vec<_>>();
    for result in posts.await {
        match result {
            Ok(session) => drop(created.insert(session.name_any(), session)),
            Err(error) => errors.push(error),
        }
    }
    if !args.no_wait && !created.is_empty() {
        let waited = wait_all(cluster, &args.parent, &mut created, deadline).await;
        errors.extend(waited.err());
    }
    let mut forks: Vec<AetherSession> = created.into_values().collect();
    forks.sort_by_key(|fork| natural(&fork.name_any()));
    match args.print.output {
        Some(format) if forks.len() == 1 => output::object(&forks[0], format)?,
        Some(format) => output::objects(&forks, format)?,
        None => output::print(&forks.iter().map(|fork| sentence(&args.parent, fork) + "\n").collect::<String>())?,
    }
    let failed = errors.len();
    match errors.into_iter().next() {
        Some(error) if failed == 1 => Err(error),
        Some(error) => Err(error.context(format!("{failed} of {} forks failed; the first", args.count))),
        None => Ok(()),
    }
}

/// The names that were asked for; `None` where the cluster makes one.
fn fork_names(name: Option<&str>, count: u16) -> Vec<Option<String>> {
    match (name, count) {
        (Some(name), 1) => vec![Some(name.into())],
        (Some(name), _) => (1..=count).map(|number| Some(format!("{name}-{number}"))).collect(),
        (None, _) => vec![None; count.into()],
    }
}

/// Orders `a-2` before `a-10`.
fn natural(name: &str) -> (String, u64, String) {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (stem, number) = name.split_at(name.len() - digits);
    (stem.into(), number.parse().unwrap_or(0), name.into())
}

/// Waits for all of `created` by one watch of the namespace; each is replaced by its newest state.
async fn wait_all(
    cluster: &Cluster,
    parent: &str,
    created: &mut BTreeMap<String, AetherSession>,
    deadline: Deadline,
) -> Result<()> {
    let what = match created.len() {
        1 => format!("session {} to be bound", created.keys().next().map_or("", String::as_str)),
        count => format!("{count} forks of session {parent} to be bound"),
    };
    let uids: std::collections::HashSet<_> = created.values().filter_map(ResourceExt::uid).collect();
    let mut left: BTreeMap<String, String> = created.keys().map(|name| (name.clone(), String::new())).collect();
    let stream = wait::named(cluster.api::<AetherSession>(), move |session: &AetherSession| {
        session.uid().is_some_and(|uid| uids.contains(&uid))
    });
    let mut failed = None;
    let progress = Progress::new(cluster.quiet);
    wait::watch_until(stream, &what, deadline, &progress, |session: AetherSession| {
        let name = session.name_any();
        let verdict = bound(&name, Some(&session));
        created.insert(name.clone(), session);
        match verdict {
            Verdict::Done(_) => drop(left.remove(&name)),
            Verdict::Failed(error) => {
                left.remove(&name);
                failed.get_or_insert(error);
            }
            Verdict::Waiting(text) | Verdict::Stuck(text) => drop(left.insert(name, text)),
        }
        match left.iter().next() {
            None => Verdict::Done(()),
            Some((name, text)) if left.len() == 1 => Verdict::Waiting(format!("session {name}: {text}")),
            Some((name, text)) => Verdict::Waiting(format!("{} to go, session {name}: {text}", left.len())),
        }
    })
    .await?;
    failed.map_or(Ok(()), Err)
}

/// Creates the session.
async fn post(cluster: &Cluster, session: AetherSession) -> Result<AetherSession> {
    let name = session
        .metadata
        .name
        .clone()
        .unwrap_or_else(|| format!("{}…", session.metadata.generate_name.as_deref().unwrap_or_default()));
    cluster.api().create(&PostParams::default(), &session).await.map_err(|error| match error {
        kube::Error::Api(status) if status.is_already_exists() => anyhow!(
            "session {name} exists already in namespace {}: take another name, or `kubectl aether delete {name}`",
            cluster.namespace
        ),
        error => explain(error, &format!("create session {name}")),
    })
}

/// Whether pods can mount the session.
fn bound(name: &str, session: Option<&AetherSession>) -> Verdict<AetherSession> {
    let Some(session) = session else { return Verdict::Failed(anyhow!("session {name} was deleted meanwhile")) };
    if session.metadata.deletion_timestamp.is_some() {
        return Verdict::Failed(anyhow!("session {name} is being deleted"));
    }
    let Some(status) = &session.status else {
        return Verdict::Waiting("no operator has taken it up yet".into());
    };
    let Some(ready) = conditions::get(&status.conditions, conditions::READY) else {
        return Verdict::Waiting(status.phase.clone().unwrap_or_else(|| "no state yet".into()));
    };
    if ready.status == "True" {
        return Verdict::Done(session.clone());
    }
    let text = in_words(ready);
    if status.phase.as_deref() == Some("Failed") {
        return Verdict::Failed(anyhow!("session {name} failed: {text}. `kubectl aether delete {name}` removes it"));
    }
    if NEEDS_A_PERSON.contains(&ready.reason.as_str()) {
        return Verdict::Stuck(format!(
            "session {name} cannot go on: {text}. It is kept and goes on when that is mended; `kubectl aether delete {name}` removes it"
        ));
    }
    Verdict::Waiting(text)
}

/// Reasons that nothing but a change by somebody takes away.
const NEEDS_A_PERSON: [&str; 7] = [
    reason::INVALID,
    reason::SOURCE_NOT_FOUND,
    reason::REVISION_NOT_FOUND,
    reason::NAMESPACE_NOT_ALLOWED,
    reason::CHECKPOINT_NOT_FOUND,
    reason::SESSION_NOT_FOUND,
    reason::NAME_TAKEN,
];

fn sentence(parent: &str, fork: &AetherSession) -> String {
    let name = fork.name_any();
    let Some(forked) = fork.status.as_ref().and_then(|status| status.forked_from.as_ref()) else {
        return format!("session {name} created as a fork of {parent}");
    };
    let consistency = match forked.consistency {
        Consistency::PointInTime => "",
        Consistency::PerFile => ", each file for itself",
    };
    let frozen = forked
        .frozen_microseconds
        .map_or_else(String::new, |frozen| format!(", pods stood still for {}", output::frozen(frozen)));
    format!("session {name} forked from {parent} as of {}{consistency}{frozen}", forked.time.0.strftime("%H:%M:%SZ"))
}

/// Fails when pods will never mount the session, and says why. One that is not ready yet will do: what is asked of it
/// waits for it.
pub(crate) fn refuse_hopeless(session: &AetherSession) -> Result<()> {
    match bound(&session.name_any(), Some(session)) {
        Verdict::Done(_) | Verdict::Waiting(_) => Ok(()),
        Verdict::Failed(error) => Err(error),
        Verdict::Stuck(text) => bail!("session {} is not ready: {text}", session.name_any()),
    }
}

#[cfg(test)]
mod tests {
    use aether_api::AetherSessionStatus;
    use aether_api::conditions::Wanted;

    use super::*;

    fn with(phase: &str, wanted: Wanted) -> AetherSession {
        let mut session = AetherSession::new("a", AetherSessionSpec::default());
        let mut status = AetherSessionStatus { phase: Some(phase.into()), ..Default::default() };
        conditions::set(&mut status.conditions, wanted, None);
        session.status = Some(status);
        session
    }

    #[test]
    fn bound_follows_the_conditions() {
        let ready = with("Bound", Wanted::yes(conditions::READY, reason::READY, ""));
        assert!(matches!(bound("a", Some(&ready)), Verdict::Done(_)));
        let waiting = with("Pending", Wanted::no(conditions::READY, reason::WAITING_FOR_CLAIM, "not bound"));
        assert!(matches!(bound("a", Some(&waiting)), Verdict::Waiting(text) if text.contains("not bound")));
        let stuck = with("Pending", Wanted::no(conditions::READY, reason::SOURCE_NOT_FOUND, "no source tools/linux"));
        assert!(
            matches!(bound("a", Some(&stuck)), Verdict::Stuck(text) if text.contains("tools/linux") && text.contains("delete a"))
        );
        let failed = with("Failed", Wanted::no(conditions::READY, reason::INVALID, "bad"));
        assert!(matches!(bound("a", Some(&failed)), Verdict::Failed(_)));
        assert!(matches!(bound("a", None), Verdict::Failed(_)));
        assert!(
            refuse_hopeless(&waiting).is_ok() && refuse_hopeless(&stuck).is_err() && refuse_hopeless(&failed).is_err()
        );
    }

    #[test]
    fn names_of_forks() {
        assert_eq!(fork_names(Some("x"), 1), [Some("x".to_owned())]);
        assert_eq!(fork_names(Some("x"), 2), [Some("x-1".to_owned()), Some("x-2".to_owned())]);
        assert_eq!(fork_names(None, 2), [None, None]);
        let mut names = ["a-10", "a-2", "a"].map(String::from);
        names.sort_by_key(|name| natural(name));
        assert_eq!(names, ["a", "a-2", "a-10"]);
    }
}

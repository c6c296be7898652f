//! A source: imported by a Job that reports how far it is; a wrong one says what is wrong.

use aether_api::{AetherSource, conditions};
use anyhow::{Context, Result, ensure};

use super::{Story, limit};

/// The Kubernetes source tree, from a git server, into the store.
pub(super) async fn import_a_repository(story: &Story) -> Result<String> {
    story.source().await?;
    let source: AetherSource = story.get_in(&story.site().platform_namespace, "kubernetes").await?;
    let status = source.status.context("a Ready source has a status")?;
    let revision = status.revisions.first().context("a Ready source has a revision")?;
    let (_, tracked) = story.tracked().await?;
    ensure!(revision.files >= tracked, "{} files imported, git has {tracked}", revision.files);
    story.figure("import_files", revision.files);
    story.figure("import_bytes", revision.bytes);
    story.figure("import_ms", revision.milliseconds);
    Ok(format!(
        "{} files, {:.0} MB in {:.1} s ({}), revision {}",
        revision.files,
        revision.bytes as f64 / 1e6,
        revision.milliseconds as f64 / 1e3,
        revision.commit.as_deref().map_or("no commit", |commit| &commit[..12.min(commit.len())]),
        revision.name
    ))
}

/// A wrong URL, ref, Secret and password each end in a condition that says which.
pub(super) async fn wrong_sources(story: &Story) -> Result<String> {
    let (git, locked) = (&story.site().git_url, &story.site().locked_git_url);
    story
        .kubectl(&[
            "create",
            "secret",
            "generic",
            "wrong-password",
            "--type=kubernetes.io/basic-auth",
            "--from-literal=username=agent",
            "--from-literal=password=wrong",
        ])
        .await?;
    let cases = [
        (
            "wrong-url",
            format!("{{url: \"{git}/no-such.git\"}}"),
            conditions::reason::REPOSITORY_NOT_FOUND,
            "no-such.git",
        ),
        (
            "wrong-ref",
            format!("{{url: \"{git}/kubernetes.git\", ref: no-such-branch}}"),
            conditions::reason::REF_NOT_FOUND,
            "no-such-branch",
        ),
        (
            "no-secret",
            format!("{{url: \"{git}/kubernetes.git\", secretRef: {{name: no-such-secret}}}}"),
            conditions::reason::SECRET_NOT_FOUND,
            "no-such-secret",
        ),
        (
            "wrong-password",
            format!("{{url: \"{locked}/kubernetes.git\", secretRef: {{name: wrong-password}}}}"),
            conditions::reason::AUTHENTICATION_FAILED,
            "secretRef",
        ),
    ];
    for (name, source, _, _) in &cases {
        story.apply(&format!("{{apiVersion: aether.dev/v1alpha1, kind: AetherSource, metadata: {{name: {name}}}, spec: {{git: {source}}}}}")).await?;
    }
    for (name, _, reason, named) in &cases {
        let source: AetherSource = story
            .until(name, &format!("has Ready=False with reason {reason}"), limit(90), |source: &AetherSource| {
                let conditions = source.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
                conditions::get(conditions, conditions::READY)
                    .is_some_and(|ready| ready.status == "False" && ready.reason == *reason)
            })
            .await?;
        let conditions = source.status.context("a status")?.conditions;
        let message = &conditions::get(&conditions, conditions::READY).context("Ready")?.message;
        ensure!(message.contains(named), "{name}: the message does not name {named}: {message}");
    }
    Ok("wrong URL, ref, Secret and password are told apart".into())
}

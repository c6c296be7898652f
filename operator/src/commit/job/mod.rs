//! The Job of one commit to git: in the source's namespace, where alone the push Secret is, with no power over the cluster.

use std::collections::BTreeMap;

use aether_api::commit::History;
use aether_api::names::{COMMIT_ANNOTATION, COMMIT_UID_LABEL, SOURCE_LABEL};
use aether_api::source::GitSource;
use aether_api::{AetherCommit, AetherSource};
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, EnvVar, PodSecurityContext, PodSpec, PodTemplateSpec, SecretVolumeSource,
    SecurityContext, Volume, VolumeMount,
};
use kube::ResourceExt;
use kube::core::ObjectMeta;

use crate::config::Config;
use crate::source::admission;
use crate::{objects, pod};

/// The container that commits.
pub(super) const CONTAINER: &str = "committer";
/// Where the Secret's keys are, as files.
const SECRET_DIRECTORY: &str = "/var/run/aether/secret";
/// The committer runs as nobody in particular.
const UNPRIVILEGED: i64 = 65532;
/// A commit that takes longer is stuck, in seconds.
const DEADLINE: i64 = 3600;
/// How long a Job and its log stay, in seconds, where the cluster cleans up Jobs.
const KEPT: i32 = 24 * 3600;

/// The name of the Job: the same when asked twice, so that two operators make one.
pub(super) fn name(commit: &AetherCommit) -> String {
    let retries = commit.status.as_ref().and_then(|status| status.retries).unwrap_or(0);
    objects::derived_name(&commit.name_any(), "commit", &[&commit.uid().unwrap_or_default(), &retries.to_string()])
}

/// The Secret by which this repository takes a push.
fn secret(git: &GitSource) -> Option<&str> {
    git.push_secret_ref.as_ref().or(git.secret_ref.as_ref()).map(|reference| reference.name.as_str())
}

/// The Job that commits. `None` for a commit whose status does not say all of it yet, or that goes elsewhere.
pub(super) fn job(
    commit: &AetherCommit,
    source: &AetherSource,
    authority: Option<&str>,
    config: &Config,
) -> Option<Job> {
    let (git, target) = (source.spec.git.as_ref()?, commit.spec.target.git.as_ref()?);
    let status = commit.status.as_ref()?;
    let base = status.base.as_ref()?;
    let (name, namespace) = (commit.name_any(), commit.namespace().unwrap_or_default());
    let mut arguments: Vec<String> = vec!["git".into()];
    let mut option = |option: &str, value: &str| arguments.extend([option.to_owned(), value.to_owned()]);
    option("--url", &git.url);
    option("--branch", &target.branch);
    option("--base-commit", base.commit.as_deref()?);
    option("--base-root", &base.root);
    option("--root", status.root.as_deref()?);
    option("--commit-uid", &commit.uid()?);
    let asked = commit.spec.requested_by.as_ref()?;
    let (author, email) = match &target.author {
        Some(author) => (author.name.clone(), author.email.clone()),
        None => (line(&asked.username), address(&asked.username)),
    };
    if let Some(time) = commit.creation_timestamp() {
        option("--date", &time.0.to_string());
    }
    option("--history", if target.history == History::Keep { "keep" } else { "squash" });
    let mut trailer = |key: &str, value: &str| {
        if !line(value).is_empty() {
            arguments.push(format!("--trailer={key}={}", line(value)));
        }
    };
    if let Some(session) = &status.session {
        trailer("Aether-Session", &format!("{namespace}/{session}"));
    }
    if let Some(checkpoint) = &status.checkpoint {
        trailer("Aether-Checkpoint", &format!("{namespace}/{checkpoint}"));
    }
    trailer("Aether-Request", &format!("{namespace}/{name}"));
    trailer("Requested-by", &asked.username);
    for approver in status.approvals.iter().flat_map(|approvals| &approvals.by) {
        trailer("Approved-by", approver);
    }
    // With the sign of equality, for a message that begins like an option.
    arguments.extend([
        format!("--message={}", target.message),
        format!("--author-name={author}"),
        format!("--author-email={email}"),
    ]);
    arguments.extend(target.rebase.then(|| "--rebase".into()));
    arguments.extend(git.lfs.then(|| "--lfs".into()));

    let mut volumes =
        vec![Volume { name: "work".into(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() }];
    let mut mounts = vec![VolumeMount { name: "work".into(), mount_path: "/tmp".into(), ..VolumeMount::default() }];
    let of_source = source.namespace().unwrap_or_default();
    if let Some(secret) = secret(git) {
        arguments.extend(["--secret-dir".into(), SECRET_DIRECTORY.into()]);
        arguments.extend(["--secret-name".into(), format!("{of_source}/{secret}")]);
        let files = SecretVolumeSource {
            secret_name: Some(secret.into()),
            default_mode: Some(0o440),
            ..SecretVolumeSource::default()
        };
        volumes.push(Volume { name: "secret".into(), secret: Some(files), ..Volume::default() });
        mounts.push(VolumeMount {
            name: "secret".into(),
            mount_path: SECRET_DIRECTORY.into(),
            read_only: Some(true),
            ..VolumeMount::default()
        });
    }
    arguments.extend(["--store".into(), config.nodes().join(",")]);
    let container = Container {
        name: CONTAINER.into(),
        image: Some(config.committer_image.clone()?),
        image_pull_policy: Some(config.image_pull_policy.name().into()),
        args: Some(arguments.iter().map(|argument| argument.replace('$', "$$")).collect()),
        // git wants a home; the root file system is read-only.
        env: Some(vec![EnvVar { name: "HOME".into(), value: Some("/tmp".into()), value_from: None }]),
        volume_mounts: Some(mounts),
        security_context: Some(SecurityContext { read_only_root_filesystem: Some(true), ..pod::confined(&[]) }),
        // If it dies without a word of its own, its last log lines say why.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        ..Container::default()
    };
    let labels = BTreeMap::from([
        (SOURCE_LABEL.to_owned(), objects::label_value(&source.name_any())),
        (COMMIT_UID_LABEL.to_owned(), commit.uid()?),
    ]);
    let pod = PodSpec {
        restart_policy: Some("Never".into()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            // Makes the Secret's files readable.
            fs_group: Some(UNPRIVILEGED),
            ..pod::runs_as(UNPRIVILEGED, UNPRIVILEGED)
        }),
        containers: vec![container],
        volumes: Some(volumes),
        ..PodSpec::default()
    };
    let mut template = PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels.clone()), ..ObjectMeta::default() }),
        spec: Some(pod),
    };
    if let Some(authority) = authority {
        admission::admit(&mut template, admission::COMMITTER, authority.to_owned());
    }
    Some(Job {
        metadata: ObjectMeta {
            name: Some(self::name(commit)),
            namespace: source.namespace(),
            labels: Some(labels),
            annotations: Some(BTreeMap::from([(COMMIT_ANNOTATION.to_owned(), format!("{namespace}/{name}"))])),
            // An owner must be of the same namespace.
            owner_references: Some(objects::owned_by(source)),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            // The operator tries again, with pauses, and says so in the status.
            backoff_limit: Some(0),
            active_deadline_seconds: Some(DEADLINE),
            ttl_seconds_after_finished: Some(KEPT),
            template,
            ..JobSpec::default()
        }),
        status: None,
    })
}

/// One line of what may be any text, without what git keeps for itself.
fn line(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && !['<', '>'].contains(c)).collect::<String>().trim().to_owned()
}

/// An address of a user whose name may be one.
fn address(username: &str) -> String {
    let name = line(username).replace(' ', "-");
    if name.contains('@') { name } else { format!("{}@users.aether.invalid", name.replace(':', ".")) }
}

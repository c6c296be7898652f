//! The Job of one commit: in the source's namespace, where alone its Secrets and claims are, with no power over the cluster.
//! Here is what all of them share; what each kind of target asks of the program is in [`git`] and [`export`].

mod export;
mod git;

use std::collections::BTreeMap;

use aether_api::conditions::reason;
use aether_api::names::{COMMIT_ANNOTATION, COMMIT_UID_LABEL, SOURCE_LABEL};
use aether_api::{AetherCommit, AetherSource};
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, EnvVar, PersistentVolumeClaim, PodSecurityContext, PodSpec, PodTemplateSpec,
    Secret, SecretVolumeSource, SecurityContext, Volume, VolumeMount,
};
use kube::core::ObjectMeta;
use kube::{Client, ResourceExt};

use crate::config::Config;
use crate::error::Result;
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

/// What one commit asks of the program, beside where the store is.
#[derive(Default)]
struct Work {
    arguments: Vec<String>,
    /// The Secret of the source's namespace by which the target is opened.
    secret: Option<String>,
    /// What is mounted beside it.
    volume: Option<(Volume, VolumeMount)>,
}

/// The name of the Job: the same when asked twice, so that two operators make one.
pub(super) fn name(commit: &AetherCommit) -> String {
    let retries = commit.status.as_ref().and_then(|status| status.retries).unwrap_or(0);
    objects::derived_name(&commit.name_any(), "commit", &[&commit.uid().unwrap_or_default(), &retries.to_string()])
}

/// What the Job would wait for in vain, as a reason and a message: a Secret or a claim that is not there.
pub(super) async fn lacks(job: &Job, client: &Client) -> Result<Option<(&'static str, String)>> {
    let namespace = job.namespace().unwrap_or_default();
    let volumes =
        job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()?.volumes.as_deref()).unwrap_or_default();
    for volume in volumes {
        let secret = volume.secret.as_ref().and_then(|secret| secret.secret_name.as_deref());
        if let Some(name) = secret
            && objects::get::<Secret>(&objects::namespaced(client, &namespace), name).await?.is_none()
        {
            let message = format!("Secret {name} does not exist in namespace {namespace}: create it, and it goes on");
            return Ok(Some((reason::SECRET_NOT_FOUND, message)));
        }
        let claim = volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.as_str());
        if let Some(name) = claim
            && objects::get::<PersistentVolumeClaim>(&objects::namespaced(client, &namespace), name).await?.is_none()
        {
            let message = format!(
                "PersistentVolumeClaim {name} does not exist in namespace {namespace}: create it, and it goes on"
            );
            return Ok(Some((reason::CLAIM_NOT_FOUND, message)));
        }
    }
    Ok(None)
}

/// The Job that commits. `None` for a commit whose status does not say all of it yet, or that takes no Job.
pub(super) fn job(
    commit: &AetherCommit,
    source: &AetherSource,
    authority: Option<&str>,
    config: &Config,
) -> Option<Job> {
    let target = &commit.spec.target;
    let work = match (&target.git, &target.export) {
        (Some(target), _) => git::work(commit, target, source)?,
        (_, Some(target)) => export::work(commit, target, source)?,
        _ => return None,
    };
    let Work { mut arguments, secret, volume } = work;
    // Or else the kubelet goes through all of a claim each time, and gives every file there to this group.
    let policy = volume.as_ref().map(|_| "OnRootMismatch".to_owned());
    let (mut volumes, mut mounts): (Vec<_>, Vec<_>) = [scratch()].into_iter().chain(volume).unzip();
    if let Some(secret) = secret {
        arguments.extend(["--secret-dir".into(), SECRET_DIRECTORY.into()]);
        arguments.extend(["--secret-name".into(), format!("{}/{secret}", source.namespace().unwrap_or_default())]);
        let (volume, mount) = keys(secret);
        volumes.push(volume);
        mounts.push(mount);
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
            // Makes the Secret's files readable, and a claim's root writable.
            fs_group: Some(UNPRIVILEGED),
            fs_group_change_policy: policy,
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
    let of = format!("{}/{}", commit.namespace().unwrap_or_default(), commit.name_any());
    Some(Job {
        metadata: ObjectMeta {
            name: Some(self::name(commit)),
            namespace: source.namespace(),
            labels: Some(labels),
            annotations: Some(BTreeMap::from([(COMMIT_ANNOTATION.to_owned(), of)])),
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

/// Where the program writes what is on its way.
fn scratch() -> (Volume, VolumeMount) {
    (
        Volume { name: "work".into(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() },
        VolumeMount { name: "work".into(), mount_path: "/tmp".into(), ..VolumeMount::default() },
    )
}

/// The keys of a Secret, as files that only this pod sees.
fn keys(secret: String) -> (Volume, VolumeMount) {
    let files =
        SecretVolumeSource { secret_name: Some(secret), default_mode: Some(0o440), ..SecretVolumeSource::default() };
    (
        Volume { name: "secret".into(), secret: Some(files), ..Volume::default() },
        VolumeMount {
            name: "secret".into(),
            mount_path: SECRET_DIRECTORY.into(),
            read_only: Some(true),
            ..VolumeMount::default()
        },
    )
}

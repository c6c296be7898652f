//! The Job of one import: in the source's namespace, beside its Secret, with no power over the cluster.

use std::collections::BTreeMap;

use aether_api::AetherSource;
use aether_api::names::SOURCE_LABEL;
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, EnvVar, PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec,
    PodTemplateSpec, SecretVolumeSource, SecurityContext, Volume, VolumeMount,
};
use kube::ResourceExt;
use kube::core::ObjectMeta;

use crate::config::Config;
use crate::{objects, pod};

/// The container that imports.
pub(super) const CONTAINER: &str = "importer";
/// Where the Secret's keys are, as files.
const SECRET_DIRECTORY: &str = "/var/run/aether/secret";
/// Where the claim is.
const CLAIM_DIRECTORY: &str = "/source";
/// The importer runs as nobody in particular.
const UNPRIVILEGED: i64 = 65532;
/// An import that takes longer is stuck, in seconds.
const DEADLINE: i64 = 12 * 3600;
/// How long a Job and its log stay, in seconds, where the cluster cleans up Jobs. The next import removes it too.
const KEPT: i32 = 24 * 3600;

/// The name of the import that follows `previous`: the same when asked twice, so that no import is started twice.
pub(super) fn name(source: &AetherSource, origin: &str, previous: &str) -> String {
    objects::derived_name(&source.name_any(), "import", &[&source.uid().unwrap_or_default(), origin, previous])
}

/// The Job that imports the source, unless it is still in the state that is known: a commit, or the listing of a bucket.
pub(super) fn job(source: &AetherSource, name: String, known: Option<&str>, config: &Config) -> Job {
    let mut arguments: Vec<String> = Vec::new();
    let mut volumes =
        vec![Volume { name: "work".into(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() }];
    let mut mounts = vec![VolumeMount { name: "work".into(), mount_path: "/tmp".into(), ..VolumeMount::default() }];
    let mut user = UNPRIVILEGED;
    let mut capabilities: &[&str] = &[];
    if let Some(git) = &source.spec.git {
        arguments.extend(["git".into(), "--url".into(), git.url.clone()]);
        if let Some(reference) = &git.reference {
            arguments.extend(["--ref".into(), reference.clone()]);
        }
        if let Some(depth) = git.depth {
            arguments.extend(["--depth".into(), depth.to_string()]);
        }
        arguments.extend(git.submodules.then(|| "--submodules".into()));
        arguments.extend(git.lfs.then(|| "--lfs".into()));
        arguments.extend(known.iter().flat_map(|commit| ["--unless-commit".into(), (*commit).into()]));
    } else if let Some(s3) = &source.spec.s3 {
        arguments.extend(["s3".into(), "--bucket".into(), s3.bucket.clone()]);
        for (option, value) in [("--prefix", &s3.prefix), ("--endpoint", &s3.endpoint), ("--region", &s3.region)] {
            arguments.extend(value.iter().flat_map(|value| [option.into(), value.clone()]));
        }
        arguments.extend(known.iter().flat_map(|listing| ["--unless-listing".into(), (*listing).into()]));
    } else if let Some(claim) = &source.spec.claim {
        let path = claim.path.as_deref().filter(|path| !path.is_empty());
        arguments.extend([
            "claim".into(),
            "--path".into(),
            path.map_or(CLAIM_DIRECTORY.into(), |path| format!("{CLAIM_DIRECTORY}/{path}")),
        ]);
        let volume = PersistentVolumeClaimVolumeSource { claim_name: claim.claim_name.clone(), read_only: Some(true) };
        volumes.push(Volume { name: "claim".into(), persistent_volume_claim: Some(volume), ..Volume::default() });
        mounts.push(VolumeMount {
            name: "claim".into(),
            mount_path: CLAIM_DIRECTORY.into(),
            read_only: Some(true),
            ..VolumeMount::default()
        });
        // Files of any owner and mode are to be read. DAC_READ_SEARCH would say no more than that, but the `baseline`
        // policy of Pod Security allows only this one; the mount is read-only.
        user = 0;
        capabilities = &["DAC_OVERRIDE"];
    } else {
        arguments.push("empty".into());
    }
    if let Some((_, secret)) = source.spec.secret() {
        arguments.extend(["--secret-dir".into(), SECRET_DIRECTORY.into()]);
        arguments
            .extend(["--secret-name".into(), format!("{}/{}", source.namespace().unwrap_or_default(), secret.name)]);
        let files = SecretVolumeSource {
            secret_name: Some(secret.name.clone()),
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
    // All its nodes, so that a content lies where who reads it looks first.
    arguments.extend(["--store".into(), config.nodes().join(",")]);
    let container = Container {
        name: CONTAINER.into(),
        image: Some(config.importer_image.clone()),
        image_pull_policy: Some(config.image_pull_policy.name().into()),
        args: Some(arguments.iter().map(|argument| argument.replace('$', "$$")).collect()),
        // git wants a home; the root file system is read-only.
        env: Some(vec![EnvVar { name: "HOME".into(), value: Some("/tmp".into()), value_from: None }]),
        volume_mounts: Some(mounts),
        security_context: Some(SecurityContext {
            read_only_root_filesystem: Some(true),
            ..pod::confined(capabilities)
        }),
        // If it dies without a word of its own, its last log lines say why.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        ..Container::default()
    };
    let labels = BTreeMap::from([(SOURCE_LABEL.into(), objects::label_value(&source.name_any()))]);
    let pod = PodSpec {
        restart_policy: Some("Never".into()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(PodSecurityContext {
            // Makes the Secret's files readable; a claim's files must stay as they are.
            fs_group: (user != 0).then_some(user),
            ..pod::runs_as(user, user)
        }),
        containers: vec![container],
        volumes: Some(volumes),
        ..PodSpec::default()
    };
    Job {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: source.namespace(),
            labels: Some(labels.clone()),
            owner_references: Some(objects::owned_by(source)),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            // The operator tries again, with pauses, and says so in the status.
            backoff_limit: Some(0),
            active_deadline_seconds: Some(DEADLINE),
            ttl_seconds_after_finished: Some(KEPT),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(labels), ..ObjectMeta::default() }),
                spec: Some(pod),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::AetherSourceSpec;
    use aether_api::source::{ClaimSource, GitSource, S3Source, SecretReference};
    use clap::Parser;

    fn config() -> Config {
        Config::parse_from([
            "aether-operator",
            "--store",
            "http://s",
            "--importer-image",
            "i:1",
            "--worker-image",
            "w",
            "--command-image",
            "t",
        ])
    }

    fn source(spec: AetherSourceSpec) -> AetherSource {
        let mut source = AetherSource::new("linux", spec);
        source.metadata.namespace = Some("platform".into());
        source.metadata.uid = Some("u-1".into());
        source
    }

    fn container(job: &Job) -> &Container {
        &job.spec.as_ref().unwrap().template.spec.as_ref().unwrap().containers[0]
    }

    #[test]
    fn a_git_import_gets_the_secret_as_files_and_nothing_in_its_arguments() {
        let git = GitSource {
            url: "https://example.org/linux".into(),
            reference: Some("v6".into()),
            depth: Some(3),
            submodules: true,
            secret_ref: Some(SecretReference { name: "key".into() }),
            ..Default::default()
        };
        let source = source(AetherSourceSpec { git: Some(git), ..Default::default() });
        let job = job(&source, "linux-import-1".into(), Some("c0ffee"), &config());
        let arguments = container(&job).args.clone().unwrap().join(" ");
        assert_eq!(
            arguments,
            "git --url https://example.org/linux --ref v6 --depth 3 --submodules --unless-commit c0ffee --secret-dir /var/run/aether/secret --secret-name platform/key --store http://s"
        );
        let pod = job.spec.unwrap().template.spec.unwrap();
        assert_eq!(pod.automount_service_account_token, Some(false));
        assert_eq!(pod.security_context.unwrap().run_as_non_root, Some(true));
        assert!(
            pod.volumes.unwrap().iter().any(|volume| volume
                .secret
                .as_ref()
                .is_some_and(|secret| secret.secret_name.as_deref() == Some("key")))
        );
    }

    #[test]
    fn a_bucket_is_told_as_it_is_and_its_key_comes_as_files() {
        let s3 = S3Source {
            bucket: "models".into(),
            prefix: Some("team/$a".into()),
            endpoint: Some("https://s3.example.org".into()),
            region: Some("eu-1".into()),
            secret_ref: Some(SecretReference { name: "key".into() }),
        };
        let secret = "--secret-dir /var/run/aether/secret --secret-name platform/key --store http://s";
        let named = source(AetherSourceSpec { s3: Some(s3), ..Default::default() });
        let first = job(&named, "n".into(), Some("f00d"), &config());
        assert_eq!(
            container(&first).args.clone().unwrap().join(" "),
            format!(
                "s3 --bucket models --prefix team/$$a --endpoint https://s3.example.org --region eu-1 --unless-listing f00d {secret}"
            )
        );
        let public = S3Source { bucket: "models".into(), ..Default::default() };
        let public = source(AetherSourceSpec { s3: Some(public), ..Default::default() });
        let job = job(&public, "n".into(), None, &config());
        assert_eq!(container(&job).args.clone().unwrap().join(" "), "s3 --bucket models --store http://s");
        let pod = job.spec.unwrap().template.spec.unwrap();
        assert!(pod.volumes.unwrap().iter().all(|volume| volume.secret.is_none()));
    }

    #[test]
    fn an_import_knows_all_nodes_of_the_store() {
        let config = Config { store_nodes: vec!["http://n0".into(), "http://n1".into()], ..config() };
        let job = job(&source(AetherSourceSpec::default()), "n".into(), None, &config);
        assert_eq!(container(&job).args.clone().unwrap().join(" "), "empty --store http://n0,http://n1");
    }

    #[test]
    fn a_claim_is_mounted_read_only_and_read_in_full() {
        let claim = ClaimSource { claim_name: "data".into(), path: Some("tree".into()) };
        let job =
            job(&source(AetherSourceSpec { claim: Some(claim), ..Default::default() }), "n".into(), None, &config());
        assert_eq!(container(&job).args.as_ref().unwrap()[..3], ["claim", "--path", "/source/tree"]);
        let mount = container(&job).volume_mounts.as_ref().unwrap().iter().find(|mount| mount.name == "claim").unwrap();
        assert_eq!(mount.read_only, Some(true));
        assert_eq!(
            container(&job).security_context.as_ref().unwrap().capabilities.as_ref().unwrap().add.as_ref().unwrap(),
            &["DAC_OVERRIDE"]
        );
    }

    #[test]
    fn the_next_import_has_another_name_and_asking_twice_the_same() {
        let source = source(Default::default());
        assert_eq!(name(&source, "o", "a"), name(&source, "o", "a"));
        assert_ne!(name(&source, "o", "a"), name(&source, "o", "b"));
    }
}

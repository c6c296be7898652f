//! What lets the Job of an import or a commit into the store: a token of its own account for the store's audience, and the
//! store's authority.
//!
//! The account is of the source's namespace, where the Job runs. Whoever may create pods there can run them under it and
//! have such a token too; so the store lets an import bring contents and ask which are missing, and read nothing, and lets commits read
//! only from the namespaces that the chart is told.

use std::collections::BTreeMap;
use std::path::Path;

use aether_credentials::AUDIENCE;
use k8s_openapi::api::core::v1::{
    DownwardAPIProjection, DownwardAPIVolumeFile, ObjectFieldSelector, PodTemplateSpec, ProjectedVolumeSource,
    ServiceAccount, ServiceAccountTokenProjection, Volume, VolumeMount, VolumeProjection,
};
use kube::Client;

use crate::error::{Error, Result};
use crate::objects;

/// The service account of import Jobs, in each namespace of sources; the chart grants it `write`.
pub(crate) const IMPORTER: &str = "aether-importer";
/// Carries the authority into the pod: a certificate is no secret, and a ConfigMap of another namespace cannot be mounted.
const AUTHORITY_ANNOTATION: &str = "aether.dev/store-ca";
/// Where the authority and the token are, as files.
const DIRECTORY: &str = "/var/run/aether/store";
/// For how long a token is good; the kubelet renews it before.
const TOKEN_SECONDS: i64 = 3600;

/// The service account of Jobs that commit, in each namespace of sources; the chart grants it `read` where it is told to.
pub(crate) const COMMITTER: &str = "aether-committer";
/// The authority (PEM) that these Jobs are to believe; none for a store in the clear.
pub(crate) fn authority(file: Option<&Path>) -> Result<Option<String>> {
    let read = |file: &Path| {
        std::fs::read_to_string(file).map_err(|source| Error::Authority { file: file.display().to_string(), source })
    };
    file.map(read).transpose()
}

/// Makes the account where it is missing. One that is there stays as it is: platform teams give it pull secrets.
pub(crate) async fn provide_account(client: &Client, namespace: &str, name: &str) -> Result<()> {
    let mut account = ServiceAccount { automount_service_account_token: Some(false), ..ServiceAccount::default() };
    account.metadata.name = Some(name.into());
    account.metadata.labels =
        Some([("app.kubernetes.io/name", "aether")].map(|(key, value)| (key.into(), value.into())).into());
    objects::create(&objects::namespaced(client, namespace), &account).await.map(drop)
}

/// Lets the pods of a Job into a store that `authority` vouches for.
pub(crate) fn admit(pods: &mut PodTemplateSpec, account: &str, authority: String) {
    let file = |path: &str| format!("{DIRECTORY}/{path}");
    let token = ServiceAccountTokenProjection {
        audience: Some(AUDIENCE.into()),
        expiration_seconds: Some(TOKEN_SECONDS),
        path: "token".into(),
    };
    let annotation = DownwardAPIVolumeFile {
        path: "ca.crt".into(),
        field_ref: Some(ObjectFieldSelector {
            field_path: format!("metadata.annotations['{AUTHORITY_ANNOTATION}']"),
            api_version: Some("v1".into()),
        }),
        ..DownwardAPIVolumeFile::default()
    };
    let sources = vec![
        VolumeProjection { service_account_token: Some(token), ..VolumeProjection::default() },
        VolumeProjection {
            downward_api: Some(DownwardAPIProjection { items: Some(vec![annotation]) }),
            ..VolumeProjection::default()
        },
    ];
    // Defaults are written out here, so that the volume of a genuine pod is equal to this one.
    let volume = ProjectedVolumeSource { sources: Some(sources), default_mode: Some(0o644) };
    let annotations = BTreeMap::from([(AUTHORITY_ANNOTATION.to_owned(), authority)]);
    pods.metadata.get_or_insert_default().annotations.get_or_insert_default().extend(annotations);
    let Some(pod) = &mut pods.spec else { return };
    pod.service_account_name = Some(account.into());
    pod.volumes.get_or_insert_default().push(Volume {
        name: "store".into(),
        projected: Some(volume),
        ..Volume::default()
    });
    for container in &mut pod.containers {
        container.volume_mounts.get_or_insert_default().push(VolumeMount {
            name: "store".into(),
            mount_path: DIRECTORY.into(),
            read_only: Some(true),
            ..VolumeMount::default()
        });
        let options = ["--store-ca".into(), file("ca.crt"), "--store-token".into(), file("token")];
        container.args.get_or_insert_default().extend(options);
    }
}

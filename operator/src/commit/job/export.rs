//! What an export asks of the program. Where it goes and by which Secret is what the source says of the place; the commit adds
//! only a folder.

use aether_api::commit::ExportTarget;
use aether_api::{AetherCommit, AetherSource};
use k8s_openapi::api::core::v1::{PersistentVolumeClaimVolumeSource, Volume, VolumeMount};
use kube::ResourceExt;

use super::Work;

/// Where the claim is.
const CLAIM_DIRECTORY: &str = "/export";

pub(super) fn work(commit: &AetherCommit, target: &ExportTarget, source: &AetherSource) -> Option<Work> {
    let root = commit.status.as_ref()?.root.clone()?;
    let place = source.spec.review.as_ref()?.exports.iter().find(|place| place.name == target.to)?;
    let name = commit.name_any();
    let folder = target.path.as_deref().unwrap_or(&name);
    let below = |outer: Option<&str>| {
        let outer = outer.unwrap_or_default().trim_matches('/');
        if outer.is_empty() { folder.to_owned() } else { format!("{outer}/{folder}") }
    };
    // With the sign of equality, for a folder that begins like an option.
    let option = |option: &str, value: &str| format!("--{option}={value}");
    if let Some(s3) = &place.s3 {
        let mut arguments = vec!["export".into(), "s3".into()];
        arguments.extend([option("root", &root), option("bucket", &s3.bucket)]);
        arguments.push(option("prefix", &below(s3.prefix.as_deref())));
        arguments.extend(s3.endpoint.as_ref().map(|endpoint| option("endpoint", endpoint)));
        arguments.extend(s3.region.as_ref().map(|region| option("region", region)));
        let secret = s3.secret_ref.as_ref().map(|reference| reference.name.clone());
        return Some(Work { arguments, secret, volume: None });
    }
    let claim = place.claim.as_ref()?;
    let arguments = vec![
        "export".into(),
        "folder".into(),
        option("root", &root),
        option("beneath", CLAIM_DIRECTORY),
        option("path", &below(claim.path.as_deref())),
        option("claim", &claim.name),
    ];
    let of = PersistentVolumeClaimVolumeSource { claim_name: claim.name.clone(), read_only: None };
    let volume = Volume { name: "export".into(), persistent_volume_claim: Some(of), ..Volume::default() };
    let mount = VolumeMount { name: "export".into(), mount_path: CLAIM_DIRECTORY.into(), ..VolumeMount::default() };
    Some(Work { arguments, secret: None, volume: Some((volume, mount)) })
}

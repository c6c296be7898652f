//! Pods of ours: what none of them may do, why one does not start, and how a container ended.

use k8s_openapi::api::core::v1::{
    Capabilities, ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodSecurityContext, SeccompProfile,
    SecurityContext,
};
use kube::ResourceExt;

/// Reasons for which a container waits that do not go away by waiting a little.
const TROUBLE: [&str; 7] = [
    "ImagePullBackOff",
    "ErrImagePull",
    "ErrImageNeverPull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
];

/// A pod that runs as this user and group, with the container runtime's own filter of system calls. No fsGroup: the kubelet
/// would change the owner of every file of the volumes.
pub fn runs_as(user: i64, group: i64) -> PodSecurityContext {
    PodSecurityContext {
        run_as_user: Some(user),
        run_as_group: Some(group),
        run_as_non_root: Some(user != 0),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}

/// A container that has no capability but these, and can gain none.
pub fn confined(capabilities: &[&str]) -> SecurityContext {
    let add = (!capabilities.is_empty()).then(|| capabilities.iter().map(|name| (*name).into()).collect());
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), add }),
        ..SecurityContext::default()
    }
}

fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let init = status.and_then(|status| status.init_container_statuses.as_ref());
    let main = status.and_then(|status| status.container_statuses.as_ref());
    init.into_iter().chain(main).flatten()
}

fn state<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerState> {
    statuses(pod).find(|status| status.name == container)?.state.as_ref()
}

/// Why the pod does not start, where a person may have to do something about it.
pub fn trouble(pod: &Pod) -> Option<String> {
    let name = pod.name_any();
    let waiting = statuses(pod).find_map(|status| {
        let waiting = status.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref().filter(|reason| TROUBLE.contains(reason))?;
        let message = waiting.message.as_deref().unwrap_or("no details");
        Some(format!("pod {name} cannot start: {reason} of image {}: {message}", status.image))
    });
    waiting.or_else(|| {
        let conditions = pod.status.as_ref()?.conditions.as_ref()?;
        let scheduled =
            conditions.iter().find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")?;
        Some(format!("pod {name} has no node yet: {}", scheduled.message.as_deref().unwrap_or("unschedulable")))
    })
}

/// How the container ended, if it did.
pub fn terminated<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStateTerminated> {
    state(pod, container)?.terminated.as_ref()
}

/// Whether the container runs.
pub fn is_running(pod: &Pod, container: &str) -> bool {
    state(pod, container).is_some_and(|state| state.running.is_some())
}

/// Whether the pod ended or is ending without its container having said how: evicted, preempted, its node lost.
pub fn is_lost(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let phase = status.phase.as_deref().unwrap_or_default();
    (phase == "Failed").then(|| {
        let reason = status.reason.as_deref().unwrap_or("it failed");
        match &status.message {
            Some(message) => format!("pod {}: {reason}: {message}", pod.name_any()),
            None => format!("pod {}: {reason}", pod.name_any()),
        }
    })
}

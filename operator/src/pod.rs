//! Reading pods: why one does not start, and how a container ended.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod};
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

//! Events, where a person would look for them: on the pod that waits, on the session or checkpoint it is about. An event
//! that cannot be written is logged and nothing else.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};

use crate::records::Pod;

/// Writes events in the name of this node's driver.
#[derive(Clone)]
pub(crate) struct Events {
    recorder: Recorder,
}

impl Events {
    pub(crate) fn new(client: Client, node: &str) -> Self {
        let reporter = Reporter { controller: aether_api::names::CSI_DRIVER.into(), instance: Some(node.into()) };
        Self { recorder: Recorder::new(client, reporter) }
    }

    /// An event on a pod.
    pub(crate) async fn on_pod(&self, pod: &Pod, type_: EventType, reason: &str, note: String) {
        let reference = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: Some(pod.namespace.clone()),
            name: Some(pod.name.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        };
        self.publish(&reference, type_, reason, note).await;
    }

    /// An event on an object of ours.
    pub(crate) async fn on<K: Resource<DynamicType = ()>>(
        &self,
        object: &K,
        type_: EventType,
        reason: &str,
        note: String,
    ) {
        self.publish(&object.object_ref(&()), type_, reason, note).await;
    }

    async fn publish(&self, reference: &ObjectReference, type_: EventType, reason: &str, mut note: String) {
        // The API server refuses more than 1 kB.
        if note.len() > 1000 {
            let end = (0..=1000).rev().find(|&end| note.is_char_boundary(end)).unwrap_or(0);
            note.truncate(end);
        }
        let event = Event { type_, reason: reason.into(), note: Some(note), action: reason.into(), secondary: None };
        if let Err(error) = self.recorder.publish(&event, reference).await {
            tracing::warn!(%error, object = ?reference.name, reason, "event could not be written");
        }
    }
}

//! Tells people about objects.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};

use crate::objects::Object;

/// Writes events in the operator's name. Clones share what they know of former events.
#[derive(Clone)]
pub struct Events {
    recorder: Recorder,
}

impl Events {
    /// Of the replica of this name.
    pub fn new(client: &Client, identity: &str) -> Self {
        let reporter =
            Reporter { controller: aether_api::names::OPERATOR_MANAGER.into(), instance: Some(identity.into()) };
        Self { recorder: Recorder::new(client.clone(), reporter) }
    }

    /// Tells people about `object`. An object that is being deleted gets no events, because its namespace may be
    /// going too; an event that cannot be written is only logged.
    pub async fn tell<K: Object>(&self, object: &K, type_: EventType, reason: &str, message: &str) {
        self.publish(object, type_, reason, message, "Reconcile").await;
    }

    /// Tells what somebody does with `object`: events that differ in their message only would be counted as one that is repeated, and
    /// the first message stay.
    pub async fn tell_deed<K: Object>(&self, object: &K, reason: &str, message: &str) {
        let action: String = message.chars().take(100).collect();
        self.publish(object, EventType::Normal, reason, message, &action).await;
    }

    async fn publish<K: Object>(&self, object: &K, type_: EventType, reason: &str, message: &str, action: &str) {
        if object.meta().deletion_timestamp.is_some() {
            return;
        }
        let reference: ObjectReference = object.object_ref(&());
        // The API server takes notes of up to 1 kB.
        let note: String = message.chars().take(900).collect();
        let event = Event { type_, reason: reason.into(), note: Some(note), action: action.into(), secondary: None };
        if let Err(error) = self.recorder.publish(&event, &reference).await {
            tracing::debug!(name = reference.name, reason, %error, "event not written");
        }
    }
}

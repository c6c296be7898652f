//! What the tests of reconcilers share: an operator against an API server in memory, and the parts that others play.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]

pub mod store;

use std::sync::Arc;

use aether_api::session::{Attachment, ClaimPolicy, Durability, Head, SourceReference};
use aether_api::source::{EmptySource, Revision};
use aether_api::{AetherSession, AetherSessionSpec, AetherSource, AetherSourceSpec, AetherSourceStatus};
use aether_cas::{MemoryStore, Store};
use aether_operator::audit::{Audit, ClusterAnchor};
use aether_operator::config::Config;
use aether_operator::context::Context;
use aether_operator::events::Events;
use aether_operator::pins::Pins;
use aether_testkit::{ApiServer, Write};
use clap::Parser;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

pub const NAMESPACE: &str = "agents";

/// An audit log in memory, with its end in the API server.
pub fn audit(api: &ApiServer) -> Arc<Audit> {
    audit_in(api, Arc::new(MemoryStore::new()), Pins::nowhere())
}

/// An audit log in this store.
pub fn audit_in(api: &ApiServer, store: Arc<dyn Store>, pins: Pins) -> Arc<Audit> {
    let client = api.client();
    let anchor = ClusterAnchor::new(&client, "aether-system", pins, Events::new(&client, "operator"));
    Arc::new(Audit::new(store, anchor))
}

pub struct Operator {
    pub api: ApiServer,
    pub context: Arc<Context>,
}

impl Operator {
    pub fn new() -> Self {
        let api = ApiServer::new();
        let arguments = [
            "aether-operator",
            "--store",
            "http://store",
            "--importer-image",
            "importer:1",
            "--worker-image",
            "worker:1",
            "--command-image",
            "tools:1",
        ];
        let context = Arc::new(Context::new(api.client(), Config::parse_from(arguments), Pins::nowhere(), audit(&api)));
        Self { api, context }
    }

    pub async fn session(&self, name: &str) {
        let seen = self.api.get::<AetherSession>(NAMESPACE, name).expect("the session exists");
        aether_operator::session::reconcile(Arc::new(seen), self.context.clone())
            .await
            .expect("the reconcile succeeds");
    }

    /// What the operator does when it looks at each volume.
    pub async fn volumes(&self) {
        for volume in self.api.all::<PersistentVolume>() {
            aether_operator::session::remains::reconcile(Arc::new(volume), self.context.clone())
                .await
                .expect("the reconcile succeeds");
        }
    }

    /// A source with one revision, in the agents' own namespace.
    pub fn put_source(&self, name: &str) {
        let mut source = AetherSource::new(
            name,
            AetherSourceSpec { empty: Some(EmptySource {}), revisions_to_keep: 3, ..Default::default() },
        );
        source.metadata.namespace = Some(NAMESPACE.into());
        let revision = Revision {
            name: "r1".into(),
            root: "aa/1".into(),
            files: 1,
            bytes: 1,
            commit: None,
            listing: None,
            promoted: None,
            time: now(),
            milliseconds: 1,
        };
        source.status =
            Some(AetherSourceStatus { latest: Some("r1".into()), revisions: vec![revision], ..Default::default() });
        self.api.put(&source);
    }

    pub fn put_session(&self, name: &str, source: &str) {
        let source = SourceReference { name: source.into(), ..Default::default() };
        self.put_session_of(
            name,
            AetherSessionSpec { source: Some(source), claim: ClaimPolicy::Create, ..Default::default() },
        );
    }

    pub fn put_session_of(&self, name: &str, spec: AetherSessionSpec) {
        let mut session = AetherSession::new(name, spec);
        session.metadata.namespace = Some(NAMESPACE.into());
        self.api.put(&session);
    }

    /// What Kubernetes' binder does when it sees a claim with a volume that is reserved for it.
    pub fn bind(&self, claim: &str, volume: &str) {
        self.api.change::<PersistentVolumeClaim>(NAMESPACE, claim, |claim| {
            claim.spec.as_mut().expect("a claim has a spec").volume_name = Some(volume.into());
            claim.status = Some(PersistentVolumeClaimStatus { phase: Some("Bound".into()), ..Default::default() });
        });
    }

    /// A session with a bound claim; no writes are left to be counted.
    pub async fn bound_session(&self, name: &str, source: &str) -> AetherSession {
        self.put_session(name, source);
        self.session(name).await;
        let session: AetherSession = self.api.get(NAMESPACE, name).expect("just put");
        self.bind(name, &aether_api::names::volume_name(session.metadata.uid.as_deref().expect("the server gave one")));
        self.session(name).await;
        self.api.take_writes();
        self.api.get(NAMESPACE, name).expect("just put")
    }

    /// What a node, which lives, does when it takes or gives back the writer's lease.
    pub fn attach(&self, session: &str, node: Option<&str>) {
        if let Some(name) = node {
            let mut node = Node::default();
            node.metadata.name = Some(name.into());
            self.api.put(&node);
        }
        self.api.change::<AetherSession>(NAMESPACE, session, |session| {
            let status = session.status.get_or_insert_default();
            let epoch = status.attachment.as_ref().map_or(0, |attachment| attachment.epoch) + 1;
            status.attachment = Some(Attachment { node: node.map(Into::into), epoch, since: Some(now()) });
        });
    }

    /// What a node does when it has uploaded what its session is now.
    pub fn set_head(&self, session: &str, root: &str) {
        self.api.change::<AetherSession>(NAMESPACE, session, |session| {
            session.status.get_or_insert_default().head =
                Some(Head { root: root.into(), durability: Durability::Durable, time: now() });
        });
    }

    /// Pretends that an object was made an hour ago, so that no grace is left.
    pub fn age<K>(&self, name: &str)
    where
        K: kube::Resource<DynamicType = ()> + serde::Serialize + serde::de::DeserializeOwned,
    {
        self.api.change::<K>(NAMESPACE, name, |object| {
            object.meta_mut().creation_timestamp =
                Some(Time(jiff::Timestamp::now() - jiff::SignedDuration::from_hours(1)));
        });
    }
}

pub fn now() -> Time {
    Time(jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).expect("now is in range"))
}

/// `METHOD plural[/subresource]` of each write.
pub fn short(writes: &[Write]) -> Vec<String> {
    writes
        .iter()
        .map(|write| match write.subresource.as_str() {
            "" => format!("{} {}", write.method, write.plural),
            subresource => format!("{} {}/{subresource}", write.method, write.plural),
        })
        .collect()
}

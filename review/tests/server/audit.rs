//! The lines of the audit log on a commit.

use std::sync::Mutex;

use aether_audit::{Anchor, Entry, Head, Held, Log, Memory, Object, Refusal, Verb};
use aether_cas::{Blob, MemoryStore};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::changes::{get_of, status};
use crate::cluster;

struct End(Mutex<Held>);

#[async_trait::async_trait]
impl Anchor for End {
    async fn newest(&self) -> Result<Held, String> {
        Ok(self.0.lock().unwrap().clone())
    }

    async fn hold(&self, _: &Held, head: Head, root: Blob) -> Result<(), Refusal> {
        *self.0.lock().unwrap() = Held { head, root: Some(root), version: None };
        Ok(())
    }
}

fn commit(name: &str, made: Timestamp) -> (&'static str, Value) {
    let metadata = json!({"name": name, "namespace": "demo", "uid": "u", "creationTimestamp": made});
    let spec = json!({"session": "s", "target": {"promote": {}}});
    let kind = "AetherCommit";
    ("aethercommits", json!({"apiVersion": "aether.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}))
}

#[tokio::test]
async fn who_may_read_a_commit_reads_its_lines_and_no_others() {
    let (store, now) = (MemoryStore::new(), Timestamp::now());
    let entry = |verb, kind: &str, namespace: &str, name: &str, minutes| Entry {
        time: now + SignedDuration::from_mins(minutes),
        actor: "jane".into(),
        verb,
        object: Object {
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
            uid: format!("u{minutes}"),
        },
        root: Some("aa/1".into()),
        occasion: 0,
    };
    let entries = [
        entry(Verb::Requested, "AetherCommit", "demo", "fix", -10),
        entry(Verb::Requested, "AetherCommit", "demo", "fix", 0),
        entry(Verb::Rejected, "AetherApproval", "demo", "fix.81f8", 1),
        entry(Verb::Rejected, "AetherApproval", "demo", "fix.2.81f8", 1),
        entry(Verb::Rejected, "AetherApproval", "other", "fix.81f8", 1),
        entry(Verb::Requested, "AetherCommit", "demo", "hidden", 1),
        entry(Verb::Withdrawn, "AetherApproval", "demo", "fix.81f8", 2),
    ];
    let anchor = End(Mutex::new(Held::NOTHING));
    let head = Log { store: &store, anchor: &anchor }.append(&entries, now, &Memory::default()).await.unwrap();
    let root = anchor.newest().await.unwrap().root.unwrap();
    let asked = async |fields: Value, user: &str, name: &str| {
        let map =
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "aether-audit"}, "data": fields});
        let others = vec![commit("fix", now), commit("hidden", now), ("configmaps", map)];
        let (service, _) = cluster::service_with(&store, vec![], others);
        status(get_of(service, user, &format!("commits/{name}/audit")).await).await
    };
    let fields = json!(Held::fields(head, root));
    let (code, body) = asked(fields.clone(), "ada", "fix").await;
    assert_eq!((code, &body["kind"], &body["end"]), (200, &json!("CommitAudit"), &json!(head.to_string())), "{body}");
    let verbs: Vec<&str> = body["items"].as_array().unwrap().iter().map(|it| it["verb"].as_str().unwrap()).collect();
    assert_eq!(verbs, ["Requested", "Rejected", "Withdrawn"]);
    assert_eq!((&body["items"][2]["actor"], &body["items"][2]["object"]["name"]), (&json!("jane"), &json!("fix.81f8")));
    for (user, name) in [("eve", "fix"), ("ada", "hidden")] {
        assert_eq!(asked(fields.clone(), user, name).await.0, 403, "{user} {name}");
    }
    assert_eq!(asked(fields.clone(), "ada", "none").await.0, 404);
    // Without an end there are no lines only of what none was written of yet.
    for (about, expected) in [(json!({}), 200), (json!({"phase": "Pending"}), 200), (json!({"root": "aa/1"}), 503)] {
        let (plural, mut waiting) = commit("fix", now);
        waiting["status"] = about;
        let (service, _) = cluster::service_with(&store, vec![], vec![(plural, waiting)]);
        let (code, body) = status(get_of(service, "ada", "commits/fix/audit").await).await;
        assert_eq!(code, expected, "{body}");
        let said = body["message"].as_str().unwrap_or_default();
        assert!(expected == 200 || said.contains("ConfigMap aether-audit is not in namespace"), "{said}");
    }
    // What does not end where the cluster says is not shown.
    let mut other = fields;
    other["lines"] = "6".into();
    let (code, body) = asked(other, "ada", "fix").await;
    assert_eq!(code, 500);
    assert!(body["message"].as_str().unwrap().contains("broken: line 7"), "{body}");
}

//! Limits of the spec reach the session that a pod has mounted, and are told of.

use aether_api::AetherSession;
use aether_api::session::Limits;

use super::{NAMESPACE, Node, UID, run};

fn limit(node: &Node, bytes: Option<&str>) {
    node.server.change(NAMESPACE, "fix", |session: &mut AetherSession| {
        session.spec.limits = bytes.map(|bytes| Limits { bytes: Some(bytes.into()), inodes: None });
    });
}

#[test]
fn a_changed_limit_holds_for_a_mounted_session() {
    run("limits::a_changed_limit_holds_for_a_mounted_session", async |root| {
        let node = Node::new(root).await;
        limit(&node, Some("1Mi"));
        let target = node.publish("1").await.unwrap();
        let volume = format!("aether-{UID}");
        let statistics = node.driver.statistics(&volume, &target).await.unwrap();
        assert_eq!((statistics.bytes.total, statistics.bytes.available), (1 << 20, 1 << 20));
        assert_eq!(statistics.abnormal, None);

        std::fs::write(target.join("file"), vec![1; 2 << 20]).unwrap();
        rustix::fs::syncfs(std::fs::File::open(&target).unwrap()).unwrap();
        let full = node.driver.statistics(&volume, &target).await.unwrap();
        assert_eq!((full.bytes.total, full.bytes.available, full.bytes.used >= 2 << 20), (1 << 20, 0, true));
        assert!(full.abnormal.unwrap().contains("spec.limits.bytes"));

        // A claim that asks for more gets it once the operator has put it into the spec.
        let early = node.driver.expand(&volume, &target, 4 << 20).await.unwrap_err().to_string();
        assert!(early.contains("fix") && early.contains("spec.limits.bytes"), "{early}");
        limit(&node, Some("4Mi"));
        assert_eq!(node.driver.expand(&volume, &target, 4 << 20).await.unwrap(), 4 << 20);
        let raised = node.driver.statistics(&volume, &target).await.unwrap();
        assert_eq!((raised.bytes.total, raised.abnormal), (4 << 20, None));

        limit(&node, None);
        node.driver.apply_limits(&node.session()).await.unwrap();
        assert!(node.driver.statistics(&volume, &target).await.unwrap().bytes.total > 4 << 20);
        node.driver.unpublish(&target).await.unwrap();
    });
}

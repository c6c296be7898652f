//! The node's administration socket, for `aether-node`: what is here, whether it is whole, what can go.

use std::sync::Arc;

use admin::node_admin_server::NodeAdmin;
use aether_proto::node::v1 as admin;
use tonic::{Request, Response, Status};

use crate::driver::Driver;
use crate::failure::Failure;
use crate::records::Upper;

/// Answers `aether-node`.
pub(crate) struct AdminService {
    driver: Arc<Driver>,
}

impl AdminService {
    pub(crate) fn new(driver: Arc<Driver>) -> Self {
        Self { driver }
    }
}

#[tonic::async_trait]
impl NodeAdmin for AdminService {
    async fn list_sessions(
        &self,
        _: Request<admin::ListSessionsRequest>,
    ) -> Result<Response<admin::ListSessionsResponse>, Status> {
        let driver = &self.driver;
        let snapshots = driver.engine.snapshots().await.map_err(Failure::from)?;
        let mut sessions = Vec::new();
        for status in driver.engine.sessions().await.map_err(Failure::from)? {
            let id = status.session.id;
            let record = driver.sessions.get(&id);
            let publishes = driver.publishes.select(|publish| {
                !publish.unpublished && (publish.uid.as_deref() == Some(&id) || publish.view.as_deref() == Some(&id))
            });
            let any = publishes.first();
            sessions.push(admin::Session {
                namespace: record
                    .as_ref()
                    .map(|record| record.namespace.clone())
                    .or(any.map(|publish| publish.namespace.clone()))
                    .unwrap_or_default(),
                name: record
                    .as_ref()
                    .map(|record| record.name.clone())
                    .or(any.map(|publish| publish.session.clone()))
                    .unwrap_or_default(),
                base: status.session.image.root.to_string(),
                mounted: status.mountpoint.is_some(),
                targets: publishes
                    .iter()
                    .map(|publish| admin::Target {
                        path: publish.target.display().to_string(),
                        read_only: publish.read_only,
                    })
                    .collect(),
                epoch: record
                    .as_ref()
                    .filter(|record| record.upper == Upper::Dirty)
                    .and_then(|record| record.epoch.try_into().ok())
                    .unwrap_or_default(),
                own_bytes: status.own_bytes,
                snapshots: snapshots.iter().filter(|snapshot| snapshot.session == id).count() as u64,
                created: Some(prost_types::Timestamp { seconds: status.session.created, nanos: 0 }),
                id,
            });
        }
        sessions.sort_by(|a, b| (&a.namespace, &a.name, &a.id).cmp(&(&b.namespace, &b.name, &b.id)));
        Ok(Response::new(admin::ListSessionsResponse { sessions }))
    }

    async fn fsck(&self, request: Request<admin::FsckRequest>) -> Result<Response<admin::FsckResponse>, Status> {
        let request = request.into_inner();
        let driver = &self.driver;
        let found = driver.engine.fsck().await.map_err(Failure::from)?;
        let mut problems: Vec<_> = found
            .into_iter()
            .map(|message| admin::Problem { subject: String::new(), message, repaired: false })
            .collect();
        if request.verify_contents {
            let objects = driver.engine.objects().clone();
            let report = tokio::task::spawn_blocking(move || objects.fsck(request.repair))
                .await
                .map_err(|_| Failure::Lost("the check of contents"))?
                .map_err(Failure::from)?;
            let problem = |subject: String, message: &str| admin::Problem {
                subject,
                message: message.to_owned(),
                repaired: report.repaired,
            };
            problems.extend(
                report.damaged.iter().map(|blob| problem(blob.to_string(), "the copy here is not what its name says")),
            );
            problems
                .extend(report.stray_files.iter().map(|path| problem(path.display().to_string(), "left by a crash")));
        }
        let statistics = driver.engine.statistics().await.map_err(Failure::from)?;
        Ok(Response::new(admin::FsckResponse { problems, sessions: statistics.sessions, objects: statistics.objects }))
    }

    async fn gc(&self, request: Request<admin::GcRequest>) -> Result<Response<admin::GcResponse>, Status> {
        let engine = &self.driver.engine;
        let removed = if request.into_inner().dry_run {
            let unused = engine.unused_images().await.map_err(Failure::from)?;
            unused.iter().map(|image| format!("image {} ({} files)", image.id(), image.files)).collect()
        } else {
            engine.gc().await.map_err(Failure::from)?
        };
        Ok(Response::new(admin::GcResponse { removed, ..Default::default() }))
    }

    async fn stats(&self, _: Request<admin::StatsRequest>) -> Result<Response<admin::StatsResponse>, Status> {
        let statistics = self.driver.engine.statistics().await.map_err(Failure::from)?;
        Ok(Response::new(admin::StatsResponse {
            pool: match statistics.pool {
                aether_engine::pool::Kind::Btrfs => "btrfs".into(),
                aether_engine::pool::Kind::Directory => "directory".into(),
            },
            pool_bytes: statistics.space.total_bytes,
            pool_bytes_used: statistics.space.total_bytes.saturating_sub(statistics.space.available_bytes),
            cache_objects: statistics.objects,
            cache_bytes: statistics.object_bytes,
            images: statistics.images,
            sessions: statistics.sessions,
            sessions_mounted: statistics.mounted,
        }))
    }
}

//! StoreAdmin: pinned roots, statistics, checks and collection.

use aether_cas::local;
use aether_proto::store::v1::{
    CollectRequest, DurableStatistics, FsckReport, FsckRequest, GetIntegrityRequest, GetStatisticsRequest,
    IncompleteRoot, Integrity, ListRootsRequest, ListRootsResponse, PinRootRequest, PinRootResponse, Root, Statistics,
    UnpinRootsRequest, UnpinRootsResponse, store_admin_server::StoreAdmin,
};
use tonic::{Request, Response, Status};

use super::{blocking, collect, integrity, status};
use crate::{
    metrics::{Call, StoreMetrics},
    tiered::{self, TieredStore},
};

pub(crate) struct AdminService {
    store: TieredStore,
    metrics: StoreMetrics,
}

impl AdminService {
    pub(crate) fn new(store: TieredStore, metrics: StoreMetrics) -> Self {
        Self { store, metrics }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&TieredStore) -> Result<T, Status> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let store = self.store.clone();
        let work = async { blocking(move || work(&store)).await? };
        self.metrics.observe(Call::Admin, work).await.map(Response::new)
    }
}

pub(super) fn root(root: local::Root) -> Root {
    Root {
        owner_uid: root.owner_uid,
        kind: root.kind,
        name: root.name,
        tree: root.tree.to_string(),
        pinned_at: root.pinned_at,
    }
}

pub(super) fn incomplete(root: local::Root, problem: String) -> IncompleteRoot {
    IncompleteRoot { root: Some(self::root(root)), problem }
}

fn some(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

#[tonic::async_trait]
impl StoreAdmin for AdminService {
    async fn pin_root(&self, request: Request<PinRootRequest>) -> Result<Response<PinRootResponse>, Status> {
        let root = request.into_inner().root.ok_or_else(|| Status::invalid_argument("root is missing"))?;
        self.run(move |store| {
            let tree = root.tree.parse().map_err(|e| Status::invalid_argument(format!("root.tree: {e}")))?;
            store.pin(&root.owner_uid, &root.kind, &root.name, tree).map_err(status)?;
            Ok(PinRootResponse {})
        })
        .await
    }

    async fn unpin_roots(&self, request: Request<UnpinRootsRequest>) -> Result<Response<UnpinRootsResponse>, Status> {
        let request = request.into_inner();
        if request.owner_uid.is_empty() {
            return Err(Status::invalid_argument("owner_uid is empty"));
        }
        self.run(move |store| {
            let removed =
                store.unpin(&request.owner_uid, some(&request.kind), request.name.as_deref()).map_err(status)?;
            Ok(UnpinRootsResponse { removed: removed as u64 })
        })
        .await
    }

    async fn list_roots(&self, request: Request<ListRootsRequest>) -> Result<Response<ListRootsResponse>, Status> {
        let request = request.into_inner();
        self.run(move |store| {
            let roots = store.roots(some(&request.owner_uid), some(&request.kind)).map_err(status)?;
            Ok(ListRootsResponse { roots: roots.into_iter().map(root).collect() })
        })
        .await
    }

    async fn get_statistics(&self, _: Request<GetStatisticsRequest>) -> Result<Response<Statistics>, Status> {
        self.run(|store| {
            let tiered::Statistics { disk, durable } = store.statistics();
            Ok(Statistics {
                inline_blobs: disk.inline_blobs,
                inline_bytes: disk.inline_bytes,
                file_blobs: disk.file_blobs,
                file_bytes: disk.file_bytes,
                roots: store.roots(None, None).map_err(status)?.len() as u64,
                durable: durable.map(|held| DurableStatistics {
                    packs: held.bucket.packs,
                    stored_bytes: held.bucket.stored_bytes,
                    unreadable_packs: held.bucket.unreadable_packs,
                    pending_blobs: held.pending_blobs,
                    pending_bytes: held.pending_bytes,
                    compared: held.compared,
                    requests: held.bucket.requests,
                    failed_requests: held.bucket.failed_requests,
                }),
            })
        })
        .await
    }

    async fn fsck(&self, request: Request<FsckRequest>) -> Result<Response<FsckReport>, Status> {
        let repair = request.into_inner().repair;
        self.run(move |store| {
            let report = store.fsck(repair).map_err(status)?;
            Ok(FsckReport {
                blobs: report.blobs,
                bytes: report.bytes,
                damaged: report.damaged.iter().map(ToString::to_string).collect(),
                stray_files: report.stray_files.iter().map(|path| path.display().to_string()).collect(),
                incomplete_roots: report.incomplete_roots.into_iter().map(|i| incomplete(i.root, i.problem)).collect(),
                repaired: report.repaired,
                unreadable_rows: report.unreadable_rows,
            })
        })
        .await
    }

    type CollectStream = collect::Answers;

    async fn collect(&self, request: Request<CollectRequest>) -> Result<Response<Self::CollectStream>, Status> {
        let (store, metrics) = (self.store.clone(), self.metrics.upkeep.clone());
        collect::answer(store, request.into_inner(), metrics).map(Response::new)
    }

    async fn get_integrity(&self, request: Request<GetIntegrityRequest>) -> Result<Response<Integrity>, Status> {
        let paths = request.into_inner().paths;
        self.run(move |store| integrity::report(store, paths).map_err(status)).await
    }
}

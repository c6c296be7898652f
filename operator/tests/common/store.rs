//! A store that only knows roots; what is pinned counts as pinned an hour ago.

use std::sync::{Arc, Mutex};

use aether_proto::store::v1::store_admin_server::{StoreAdmin, StoreAdminServer};
use aether_proto::store::v1::{
    AffectedPath, AffectedRoot, CollectRequest, CollectResponse, FsckReport, FsckRequest, GetIntegrityRequest,
    GetStatisticsRequest, Integrity, ListRootsRequest, ListRootsResponse, PinRootRequest, PinRootResponse, Root,
    Statistics, UnpinRootsRequest, UnpinRootsResponse,
};
use futures::stream::Empty;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// The roots of a store, what it says it has lost, and nothing else of it.
#[derive(Clone, Default)]
pub struct Roots(pub Arc<Mutex<Vec<Root>>>, Arc<Mutex<Option<Integrity>>>);

impl Roots {
    /// Serves it until the test's runtime ends, and says where.
    pub async fn serve(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = Server::builder().add_service(StoreAdminServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        address
    }

    /// From now on it says that these paths of the root are lost.
    pub fn lose(&self, root: Root, paths: &[&str]) {
        let paths = paths.iter().map(|path| AffectedPath { path: (*path).into(), blob: "aa/1".into() }).collect();
        let affected = vec![AffectedRoot { root: Some(root), paths, more: 0 }];
        *self.1.lock().unwrap() = Some(Integrity { affected, ..Integrity::default() });
    }

    /// From now on it says that nothing is lost.
    pub fn heal(&self) {
        *self.1.lock().unwrap() = Some(Integrity::default());
    }

    /// From now on it does not say what is lost.
    pub fn hush(&self) {
        *self.1.lock().unwrap() = None;
    }

    pub fn pin(&self, owner: &str, kind: &str) {
        self.0.lock().unwrap().push(root(owner, kind));
    }

    /// The names of what is pinned of this kind.
    pub fn names(&self, kind: &str) -> Vec<String> {
        self.0.lock().unwrap().iter().filter(|root| root.kind == kind).map(|root| root.name.clone()).collect()
    }

    pub fn owners(&self) -> Vec<String> {
        self.0.lock().unwrap().iter().map(|root| root.owner_uid.clone()).collect()
    }
}

/// Pinned an hour ago.
pub fn root(owner: &str, kind: &str) -> Root {
    let pinned_at = jiff::Timestamp::now().as_second() - 3600;
    Root { owner_uid: owner.into(), kind: kind.into(), pinned_at, ..Root::default() }
}

#[tonic::async_trait]
impl StoreAdmin for Roots {
    async fn unpin_roots(&self, request: Request<UnpinRootsRequest>) -> Result<Response<UnpinRootsResponse>, Status> {
        let UnpinRootsRequest { owner_uid, kind, name } = request.into_inner();
        let is_meant = |root: &Root| {
            root.owner_uid == owner_uid
                && (kind.is_empty() || root.kind == kind)
                && name.as_ref().is_none_or(|name| root.name == *name)
        };
        self.0.lock().unwrap().retain(|root| !is_meant(root));
        Ok(Response::new(UnpinRootsResponse { removed: 1 }))
    }

    async fn list_roots(&self, request: Request<ListRootsRequest>) -> Result<Response<ListRootsResponse>, Status> {
        let ListRootsRequest { owner_uid, kind } = request.into_inner();
        let mut roots = self.0.lock().unwrap().clone();
        roots.retain(|root| owner_uid.is_empty() || root.owner_uid == owner_uid);
        roots.retain(|root| kind.is_empty() || root.kind == kind);
        Ok(Response::new(ListRootsResponse { roots }))
    }

    async fn pin_root(&self, request: Request<PinRootRequest>) -> Result<Response<PinRootResponse>, Status> {
        let mut root = request.into_inner().root.expect("a root");
        root.pinned_at = jiff::Timestamp::now().as_second() - 3600;
        let mut roots = self.0.lock().unwrap();
        roots.retain(|one| (&one.owner_uid, &one.kind, &one.name) != (&root.owner_uid, &root.kind, &root.name));
        roots.push(root);
        Ok(Response::new(PinRootResponse::default()))
    }

    async fn get_statistics(&self, _: Request<GetStatisticsRequest>) -> Result<Response<Statistics>, Status> {
        Err(Status::unimplemented("only roots"))
    }

    async fn fsck(&self, _: Request<FsckRequest>) -> Result<Response<FsckReport>, Status> {
        Err(Status::unimplemented("only roots"))
    }

    type CollectStream = Empty<Result<CollectResponse, Status>>;

    async fn collect(&self, _: Request<CollectRequest>) -> Result<Response<Self::CollectStream>, Status> {
        Err(Status::unimplemented("only roots"))
    }

    async fn get_integrity(&self, _: Request<GetIntegrityRequest>) -> Result<Response<Integrity>, Status> {
        let said = self.1.lock().unwrap().clone();
        said.map(Response::new).ok_or_else(|| Status::unavailable("it does not say"))
    }
}

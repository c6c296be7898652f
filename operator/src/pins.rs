//! Pins: the trees that the store must keep, each named by the uid of the object that needs it.
//!
//! Pinning is a promise kept in the background. A pin that the store did not take is tried again with the object's
//! next activation, which the reconciler asks for; the sweep forgets pins whose object is gone. What is remembered
//! here only saves calls: after a restart every pin is sent once more, which only makes it younger (`pinned_at`).

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use aether_credentials::{Connection, Credentials};
use aether_proto::store::v1::store_admin_client::StoreAdminClient;
use aether_proto::store::v1::{ListRootsRequest, PinRootRequest, Root, UnpinRootsRequest};
use tonic::Code;
use tonic::transport::Endpoint;

/// A revision of a source.
pub const SOURCE_REVISION: &str = "SourceRevision";
/// What a session is now, and (by the name `base`) what its differences are shown against.
pub const SESSION_HEAD: &str = "SessionHead";
/// A checkpoint, and (by the name `base`) what its differences are shown against.
pub const CHECKPOINT: &str = "Checkpoint";

/// What a commit takes out of the cluster, and (by the name `base`) what its session started from.
pub const COMMIT: &str = "Commit";

/// The audit log, by a name that says where it ends ([`crate::audit::anchor`]). No sweep takes it for a stray.
pub const AUDIT_LOG: &str = "AuditLog";

/// When to try again what the store did not take.
pub const RETRY: Duration = Duration::from_secs(15);
/// For how long a store that did not answer is left in peace, so that sessions need not wait for each other's pins.
const PEACE: Duration = Duration::from_secs(5);
/// How long one call may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// A tree that must stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The uid of the object that needs it.
    pub owner: String,
    /// What it is to that object.
    pub kind: &'static str,
    /// Tells several trees of one owner and kind apart.
    pub name: String,
    /// `<hex>/<size>`.
    pub tree: String,
}

/// A client of the store at this address, connected when first needed. `deadline` is for each call.
pub(crate) fn client(
    address: &str,
    credentials: &Credentials,
    deadline: Duration,
) -> anyhow::Result<StoreAdminClient<Connection>> {
    let address = match address.strip_prefix("grpc://") {
        Some(rest) => format!("http://{rest}"),
        None => address.to_owned(),
    };
    let endpoint = Endpoint::from_shared(address.clone())
        .map_err(|error| anyhow::anyhow!("--store {address:?} is not an address: {error}"))?;
    let endpoint = endpoint.connect_timeout(DEADLINE).timeout(deadline);
    let channel = credentials.connect(&endpoint).map_err(|error| anyhow::anyhow!("--store {address:?}: {error}"))?;
    Ok(StoreAdminClient::new(channel))
}

/// The pins of one store.
pub struct Pins {
    client: Option<StoreAdminClient<Connection>>,
    taken: Mutex<HashMap<(String, &'static str, String), String>>,
    /// When the store last failed to answer, until it answers again.
    silent: Mutex<Option<Instant>>,
}

impl Pins {
    /// Pins in the store at this address, connected when first needed.
    ///
    /// # Errors
    /// An address that is not one, or credentials that do not fit it.
    pub fn connect(address: &str, credentials: &Credentials) -> anyhow::Result<Self> {
        let client = client(address, credentials, DEADLINE)?;
        Ok(Self { client: Some(client), taken: Mutex::default(), silent: Mutex::default() })
    }

    /// No store: every pin counts as taken. For tests.
    pub fn nowhere() -> Self {
        Self { client: None, taken: Mutex::default(), silent: Mutex::default() }
    }

    /// Pins what is not known to be pinned. `false` when the store did not take all of it.
    pub async fn keep(&self, pins: Vec<Pin>) -> bool {
        let Some(client) = &self.client else { return true };
        if self.silent.lock().expect("no holder panics").is_some_and(|since| since.elapsed() < PEACE) {
            return false;
        }
        let mut all = true;
        for pin in pins {
            let key = (pin.owner.clone(), pin.kind, pin.name.clone());
            if self.taken.lock().expect("no holder panics").get(&key) == Some(&pin.tree) {
                continue;
            }
            let root = Root {
                owner_uid: pin.owner,
                kind: pin.kind.into(),
                name: pin.name,
                tree: pin.tree.clone(),
                pinned_at: 0,
            };
            let answer = client.clone().pin_root(PinRootRequest { root: Some(root) }).await;
            if !self.answered(&answer) {
                return false;
            }
            match answer {
                Ok(_) => {
                    self.taken.lock().expect("no holder panics").insert(key, pin.tree);
                }
                Err(status) => {
                    tracing::warn!(owner = key.0, kind = key.1, name = key.2, tree = pin.tree, code = %status.code(), said = status.message(), "the store did not take a pin; it is tried again");
                    all = false;
                }
            }
        }
        all
    }

    /// Pins now, or says why not.
    ///
    /// # Errors
    /// What the store said.
    pub async fn hold(&self, pin: Pin) -> Result<(), tonic::Status> {
        let Some(client) = &self.client else { return Ok(()) };
        let Pin { owner, kind, name, tree } = pin;
        let root = Root { owner_uid: owner, kind: kind.into(), name, tree, pinned_at: 0 };
        client.clone().pin_root(PinRootRequest { root: Some(root) }).await?;
        Ok(())
    }

    /// What this owner has pinned of this kind.
    ///
    /// # Errors
    /// What the store said.
    pub async fn of(&self, owner: &str, kind: &'static str) -> Result<Vec<Root>, tonic::Status> {
        let Some(client) = &self.client else { return Ok(Vec::new()) };
        let request = ListRootsRequest { owner_uid: owner.into(), kind: kind.into() };
        Ok(client.clone().list_roots(request).await?.into_inner().roots)
    }

    /// Whether the store said anything; tells when that changes.
    fn answered<T>(&self, answer: &Result<T, tonic::Status>) -> bool {
        let mut silent = self.silent.lock().expect("no holder panics");
        match answer {
            Err(status) if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled) => {
                if silent.replace(Instant::now()).is_none() {
                    tracing::warn!(code = %status.code(), said = status.message(), "the store does not answer; pins are tried again");
                }
                false
            }
            _ => {
                if silent.take().is_some() {
                    tracing::info!("the store answers again");
                }
                true
            }
        }
    }

    /// What was pinned at least `grace` ago.
    ///
    /// # Errors
    /// What the store said.
    pub async fn taken(&self, grace: Duration) -> Result<Vec<Root>, tonic::Status> {
        let Some(client) = &self.client else { return Ok(Vec::new()) };
        let latest = jiff::Timestamp::now().as_second() - grace.as_secs() as i64;
        let mut roots = client.clone().list_roots(ListRootsRequest::default()).await?.into_inner().roots;
        let kinds = [SOURCE_REVISION, SESSION_HEAD, CHECKPOINT, COMMIT];
        roots.retain(|root| root.pinned_at <= latest && kinds.contains(&root.kind.as_str()));
        Ok(roots)
    }

    /// Forgets everything that the object pinned.
    ///
    /// # Errors
    /// What the store said.
    pub async fn forget(&self, owner: &str) -> Result<(), tonic::Status> {
        self.taken.lock().expect("no holder panics").retain(|(uid, ..), _| uid != owner);
        let Some(client) = &self.client else { return Ok(()) };
        client
            .clone()
            .unpin_roots(UnpinRootsRequest { owner_uid: owner.into(), kind: String::new(), name: None })
            .await?;
        Ok(())
    }

    /// Forgets one tree that the object pinned and needs no more.
    ///
    /// # Errors
    /// What the store said.
    pub async fn forget_one(&self, owner: &str, kind: &'static str, name: &str) -> Result<(), tonic::Status> {
        self.taken.lock().expect("no holder panics").remove(&(owner.into(), kind, name.into()));
        let Some(client) = &self.client else { return Ok(()) };
        let request = UnpinRootsRequest { owner_uid: owner.into(), kind: kind.into(), name: Some(name.into()) };
        client.clone().unpin_roots(request).await?;
        Ok(())
    }
}

//! What the program does besides serving: questions about a store, and orders to it.

pub mod gc;
pub mod integrity;

use aether_credentials::{Connection, Credentials};
use aether_proto::store::v1::{Root, store_admin_client::StoreAdminClient};
use anyhow::Context;
use clap::Args;
use tonic::transport::Endpoint;

/// What an answer may take: paths of each tree that misses something.
const ANSWER: usize = 256 << 20;

/// A node that runs.
#[derive(Clone, Debug, Args)]
pub struct NodeArgs {
    /// Address of a node that runs, such as http://127.0.0.1:8980; without it, a folder that no node runs on.
    #[arg(long, value_name = "URL")]
    pub address: Option<String>,
    /// How to know the store, and what to show to it.
    #[command(flatten)]
    pub credentials: Credentials,
}

impl NodeArgs {
    /// The administration of the node, if one was named.
    ///
    /// # Errors
    /// An address that is not one, or credentials that do not fit it.
    pub fn admin(&self) -> anyhow::Result<Option<StoreAdminClient<Connection>>> {
        let Some(address) = &self.address else { return Ok(None) };
        let endpoint = Endpoint::from_shared(address.clone())
            .with_context(|| format!("--address {address:?} is not an address such as http://127.0.0.1:8980"))?;
        let client = StoreAdminClient::new(self.credentials.connect(&endpoint)?);
        Ok(Some(client.max_decoding_message_size(ANSWER)))
    }
}

/// `Checkpoint of 6d2f… "name"`.
fn describe(root: Option<&Root>) -> String {
    root.map_or_else(String::new, |root| match root.name.as_str() {
        "" => format!("{} of {}", root.kind, root.owner_uid),
        name => format!("{} {name:?} of {}", root.kind, root.owner_uid),
    })
}

/// Milliseconds since 1970 for a person.
fn moment(milliseconds: u64) -> String {
    let moment = i64::try_from(milliseconds).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    moment.map_or_else(|| "a time far away".to_owned(), |moment| moment.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

//! [`RemoteStore`]: each blob is asked of, and given to, the node for it; what a node does not do, the next one does.
//!
//! With a durable tier behind them any node can serve any blob, so that nothing depends on where a blob was placed.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::join_all;
use tonic::Code;

use super::{
    RemoteConfig,
    node::{NodeClient, Patience},
    nodes::{Nodes, choose},
};
use crate::{Blob, Store, StoreError, store::Result};

/// A store behind REAPI: one node, or several. Clones share its connections.
#[derive(Clone)]
pub struct RemoteStore(Arc<Inner>);

struct Inner {
    config: RemoteConfig,
    nodes: Nodes,
}

/// Something to do with a blob, and by which nodes it was not done.
struct Item<T> {
    blob: Blob,
    value: T,
    refused_by: Vec<usize>,
    /// Whether one of these did not answer.
    in_doubt: bool,
}

impl RemoteStore {
    /// Connects with the usual settings and checks that the server can do what is needed.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a bad address or a server without BLAKE3, [`StoreError::Remote`]
    /// when it does not answer.
    pub async fn connect(uri: &str) -> Result<Self> {
        let store = Self::lazy(&RemoteConfig::new(uri))?;
        store.check().await?;
        Ok(store)
    }

    /// A store that connects when it is first used, and again after every interruption.
    /// Must be called within a Tokio runtime.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for a bad address.
    pub fn lazy(config: &RemoteConfig) -> Result<Self> {
        Ok(Self(Arc::new(Inner { config: config.clone(), nodes: Nodes::new(config)? })))
    }

    /// Asks the server what it can do; of several, one that answers is enough.
    ///
    /// # Errors
    /// As [`RemoteStore::connect`].
    pub async fn check(&self) -> Result<()> {
        let mut patience = Patience::new(self.0.config.patience);
        loop {
            let nodes = self.0.nodes.now().await;
            let mut failed = None;
            for (node, result) in nodes.iter().zip(join_all(nodes.iter().map(|node| node.client.check())).await) {
                match result {
                    Ok(()) => node.answered(),
                    Err(error) if is_of_the_node(&error) => {
                        node.failed();
                        failed = Some(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            match failed {
                Some(error) if !nodes.iter().any(|node| node.answers()) => {
                    // One node alone was patient itself.
                    if nodes.len() == 1 || !patience.wait().await {
                        return Err(error);
                    }
                }
                _ => return Ok(()),
            }
        }
    }

    /// Reads `length` bytes of a blob from `offset`, fewer where it ends before. Bytes of a part cannot be verified:
    /// whoever reads them verifies the whole when he has it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Corrupt`] when the store sends too little, and those of the connection.
    pub async fn read_range(&self, blob: Blob, offset: u64, length: u64) -> Result<Bytes> {
        self.one(blob, |node| async move { node.read_range(blob, offset, length).await }).await
    }

    /// Has one thing done by the node for `blob`.
    async fn one<R, F>(&self, blob: Blob, work: impl Fn(NodeClient) -> F) -> Result<R>
    where
        F: Future<Output = Result<R>>,
    {
        let done = self.spread(vec![(blob, ())], |node, _| work(node)).await?;
        done.into_iter().next().ok_or_else(|| StoreError::Closed(self.0.config.uri.clone()))
    }

    /// Has things done by the nodes for their blobs, each node's together. What a node fails at goes to the next one;
    /// when none is left they are tried again for as long as the settings say.
    async fn spread<T, R, F>(
        &self,
        items: Vec<(Blob, T)>,
        work: impl Fn(NodeClient, Vec<(Blob, T)>) -> F,
    ) -> Result<Vec<R>>
    where
        T: Clone,
        F: Future<Output = Result<R>>,
    {
        let nodes = self.0.nodes.now().await;
        if let [node] = &nodes[..] {
            return Ok(vec![work(node.client.clone(), items).await?]);
        }
        let mut patience = Patience::new(self.0.config.patience);
        let mut left: Vec<Item<T>> = items
            .into_iter()
            .map(|(blob, value)| Item { blob, value, refused_by: Vec::new(), in_doubt: false })
            .collect();
        let mut done = Vec::new();
        let mut failed = None;
        loop {
            let mut groups: BTreeMap<usize, Vec<Item<T>>> = BTreeMap::new();
            for mut item in left.drain(..) {
                let place = choose(&nodes, &item.blob, |node| !item.refused_by.contains(&node));
                // Everybody was asked: those that did not answer may by now.
                let place = place.map_or_else(
                    || {
                        item.refused_by.clear();
                        item.in_doubt = false;
                        choose(&nodes, &item.blob, |_| true).map_or(0, |(node, _)| node)
                    },
                    |(node, _)| node,
                );
                groups.entry(place).or_default().push(item);
            }
            let results = join_all(groups.into_iter().map(|(place, group)| {
                let asked = group.iter().map(|item| (item.blob, item.value.clone())).collect();
                let work = work(nodes[place].client.clone(), asked);
                async move { (place, group, work.await) }
            }))
            .await;
            let mut exhausted = false;
            for (place, mut group, result) in results {
                match result {
                    Ok(result) => {
                        nodes[place].answered();
                        done.push(result);
                    }
                    Err(error) if is_of_the_node(&error) || error.is_missing() => {
                        let failing = is_of_the_node(&error);
                        if failing {
                            nodes[place].failed();
                        }
                        for item in &mut group {
                            item.in_doubt |= failing;
                            item.refused_by.push(place);
                            exhausted |= item.refused_by.len() == nodes.len();
                        }
                        tracing::debug!(%error, "asking another node");
                        let all_asked = group.iter().any(|item| item.refused_by.len() == nodes.len() && !item.in_doubt);
                        if all_asked {
                            return Err(error);
                        }
                        left.append(&mut group);
                        // A node that does not answer might have what another one has not: that is no "not found".
                        if failing || failed.is_none() {
                            failed = Some(error);
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
            if left.is_empty() {
                return Ok(done);
            }
            if exhausted
                && !patience.wait().await
                && let Some(error) = failed
            {
                return Err(error);
            }
        }
    }
}

/// Whether another node may do what this one did not.
fn is_of_the_node(error: &StoreError) -> bool {
    error.is_transient() || matches!(error, StoreError::Remote { code: Code::Internal | Code::Unknown, .. })
}

fn plain(blobs: &[Blob]) -> Vec<(Blob, ())> {
    blobs.iter().map(|blob| (*blob, ())).collect()
}

fn names<T>(items: Vec<(Blob, T)>) -> Vec<Blob> {
    items.into_iter().map(|(blob, _)| blob).collect()
}

#[async_trait]
impl Store for RemoteStore {
    async fn find_missing(&self, blobs: &[Blob]) -> Result<Vec<Blob>> {
        let found =
            self.spread(plain(blobs), |node, items| async move { node.find_missing(&names(items)).await }).await?;
        match <[Vec<Blob>; 1]>::try_from(found) {
            Ok([missing]) => Ok(missing),
            // In the order asked, each once.
            Err(parts) => {
                let mut missing: std::collections::HashSet<Blob> = parts.into_iter().flatten().collect();
                Ok(blobs.iter().copied().filter(|blob| missing.remove(blob)).collect())
            }
        }
    }

    async fn read(&self, blob: Blob) -> Result<Bytes> {
        self.one(blob, |node| async move { node.read(blob).await }).await
    }

    async fn read_batch(&self, blobs: &[Blob]) -> Result<Vec<Bytes>> {
        let read = self
            .spread(plain(blobs), |node, items| async move {
                let blobs = names(items);
                let data = node.read_batch(&blobs).await?;
                Ok(blobs.into_iter().zip(data).collect::<Vec<_>>())
            })
            .await?;
        let data: std::collections::HashMap<Blob, Bytes> = read.into_iter().flatten().collect();
        blobs
            .iter()
            .map(|blob| {
                let missing = || StoreError::NotFound { blob: *blob, store: self.0.config.uri.clone() };
                data.get(blob).cloned().ok_or_else(missing)
            })
            .collect()
    }

    async fn fetch_to(&self, blob: Blob, path: &Path) -> Result<()> {
        self.one(blob, |node| async move { node.fetch_to(blob, path).await }).await
    }

    async fn write_batch(&self, blobs: Vec<(Blob, Bytes)>) -> Result<()> {
        self.spread(blobs, |node, items| async move { node.write_batch(items).await }).await.map(|_| ())
    }

    async fn write_file(&self, blob: Blob, path: &Path) -> Result<()> {
        self.one(blob, |node| async move { node.write_file(blob, path).await }).await
    }

    async fn read_tree(&self, root: Blob) -> Result<Vec<(Blob, Bytes)>> {
        self.one(root, |node| async move { node.read_tree(root).await }).await
    }
}

//! Whole trees of directories, in pages.

use std::collections::{HashSet, VecDeque};

use aether_cas::{ContentName, sha256::DigestFunction, transfer::BLOB_OVERHEAD, tree::MAX_DIRECTORY_BYTES};
use bazel_remote_apis::build::bazel::remote::execution::v2::{self as reapi, GetTreeResponse};
use prost::Message;
use tokio::sync::mpsc;
use tonic::{Code, Status};

use super::{MAX_BATCH_BYTES, missing, status};
use crate::{metrics::StoreMetrics, page_token::PageToken, tiered::TieredStore};

/// Bytes of a page, unless a single directory is larger.
const PAGE_BYTES: u64 = 1 << 20;
/// Directories of a tree that are brought from the bucket together.
const LEVEL: usize = 4096;

/// A tree to be sent.
pub(super) struct Tree {
    pub(super) store: TieredStore,
    pub(super) metrics: StoreMetrics,
    pub(super) function: DigestFunction,
    /// The root, and how many directories the client has.
    pub(super) begin: PageToken,
    /// Directories of a page.
    pub(super) page_size: usize,
}

type Pages = mpsc::Sender<Result<GetTreeResponse, Status>>;

impl Tree {
    /// Reads a directory of any REAPI client, not only of ours.
    pub(super) fn directory(&self, name: &ContentName) -> Result<reapi::Directory, Status> {
        if name.size() > MAX_DIRECTORY_BYTES as u64 {
            return Err(Status::invalid_argument(format!("blob {name} is too large for a directory")));
        }
        let blob = self.store.resolve(&[*name]).map_err(status)?.pop().flatten().ok_or_else(|| missing(name))?;
        let data = self.store.read_blob(&blob).map_err(status)?;
        reapi::Directory::decode(data)
            .map_err(|error| Status::invalid_argument(format!("blob {name} is not a directory: {error}")))
    }

    /// Sends the directories breadth-first, each once, in pages that fit a message; those that the client has are left out.
    ///
    /// As REAPI allows, what is missing is left out; so are directories that fit no message, which a client reads as
    /// blobs.
    pub(super) fn send(&self, root: reapi::Directory, pages: &Pages) -> Result<(), Status> {
        let mut seen = HashSet::from([self.begin.root]);
        let mut waiting = VecDeque::new();
        let mut page = GetTreeResponse::default();
        let mut bytes = 0;
        let mut position = 0;
        let mut brought: usize = 0;
        let mut next = Some((self.begin.root, root));
        while let Some((name, directory)) = next.take() {
            for child in &directory.directories {
                let child = super::parse_digest(self.function, child.digest.as_ref())?;
                if seen.insert(child) {
                    waiting.push_back(child);
                }
            }
            let cost = name.size() + BLOB_OVERHEAD;
            if cost <= MAX_BATCH_BYTES {
                if position >= self.begin.skip {
                    let full = bytes + cost > PAGE_BYTES || page.directories.len() >= self.page_size;
                    if full && !page.directories.is_empty() {
                        page.next_page_token = PageToken { skip: position, ..self.begin }.to_string();
                        self.metrics.sent(std::mem::take(&mut bytes));
                        if pages.blocking_send(Ok(std::mem::take(&mut page))).is_err() {
                            return Ok(());
                        }
                    }
                    bytes += cost;
                    page.directories.push(directory);
                }
                position += 1;
            }
            while let Some(name) = waiting.pop_front() {
                if brought == 0 {
                    // Whole levels of the tree at a time, where the disk does not have them.
                    let level: Vec<_> = std::iter::once(name).chain(waiting.iter().copied()).take(LEVEL).collect();
                    let blobs: Vec<_> = self.store.resolve(&level).map_err(status)?.into_iter().flatten().collect();
                    self.store.bring_now(&blobs).map_err(status)?;
                    brought = level.len();
                }
                brought -= 1;
                match self.directory(&name) {
                    Ok(directory) => {
                        next = Some((name, directory));
                        break;
                    }
                    Err(error) if error.code() == Code::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        self.metrics.sent(bytes);
        // The client may have gone, which is no error of ours.
        let _ = pages.blocking_send(Ok(page));
        Ok(())
    }
}

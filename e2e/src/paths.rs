//! Where everything of the test cluster lies: one folder, `cluster/` of the cache folder. Outside it are only what is
//! built or loaded once (beside it), and what the kernel names (a bridge, network namespaces, cgroups).

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The folder of the test cluster and the names in it.
#[derive(Debug, Clone)]
pub struct Paths {
    cache: PathBuf,
}

impl Paths {
    /// `AETHER_CACHE`, or `~/.cache/aether`: the same rule as in `third-party/lib.sh`.
    pub fn from_environment() -> Result<Self> {
        let cache = match std::env::var_os("AETHER_CACHE") {
            Some(cache) => PathBuf::from(cache),
            None => PathBuf::from(std::env::var_os("HOME").context("neither AETHER_CACHE nor HOME is set")?)
                .join(".cache/aether"),
        };
        Ok(Self { cache })
    }

    /// Built third-party programs and images: kept between clusters.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The cluster's own folder.
    pub fn cluster(&self) -> PathBuf {
        self.cache.join("cluster")
    }

    /// Options, addresses and programs of the running cluster.
    pub fn record(&self) -> PathBuf {
        self.cluster().join("cluster.json")
    }

    /// Held while the cluster is brought up or down.
    pub fn lock(&self) -> PathBuf {
        self.cache.join("cluster.lock")
    }

    /// Certificates, keys and kubeconfigs.
    pub fn pki(&self) -> PathBuf {
        self.cluster().join("pki")
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.cluster().join("kubeconfig")
    }

    /// One log file per program.
    pub fn logs(&self) -> PathBuf {
        self.cluster().join("logs")
    }

    /// One record per running program.
    pub fn processes(&self) -> PathBuf {
        self.cluster().join("processes")
    }

    /// etcd's data.
    pub fn etcd(&self) -> PathBuf {
        self.cluster().join("etcd")
    }

    /// The API server's audit log, JSON lines.
    pub fn audit_log(&self) -> PathBuf {
        self.logs().join("audit.log")
    }

    /// A node's containerd: its images are kept between clusters, because importing and deleting them takes long.
    pub fn image_store(&self, node: &str) -> PathBuf {
        self.cache.join("image-stores").join(node)
    }

    /// A node's disk: what its kubelet and driver keep under `/var/lib`.
    pub fn node(&self, name: &str) -> PathBuf {
        self.cluster().join("nodes").join(name)
    }

    /// The scripts that build and fetch what others wrote.
    pub fn third_party() -> PathBuf {
        Path::new(env!("AETHER_TOP")).join("e2e/third-party")
    }
}

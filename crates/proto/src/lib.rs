//! gRPC bindings of every protocol Aether speaks, generated from `proto/` at build time; no logic lives here.
//!
//! | module | protocol | spoken between |
//! |---|---|---|
//! | [`csi::v1`] | Container Storage Interface 1.9 (older callers leave newer fields out) | kubelet or sidecars and the driver |
//! | [`registration`] | kubelet plugin registration v1 | kubelet and the driver |
//! | [`store::v1`] | administration of a store node | operator, `aether-store` and store nodes |
//! | [`node::v1`] | administration of a node's sessions | `aether-node` and the driver, over a unix socket |

/// Declares the module of one package; what is in it is documented by the comments of its `.proto` file.
macro_rules! generated {
    ($(#[$attribute:meta])* $module:ident = $package:literal) => {
        $(#[$attribute])*
        #[allow(missing_docs, unreachable_pub, clippy::all)]
        pub mod $module {
            tonic::include_proto!($package);
        }
    };
}

/// The Container Storage Interface.
pub mod csi {
    generated! {
        /// Messages and numbers of specification 1.9.
        v1 = "csi.v1"
    }
}

generated! {
    /// Kubelet plugin registration, version v1.
    registration = "pluginregistration"
}

/// Administration of store nodes, beside the Remote Execution API that carries their data.
pub mod store {
    generated! {
        /// Package `aether.store.v1`.
        v1 = "aether.store.v1"
    }
}

/// Administration of one node's engine.
pub mod node {
    generated! {
        /// Package `aether.node.v1`.
        v1 = "aether.node.v1"
    }
}

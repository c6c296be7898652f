//! The Kubernetes API of Aether: its custom resources, what their conditions mean, and every name that two parts
//! must spell alike. No I/O happens here.
//!
//! The spec of an object belongs to its user and is never written by a controller. Each part of a status has one
//! owner: the operator, or the driver of the node that holds the session.

// kube's derive repeats the visibility of a spec where the lint cannot see who uses it.
#![allow(unreachable_pub)]
// Each printcolumn has a name and a type of its own, which the lint takes for repetitions.
#![allow(clippy::duplicated_attributes)]

pub mod approval;
pub mod checkpoint;
pub mod command;
pub mod commit;
pub mod conditions;
pub mod identity;
pub mod liveness;
pub mod names;
pub mod note;
pub mod quantity;
pub mod restore;
pub mod review;
pub mod session;
pub mod source;

pub use approval::{AetherApproval, AetherApprovalSpec, AetherApprovalStatus};
pub use checkpoint::{AetherCheckpoint, AetherCheckpointSpec, AetherCheckpointStatus};
pub use command::{AetherCommand, AetherCommandSpec, AetherCommandStatus};
pub use commit::{AetherCommit, AetherCommitSpec, AetherCommitStatus};
pub use note::{AetherNote, AetherNoteSpec};
pub use restore::{AetherRestore, AetherRestoreSpec, AetherRestoreStatus};
pub use session::{AetherSession, AetherSessionSpec, AetherSessionStatus};
pub use source::{AetherSource, AetherSourceSpec, AetherSourceStatus};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

/// Every custom resource definition, in the order in which a reader meets them.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    vec![
        AetherSource::crd(),
        AetherSession::crd(),
        AetherCheckpoint::crd(),
        AetherRestore::crd(),
        AetherCommand::crd(),
        AetherCommit::crd(),
        AetherApproval::crd(),
        AetherNote::crd(),
    ]
}

//! A real Kubernetes on one machine, and what tests of it need.
//!
//! [`cluster::Cluster`] is the way in: a control plane and several nodes, each in namespaces of its own, made from Debian's
//! packages alone. The program `aether-cluster` brings it up and down.

pub mod audit;
pub mod cluster;
pub mod command;
pub mod control_plane;
pub mod density;
pub mod git_server;
pub mod images;
pub mod init;
pub mod kernel;
pub mod manifests;
pub mod network;
pub mod node;
pub mod options;
pub mod paths;
pub mod pki;
pub mod process;
pub mod product;
pub mod site;
pub mod story;
pub mod team;
pub mod testing;
pub mod third_party;
pub mod tools;
pub mod wait;

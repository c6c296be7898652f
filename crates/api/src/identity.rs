//! Who did something, as the API server had authenticated them, and the proof that the operator wrote it down. No user writes
//! these: what a user sends in their place is replaced when the object is admitted.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A user, as the API server had authenticated them.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub struct Identity {
    /// The name: of a service account, `system:serviceaccount:NAMESPACE:NAME`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub username: String,
    /// What tells two users of one name apart, where the authenticator knows.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The groups that the user was in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// What else the authenticator said, which an authorizer may look at.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, Vec<String>>,
}

/// The operator's proof that it wrote the identity, of this user and about this object. It counts only in an object
/// that was made at the time it names, so that a copy in a later object proves nothing.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq, JsonSchema)]
pub struct Signature {
    /// Which key of the operator made it.
    pub key: String,
    /// When.
    pub time: Time,
    /// HMAC-SHA256, in hex.
    pub value: String,
}

//! Proof that the operator wrote down who made an object: HMAC-SHA256 over what the object says, by a key that the operator's
//! replicas share.
//!
//! The webhook signs before the API server gives an object its uid (that happens after all mutating admission, and no API server
//! takes another order), so the uid of the object itself cannot be signed. What stands in its place is namespace, name and the time:
//! a signature proves something only in an object that the API server made at that time, within [`TOLERANCE`]. Creation
//! times are written by the API server alone; so a signature that is copied into a later object, such as an approval that
//! was withdrawn, proves nothing. Of what an object names (a commit), the uid is there, and is signed.
//!
//! Keys are in Secret `aether-signing-keys`. The leader makes them and replaces them when they are [`KEY_AGE`] old; the one before
//! stays good until the next time. What was signed longer ago than that counts no more, and must be made again.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use aether_api::identity::{Identity, Signature};
use aether_api::{AetherApprovalSpec, AetherCommitSpec};
use aether_runtime::CancellationToken;
use anyhow::{Context as _, Result};
use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::PostParams;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use ring::rand::SecureRandom;
use ring::{hmac, rand};
use serde::Serialize;

use crate::objects;

/// The Secret of the keys.
pub const SECRET: &str = "aether-signing-keys";
/// How far the clocks of API server and operator may be apart, with what an admission may take.
pub const TOLERANCE: SignedDuration = SignedDuration::from_secs(120);
/// When a key is replaced.
pub const KEY_AGE: SignedDuration = SignedDuration::from_hours(24 * 180);

/// Keys of the Secret.
const CURRENT: &str = "current";
const PREVIOUS: &str = "previous";
const MADE: &str = "made";
/// What is signed for [`Keys::word`]. No statement begins so.
const WORD: &[u8] = b"the API server asks";
/// How often the leader looks at the age of the key, and how soon it tries again what failed.
const LOOK: Duration = Duration::from_secs(3600);
const RETRY: Duration = Duration::from_secs(5);

/// What is signed: one encoding for one meaning.
#[derive(Clone, Debug)]
pub struct Statement(Vec<u8>);

impl Statement {
    /// A commit: all of its spec, with who asked for it.
    pub fn commit(namespace: &str, name: &str, spec: &AetherCommitSpec) -> Self {
        let spec = AetherCommitSpec { signature: None, ..spec.clone() };
        Self::of("AetherCommit", namespace, name, &[&json(&spec)])
    }

    /// An approval: all of its spec, with the reviewer, and the uid of the commit.
    pub fn approval(namespace: &str, name: &str, spec: &AetherApprovalSpec, commit_uid: &str) -> Self {
        let spec = AetherApprovalSpec { signature: None, ..spec.clone() };
        Self::of("AetherApproval", namespace, name, &[&json(&spec), commit_uid.as_bytes()])
    }

    /// Who made an object of this kind.
    pub fn creation(kind: &str, namespace: &str, name: &str, by: &Identity) -> Self {
        Self::of(kind, namespace, name, &[&json(by)])
    }

    /// Each part with its length before it, so that no two lists of parts are encoded alike.
    fn of(kind: &str, namespace: &str, name: &str, parts: &[&[u8]]) -> Self {
        let head = ["aether.dev/v1", kind, namespace, name].map(str::as_bytes);
        let mut encoded = Vec::new();
        for part in head.iter().chain(parts) {
            encoded.extend((part.len() as u64).to_le_bytes());
            encoded.extend(*part);
        }
        Self(encoded)
    }

    fn at(&self, time: &Time) -> Vec<u8> {
        let mut encoded = self.0.clone();
        encoded.extend(time.0.as_second().to_le_bytes());
        encoded
    }
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("specs have string keys only")
}

/// Why a signature proves nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nobody signed.
    #[error("it is not signed: it was made while the operator's webhook was away")]
    Unsigned,
    /// By a key that is not known, any more or yet.
    #[error("it is signed by a key that is not known any more")]
    UnknownKey,
    /// Not what was signed.
    #[error("it is not what the operator signed: it was changed, or it speaks of an earlier object of that name")]
    Different,
    /// A copy.
    #[error(
        "it was signed at another time than it was made: it is a copy, or the clocks of API server and operator differ"
    )]
    OtherTime,
}

/// A key and the one before.
#[derive(Clone)]
pub struct Keys {
    current: Key,
    previous: Option<Key>,
}

#[derive(Clone)]
struct Key {
    id: String,
    key: hmac::Key,
}

impl Key {
    fn new(bytes: &[u8]) -> Option<Self> {
        // Part of a digest of 32 random bytes says nothing about them.
        let id = hex::encode(&ring::digest::digest(&ring::digest::SHA256, bytes).as_ref()[..6]);
        (bytes.len() == 32).then(|| Self { id, key: hmac::Key::new(hmac::HMAC_SHA256, bytes) })
    }

    fn word(&self) -> String {
        hex::encode(hmac::sign(&self.key, WORD))
    }
}

impl Keys {
    /// Reads the Secret; `None` when there is no key in it.
    pub fn read(secret: &Secret) -> Option<Self> {
        let key = |name: &str| Key::new(&secret.data.as_ref()?.get(name)?.0);
        Some(Self { current: key(CURRENT)?, previous: key(PREVIOUS) })
    }

    /// A word by which the API server shows that it is the one who asks: part of the address that it is told to ask at.
    pub fn word(&self) -> String {
        self.current.word()
    }

    /// Whether this is such a word.
    pub fn knows(&self, word: &str) -> bool {
        let Ok(word) = hex::decode(word) else { return false };
        let keys = [Some(&self.current), self.previous.as_ref()];
        keys.into_iter().flatten().any(|key| hmac::verify(&key.key, WORD, &word).is_ok())
    }

    /// Signs.
    pub fn sign(&self, statement: &Statement, time: Time) -> Signature {
        let value = hmac::sign(&self.current.key, &statement.at(&time));
        Signature { key: self.current.id.clone(), value: hex::encode(value), time }
    }

    /// Checks that this was signed, for an object that the API server made at `made`.
    ///
    /// # Errors
    /// Why it proves nothing.
    pub fn verify(
        &self,
        statement: &Statement,
        signature: Option<&Signature>,
        made: Option<&Time>,
    ) -> Result<(), Refusal> {
        let signature = signature.ok_or(Refusal::Unsigned)?;
        let keys = [Some(&self.current), self.previous.as_ref()];
        let key = keys.into_iter().flatten().find(|key| key.id == signature.key).ok_or(Refusal::UnknownKey)?;
        let value = hex::decode(&signature.value).map_err(|_| Refusal::Different)?;
        hmac::verify(&key.key, &statement.at(&signature.time), &value).map_err(|_| Refusal::Different)?;
        // An object that is only being made has no time yet.
        let apart = made.map(|made| signature.time.0.duration_since(made.0).abs());
        if apart.is_some_and(|apart| apart > TOLERANCE) { Err(Refusal::OtherTime) } else { Ok(()) }
    }
}

/// The keys as they were last seen. Clones share them.
#[derive(Clone, Default)]
pub struct Keyring(Arc<RwLock<Option<Keys>>>);

impl Keyring {
    /// The keys, if there are any yet.
    pub fn keys(&self) -> Option<Keys> {
        self.0.read().expect("no holder panics").clone()
    }

    /// From now on these.
    pub fn set(&self, keys: Option<Keys>) {
        *self.0.write().expect("no holder panics") = keys;
    }

    /// Follows the Secret until `stop`.
    ///
    /// # Errors
    /// None: a watch that fails is begun anew.
    pub async fn follow(self, client: Client, namespace: String, stop: CancellationToken) -> Result<()> {
        let secrets: Api<Secret> = Api::namespaced(client, &namespace);
        let mut secrets = std::pin::pin!(watch_object(secrets, SECRET).default_backoff());
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                Some(seen) = secrets.next() => match seen {
                    Ok(secret) => self.set(secret.as_ref().and_then(Keys::read)),
                    Err(error) => tracing::warn!("cannot watch Secret {SECRET}: {error}"),
                },
            }
        }
    }
}

/// Makes the keys and replaces them in time, until `stop`. Only the leader does.
pub async fn keep(client: Client, namespace: &str, stop: &CancellationToken) {
    loop {
        let pause = match rotate(&client, namespace, Timestamp::now()).await {
            Ok(()) => LOOK,
            Err(error) => {
                tracing::warn!("the keys of signatures: {error:#}");
                RETRY
            }
        };
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
    }
}

/// Makes the Secret, or puts a new key into one whose key is old.
///
/// # Errors
/// What cannot be read or written.
pub async fn rotate(client: &Client, namespace: &str, now: Timestamp) -> Result<()> {
    let secrets: Api<Secret> = objects::namespaced(client, namespace);
    let there = objects::get(&secrets, SECRET).await?;
    let how = PostParams { field_manager: Some(aether_api::names::OPERATOR_MANAGER.into()), ..PostParams::default() };
    let old = there.as_ref().and_then(|secret| secret.data.clone()).unwrap_or_default();
    let usable = there.as_ref().is_some_and(|secret| Keys::read(secret).is_some());
    let made = old.get(MADE).and_then(|made| std::str::from_utf8(&made.0).ok()?.parse::<Timestamp>().ok());
    if usable && made.is_some_and(|made| now.duration_since(made) < KEY_AGE) {
        return Ok(());
    }
    let mut fresh = [0; 32];
    rand::SystemRandom::new().fill(&mut fresh).ok().context("the system has no random numbers")?;
    let mut data = std::collections::BTreeMap::from([
        (CURRENT.to_owned(), ByteString(fresh.to_vec())),
        (MADE.to_owned(), ByteString(now.to_string().into_bytes())),
    ]);
    data.extend(old.get(CURRENT).filter(|_| usable).map(|key| (PREVIOUS.to_owned(), key.clone())));
    let written = match there {
        // With the resourceVersion that was read: of two that write, one wins.
        Some(secret) => secrets.replace(SECRET, &how, &Secret { data: Some(data), ..secret }).await,
        None => {
            let mut secret = Secret { data: Some(data), ..Secret::default() };
            secret.metadata.name = Some(SECRET.into());
            secret.metadata.labels = Some([("app.kubernetes.io/name".to_owned(), "aether".to_owned())].into());
            secrets.create(&how, &secret).await
        }
    };
    match written {
        Ok(_) => tracing::info!(secret = SECRET, "wrote a new key for signatures"),
        Err(kube::Error::Api(status)) if status.is_already_exists() || status.is_conflict() => {}
        Err(error) => return Err(error).with_context(|| format!("cannot write Secret {namespace}/{SECRET}")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::approval::Decision;

    fn keys(current: u8, previous: Option<u8>) -> Keys {
        let key = |byte| Key::new(&[byte; 32]).unwrap();
        Keys { current: key(current), previous: previous.map(key) }
    }

    fn time(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    fn approval() -> AetherApprovalSpec {
        AetherApprovalSpec {
            commit: "fix".into(),
            root: "aa/1".into(),
            reviewer: Some(Identity { username: "jane".into(), groups: vec!["g".into()], ..Identity::default() }),
            ..AetherApprovalSpec::default()
        }
    }

    #[test]
    fn no_part_of_an_approval_can_be_changed() {
        let keys = keys(1, None);
        let statement = Statement::approval("agents", "fix.1", &approval(), "u-1");
        let signature = keys.sign(&statement, time(1000));
        let check = |statement: &Statement| keys.verify(statement, Some(&signature), Some(&time(1001)));
        assert_eq!(check(&statement), Ok(()));
        let changes: [fn(&mut AetherApprovalSpec); 6] = [
            |spec| spec.commit = "fiy".into(),
            |spec| spec.root = "ab/1".into(),
            |spec| spec.decision = Decision::Reject,
            |spec| spec.text = Some("fine".into()),
            |spec| spec.reviewer.as_mut().unwrap().username = "joe".into(),
            |spec| spec.reviewer.as_mut().unwrap().groups.push("release".into()),
        ];
        for change in changes {
            let mut spec = approval();
            change(&mut spec);
            let changed = Statement::approval("agents", "fix.1", &spec, "u-1");
            assert_eq!(check(&changed), Err(Refusal::Different), "{spec:?}");
        }
        for (namespace, name, uid) in
            [("agent", "sfix.1", "u-1"), ("agents", "fix.2", "u-1"), ("agents", "fix.1", "u-2")]
        {
            let moved = Statement::approval(namespace, name, &approval(), uid);
            assert_eq!(check(&moved), Err(Refusal::Different), "{namespace} {name} {uid}");
        }
        let commit = AetherCommitSpec { checkpoint: Some("c".into()), ..AetherCommitSpec::default() };
        assert_eq!(check(&Statement::commit("agents", "fix.1", &commit)), Err(Refusal::Different));
    }

    #[test]
    fn neither_can_the_signature() {
        let keys = keys(1, None);
        let statement = Statement::approval("agents", "fix.1", &approval(), "u-1");
        let good = keys.sign(&statement, time(1000));
        let verify = |signature: &Signature| keys.verify(&statement, Some(signature), Some(&time(1000)));
        assert_eq!(keys.verify(&statement, None, None), Err(Refusal::Unsigned));
        assert_eq!(verify(&Signature { time: time(1001), ..good.clone() }), Err(Refusal::Different));
        assert_eq!(verify(&Signature { value: good.value[2..].into(), ..good.clone() }), Err(Refusal::Different));
        assert_eq!(verify(&Signature { value: "so what".into(), ..good.clone() }), Err(Refusal::Different));
        assert_eq!(verify(&Signature { value: String::new(), ..good.clone() }), Err(Refusal::Different));
        let forged = self::keys(2, None).sign(&statement, time(1000));
        assert_eq!(verify(&forged), Err(Refusal::UnknownKey));
        assert_eq!(verify(&Signature { key: good.key, ..forged }), Err(Refusal::Different));
    }

    #[test]
    fn a_copy_in_a_later_object_proves_nothing() {
        let keys = keys(1, None);
        let statement = Statement::creation("AetherSession", "agents", "fix", &Identity::default());
        let signature = keys.sign(&statement, time(1000));
        let made = |second| keys.verify(&statement, Some(&signature), Some(&time(second)));
        assert_eq!((made(880), made(1120)), (Ok(()), Ok(())));
        assert_eq!((made(879), made(1121)), (Err(Refusal::OtherTime), Err(Refusal::OtherTime)));
    }

    #[test]
    fn the_key_before_is_good_until_the_next() {
        let statement = Statement::creation("AetherSession", "agents", "fix", &Identity::default());
        let signature = keys(1, None).sign(&statement, time(1000));
        let verify = |keys: &Keys| keys.verify(&statement, Some(&signature), None);
        assert_eq!(verify(&keys(2, Some(1))), Ok(()));
        assert_eq!(verify(&keys(3, Some(2))), Err(Refusal::UnknownKey));
    }

    #[tokio::test]
    async fn keys_are_made_once_and_replaced_in_time() {
        let api = aether_testkit::ApiServer::new();
        let client = api.client();
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let keys = || Keys::read(&api.get("aether-system", SECRET).unwrap()).unwrap();
        rotate(&client, "aether-system", start).await.unwrap();
        let first = keys();
        assert!(first.previous.is_none());
        api.take_writes();
        rotate(&client, "aether-system", start + SignedDuration::from_hours(24 * 179)).await.unwrap();
        assert!(api.take_writes().is_empty());
        rotate(&client, "aether-system", start + KEY_AGE).await.unwrap();
        let second = keys();
        assert_ne!(second.current.id, first.current.id);
        assert_eq!(second.previous.map(|key| key.id), Some(first.current.id));
        // One that cannot be used is replaced at once, and vouches for nothing.
        api.change::<Secret>("aether-system", SECRET, |secret| {
            secret.data.as_mut().unwrap().insert(CURRENT.into(), ByteString(b"short".to_vec()));
        });
        rotate(&client, "aether-system", start + KEY_AGE).await.unwrap();
        assert!(keys().previous.is_none());
    }
}

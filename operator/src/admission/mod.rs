//! The admission webhook: writes down who asks for a commit, approves one, or makes what can be committed, and refuses what breaks
//! a rule, in words.
//!
//! `mutate` stamps what is made with the user whom the API server had authenticated, whatever the object says, and signs it
//! ([`crate::signature`]); of what is changed it puts back what it had stamped. `validate` looks at what has become of
//! that after all other webhooks, and writes down what cannot be told from the objects later: who withdraws a decision, and who
//! makes, resolves or reopens a note ([`crate::audit`]). Every replica serves; the chart says which requests come here and what becomes of them
//! while nobody answers. That is no matter of trust: what was not stamped here does not count.

mod keeper;
mod review;
pub mod rules;

use std::sync::Arc;

use aether_api::identity::{Identity, Signature};
use aether_api::names::{CREATOR_ANNOTATION, approval_name};
use aether_api::{AetherApproval, AetherApprovalSpec, AetherCommit, AetherCommitSpec, AetherNote, AetherNoteSpec};
use aether_audit::Entry;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Client, Resource, ResourceExt};
use ring::rand::SecureRandom;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use keeper::Keeper;
pub use review::{Answer, Change, Question, Request, response};

use crate::audit::{self, Audit, lines};
use crate::events::Events;
use crate::signature::{Keyring, Keys, Statement};
use crate::{access, objects};

/// The largest question: two objects of the most that etcd takes, with room.
const LARGEST: usize = 8 << 20;
/// What the API server itself makes names of.
const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// What answers.
#[derive(Clone)]
pub struct Admission {
    /// The Kubernetes API.
    pub client: Client,
    /// The keys to sign by.
    pub keyring: Keyring,
    /// The audit log.
    pub audit: Arc<Audit>,
    /// What people are told.
    pub events: Events,
}

/// Who made an object, as its annotation says.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Creation {
    /// Who.
    pub by: Identity,
    /// The proof.
    pub signature: Signature,
}

impl Creation {
    /// Who made this session or checkpoint, if that can be believed.
    ///
    /// # Errors
    /// Why not.
    pub fn of<K: objects::Object>(object: &K, keys: &Keys) -> Result<Identity, String> {
        let text = object.annotations().get(CREATOR_ANNOTATION).ok_or("nobody has written it down")?;
        let creation: Self = serde_json::from_str(text).map_err(|_| "what is written there makes no sense")?;
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        let statement = Statement::creation(&K::kind(&()), &namespace, &name, &creation.by);
        keys.verify(&statement, Some(&creation.signature), object.meta().creation_timestamp.as_ref())
            .map_err(|why| why.to_string())?;
        Ok(creation.by)
    }
}

/// The routes. Each ends with a word that only the API server has ([`Keys::word`]), because whoever can ask here is told
/// signatures.
pub fn router(admission: Admission) -> Router {
    Router::new()
        .route("/mutate/{word}", post(mutate))
        .route("/validate/{word}", post(validate))
        .layer(DefaultBodyLimit::max(LARGEST))
        .with_state(Arc::new(admission))
}

async fn mutate(
    State(admission): State<Arc<Admission>>,
    Path(word): Path<String>,
    Json(Question { request }): Json<Question>,
) -> Result<Json<Value>, StatusCode> {
    admission.knows(&word)?;
    let answer = admission.mutate(&request).await;
    Ok(Json(told(&request, &answer)))
}

async fn validate(
    State(admission): State<Arc<Admission>>,
    Path(word): Path<String>,
    Json(Question { request }): Json<Question>,
) -> Result<Json<Value>, StatusCode> {
    admission.knows(&word)?;
    let answer = admission.validate(&request).await;
    Ok(Json(told(&request, &answer)))
}

fn told(request: &Request, answer: &Answer) -> Value {
    if let Err(why) = answer {
        let (kind, user) = (&request.kind.kind, &request.user_info.username);
        tracing::info!(kind, user, namespace = request.namespace, why, "refused");
    }
    response(&request.uid, answer)
}

/// An object, as far as it is looked at here.
struct Given<'a> {
    kind: &'a str,
    namespace: &'a str,
    name: String,
    changes: Vec<Change>,
}

impl<'a> Given<'a> {
    /// An object that is being made. One that asks for a name gets it here, where it can be signed.
    fn new(request: &'a Request) -> Self {
        let metadata = &request.object["metadata"];
        let text = |field: &str| metadata[field].as_str().unwrap_or_default().to_owned();
        let mut given =
            Self { kind: &request.kind.kind, namespace: &request.namespace, name: text("name"), changes: Vec::new() };
        let beginning = text("generateName");
        if given.name.is_empty() && !beginning.is_empty() {
            let beginning: String = beginning.chars().take(58).collect();
            given.call(format!("{beginning}{}", random_end()));
        }
        given
    }

    fn call(&mut self, name: String) {
        self.changes.retain(|change| change.path() != "/metadata/name");
        self.changes.push(Change::set("/metadata/name", &name));
        self.name = name;
    }
}

impl Admission {
    fn knows(&self, word: &str) -> Result<(), StatusCode> {
        let known = self.keyring.keys().is_some_and(|keys| keys.knows(word));
        if known { Ok(()) } else { Err(StatusCode::NOT_FOUND) }
    }

    fn keys(&self) -> Result<Keys, String> {
        self.keyring.keys().ok_or_else(|| "the operator has no keys to sign by yet: try again in a moment".to_owned())
    }

    /// What to change in an object, or why it is refused.
    ///
    /// # Errors
    /// The refusal, for people.
    pub async fn mutate(&self, request: &Request) -> Answer {
        match request.operation.as_str() {
            "UPDATE" => return restore(request),
            "DELETE" => return Ok(Vec::new()),
            _ => {}
        }
        let mut given = Given::new(request);
        let now = objects::now();
        match given.kind {
            "AetherCommit" => {
                let mut spec: AetherCommitSpec = spec(&request.object)?;
                refuse(rules::commit(&given.name, &spec))?;
                // What an authorizer may want to know beside is not asked of who asks for a commit.
                let by = Identity { extra: Default::default(), ..request.user_info.clone() };
                given.changes.push(Change::set("/spec/requestedBy", &by));
                spec.requested_by = Some(by);
                let statement = Statement::commit(given.namespace, &given.name, &spec);
                given.changes.push(Change::set("/spec/signature", self.keys()?.sign(&statement, now)));
            }
            "AetherApproval" => self.stamp_approval(request, &mut given, now).await?,
            "AetherNote" => {
                refuse(rules::note(&spec::<AetherNoteSpec>(&request.object)?))?;
                let author = Identity { extra: Default::default(), ..request.user_info.clone() };
                given.changes.push(Change::set("/spec/author", author));
            }
            _ => {
                // Sessions, checkpoints and commands are made without a stamp rather than not at all.
                let Ok(keys) = self.keys() else { return Ok(Vec::new()) };
                let who = &request.user_info;
                let by = Identity { username: who.username.clone(), uid: who.uid.clone(), ..Identity::default() };
                let statement = Statement::creation(given.kind, given.namespace, &given.name, &by);
                let creation = Creation { signature: keys.sign(&statement, now), by };
                let text = serde_json::to_string(&creation).expect("string keys only");
                if request.object["metadata"]["annotations"].is_null() {
                    given.changes.push(Change::set("/metadata/annotations", json!({})));
                }
                let key = CREATOR_ANNOTATION.replace('/', "~1");
                given.changes.push(Change::set(format!("/metadata/annotations/{key}"), text));
            }
        }
        Ok(given.changes)
    }

    async fn stamp_approval(&self, request: &Request, given: &mut Given<'_>, now: Time) -> Result<(), String> {
        let mut spec: AetherApprovalSpec = spec(&request.object)?;
        refuse(rules::approval(&spec))?;
        let who = &request.user_info;
        let expected = approval_name(&spec.commit, &who.username);
        let said = request.object["metadata"]["name"].as_str().unwrap_or_default();
        if !said.is_empty() && said != expected {
            return Err(format!(
                "what {} says of AetherCommit {} is called {expected}, so that everybody has one voice: use that name, or generateName",
                who.username, spec.commit
            ));
        }
        given.call(expected);
        let commit = self.commit(given.namespace, &spec.commit).await?;
        if commit.finished() {
            return Err(format!("AetherCommit {} has ended: there is nothing to decide any more", spec.commit));
        }
        let Some(source) = commit.status.as_ref().and_then(|status| status.source.as_ref()) else {
            return Err(format!(
                "AetherCommit {} is not ready to be reviewed yet: its status names no tree",
                spec.commit
            ));
        };
        let allowed = access::may(&self.client, who, access::APPROVE, &source.namespace, &source.name).await;
        if !allowed.map_err(|error| format!("it cannot be found out whether you may approve: {error}"))? {
            return Err(format!(
                "{} may not decide on commits of AetherSource {}/{}: that takes the verb {} on it",
                who.username,
                source.namespace,
                source.name,
                access::APPROVE
            ));
        }
        given.changes.push(Change::set("/spec/reviewer", who));
        spec.reviewer = Some(who.clone());
        let uid = commit.uid().unwrap_or_default();
        let statement = Statement::approval(given.namespace, &given.name, &spec, &uid);
        given.changes.push(Change::set("/spec/signature", self.keys()?.sign(&statement, now)));
        Ok(())
    }

    async fn commit(&self, namespace: &str, name: &str) -> Result<AetherCommit, String> {
        let commits = objects::namespaced::<AetherCommit>(&self.client, namespace);
        let commit = objects::get(&commits, name).await.map_err(|error| error.to_string())?;
        commit.ok_or_else(|| format!("AetherCommit {name} does not exist in namespace {namespace}"))
    }

    /// Whether what became of the object can be stored.
    ///
    /// # Errors
    /// The refusal, for people.
    pub async fn validate(&self, request: &Request) -> Answer {
        match (request.operation.as_str(), request.kind.kind.as_str()) {
            ("UPDATE", kind) => {
                unchanged(request)?;
                if kind == "AetherNote" {
                    let (old, new) = (object(&request.old_object)?, object(&request.object)?);
                    self.note_down(&new, lines::turned(&old, &new, &request.user_info), request).await?;
                }
                return Ok(Vec::new());
            }
            ("DELETE", "AetherApproval") => return self.withdraw(request).await.map(|()| Vec::new()),
            ("DELETE", _) => return Ok(Vec::new()),
            _ => {}
        }
        let (namespace, name) = (&request.namespace, request.object["metadata"]["name"].as_str().unwrap_or_default());
        let changed = |why: crate::signature::Refusal| {
            format!("another webhook has changed what was signed, or nothing was: {why}")
        };
        match request.kind.kind.as_str() {
            "AetherCommit" => {
                let spec: AetherCommitSpec = spec(&request.object)?;
                refuse(rules::commit(name, &spec))?;
                let statement = Statement::commit(namespace, name, &spec);
                self.keys()?.verify(&statement, spec.signature.as_ref(), None).map_err(changed)?;
                is_theirs(spec.requested_by.as_ref(), request)?;
            }
            "AetherApproval" => {
                let spec: AetherApprovalSpec = spec(&request.object)?;
                refuse(rules::approval(&spec))?;
                let uid = self.commit(namespace, &spec.commit).await?.uid().unwrap_or_default();
                let statement = Statement::approval(namespace, name, &spec, &uid);
                self.keys()?.verify(&statement, spec.signature.as_ref(), None).map_err(changed)?;
                is_theirs(spec.reviewer.as_ref(), request)?;
            }
            "AetherNote" => {
                let spec: AetherNoteSpec = spec(&request.object)?;
                refuse(rules::note(&spec))?;
                is_theirs(spec.author.as_ref(), request)?;
                let note = object(&request.object)?;
                self.note_down(&note, Some(lines::noted(&note, &request.user_info)), request).await?;
            }
            _ => {}
        }
        Ok(Vec::new())
    }

    /// Writes down what somebody does with a note.
    async fn note_down(&self, note: &AetherNote, entry: Option<Entry>, request: &Request) -> Result<(), String> {
        let Some(entry) = entry.filter(|_| !request.dry_run) else { return Ok(()) };
        let (verb, who) = (entry.verb, entry.actor.clone());
        self.audit.tell(&[entry], lines::made(note), audit::AT_ONCE).await?;
        let message = format!("by {who}: {}", note.spec.text);
        self.events.tell_deed(note, &format!("{verb:?}"), &message).await;
        Ok(())
    }

    /// Whether this user may delete an approval; if so, it is written down. What goes with its commit or its namespace is not
    /// withdrawn.
    async fn withdraw(&self, request: &Request) -> Result<(), String> {
        let approval: AetherApproval = object(&request.old_object)?;
        if approval.meta().deletion_timestamp.is_some() {
            return Ok(());
        }
        let unknown =
            |error: crate::error::Error| format!("it cannot be found out whether you may withdraw it: {error}");
        let (namespace, who) = (&request.namespace, &request.user_info);
        let commits = objects::namespaced::<AetherCommit>(&self.client, namespace);
        let commit = objects::get(&commits, &approval.spec.commit).await.map_err(unknown)?;
        let Some(commit) = commit.filter(|commit| commit.meta().deletion_timestamp.is_none()) else { return Ok(()) };
        let namespaces = objects::cluster::<Namespace>(&self.client);
        let of = objects::get(&namespaces, namespace).await.map_err(unknown)?;
        if of.is_none_or(|of| of.meta().deletion_timestamp.is_some()) {
            return Ok(());
        }
        self.may_withdraw(&approval, &commit, who).await?;
        if request.dry_run {
            return Ok(());
        }
        let genuine = self.keys().ok().and_then(|keys| is_genuine(&approval, &commit, &keys).ok());
        let said = genuine.map(|reviewer| lines::voice(&approval, &reviewer));
        let entries: Vec<Entry> = said.into_iter().chain([lines::withdrawn(&approval, who)]).collect();
        let told = self.audit.tell(&entries, lines::made(&commit), audit::AT_ONCE).await;
        told.map_err(|why| {
            format!("what was said of AetherCommit {} cannot be withdrawn now: {why}", commit.name_any())
        })?;
        let reviewer = approval.spec.reviewer.map(|reviewer| reviewer.username).unwrap_or_default();
        let message = format!("{} withdraws what {reviewer} has said ({:?})", who.username, approval.spec.decision);
        self.events.tell_deed(&commit, "Withdrawn", &message).await;
        Ok(())
    }

    /// Everybody may take back what was said in their own name. What others have said takes a right on the source.
    async fn may_withdraw(
        &self,
        approval: &AetherApproval,
        commit: &AetherCommit,
        who: &Identity,
    ) -> Result<(), String> {
        let reviewer = approval.spec.reviewer.clone().unwrap_or_default().username;
        if reviewer == who.username || approval.name_any() == approval_name(&approval.spec.commit, &who.username) {
            return Ok(());
        }
        // A commit that names no source yet cannot have been approved by anybody.
        let Some(source) = commit.status.as_ref().and_then(|status| status.source.as_ref()) else { return Ok(()) };
        let allowed = access::may(&self.client, who, access::WITHDRAW, &source.namespace, &source.name).await;
        if allowed.map_err(|error| format!("it cannot be found out whether you may withdraw it: {error}"))? {
            return Ok(());
        }
        Err(format!(
            "{} may not withdraw what {reviewer} has said of AetherCommit {}: {reviewer} may, and whoever has the verb {} on AetherSource {}/{}",
            who.username,
            approval.spec.commit,
            access::WITHDRAW,
            source.namespace,
            source.name
        ))
    }
}

fn object<T: DeserializeOwned>(object: &Value) -> Result<T, String> {
    T::deserialize(object).map_err(|error| format!("it makes no sense: {error}"))
}

fn spec<T: DeserializeOwned>(object: &Value) -> Result<T, String> {
    T::deserialize(&object["spec"]).map_err(|error| format!("spec: {error}"))
}

fn refuse(violation: Option<String>) -> Result<(), String> {
    violation.map_or(Ok(()), Err)
}

fn is_theirs(stamped: Option<&Identity>, request: &Request) -> Result<(), String> {
    let theirs = stamped.is_some_and(|stamped| stamped.username == request.user_info.username);
    if theirs { Ok(()) } else { Err("another webhook has changed who made this".into()) }
}

/// The members of a spec that are written here.
fn stamped(kind: &str) -> &'static [&'static str] {
    match kind {
        "AetherCommit" => &["requestedBy", "signature"],
        "AetherApproval" => &["reviewer", "signature"],
        "AetherNote" => &["author"],
        _ => &[],
    }
}

/// Puts back what was stamped: who writes an object as a file says it leaves that out.
fn restore(request: &Request) -> Answer {
    let (old, new) = (&request.old_object["spec"], &request.object["spec"]);
    let gone =
        stamped(&request.kind.kind).iter().filter(|member| !old[**member].is_null() && old[**member] != new[**member]);
    Ok(gone.map(|member| Change::set(format!("/spec/{member}"), &old[*member])).collect())
}

/// Only the `resolved` of a note can be changed.
fn unchanged(request: &Request) -> Result<(), String> {
    let kind = request.kind.kind.as_str();
    let spec = |object: &Value| {
        let mut spec = object["spec"].clone();
        if let Some(members) = spec.as_object_mut().filter(|_| kind == "AetherNote") {
            members.remove("resolved");
        }
        spec
    };
    if stamped(kind).is_empty() || spec(&request.object) == spec(&request.old_object) {
        return Ok(());
    }
    Err(match kind {
        "AetherCommit" => "a commit cannot be changed: make another one".into(),
        "AetherApproval" => "an approval cannot be changed: delete it and make another one".into(),
        _ => "only resolved of a note can be changed: make another note".into(),
    })
}

fn random_end() -> String {
    let mut random = [0; 5];
    // Without random numbers the name is one that is taken soon, and the API server says so.
    let _ = ring::rand::SystemRandom::new().fill(&mut random);
    random.iter().map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()])).collect()
}

/// Whether an approval is what the operator has signed, of this commit, in the reviewer's own name.
///
/// # Errors
/// Why not.
pub fn is_genuine(approval: &AetherApproval, commit: &AetherCommit, keys: &Keys) -> Result<Identity, String> {
    let (namespace, name) = (approval.namespace().unwrap_or_default(), approval.name_any());
    let uid = commit.uid().unwrap_or_default();
    let statement = Statement::approval(&namespace, &name, &approval.spec, &uid);
    keys.verify(&statement, approval.spec.signature.as_ref(), approval.meta().creation_timestamp.as_ref())
        .map_err(|why| why.to_string())?;
    let reviewer = approval.spec.reviewer.clone().ok_or("it names no reviewer")?;
    if name != approval_name(&approval.spec.commit, &reviewer.username) {
        return Err("its name is not the one of this reviewer".into());
    }
    Ok(reviewer)
}

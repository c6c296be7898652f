//! A Kubernetes API server in memory, as far as reconcilers need one: it keeps objects and counts writes.
//!
//! Like the real one it gives out uids and resource versions, refuses a create of a name that is taken, a write that
//! is based on an old version and a delete of another uid, keeps `status` apart from the rest, lets an object with
//! finalizers only begin to go, and changes no version when a write changes nothing. It knows no schemas, no controllers and
//! no watches: what the binder, the kubelet or the garbage collector would do, a test does with [`ApiServer::change`].

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt::Debug;
use std::future::{Ready, ready};
use std::sync::{Arc, Mutex, MutexGuard};

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use kube::client::Body;
use kube::{Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// A request that asked for a change, in the order in which they came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// `POST`, `PUT`, `PATCH` or `DELETE`.
    pub method: String,
    /// As in URLs: `aethersessions`, `persistentvolumeclaims`.
    pub plural: String,
    /// The object's name.
    pub name: String,
    /// `status`, or nothing for the object itself.
    pub subresource: String,
    /// Whether the server did it.
    pub accepted: bool,
}

/// What becomes of a write, see [`ApiServer::before_writes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is answered as usual.
    Answered,
    /// It is done as usual, but the client gets an error: the connection broke before the answer came.
    AnswerLost,
}

type Hook = Box<dyn FnMut(&Write) -> Fate + Send>;

/// The server. Clones are handles to the same objects.
#[derive(Clone, Default)]
pub struct ApiServer {
    state: Arc<Mutex<State>>,
    hook: Arc<Mutex<Option<Hook>>>,
}

#[derive(Default)]
struct State {
    /// By (plural, namespace, name).
    objects: BTreeMap<(String, String, String), Value>,
    logs: BTreeMap<(String, String), String>,
    /// Accounts and audiences by token.
    tokens: BTreeMap<String, (String, Vec<String>)>,
    /// Who may do what, as `USER VERB RESOURCE NAMESPACE/NAME`.
    rights: BTreeSet<String>,
    writes: Vec<Write>,
    version: u64,
    made: u64,
}

/// The parts of a request's path.
struct Path {
    api_version: String,
    plural: String,
    namespace: String,
    name: String,
    subresource: String,
}

type Answer = Result<Value, (StatusCode, &'static str, String)>;

impl ApiServer {
    /// A server without objects.
    pub fn new() -> Self {
        Self::default()
    }

    /// A client of this server.
    pub fn client(&self) -> Client {
        let server = self.clone();
        Client::new(tower::service_fn(move |request| server.clone().serve(request)), "default")
    }

    /// Puts an object there as it is, without counting a write. It gets a uid, a time and a version if it has none.
    pub fn put<K: Resource<DynamicType = ()> + Serialize>(&self, object: &K) {
        let mut state = self.state();
        let mut value = serde_json::to_value(object).expect("objects are JSON");
        value["apiVersion"] = K::api_version(&()).into();
        value["kind"] = K::kind(&()).into();
        let meta = object.meta();
        let key = (
            K::plural(&()).into_owned(),
            meta.namespace.clone().unwrap_or_default(),
            meta.name.clone().unwrap_or_default(),
        );
        state.complete(&mut value);
        state.objects.insert(key, value);
    }

    /// The object as it is now.
    pub fn get<K: Resource<DynamicType = ()> + DeserializeOwned>(&self, namespace: &str, name: &str) -> Option<K> {
        let key = (K::plural(&()).into_owned(), namespace.to_owned(), name.to_owned());
        let value = self.state().objects.get(&key).cloned()?;
        Some(serde_json::from_value(value).expect("what was stored is of its kind"))
    }

    /// Every object of a kind.
    pub fn all<K: Resource<DynamicType = ()> + DeserializeOwned>(&self) -> Vec<K> {
        let plural = K::plural(&());
        let state = self.state();
        let values = state.objects.iter().filter(|((kind, ..), _)| *kind == plural).map(|(_, value)| value.clone());
        values.map(|value| serde_json::from_value(value).expect("what was stored is of its kind")).collect()
    }

    /// Changes an object as somebody else would: with a new version, and without counting a write.
    ///
    /// # Panics
    /// When there is no such object.
    pub fn change<K: Resource<DynamicType = ()> + DeserializeOwned + Serialize>(
        &self,
        namespace: &str,
        name: &str,
        change: impl FnOnce(&mut K),
    ) {
        let mut object: K =
            self.get(namespace, name).unwrap_or_else(|| panic!("no {} {namespace}/{name}", K::kind(&())));
        change(&mut object);
        object.meta_mut().resource_version = None;
        self.put(&object);
    }

    /// Removes an object at once, whatever its finalizers say.
    pub fn remove<K: Resource<DynamicType = ()>>(&self, namespace: &str, name: &str) {
        self.state().objects.remove(&(K::plural(&()).into_owned(), namespace.to_owned(), name.to_owned()));
    }

    /// What the log of a pod says.
    pub fn set_log(&self, namespace: &str, pod: &str, log: &str) {
        self.state().logs.insert((namespace.into(), pod.into()), log.into());
    }

    /// From now on a TokenReview says that this token is the account's, for these audiences. Without audiences the server
    /// knows nothing of them, and accepts the token for any.
    pub fn know_token(&self, token: &str, account: &str, audiences: &[&str]) {
        let audiences = audiences.iter().map(|audience| (*audience).to_owned()).collect();
        self.state().tokens.insert(token.into(), (account.into(), audiences));
    }

    /// From now on a SubjectAccessReview says that this user may do this to the object of this name, or may not.
    pub fn set_right(&self, user: &str, verb: &str, resource: &str, namespace: &str, name: &str, allowed: bool) {
        let right = format!("{user} {verb} {resource} {namespace}/{name}");
        let rights = &mut self.state().rights;
        let _ = if allowed { rights.insert(right) } else { rights.remove(&right) };
    }

    /// From now on a TokenReview says that the token is nobody's.
    pub fn forget_token(&self, token: &str) {
        self.state().tokens.remove(token);
    }

    /// The writes since the last call of this.
    pub fn take_writes(&self) -> Vec<Write> {
        std::mem::take(&mut self.state().writes)
    }

    /// Calls `hook` with each write before it is done: what it changes here, another was faster to change. It must not
    /// send a request itself.
    pub fn before_writes(&self, hook: impl FnMut(&Write) -> Fate + Send + 'static) {
        *self.hook.lock().expect("no hook panics") = Some(Box::new(hook));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    fn fate(&self, method: &Method, uri: &http::Uri, body: &[u8]) -> Fate {
        let mut hook = self.hook.lock().expect("no hook panics");
        let (Some(hook), Some(path)) = (hook.as_mut(), Path::parse(uri.path())) else { return Fate::Answered };
        if *method == Method::GET {
            return Fate::Answered;
        }
        let sent: Value = serde_json::from_slice(body).unwrap_or_default();
        let named = sent["metadata"]["name"].as_str().unwrap_or_default();
        let Path { plural, name, subresource, .. } = path;
        let name = if name.is_empty() { named.to_owned() } else { name };
        hook(&Write { method: method.to_string(), plural, name, subresource, accepted: false })
    }

    async fn serve(self, request: Request<Body>) -> Result<Response<Body>, Infallible> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let fate = self.fate(&head.method, &head.uri, &body);
        let mut answer = self.state().answer(&head.method, &head.uri, &body);
        if fate == Fate::AnswerLost {
            answer = Err((StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "the answer was lost".into()));
        }
        let (code, bytes) = match answer {
            Ok(Value::String(log)) => (StatusCode::OK, log.into_bytes()),
            Ok(value) => (StatusCode::OK, value.to_string().into_bytes()),
            Err((code, reason, message)) => {
                let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code.as_u16()});
                (code, status.to_string().into_bytes())
            }
        };
        let response: Ready<Response<Body>> =
            ready(Response::builder().status(code).body(Body::from(bytes)).expect("a code and a body"));
        Ok(response.await)
    }
}

fn not_found(name: &str) -> (StatusCode, &'static str, String) {
    (StatusCode::NOT_FOUND, "NotFound", format!("{name:?} not found"))
}

fn conflict(message: impl Into<String>) -> (StatusCode, &'static str, String) {
    (StatusCode::CONFLICT, "Conflict", message.into())
}

impl Path {
    /// `/api/v1/…` or `/apis/GROUP/VERSION/…`, then `[namespaces/NS/]PLURAL[/NAME[/SUBRESOURCE]]`.
    fn parse(path: &str) -> Option<Self> {
        let mut parts = path.trim_matches('/').split('/');
        let api_version = match parts.next()? {
            "api" => parts.next()?.to_owned(),
            "apis" => format!("{}/{}", parts.next()?, parts.next()?),
            _ => return None,
        };
        let rest: Vec<&str> = parts.collect();
        let (namespace, rest) = match rest.as_slice() {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => ((*namespace).to_owned(), rest),
            rest => (String::new(), rest),
        };
        let part = |index: usize| rest.get(index).map(|part| (*part).to_owned()).unwrap_or_default();
        Some(Self { api_version, plural: part(0), namespace, name: part(1), subresource: part(2) })
    }

    fn key(&self) -> (String, String, String) {
        (self.plural.clone(), self.namespace.clone(), self.name.clone())
    }
}

impl State {
    fn answer(&mut self, method: &Method, uri: &http::Uri, body: &[u8]) -> Answer {
        let mut path = Path::parse(uri.path()).ok_or_else(|| not_found(uri.path()))?;
        let sent: Value = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(body).map_err(|error| (StatusCode::BAD_REQUEST, "BadRequest", error.to_string()))?
        };
        if *method == Method::POST {
            path.name = self.name_of(&sent);
        }
        let answer = match *method {
            Method::GET if path.subresource == "log" => Ok(Value::String(
                self.logs.get(&(path.namespace.clone(), path.name.clone())).cloned().unwrap_or_default(),
            )),
            Method::GET if path.name.is_empty() => Ok(self.list(&path, uri)),
            Method::GET => self.objects.get(&path.key()).cloned().ok_or_else(|| not_found(&path.name)),
            Method::POST if path.plural == "tokenreviews" => Ok(self.review_token(sent)),
            Method::POST if path.plural == "subjectaccessreviews" => Ok(self.review_access(sent)),
            Method::POST => self.create(&path, sent),
            Method::PUT => self.update(&path, |_| Ok(sent)),
            Method::PATCH => self.update(&path, |old| {
                let mut new = old.clone();
                merge(&mut new, sent);
                Ok(new)
            }),
            Method::DELETE => self.delete(&path, &sent),
            _ => Err((StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", method.to_string())),
        };
        if *method != Method::GET {
            let Path { plural, name, subresource, .. } = path;
            self.writes.push(Write { method: method.to_string(), plural, name, subresource, accepted: answer.is_ok() });
        }
        answer
    }

    fn review_token(&self, mut review: Value) -> Value {
        let asked: Vec<String> = serde_json::from_value(review["spec"]["audiences"].clone()).unwrap_or_default();
        let known = self.tokens.get(review["spec"]["token"].as_str().unwrap_or_default());
        review["status"] = match known {
            Some((account, audiences)) if audiences.is_empty() => {
                json!({"authenticated": true, "user": {"username": account}})
            }
            Some((account, audiences)) if asked.iter().any(|one| audiences.contains(one)) => {
                let shared: Vec<&String> = asked.iter().filter(|one| audiences.contains(one)).collect();
                json!({"authenticated": true, "user": {"username": account}, "audiences": shared})
            }
            Some(_) => json!({"authenticated": false, "error": "token audiences are not those that were asked for"}),
            None => json!({"authenticated": false, "error": "invalid bearer token"}),
        };
        review
    }

    fn review_access(&self, mut review: Value) -> Value {
        let asked = &review["spec"]["resourceAttributes"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let [verb, resource, namespace, name] =
            ["verb", "resource", "namespace", "name"].map(|part| text(&asked[part]));
        let right = format!("{} {verb} {resource} {namespace}/{name}", text(&review["spec"]["user"]));
        review["status"] = json!({"allowed": self.rights.contains(&right)});
        review
    }

    fn name_of(&mut self, sent: &Value) -> String {
        if let Some(name) = sent["metadata"]["name"].as_str() {
            return name.to_owned();
        }
        self.made += 1;
        format!("{}{:05}", sent["metadata"]["generateName"].as_str().unwrap_or_default(), self.made)
    }

    fn complete(&mut self, value: &mut Value) {
        self.version += 1;
        let version = self.version;
        let meta = &mut value["metadata"];
        if meta["uid"].is_null() {
            meta["uid"] = format!("00000000-0000-0000-0000-{version:012}").into();
        }
        if meta["creationTimestamp"].is_null() {
            let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).expect("now is in range");
            meta["creationTimestamp"] = now.to_string().into();
        }
        if meta["generation"].is_null() {
            meta["generation"] = 1.into();
        }
        meta["resourceVersion"] = version.to_string().into();
    }

    fn list(&self, path: &Path, uri: &http::Uri) -> Value {
        let query: BTreeMap<String, String> =
            url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
        let selector = query.get("labelSelector").map_or("", String::as_str);
        let selected = |value: &Value| {
            selector.split(',').filter(|part| !part.is_empty()).all(|part| {
                let (key, wanted) = part.split_once('=').map_or((part, None), |(key, wanted)| (key, Some(wanted)));
                let found = value["metadata"]["labels"][key].as_str();
                found.is_some() && (wanted.is_none() || found == wanted)
            })
        };
        let of_path = |(plural, namespace, _): &(String, String, String)| {
            *plural == path.plural && (path.namespace.is_empty() || *namespace == path.namespace)
        };
        let items: Vec<&Value> = self
            .objects
            .iter()
            .filter(|(key, value)| of_path(key) && selected(value))
            .map(|(_, value)| value)
            .collect();
        json!({"kind": "List", "apiVersion": path.api_version, "metadata": {"resourceVersion": self.version.to_string()}, "items": items})
    }

    fn create(&mut self, path: &Path, mut value: Value) -> Answer {
        if self.objects.contains_key(&path.key()) {
            return Err((
                StatusCode::CONFLICT,
                "AlreadyExists",
                format!("{} {:?} already exists", path.plural, path.name),
            ));
        }
        value["metadata"]["name"] = path.name.clone().into();
        if !path.namespace.is_empty() {
            value["metadata"]["namespace"] = path.namespace.clone().into();
        }
        self.complete(&mut value);
        self.objects.insert(path.key(), value.clone());
        Ok(value)
    }

    fn update(&mut self, path: &Path, change: impl FnOnce(&Value) -> Answer) -> Answer {
        let old = self.objects.get(&path.key()).cloned().ok_or_else(|| not_found(&path.name))?;
        let mut new = change(&old)?;
        let (before, asked) = (&old["metadata"], new["metadata"].clone());
        for (field, what) in [("resourceVersion", "the object has been modified"), ("uid", "the uid is another one")] {
            if !asked[field].is_null() && asked[field] != before[field] {
                return Err(conflict(format!("{} {:?}: {what}", path.plural, path.name)));
            }
        }
        if path.subresource == "status" {
            let status = new["status"].take();
            new = old.clone();
            new["status"] = status;
        } else if is_custom(path) {
            // Only kinds with a status subresource are ours; the write leaves it alone.
            match old.get("status") {
                Some(status) => new["status"] = status.clone(),
                None => drop(new.as_object_mut().and_then(|object| object.remove("status"))),
            }
        }
        for field in ["uid", "creationTimestamp", "resourceVersion", "generation", "deletionTimestamp"] {
            if !before[field].is_null() {
                new["metadata"][field] = before[field].clone();
            }
        }
        if new == old {
            return Ok(old);
        }
        if new["spec"] != old["spec"] {
            new["metadata"]["generation"] = (before["generation"].as_i64().unwrap_or(1) + 1).into();
        }
        self.version += 1;
        new["metadata"]["resourceVersion"] = self.version.to_string().into();
        let gone = !new["metadata"]["deletionTimestamp"].is_null() && has_no_finalizers(&new);
        if gone {
            self.objects.remove(&path.key());
        } else {
            self.objects.insert(path.key(), new.clone());
        }
        Ok(new)
    }

    fn delete(&mut self, path: &Path, options: &Value) -> Answer {
        let mut object = self.objects.get(&path.key()).cloned().ok_or_else(|| not_found(&path.name))?;
        let wanted = &options["preconditions"]["uid"];
        if !wanted.is_null() && *wanted != object["metadata"]["uid"] {
            return Err(conflict("the uid is another one"));
        }
        if has_no_finalizers(&object) {
            self.objects.remove(&path.key());
            return Ok(object);
        }
        if object["metadata"]["deletionTimestamp"].is_null() {
            self.version += 1;
            let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).expect("now is in range");
            object["metadata"]["deletionTimestamp"] = now.to_string().into();
            object["metadata"]["resourceVersion"] = self.version.to_string().into();
            self.objects.insert(path.key(), object.clone());
        }
        Ok(object)
    }
}

fn is_custom(path: &Path) -> bool {
    path.api_version.starts_with("aether.dev/")
}

fn has_no_finalizers(object: &Value) -> bool {
    object["metadata"]["finalizers"].as_array().is_none_or(Vec::is_empty)
}

/// RFC 7386.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let object = target.as_object_mut().expect("just made one");
    for (key, value) in patch {
        if value.is_null() {
            object.remove(&key);
        } else {
            merge(object.entry(key).or_insert(Value::Null), value);
        }
    }
}

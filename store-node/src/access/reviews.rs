//! Who shows a token: Kubernetes is asked by a TokenReview, and its answer remembered for a short time.
//!
//! An answer counts until its time even while the API server is away. A token that is withdrawn (its pod or its account
//! was deleted) is refused when that time is over, at the latest. What is refused is remembered apart from what is
//! believed, so that a flood of bad tokens cannot push out good ones. Only so many questions are asked at one time, and those
//! about tokens that were believed before do not wait for the others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use aether_cas::Digest;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::{Api, PostParams};
use tokio::sync::Semaphore;
use tonic::Status;

use super::cache::Cache;
use super::grant::ACCOUNTS;
use super::{AUDIENCE, claims};

/// Answers that are remembered: a token for each pod of Aether's own, times the renewals of some minutes.
const REMEMBERED: usize = 8192;
/// Questions at one time, of each of two kinds.
const QUESTIONS: usize = 16;

/// How long answers count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// That a token is an account's.
    pub believed: Duration,
    /// That it is nobody's.
    pub refused: Duration,
    /// How long the API server may take.
    pub answer: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self { believed: Duration::from_secs(120), refused: Duration::from_secs(10), answer: Duration::from_secs(5) }
    }
}

/// Knows who shows a token.
pub struct Reviews {
    api: Api<TokenReview>,
    times: Times,
    believed: Mutex<Cache<Arc<str>>>,
    refused: Mutex<Cache<Arc<str>>>,
    /// About tokens that nobody has vouched for yet.
    questions: Semaphore,
    /// About those that were believed.
    renewals: Semaphore,
    /// Whether the last question got no answer.
    away: AtomicBool,
}

impl Reviews {
    /// Asks this API server.
    #[must_use]
    pub fn new(client: kube::Client, times: Times) -> Self {
        Self {
            api: Api::all(client),
            times,
            believed: Mutex::new(Cache::new(REMEMBERED)),
            refused: Mutex::new(Cache::new(REMEMBERED)),
            questions: Semaphore::new(QUESTIONS),
            renewals: Semaphore::new(QUESTIONS),
            away: AtomicBool::new(false),
        }
    }

    /// The user name of the service account that shows the token.
    pub(super) async fn account(&self, token: &str) -> Result<Arc<str>, Status> {
        let left = claims::remaining(token, SystemTime::now())?;
        // Only the hash is kept: what is in memory opens nothing.
        let key = Digest::of(token.as_bytes());
        if let Some(known) = self.known(&key) {
            return known;
        }
        let asked = tokio::time::timeout(self.times.answer, async {
            let was_believed = self.believed.lock().expect("no holder panics").remembers(&key);
            let turns = if was_believed { &self.renewals } else { &self.questions };
            let _turn = turns.acquire().await;
            // Another call with this token may have been first.
            match self.known(&key) {
                Some(known) => known,
                None => self.learn(key, token, left).await,
            }
        });
        asked.await.unwrap_or_else(|_| {
            let seconds = self.times.answer.as_secs_f32();
            Err(self.cannot_ask(&format!("the API server has not answered for {seconds} s")))
        })
    }

    fn known(&self, key: &Digest) -> Option<Result<Arc<str>, Status>> {
        let now = Instant::now();
        let account = self.believed.lock().expect("no holder panics").get(key, now);
        account.map(Ok).or_else(|| {
            let reason = self.refused.lock().expect("no holder panics").get(key, now)?;
            Some(Err(Status::unauthenticated(&*reason)))
        })
    }

    async fn learn(&self, key: Digest, token: &str, left: Duration) -> Result<Arc<str>, Status> {
        let spec = TokenReviewSpec { token: Some(token.into()), audiences: Some(vec![AUDIENCE.into()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = self.api.create(&PostParams::default(), &review).await;
        let answer = answer.map_err(|error| self.cannot_ask(&error.to_string()))?;
        if self.away.swap(false, Ordering::Relaxed) {
            tracing::info!("Kubernetes answers questions about tokens again");
        }
        let now = Instant::now();
        match judge(answer.status.unwrap_or_default()) {
            Ok(account) => {
                let account: Arc<str> = account.into();
                let until = now + self.times.believed.min(left);
                self.believed.lock().expect("no holder panics").insert(key, account.clone(), until, now);
                Ok(account)
            }
            Err(reason) => {
                let until = now + self.times.refused;
                self.refused.lock().expect("no holder panics").insert(key, reason.as_str().into(), until, now);
                Err(Status::unauthenticated(reason))
            }
        }
    }

    fn cannot_ask(&self, problem: &str) -> Status {
        // Every call fails for the same reason: said once.
        if !self.away.swap(true, Ordering::Relaxed) {
            tracing::warn!(problem, "Kubernetes cannot be asked about tokens; only those are let in that are known");
        }
        Status::unavailable(format!("the store cannot ask Kubernetes about the token now; try again: {problem}"))
    }
}

/// The account that Kubernetes vouches for, or why there is none.
fn judge(status: TokenReviewStatus) -> Result<String, String> {
    if status.authenticated != Some(true) {
        let reason = status.error.filter(|reason| !reason.is_empty());
        let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        return Err(format!(
            "Kubernetes does not accept the token{reason}. It may be too old, or its pod or service account gone"
        ));
    }
    // A server that knows nothing of audiences accepts any token of its own, and leaves this out.
    if !status.audiences.unwrap_or_default().iter().any(|audience| audience == AUDIENCE) {
        return Err(format!("Kubernetes does not accept the token for audience {AUDIENCE}"));
    }
    let user = status.user.and_then(|user| user.username).unwrap_or_default();
    if user.starts_with(ACCOUNTS) { Ok(user) } else { Err(format!("{user:?} is not a service account")) }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use aether_testkit::ApiServer;
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

    use super::*;

    #[tokio::test]
    async fn who_was_believed_does_not_wait_for_strangers() {
        let api = ApiServer::new();
        let end = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 3600;
        let [known, stranger] = ["known", "stranger"].map(|name| {
            let payload = format!(r#"{{"aud":["{AUDIENCE}"],"exp":{end},"jti":"{name}"}}"#);
            let token = format!("e30.{}.c2lnbmVk", URL_SAFE_NO_PAD.encode(payload));
            api.know_token(&token, &format!("{ACCOUNTS}team:{name}"), &[AUDIENCE]);
            token
        });
        let times = Times { believed: Duration::ZERO, answer: Duration::from_millis(500), ..Times::default() };
        let reviews = Reviews::new(api.client(), times);
        reviews.account(&known).await.unwrap();
        let _flood = reviews.questions.acquire_many(QUESTIONS as u32).await.unwrap();
        assert_eq!(reviews.account(&stranger).await.unwrap_err().code(), tonic::Code::Unavailable);
        reviews.account(&known).await.expect("its question is asked");
    }
}

//! What a token says of itself, before anybody has vouched for it: enough to refuse it, never enough to believe it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use tonic::Status;

use super::AUDIENCE;

/// The longest token that is looked at; those of Kubernetes have about one KiB.
const LONGEST: usize = 16 << 10;

#[derive(Deserialize)]
struct Payload {
    exp: u64,
    #[serde(default)]
    aud: Audiences,
}

/// A list, or a single one by itself (RFC 7519).
#[derive(Deserialize)]
#[serde(untagged)]
enum Audiences {
    Several(Vec<String>),
    One(String),
}

impl Default for Audiences {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

/// For how long the token says that it is good. A token that is not for this store, or no more, is refused without
/// asking anybody.
pub(super) fn remaining(token: &str, now: SystemTime) -> Result<Duration, Status> {
    let payload = payload(token).ok_or_else(|| {
        Status::unauthenticated(format!(
            "this is not a token of a service account for a limited time and audience {AUDIENCE}"
        ))
    })?;
    let audiences = match payload.aud {
        Audiences::Several(all) => all,
        Audiences::One(one) => vec![one],
    };
    if !audiences.iter().any(|audience| audience == AUDIENCE) {
        return Err(Status::unauthenticated(format!(
            "the token is for {audiences:?}, not for audience {AUDIENCE}: a pod gets one for this store in a projected volume"
        )));
    }
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    Duration::from_secs(payload.exp).checked_sub(now).filter(|left| !left.is_zero()).ok_or_else(|| {
        let ago = now.as_secs().saturating_sub(payload.exp);
        Status::unauthenticated(format!(
            "the token expired {ago} s ago: its file has a newer one, or the kubelet no longer renews it"
        ))
    })
}

fn payload(token: &str) -> Option<Payload> {
    if token.len() > LONGEST {
        return None;
    }
    let mut parts = token.split('.');
    let (Some(_), Some(payload), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return None;
    };
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(payload: &str) -> String {
        format!("e30.{}.signature", URL_SAFE_NO_PAD.encode(payload))
    }

    fn look(token: &str) -> Result<u64, String> {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        remaining(token, now).map(|left| left.as_secs()).map_err(|status| status.message().to_owned())
    }

    #[test]
    fn only_tokens_for_this_store_and_this_time_are_worth_a_question() {
        assert_eq!(look(&token(r#"{"aud":["x","aether-store"],"exp":1010}"#)), Ok(10));
        assert_eq!(look(&token(r#"{"aud":"aether-store","exp":1001}"#)), Ok(1));
        for (bad, word) in [
            (token(r#"{"aud":["aether-store"],"exp":1000}"#), "expired 0 s ago"),
            (token(r#"{"aud":["aether-store"],"exp":940}"#), "expired 60 s ago"),
            (token(r#"{"aud":["https://kubernetes.default.svc"],"exp":1010}"#), "kubernetes.default"),
            (token(r#"{"exp":1010}"#), "not for audience"),
            (token(r#"{"aud":["aether-store"]}"#), "limited time"),
            (token(r#"{"aud":["aether-store"],"exp":"soon"}"#), "not a token"),
            ("garbage".into(), "not a token"),
            ("a.b".into(), "not a token"),
            (token(r#"{"aud":["aether-store"],"exp":1010}"#) + ".x", "not a token"),
            (token(&format!(r#"{{"aud":["aether-store"],"exp":1010,"x":"{}"}}"#, "y".repeat(LONGEST))), "not a token"),
        ] {
            let error = look(&bad).expect_err(&bad);
            assert!(error.contains(word), "{bad}: {error}");
        }
    }
}

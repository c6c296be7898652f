//! The token that goes with every call.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// How long a token is used before its file is read again. The kubelet renews it a long time before its end.
const REREAD: Duration = Duration::from_secs(10);

/// Shows a token with every call, if there is one to show.
#[derive(Clone)]
pub struct Bearer(Option<Arc<Token>>);

struct Token {
    file: PathBuf,
    last: Mutex<Option<(Instant, MetadataValue<Ascii>)>>,
}

impl Bearer {
    pub(crate) fn new(file: Option<PathBuf>) -> Self {
        Self(file.map(|file| Arc::new(Token { file, last: Mutex::default() })))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.current()?);
        }
        Ok(request)
    }
}

impl Token {
    fn current(&self) -> Result<MetadataValue<Ascii>, Status> {
        let mut last = self.last.lock().expect("no holder panics");
        if let Some((_, value)) = last.as_ref().filter(|(read, _)| read.elapsed() < REREAD) {
            return Ok(value.clone());
        }
        let value = match self.read() {
            Ok(value) => value,
            // One that was good a moment ago goes on: the store says when it is no more.
            Err(problem) => last.take().map(|(_, value)| value).ok_or_else(|| {
                let file = self.file.display();
                Status::unauthenticated(format!(
                    "cannot read the token for the store in {file} (--store-token): {problem}"
                ))
            })?,
        };
        *last = Some((Instant::now(), value.clone()));
        Ok(value)
    }

    /// A few hundred bytes in memory: the kubelet keeps tokens in a tmpfs.
    fn read(&self) -> Result<MetadataValue<Ascii>, String> {
        let text = std::fs::read_to_string(&self.file).map_err(|error| error.to_string())?;
        let token = Some(text.trim()).filter(|token| !token.is_empty());
        let value = token.and_then(|token| format!("Bearer {token}").parse().ok());
        let mut value: MetadataValue<Ascii> = value.ok_or("it holds no token")?;
        value.set_sensitive(true);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(bearer: &mut Bearer) -> Result<String, Status> {
        let request = bearer.call(Request::new(()))?;
        Ok(request.metadata().get("authorization").unwrap().to_str().unwrap().to_owned())
    }

    #[test]
    fn a_new_token_is_shown_after_a_while_and_one_that_is_gone_until_the_store_refuses_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let mut bearer = Bearer::new(Some(file.clone()));
        let error = shown(&mut bearer).unwrap_err();
        assert!(error.message().contains("--store-token") && error.message().contains("token)"), "{error}");

        std::fs::write(&file, "first\n").unwrap();
        assert_eq!(shown(&mut bearer).unwrap(), "Bearer first");
        std::fs::write(&file, "second").unwrap();
        assert_eq!(shown(&mut bearer).unwrap(), "Bearer first");
        let later = |bearer: &Bearer| {
            let token = bearer.0.as_ref().unwrap();
            token.last.lock().unwrap().as_mut().unwrap().0 -= REREAD;
        };
        later(&bearer);
        assert_eq!(shown(&mut bearer).unwrap(), "Bearer second");
        std::fs::remove_file(&file).unwrap();
        later(&bearer);
        assert_eq!(shown(&mut bearer).unwrap(), "Bearer second");
        assert!(Bearer::new(None).call(Request::new(())).unwrap().metadata().is_empty());
    }
}

//! How a program knows the store, and shows the store who it is: an authority to believe, and a token to show.
//!
//! Both are files that somebody else renews, the kubelet in a pod. The authority is read for each new connection, the
//! token again every few seconds, so that no program needs to be restarted when they change. It is a crate of its own
//! because whoever pins trees speaks to the store too, and needs nothing else that stores are made of.

mod authority;
mod bearer;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

pub use bearer::Bearer;

/// What tokens for the store are made out to.
pub const AUDIENCE: &str = "aether-store";

/// A connection that shows its token with every call.
pub type Connection = InterceptedService<Channel, Bearer>;

/// Where the authority and the token are: options of every program that talks to the store.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// File of the authorities (PEM) that vouch for a store at https://
    #[arg(long = "store-ca", env = "AETHER_STORE_CA", global = true, value_name = "FILE")]
    pub authority: Option<PathBuf>,
    /// File of the token to show to the store, read again as it changes
    #[arg(long = "store-token", env = "AETHER_STORE_TOKEN", global = true, value_name = "FILE")]
    pub token: Option<PathBuf>,
}

/// Why there can be no connection with these credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nobody vouches for the store.
    #[error("https:// needs the file of an authority (--store-ca), such as /etc/ssl/certs/ca-certificates.crt")]
    NoAuthority,
    /// Whoever listens would have the token.
    #[error("a token (--store-token) is shown by https:// only")]
    TokenInTheClear,
}

impl Credentials {
    /// A connection that is made when it is first used, and again after every interruption. Must be called within a
    /// Tokio runtime.
    ///
    /// # Errors
    /// Credentials that do not fit the address.
    pub fn connect(&self, endpoint: &Endpoint) -> Result<Connection, Error> {
        self.connect_at(endpoint, None)
    }

    /// As [`Credentials::connect`]; `at` one of the addresses of the endpoint's name, for which the certificate must be all
    /// the same.
    ///
    /// # Errors
    /// Credentials that do not fit the address.
    pub fn connect_at(&self, endpoint: &Endpoint, at: Option<SocketAddr>) -> Result<Connection, Error> {
        let channel = if endpoint.uri().scheme_str() == Some("https") {
            let file = self.authority.clone().ok_or(Error::NoAuthority)?;
            endpoint.connect_with_connector_lazy(service_fn(move |uri| authority::dial(uri, at, file.clone())))
        } else if self.token.is_some() {
            return Err(Error::TokenInTheClear);
        } else if let Some(address) = at {
            endpoint.connect_with_connector_lazy(service_fn(move |_| dial(address)))
        } else {
            endpoint.connect_lazy()
        };
        Ok(InterceptedService::new(channel, Bearer::new(self.token.clone())))
    }
}

async fn dial(address: SocketAddr) -> std::io::Result<TokioIo<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_does_not_fit_is_refused() {
        let connect = |uri, authority: Option<&str>, token: Option<&str>| {
            let credentials = Credentials { authority: authority.map(Into::into), token: token.map(Into::into) };
            credentials.connect(&Endpoint::from_static(uri)).map(drop)
        };
        assert_eq!(connect("https://store:8980", None, None), Err(Error::NoAuthority));
        assert_eq!(connect("http://store:8980", Some("ca"), Some("token")), Err(Error::TokenInTheClear));
        assert_eq!(connect("http://store:8980", None, None), Ok(()));
        assert_eq!(connect("https://store:8980", Some("ca"), Some("token")), Ok(()));
    }
}

//! Unix sockets that the kubelet can call.
//!
//! Owns a listening socket from bind to unlink, and a remedy: the kubelet's gRPC library dials a unix socket with the
//! socket's path as HTTP/2 `:authority` (always for registration, before Kubernetes 1.26 also for CSI), which is no valid
//! authority, so tonic's HTTP/2 layer resets the stream. Every accepted connection passes through [`AuthorityStream`],
//! which replaces it by `localhost` before tonic sees it.

mod authority;
mod frame;
mod stream;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};

pub(crate) use stream::AuthorityStream;

/// A bound unix socket, which only root may connect to. Its file is removed when this is dropped, unless another process
/// has put its own there meanwhile.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: UnixListener,
    file: SocketFile,
}

/// Unlinks a socket's file, which must outlive the listener that moves into the server.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode of the file that we made.
    identity: (u64, u64),
}

impl Socket {
    /// Binds `path`, making its directory when needed. A socket left behind by a process that is gone is replaced.
    ///
    /// # Errors
    /// `AddrInUse` when a process still answers there; `AlreadyExists` when something else than a socket is there, which
    /// is not touched; and whatever the system says, with the path.
    pub(crate) fn bind(path: &Path) -> io::Result<Socket> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("socket {}: {error}", path.display()));
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o750).create(directory).map_err(named)?;
        }
        remove_stale(path).map_err(named)?;
        let listener = UnixListener::bind(path).map_err(named)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(named)?;
        let metadata = fs::symlink_metadata(path).map_err(named)?;
        let file = SocketFile { path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) };
        Ok(Socket { listener, file })
    }

    /// The connections, for `tonic::transport::Server::serve_with_incoming_shutdown`, and the guard of the file: drop it
    /// when the server has ended.
    pub(crate) fn into_incoming(
        self,
    ) -> (impl Stream<Item = io::Result<AuthorityStream<UnixStream>>> + Send + use<>, SocketFile) {
        let Socket { listener, file } = self;
        (UnixListenerStream::new(listener).map(|stream| stream.map(AuthorityStream::new)), file)
    }
}

impl SocketFile {
    /// Where it is.
    #[must_use]
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), "cannot remove the socket: {error}");
        }
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata?,
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something else than a socket; remove it"));
    }
    // A connection to a unix socket succeeds or fails at once: it needs the listener's backlog, not its attention.
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves it; end that first")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;

//! The adapter between an accepted connection and tonic: reads pass through the authority rewriter, writes do not.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

use super::authority::Authority;

/// Bytes asked of the connection at a time.
const CHUNK: usize = 16 * 1024;

/// A connection whose `:authority` reads `localhost`. A client that breaks a rule of HTTP/2 framing gets `InvalidData` on
/// the next read, upon which the server closes the connection.
pub(crate) struct AuthorityStream<S> {
    inner: S,
    authority: Authority,
    /// Read from the connection; what is before `taken` has gone into the rewriter.
    input: Vec<u8>,
    taken: usize,
    /// Come out of the rewriter; what is before `given` has been read from us.
    output: Vec<u8>,
    given: usize,
}

impl<S> AuthorityStream<S> {
    /// Wraps a connection of which nothing has been read.
    pub(crate) fn new(inner: S) -> Self {
        let authority = Authority::new();
        AuthorityStream { inner, authority, input: Vec::new(), taken: 0, output: Vec::new(), given: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AuthorityStream<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.given < this.output.len() {
                let left = &this.output[this.given..];
                let count = left.len().min(buffer.remaining());
                buffer.put_slice(&left[..count]);
                this.given += count;
                return Poll::Ready(Ok(()));
            }
            this.output.clear();
            this.given = 0;
            if this.taken == this.input.len() {
                this.input.resize(CHUNK, 0);
                let mut chunk = ReadBuf::new(&mut this.input);
                let read = Pin::new(&mut this.inner).poll_read(context, &mut chunk);
                let count = chunk.filled().len();
                this.input.truncate(count);
                this.taken = 0;
                ready!(read)?;
                if count == 0 {
                    return Poll::Ready(Ok(()));
                }
            }
            match this.authority.push(&this.input[this.taken..], &mut this.output) {
                Ok(count) => this.taken += count,
                Err(violation) => {
                    tracing::warn!("closing a connection: {violation}");
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, violation)));
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AuthorityStream<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

impl<S: Connected> Connected for AuthorityStream<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.inner.connect_info()
    }
}

//! Blobs too large for a message: ByteStream, in pieces, resumed where a connection broke.

use std::{
    path::{Path, PathBuf},
    pin::pin,
    sync::atomic::Ordering,
};

use bazel_remote_apis::google::bytestream::{QueryWriteStatusRequest, ReadRequest, WriteRequest};
use bytes::{Bytes, BytesMut};
use futures::future::{Either, select};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{
    node::{NodeClient, broken_is_unavailable},
    resource::{read_name, upload_name},
};
use crate::{Blob, StoreError, digest::BlobHasher, store::Result};

const PIECE: usize = 1 << 20;
/// Pieces waiting to be sent.
const QUEUE: usize = 2;

/// Where pieces come from when a blob is sent.
#[derive(Clone)]
enum Pieces {
    Memory(Bytes),
    File(PathBuf),
}

/// Where pieces go when a blob is received.
enum Sink<'a> {
    Memory(BytesMut),
    File(File, &'a Path),
}

impl Sink<'_> {
    async fn write(&mut self, data: &[u8]) -> Result<()> {
        match self {
            Sink::Memory(bytes) => bytes.extend_from_slice(data),
            Sink::File(file, path) => file.write_all(data).await.map_err(StoreError::io("write", path))?,
        }
        Ok(())
    }
}

impl NodeClient {
    /// Reads `length` bytes of a blob from `offset`, fewer where it ends before. Bytes of a part cannot be verified:
    /// whoever reads them verifies the whole when he has it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Corrupt`] when the store sends too little, and those of the connection.
    pub(super) async fn read_range(&self, blob: Blob, offset: u64, length: u64) -> Result<Bytes> {
        let length = length.min(blob.size.saturating_sub(offset));
        if length == 0 {
            return Ok(Bytes::new());
        }
        let action = format!("read a part of blob {blob}");
        let _permit = self.permit().await?;
        let mut patience = self.patience();
        loop {
            match self.receive_range(blob, offset, length).await {
                Ok(data) if data.len() as u64 == length => return Ok(data),
                Ok(data) => return Err(self.corrupt(blob, &format!("it sent {} of {length} bytes", data.len()))),
                Err(status) if status.code() == Code::NotFound => return Err(self.not_found(blob)),
                Err(status) if status.code() == Code::DataLoss => return Err(self.corrupt(blob, status.message())),
                Err(status) if patience.wait_after(&status).await => {}
                Err(status) => return Err(self.error(&action, &status)),
            }
        }
    }

    async fn receive_range(&self, blob: Blob, offset: u64, length: u64) -> Result<Bytes, Status> {
        let request = ReadRequest {
            resource_name: read_name(&blob),
            read_offset: i64::try_from(offset).unwrap_or(i64::MAX),
            read_limit: i64::try_from(length).unwrap_or(i64::MAX),
        };
        let mut client = self.bytestream();
        let mut stream = self.bounded(client.read(request)).await?.into_inner();
        let mut data = BytesMut::new();
        while let Some(piece) = self.bounded(stream.message()).await? {
            if data.len() as u64 + piece.data.len() as u64 > length {
                return Err(Status::data_loss("it sent more bytes than were asked for"));
            }
            data.extend_from_slice(&piece.data);
        }
        Ok(data.freeze())
    }

    pub(super) async fn read_stream(&self, blob: Blob) -> Result<Bytes> {
        let mut sink = Sink::Memory(BytesMut::new());
        self.receive(blob, &mut sink).await?;
        match sink {
            Sink::Memory(bytes) => Ok(bytes.freeze()),
            Sink::File(..) => unreachable!("the sink was made four lines above"),
        }
    }

    pub(super) async fn fetch_stream(&self, blob: Blob, path: &Path) -> Result<()> {
        let file = File::create_new(path).await.map_err(StoreError::io("create", path))?;
        let mut sink = Sink::File(file, path);
        let mut result = if blob.is_empty() { Ok(()) } else { self.receive(blob, &mut sink).await };
        if let (Ok(()), Sink::File(file, path)) = (&result, &mut sink) {
            result = file.flush().await.map_err(StoreError::io("write", path));
        }
        if result.is_err() {
            let _ = tokio::fs::remove_file(path).await;
        }
        result
    }

    async fn receive(&self, blob: Blob, sink: &mut Sink<'_>) -> Result<()> {
        let action = format!("read blob {blob}");
        let mut hasher = BlobHasher::new();
        let _permit = self.permit().await?;
        let mut patience = self.patience();
        while hasher.size() < blob.size {
            let before = hasher.size();
            let result = self.receive_some(blob, &mut hasher, sink).await?;
            if hasher.size() > before {
                patience = self.patience();
            }
            match result {
                Ok(()) if hasher.size() < blob.size => {
                    let status = Status::data_loss(format!("it sent {} bytes", hasher.size()));
                    return Err(self.error(&action, &status));
                }
                Ok(()) => {}
                Err(status) if status.code() == Code::NotFound => return Err(self.not_found(blob)),
                Err(status) if status.code() == Code::DataLoss => {
                    return Err(self.corrupt(blob, status.message()));
                }
                Err(status) if patience.wait_after(&status).await => {}
                Err(status) => return Err(self.error(&action, &status)),
            }
        }
        let found = hasher.finish();
        if found == blob { Ok(()) } else { Err(StoreError::Mismatch { blob, found }) }
    }

    /// Reads on from where `hasher` is; the inner error is the server's, the outer one ours.
    async fn receive_some(
        &self,
        blob: Blob,
        hasher: &mut BlobHasher,
        sink: &mut Sink<'_>,
    ) -> Result<Result<(), Status>> {
        let request = ReadRequest {
            resource_name: read_name(&blob),
            read_offset: i64::try_from(hasher.size()).unwrap_or(i64::MAX),
            read_limit: 0,
        };
        let mut client = self.bytestream();
        let mut stream = match self.bounded(client.read(request)).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => return Ok(Err(status)),
        };
        loop {
            match self.bounded(stream.message()).await {
                Ok(Some(piece)) => {
                    if hasher.size() + piece.data.len() as u64 > blob.size {
                        return Ok(Err(Status::data_loss("it sent more bytes than the blob has")));
                    }
                    hasher.update(&piece.data);
                    sink.write(&piece.data).await?;
                }
                Ok(None) => return Ok(Ok(())),
                Err(status) => return Ok(Err(status)),
            }
        }
    }

    pub(super) async fn write_stream(&self, blob: Blob, data: Bytes) -> Result<()> {
        self.send(blob, Pieces::Memory(data)).await
    }

    pub(super) async fn write_file_stream(&self, blob: Blob, path: &Path) -> Result<()> {
        // Found here rather than in the task that sends, which could only end the stream.
        let metadata = tokio::fs::metadata(path).await.map_err(StoreError::io("examine", path))?;
        if metadata.len() != blob.size {
            return Err(StoreError::Invalid(format!(
                "{} has {} bytes and is not blob {blob}",
                path.display(),
                metadata.len()
            )));
        }
        self.send(blob, Pieces::File(path.to_owned())).await
    }

    async fn send(&self, blob: Blob, pieces: Pieces) -> Result<()> {
        let action = format!("write blob {blob}");
        let number = self.0.uploads.fetch_add(1, Ordering::Relaxed);
        let name = upload_name(&format!("{}-{number:x}", self.0.upload_prefix), &blob);
        let _permit = self.permit().await?;
        let mut patience = self.patience();
        let mut offset = 0;
        loop {
            match self.send_from(offset, &name, blob, pieces.clone()).await? {
                Ok(committed) if committed == blob.size => return Ok(()),
                Ok(committed) => {
                    let message = format!("the server has taken {committed} bytes only");
                    return Err(self.error(&action, &Status::data_loss(message)));
                }
                Err(status) if patience.wait_after(&status).await => {
                    let committed = self.committed(&name).await;
                    if committed == blob.size {
                        return Ok(());
                    }
                    if committed > offset {
                        patience = self.patience();
                    }
                    offset = committed;
                }
                Err(status) => return Err(self.error(&action, &status)),
            }
        }
    }

    /// How much of an upload the server has; 0 when it knows nothing of it.
    async fn committed(&self, name: &str) -> u64 {
        let request = QueryWriteStatusRequest { resource_name: name.to_owned() };
        let mut client = self.bytestream();
        match self.bounded(client.query_write_status(request)).await {
            Ok(answer) => u64::try_from(answer.into_inner().committed_size).unwrap_or(0),
            Err(_) => 0,
        }
    }

    /// Sends from `offset` on; the inner error is the server's, the outer one ours.
    async fn send_from(&self, offset: u64, name: &str, blob: Blob, pieces: Pieces) -> Result<Result<u64, Status>> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let mut client = self.bytestream();
        let call = client.write(ReceiverStream::new(receiver));
        let feed = pin!(self.feed(sender, offset, name, blob, pieces));
        let answer = match select(pin!(call), feed).await {
            // The server may answer before it has everything: an error, or it has the blob already.
            Either::Left((answer, _)) => answer.map_err(broken_is_unavailable),
            Either::Right((fed, call)) => {
                fed?;
                self.bounded(call).await
            }
        };
        Ok(answer.map(|answer| u64::try_from(answer.into_inner().committed_size).unwrap_or(0)))
    }

    async fn feed(
        &self,
        sender: mpsc::Sender<WriteRequest>,
        offset: u64,
        name: &str,
        blob: Blob,
        pieces: Pieces,
    ) -> Result<()> {
        let mut file = match &pieces {
            Pieces::Memory(_) => None,
            Pieces::File(path) => {
                let mut file = File::open(path).await.map_err(StoreError::io("open", path))?;
                file.seek(std::io::SeekFrom::Start(offset)).await.map_err(StoreError::io("read", path))?;
                Some((file, path))
            }
        };
        let mut at = offset;
        let mut resource_name = name.to_owned();
        while at < blob.size {
            let length = PIECE.min(usize::try_from(blob.size - at).unwrap_or(PIECE));
            let data = match (&mut file, &pieces) {
                (Some((file, path)), _) => {
                    let mut data = vec![0; length];
                    file.read_exact(&mut data).await.map_err(StoreError::io("read", path))?;
                    data
                }
                (None, Pieces::Memory(bytes)) => {
                    let at = usize::try_from(at).unwrap_or(usize::MAX);
                    bytes[at..at + length].to_vec()
                }
                (None, Pieces::File(_)) => unreachable!("files were opened above"),
            };
            let request = WriteRequest {
                // Only the first request needs the name.
                resource_name: std::mem::take(&mut resource_name),
                write_offset: i64::try_from(at).unwrap_or(i64::MAX),
                finish_write: at + length as u64 == blob.size,
                data,
            };
            match tokio::time::timeout(self.0.stall, sender.send(request)).await {
                Ok(Ok(())) => at += length as u64,
                // The call has ended; its answer says why.
                Ok(Err(_)) => return Ok(()),
                Err(_) => {
                    return Err(self.error(&format!("write blob {blob}"), &self.stalled()));
                }
            }
        }
        Ok(())
    }
}

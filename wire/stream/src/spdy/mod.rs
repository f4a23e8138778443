//! SPDY/3.1 as Kubernetes uses it: the client makes streams, each with headers; data flows both ways; each side closes its half.
//!
//! Like every implementation in this field, flow-control windows are not kept. Instead each stream has a short queue; when a backend takes nothing for
//! [`STALL`], its stream is reset, so that the connection's others go on.
mod frame;
mod headers;

use crate::activity::Activity;
use bytes::Bytes;
use frame::Frame;
pub(crate) use headers::Headers;
use headers::{Packer, Unpacker};
use std::collections::HashMap;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, watch};

/// Bytes between the connection and a stream's user.
const BUFFER: usize = 32 << 10;
/// Frames that wait in a queue.
const QUEUE: usize = 64;
/// How long a stream may take nothing while others wait behind it.
const STALL: Duration = Duration::from_secs(10);
/// Streams of one connection at a time.
const STREAMS: usize = 1024;

/// A stream that the client made.
pub(crate) struct Stream {
    pub id: u32,
    pub headers: Headers,
    /// Reading it gives what the client sends; dropping or shutting it down closes our half.
    pub io: DuplexStream,
}

/// A connection.
pub(crate) struct Connection {
    /// Streams as they come; ends with the connection.
    pub streams: mpsc::Receiver<Stream>,
    closed: watch::Receiver<bool>,
    out: mpsc::Sender<Frame>,
    writer: tokio::task::JoinHandle<()>,
    reader: tokio::task::JoinHandle<()>,
}

impl Connection {
    /// Starts serving a connection.
    pub(crate) fn start<C: AsyncRead + AsyncWrite + Send + 'static>(connection: C, activity: Activity) -> Connection {
        let (read, write) = tokio::io::split(connection);
        let (out, queue) = mpsc::channel(QUEUE);
        let (new, streams) = mpsc::channel(QUEUE);
        let (close, closed) = watch::channel(false);
        let writer = tokio::spawn(write_all(write, queue, activity.clone()));
        let sender = out.clone();
        let reader = tokio::spawn(async move {
            if let Err(error) = read_all(read, sender, new, activity).await {
                tracing::debug!(%error, "a SPDY connection ended");
            }
            close.send_replace(true);
        });
        Connection { streams, closed, out, writer, reader }
    }
    /// Done when the client is gone.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + use<> {
        let mut closed = self.closed.clone();
        async move {
            let _ = closed.wait_for(|c| *c).await;
        }
    }
    /// Sends what is queued, says good-bye, and waits a moment for the client to close, so that nothing unread is lost to a reset.
    pub(crate) async fn finish(self) {
        let Connection { out, writer, mut reader, streams, .. } = self;
        drop(streams);
        let _ = out.send(Frame::GoAway).await;
        drop(out);
        let _ = tokio::time::timeout(Duration::from_secs(2), &mut reader).await;
        reader.abort();
        let _ = tokio::time::timeout(Duration::from_secs(2), writer).await;
    }
}

async fn write_all<W: AsyncWrite + Unpin>(mut to: W, mut queue: mpsc::Receiver<Frame>, activity: Activity) {
    let mut packer = Packer::new();
    while let Some(frame) = queue.recv().await {
        let last = matches!(frame, Frame::GoAway);
        if to.write_all(&frame.encode(&mut packer)).await.is_err() || to.flush().await.is_err() {
            return;
        }
        activity.touch();
        if last {
            let _ = to.shutdown().await;
            return;
        }
    }
}

type Senders = HashMap<u32, mpsc::Sender<Bytes>>;

async fn read_all<R: AsyncRead + Unpin>(
    mut from: R,
    out: mpsc::Sender<Frame>,
    new: mpsc::Sender<Stream>,
    activity: Activity,
) -> io::Result<()> {
    let mut unpacker = Unpacker::new();
    let mut streams = Senders::new();
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    loop {
        let frame = Frame::read(&mut from, &mut unpacker).await?;
        activity.touch();
        match frame {
            Frame::SynStream { id, headers, fin } => {
                streams.retain(|_, s| !s.is_closed());
                if streams.len() >= STREAMS {
                    out.send(Frame::Reset { id, status: frame::REFUSED }).await.map_err(gone)?;
                    continue;
                }
                let (theirs, ours) = tokio::io::duplex(BUFFER);
                let (sender, data) = mpsc::channel(QUEUE);
                tokio::spawn(carry(id, ours, data, out.clone()));
                if !fin {
                    streams.insert(id, sender);
                }
                out.send(Frame::SynReply { id }).await.map_err(gone)?;
                new.send(Stream { id, headers, io: theirs }).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            }
            Frame::Data { id, bytes, fin } => {
                if let Some(sender) = streams.get(&id)
                    && !bytes.is_empty()
                    && sender.send_timeout(bytes, STALL).await.is_err()
                {
                    // Its user takes nothing, or is gone: what still comes for it is dropped.
                    streams.remove(&id);
                }
                if fin {
                    streams.remove(&id);
                }
            }
            Frame::Reset { id, .. } => drop(streams.remove(&id)),
            Frame::Ping { id } => out.send(Frame::Ping { id }).await.map_err(gone)?,
            Frame::GoAway => return Ok(()),
            Frame::SynReply { .. } | Frame::Other => {}
        }
    }
}

/// Carries one stream between the connection and its user.
async fn carry(id: u32, ours: DuplexStream, mut data: mpsc::Receiver<Bytes>, out: mpsc::Sender<Frame>) {
    let (mut read, mut write) = tokio::io::split(ours);
    let inward = async {
        while let Some(bytes) = data.recv().await {
            if write.write_all(&bytes).await.is_err() {
                break;
            }
        }
        data.close();
        let _ = write.shutdown().await;
    };
    let outward = async {
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = read.read(&mut buffer).await.unwrap_or(0);
            let frame = Frame::Data { id, bytes: Bytes::copy_from_slice(&buffer[..n]), fin: n == 0 };
            if out.send(frame).await.is_err() || n == 0 {
                return;
            }
        }
    };
    tokio::join!(inward, outward);
}

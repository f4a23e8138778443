//! SPDY/3.1 as Kubernetes uses it: the client makes streams, each with headers; data flows both ways; each side closes its half.
//!
//! Like every implementation in this field, flow-control windows are not kept. Instead each stream has a short queue; while its user takes nothing the
//! connection waits. Where streams have nothing to do with each other (port-forward), one that takes nothing for [`STALL`] is reset instead, so that
//! the others go on.
pub(crate) mod frame;
pub(crate) mod headers;

use crate::PING;
use crate::activity::{Activity, Owned};
use bytes::Bytes;
use frame::Frame;
pub(crate) use headers::Headers;
use headers::{Packer, Unpacker};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{mpsc, watch};

/// Bytes between the connection and a stream's user.
const BUFFER: usize = 32 << 10;
/// Frames that wait in a queue.
const QUEUE: usize = 64;
/// How long a stream may take nothing while others of other users wait behind it.
pub(crate) const STALL: Duration = Duration::from_secs(10);
/// INTERNAL_ERROR.
const STALLED: u32 = 6;
/// Streams of one connection at a time.
const STREAMS: usize = 1024;

/// How long a client may take to say good-bye.
const GOODBYE: Duration = Duration::from_secs(2);

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
    /// Streams whose users may still have something to send.
    sending: watch::Sender<usize>,
    writer: Owned,
    reader: Owned,
}

impl Connection {
    /// Starts serving a connection; a stream that takes nothing for `patience` is reset.
    pub(crate) fn start<C: AsyncRead + AsyncWrite + Send + 'static>(connection: C, activity: Activity, patience: Duration) -> Connection {
        let (read, write) = tokio::io::split(connection);
        let (out, queue) = mpsc::channel(QUEUE);
        let (new, streams) = mpsc::channel(QUEUE);
        let (close, closed) = watch::channel(false);
        let sending = watch::Sender::new(0);
        let close = Arc::new(close);
        let (writing, gone) = (activity.clone(), close.clone());
        let writer = Owned::spawn(async move {
            write_all(write, queue, writing).await;
            gone.send_replace(true);
        });
        let ends = Ends { out: out.clone(), new, sending: sending.clone() };
        let reader = Owned::spawn(async move {
            if let Err(error) = read_all(read, ends, activity, patience).await {
                tracing::debug!(%error, "a SPDY connection ended");
            }
            close.send_replace(true);
        });
        Connection { streams, closed, out, sending, writer, reader }
    }
    /// Done when the client is gone.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + use<> {
        let mut closed = self.closed.clone();
        async move {
            let _ = closed.wait_for(|c| *c).await;
        }
    }
    /// Sends what the streams' users have written (they have dropped their ends), says good-bye, and waits a moment for the client to close, so that nothing unread is lost to a reset.
    pub(crate) async fn finish(self) {
        let Connection { out, sending, writer, reader, streams, .. } = self;
        drop(streams);
        let _ = sending.subscribe().wait_for(|n| *n == 0).await;
        let _ = out.send(Frame::GoAway).await;
        drop(out);
        reader.within(GOODBYE).await;
        writer.within(GOODBYE).await;
    }
}

async fn write_all<W: AsyncWrite + Unpin>(mut to: W, mut queue: mpsc::Receiver<Frame>, activity: Activity) {
    let mut packer = Packer::new();
    let mut pings = 0;
    loop {
        let frame = match tokio::time::timeout(PING, queue.recv()).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            // Even numbers are a server's.
            Err(_) => {
                pings = (pings + 2) & 0x7fff_fffe;
                Frame::Ping { id: pings }
            }
        };
        let (last, ping) = (matches!(frame, Frame::GoAway), matches!(frame, Frame::Ping { .. }));
        if to.write_all(&frame.encode(&mut packer)).await.is_err() || to.flush().await.is_err() {
            return;
        }
        if !ping {
            activity.touch();
        }
        if last {
            let _ = to.shutdown().await;
            return;
        }
    }
}

/// A stream's way in, and the task that carries it.
type Senders = HashMap<u32, (mpsc::Sender<Bytes>, tokio::task::AbortHandle)>;

/// Where the reader passes things on to.
struct Ends {
    out: mpsc::Sender<Frame>,
    new: mpsc::Sender<Stream>,
    sending: watch::Sender<usize>,
}

async fn read_all<R: AsyncRead + Unpin>(mut from: R, ends: Ends, activity: Activity, patience: Duration) -> io::Result<()> {
    let Ends { out, new, sending } = ends;
    let mut unpacker = Unpacker::new();
    let mut streams = Senders::new();
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    loop {
        let frame = Frame::read(&mut from, &mut unpacker).await?;
        if !matches!(frame, Frame::Ping { .. }) {
            activity.touch();
        }
        match frame {
            Frame::SynStream { id, headers, fin } => {
                streams.retain(|_, (sender, _)| !sender.is_closed());
                if streams.len() >= STREAMS {
                    out.send(Frame::Reset { id, status: frame::REFUSED }).await.map_err(gone)?;
                    continue;
                }
                let (theirs, ours) = tokio::io::duplex(BUFFER);
                let (sender, data) = mpsc::channel(QUEUE);
                let carrier = tokio::spawn(carry(id, ours, data, out.clone(), Sending::new(&sending))).abort_handle();
                if !fin {
                    streams.insert(id, (sender, carrier));
                }
                out.send(Frame::SynReply { id }).await.map_err(gone)?;
                new.send(Stream { id, headers, io: theirs }).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            }
            Frame::Data { id, bytes, fin } => {
                if let Some((sender, carrier)) = streams.get(&id)
                    && !bytes.is_empty()
                {
                    match sender.send_timeout(bytes, patience).await {
                        Ok(()) => {}
                        // Its user is gone: what still comes for it is dropped.
                        Err(SendTimeoutError::Closed(_)) => drop(streams.remove(&id)),
                        Err(SendTimeoutError::Timeout(_)) => {
                            carrier.abort();
                            streams.remove(&id);
                            out.send(Frame::Reset { id, status: STALLED }).await.map_err(gone)?;
                        }
                    }
                }
                if fin {
                    streams.remove(&id);
                }
            }
            Frame::Reset { id, .. } => {
                if let Some((_, carrier)) = streams.remove(&id) {
                    carrier.abort();
                }
            }
            Frame::Ping { id } if id % 2 == 1 => out.send(Frame::Ping { id }).await.map_err(gone)?,
            Frame::GoAway => return Ok(()),
            // What answers a ping of ours says no more than the connection does.
            Frame::SynReply { .. } | Frame::Ping { .. } | Frame::Other => {}
        }
    }
}

/// Counts a stream while its user may send.
struct Sending(watch::Sender<usize>);

impl Sending {
    fn new(count: &watch::Sender<usize>) -> Sending {
        count.send_modify(|n| *n += 1);
        Sending(count.clone())
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

/// Carries one stream between the connection and its user.
async fn carry(id: u32, ours: DuplexStream, mut data: mpsc::Receiver<Bytes>, out: mpsc::Sender<Frame>, sending: Sending) {
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
    let outward = async move {
        let _sending = sending;
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

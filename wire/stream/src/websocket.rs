//! WebSocket: channels in one connection, told apart by the first byte of a message; and SPDY tunnelled in binary messages.
use crate::PING;
use crate::activity::{Activity, Owned};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

/// Bytes between the connection and a channel's user.
const BUFFER: usize = 32 << 10;
/// Messages that wait in a queue.
const QUEUE: usize = 64;
/// How long a client may take to say good-bye.
const GOODBYE: Duration = Duration::from_secs(2);
/// Largest message.
const LARGEST: usize = 1 << 20;
/// Version 5: the second byte names a channel that its sender has closed.
const CLOSE: u8 = 255;

/// How a protocol of this family packs its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    /// 1 to 5.
    pub version: u8,
    /// Digit and base64 in text messages, instead of a byte and bytes.
    pub base64: bool,
}

/// Protocol names of exec and attach.
pub(crate) fn packing(protocol: &str) -> Option<Packing> {
    let (version, base64) = match protocol {
        "" | "channel.k8s.io" => (1, false),
        "base64.channel.k8s.io" => (1, true),
        "v4.channel.k8s.io" => (4, false),
        "v4.base64.channel.k8s.io" => (4, true),
        "v5.channel.k8s.io" => (5, false),
        _ => return None,
    };
    Some(Packing { version, base64 })
}

async fn accept<C: AsyncRead + AsyncWrite + Unpin>(connection: C) -> WebSocketStream<C> {
    let limits = WebSocketConfig::default().max_message_size(Some(LARGEST)).max_frame_size(Some(LARGEST));
    WebSocketStream::from_raw_socket(connection, Role::Server, Some(limits)).await
}

/// A connection with channels.
pub(crate) struct Connection {
    closed: watch::Receiver<bool>,
    out: mpsc::Sender<Message>,
    carriers: JoinSet<()>,
    writer: Owned,
    reader: Owned,
}

impl Connection {
    /// Starts `count` channels; `writable` ones send what their user writes; one that takes nothing for `patience` gets no more.
    pub(crate) async fn start<C>(
        connection: C,
        packing: Packing,
        count: u8,
        writable: &[u8],
        activity: Activity,
        patience: Duration,
    ) -> (Connection, Vec<DuplexStream>)
    where
        C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (mut sink, mut source) = accept(connection).await.split();
        let (out, mut queue) = mpsc::channel::<Message>(QUEUE);
        let (close, closed) = watch::channel(false);
        let (mut carriers, mut users, mut senders) = (JoinSet::new(), vec![], vec![]);
        for channel in 0..count {
            let (theirs, ours) = tokio::io::duplex(BUFFER);
            let (sender, data) = mpsc::channel::<Bytes>(QUEUE);
            let (read, write) = tokio::io::split(ours);
            tokio::spawn(inward(write, data));
            if writable.contains(&channel) {
                carriers.spawn(outward(read, channel, packing, out.clone()));
            }
            users.push(theirs);
            senders.push(Some(sender));
        }
        // The field's servers begin with an empty message on the lowest channel that they write; clients wait for it.
        if let Some(first) = writable.iter().min() {
            let _ = out.send(pack(*first, b"", packing)).await;
        }
        let close = Arc::new(close);
        let (writing, gone) = (activity.clone(), close.clone());
        let writer = Owned::spawn(async move {
            loop {
                let message = match tokio::time::timeout(PING, queue.recv()).await {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err(_) => Message::Ping(Bytes::new()),
                };
                let (last, ping) = (matches!(message, Message::Close(_)), matches!(message, Message::Ping(_)));
                if sink.send(message).await.is_err() || last {
                    break;
                }
                if !ping {
                    writing.touch();
                }
            }
            let _ = sink.close().await;
            gone.send_replace(true);
        });
        let reader = Owned::spawn(async move {
            while let Some(Ok(message)) = source.next().await {
                if matches!(message, Message::Ping(_) | Message::Pong(_)) {
                    continue;
                }
                activity.touch();
                let Some((channel, data)) = unpack(message, packing) else { continue };
                if channel == CLOSE && packing.version >= 5 {
                    data.first().and_then(|c| senders.get_mut(usize::from(*c))).into_iter().for_each(|s| drop(s.take()));
                    continue;
                }
                let Some(slot) = senders.get_mut(usize::from(channel)) else { continue };
                if let Some(sender) = slot
                    && !data.is_empty()
                    && sender.send_timeout(data, patience).await.is_err()
                {
                    slot.take();
                }
            }
            close.send_replace(true);
        });
        (Connection { closed, out, carriers, writer, reader }, users)
    }
    /// Done when the client is gone.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + use<> {
        let mut closed = self.closed.clone();
        async move {
            let _ = closed.wait_for(|c| *c).await;
        }
    }
    /// Sends all that was written (its users have dropped their ends), closes, and waits a moment for the client to do so.
    pub(crate) async fn finish(self) {
        let Connection { out, mut carriers, writer, reader, .. } = self;
        while carriers.join_next().await.is_some() {}
        let _ = out.send(good_bye()).await;
        drop(out);
        writer.within(GOODBYE).await;
        reader.within(GOODBYE).await;
    }
}

/// With its code: clients take an end without one for a broken connection.
fn good_bye() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

fn pack(channel: u8, data: &[u8], packing: Packing) -> Message {
    if packing.base64 {
        return Message::text(format!("{channel}{}", STANDARD.encode(data)));
    }
    let mut all = BytesMut::with_capacity(data.len() + 1);
    all.put_u8(channel);
    all.put_slice(data);
    Message::Binary(all.freeze())
}

fn unpack(message: Message, packing: Packing) -> Option<(u8, Bytes)> {
    let mut bytes = match message {
        Message::Binary(bytes) => bytes,
        Message::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
        _ => return None,
    };
    if bytes.is_empty() {
        return None;
    }
    let first = bytes.split_to(1)[0];
    if packing.base64 {
        return Some((first.checked_sub(b'0')?, STANDARD.decode(&bytes).ok()?.into()));
    }
    Some((first, bytes))
}

async fn inward<W: AsyncWrite + Unpin>(mut to: W, mut data: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = data.recv().await {
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

async fn outward<R: AsyncRead + Unpin>(mut from: R, channel: u8, packing: Packing, out: mpsc::Sender<Message>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = from.read(&mut buffer).await.unwrap_or(0);
        if n == 0 || out.send(pack(channel, &buffer[..n], packing)).await.is_err() {
            return;
        }
    }
}

/// Binary messages as a plain stream of bytes, for SPDY in a tunnel.
pub(crate) async fn tunnel<C>(connection: C) -> DuplexStream
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sink, mut source) = accept(connection).await.split();
    let (theirs, ours) = tokio::io::duplex(BUFFER);
    let (mut read, mut write) = tokio::io::split(ours);
    let up = Owned::spawn(async move {
        while let Some(Ok(message)) = source.next().await {
            if let Message::Binary(bytes) = message
                && write.write_all(&bytes).await.is_err()
            {
                break;
            }
        }
        let _ = write.shutdown().await;
    });
    tokio::spawn(async move {
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = read.read(&mut buffer).await.unwrap_or(0);
            if n == 0 || sink.send(Message::Binary(Bytes::copy_from_slice(&buffer[..n]))).await.is_err() {
                break;
            }
        }
        let _ = sink.send(good_bye()).await;
        let _ = sink.close().await;
        up.within(GOODBYE).await;
    });
    theirs
}

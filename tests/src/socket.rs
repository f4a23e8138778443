//! A client of the streaming server over WebSocket, as kubectl's.
use futures::{SinkExt, StreamExt};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// How long a test waits for the next message.
const PATIENCE: Duration = Duration::from_secs(60);
/// Version 5's message that closes a channel.
const CLOSE: u8 = 255;

/// An open session.
pub struct Socket(WebSocketStream<TcpStream>);

/// What came until the end.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// The status on the error channel.
    pub status: serde_json::Value,
}

impl Outcome {
    /// The exit code that the status tells.
    pub fn code(&self) -> i32 {
        match self.status["status"].as_str() {
            Some("Success") => 0,
            _ => self.status.pointer("/details/causes/0/message").and_then(|m| m.as_str()?.parse().ok()).unwrap_or(-1),
        }
    }
}

impl Socket {
    /// Dials a URL.
    pub async fn dial(url: &str, protocol: &str) -> Socket {
        let address = url.strip_prefix("http://").unwrap().split('/').next().unwrap();
        let tcp = TcpStream::connect(address).await.unwrap();
        let mut request = url.replace("http://", "ws://").into_client_request().unwrap();
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
        Socket(tokio_tungstenite::client_async(request, tcp).await.unwrap().0)
    }
    /// Sends data on a channel.
    pub async fn send(&mut self, channel: u8, data: &[u8]) {
        let message = [&[channel], data].concat();
        self.0.send(Message::binary(message)).await.unwrap();
    }
    /// Closes a channel.
    pub async fn close(&mut self, channel: u8) {
        self.0.send(Message::binary(vec![CLOSE, channel])).await.unwrap();
    }
    /// The next data: channel and bytes. `None`: a proper end.
    pub async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            match tokio::time::timeout(PATIENCE, self.0.next()).await.expect("the session says nothing").unwrap().unwrap() {
                Message::Binary(bytes) if bytes.len() > 1 => return Some((bytes[0], bytes[1..].to_vec())),
                Message::Close(frame) => {
                    assert_eq!(u16::from(frame.expect("a close without its code").code), 1000);
                    return None;
                }
                _ => {}
            }
        }
    }
    /// Reads until the channel has said this.
    pub async fn until(&mut self, channel: u8, text: &str) -> String {
        let mut all = String::new();
        while !all.contains(text) {
            let (from, bytes) = self.next().await.unwrap_or_else(|| panic!("it ended before {text:?}: {all:?}"));
            if from == channel {
                all.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        all
    }
    /// Reads all to the end.
    pub async fn finish(mut self) -> Outcome {
        let mut out = Outcome::default();
        while let Some((channel, bytes)) = self.next().await {
            match channel {
                1 => out.stdout.extend(bytes),
                2 => out.stderr.extend(bytes),
                3 => out.status = serde_json::from_slice(&bytes).unwrap(),
                _ => {}
            }
        }
        out
    }
    /// Copies `input` in while it reads everything out.
    pub async fn copy(self, input: Vec<u8>) -> Outcome {
        let (mut sink, mut source) = self.0.split();
        let sending = tokio::spawn(async move {
            for piece in input.chunks(32 << 10) {
                let message = [&[0], piece].concat();
                sink.send(Message::binary(message)).await.unwrap();
            }
            sink.send(Message::binary(vec![CLOSE, 0])).await.unwrap();
            sink
        });
        let mut out = Outcome::default();
        loop {
            match tokio::time::timeout(PATIENCE, source.next()).await.unwrap().unwrap().unwrap() {
                Message::Binary(bytes) if bytes.len() > 1 => match bytes[0] {
                    1 => out.stdout.extend(&bytes[1..]),
                    2 => out.stderr.extend(&bytes[1..]),
                    3 => out.status = serde_json::from_slice(&bytes[1..]).unwrap(),
                    _ => {}
                },
                Message::Close(_) => break,
                _ => {}
            }
        }
        drop(sending.await.unwrap());
        out
    }
}

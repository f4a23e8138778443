//! The server as its clients meet it: over TCP, with the field's handshakes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::spdy::Headers;
use crate::spdy::frame::Frame;
use crate::spdy::headers::{Packer, Unpacker};
use bytes::Bytes;
use futures::{FutureExt, SinkExt, StreamExt};
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// `cat` copies, `size` answers with the terminal's sizes, `slow` reads its input only after a while; port 1 refuses.
struct Fake;

impl Backend for Fake {
    fn exec(&self, _: String, command: Vec<String>, _: bool, io: Io) -> BoxFuture<'_, Result<i32>> {
        async move {
            let Io { stdin, stdout, stderr, mut resize } = io;
            match command[0].as_str() {
                "size" => {
                    let mut out = stdout.unwrap();
                    for _ in 0..2 {
                        let (w, h) = resize.recv().await.unwrap();
                        out.write_all(format!("{w}x{h};").as_bytes()).await?;
                    }
                    return Ok(0);
                }
                "slow" => tokio::time::sleep(Duration::from_millis(300)).await,
                "missing" => return Err(Fault::not_found("container missing")),
                _ => {}
            }
            let copied = tokio::io::copy(&mut stdin.unwrap(), &mut stdout.unwrap()).await?;
            if let Some(mut stderr) = stderr {
                stderr.write_all(format!("{copied} bytes").as_bytes()).await?;
            }
            Ok(3)
        }
        .boxed()
    }
    fn attach(&self, _: String, io: Io) -> BoxFuture<'_, Result<()>> {
        async move {
            io.stdout.unwrap().write_all(b"attached").await?;
            Ok(())
        }
        .boxed()
    }
    fn forward(&self, pod: String, port: u16, connection: DuplexStream) -> BoxFuture<'_, Result<()>> {
        async move {
            if port == 1 {
                return Err(Fault::unavailable("nobody listens"));
            }
            let (mut read, mut write) = tokio::io::split(connection);
            write.write_all(format!("{pod}:{port}:").as_bytes()).await?;
            tokio::io::copy(&mut read, &mut write).await?;
            Ok(())
        }
        .boxed()
    }
}

async fn server(config: Config) -> Server {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = Server::new(Arc::new(Fake), listener.local_addr().unwrap(), config);
    tokio::spawn(server.clone().serve(listener, std::future::pending()));
    server
}

fn exec(server: &Server, command: &str, stderr: bool, tty: bool) -> String {
    let wanted = Wanted { stdin: true, stdout: true, stderr, tty };
    server.url(Request::Exec { container: "c".into(), command: vec![command.into()], wanted }).unwrap()
}

fn ports(server: &Server, ports: &[u16]) -> String {
    server.url(Request::PortForward { pod: "p".into(), ports: ports.to_vec() }).unwrap()
}

async fn dial(url: &str, headers: &str) -> (TcpStream, String) {
    let rest = url.strip_prefix("http://").unwrap();
    let (address, path) = rest.split_once('/').unwrap();
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(format!("POST /{path} HTTP/1.1\r\nHost: {address}\r\n{headers}\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tcp.read_u8().await.unwrap());
    }
    (tcp, String::from_utf8(head).unwrap())
}

/// A SPDY client: makes streams, and gathers what comes back until the server says good-bye.
struct Client<C> {
    io: C,
    packer: Packer,
    unpacker: Unpacker,
    made: u32,
    got: BTreeMap<u32, Vec<u8>>,
    ended: Vec<u32>,
}

impl<C: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Client<C> {
    fn new(io: C) -> Self {
        Client { io, packer: Packer::new(), unpacker: Unpacker::new(), made: 0, got: BTreeMap::new(), ended: vec![] }
    }
    async fn stream(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.made * 2 + 1;
        self.made += 1;
        let frame = Frame::SynStream { id, headers: headers.iter().copied().collect::<Headers>(), fin: false };
        self.send(frame).await;
        id
    }
    async fn send(&mut self, frame: Frame) {
        let bytes = frame.encode(&mut self.packer);
        self.io.write_all(&bytes).await.unwrap();
    }
    async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) {
        self.send(Frame::Data { id, bytes: Bytes::copy_from_slice(bytes), fin }).await;
    }
    async fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let reading = async {
            while !done(self) {
                match Frame::read(&mut self.io, &mut self.unpacker).await {
                    Ok(Frame::Data { id, bytes, fin }) => {
                        self.got.entry(id).or_default().extend_from_slice(&bytes);
                        self.ended.extend(fin.then_some(id));
                    }
                    Ok(Frame::GoAway) | Err(_) => return,
                    Ok(_) => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reading).await.expect("the server answers");
    }
    async fn all(&mut self) {
        self.until(|_| false).await;
    }
    fn text(&self, id: u32) -> &str {
        self.got.get(&id).map_or("", |b| std::str::from_utf8(b).unwrap())
    }
}

const SPDY: &str = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nX-Stream-Protocol-Version: v3.channel.k8s.io\r\n";

async fn websocket(url: &str, protocol: &str) -> tokio_tungstenite::WebSocketStream<TcpStream> {
    let url = url.replace("http://", "ws://");
    let mut request = url.as_str().into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
    let tcp = TcpStream::connect(request.uri().authority().unwrap().as_str()).await.unwrap();
    let (socket, response) = tokio_tungstenite::client_async(request, tcp).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], protocol);
    socket
}

#[tokio::test]
async fn a_command_over_spdy_sees_its_input_end_and_tells_its_exit_code() {
    let server = server(Config::default()).await;
    let (tcp, head) = dial(&exec(&server, "cat", true, false), SPDY).await;
    assert!(head.starts_with("HTTP/1.1 101") && head.to_lowercase().contains("x-stream-protocol-version: v4.channel.k8s.io"), "{head}");
    let mut client = Client::new(tcp);
    let error = client.stream(&[("streamType", "error")]).await;
    let stdin = client.stream(&[("streamType", "stdin")]).await;
    let stdout = client.stream(&[("streamType", "stdout")]).await;
    let stderr = client.stream(&[("streamType", "stderr")]).await;
    client.data(stdin, b"hello", false).await;
    client.data(stdin, b" world", true).await;
    client.all().await;
    assert_eq!((client.text(stdout), client.text(stderr)), ("hello world", "11 bytes"));
    let status: serde_json::Value = serde_json::from_str(client.text(error)).unwrap();
    assert_eq!((&status["reason"], &status["details"]["causes"][0]["message"]), (&"NonZeroExitCode".into(), &"3".into()));
}

#[tokio::test]
async fn a_url_is_good_once_and_for_its_kind_only() {
    let server = server(Config::default()).await;
    let url = exec(&server, "cat", false, false);
    assert!(dial(&url.replace("/exec/", "/attach/"), SPDY).await.1.starts_with("HTTP/1.1 404"));
    assert!(dial(&url, "").await.1.starts_with("HTTP/1.1 400"), "not an upgrade: the URL stays good");
    assert!(dial(&url, SPDY).await.1.starts_with("HTTP/1.1 101"));
    assert!(dial(&url, SPDY).await.1.starts_with("HTTP/1.1 404"));
    let unknown =
        dial(&exec(&server, "cat", false, false), "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v9\r\n").await.1;
    assert!(unknown.starts_with("HTTP/1.1 403") && unknown.contains("v4.channel.k8s.io"), "{unknown}");
}

#[tokio::test]
async fn sizes_of_the_clients_terminal_reach_the_command() {
    let server = server(Config::default()).await;
    let (tcp, _) = dial(&exec(&server, "size", false, true), SPDY).await;
    let mut client = Client::new(tcp);
    for kind in ["error", "stdin"] {
        client.stream(&[("streamType", kind)]).await;
    }
    let stdout = client.stream(&[("streamType", "stdout")]).await;
    let resize = client.stream(&[("streamType", "resize")]).await;
    client.data(resize, br#"{"Width":80,"Height":24}"#, false).await;
    client.data(resize, br#"{"Width":132,"Hei"#, false).await;
    client.data(resize, br#"ght":43}"#, false).await;
    client.all().await;
    assert_eq!((client.text(stdout), client.text(1)), ("80x24;132x43;", r#"{"metadata":{},"status":"Success"}"#));
}

#[tokio::test]
async fn a_command_that_reads_late_loses_no_input() {
    let server = server(Config::default()).await;
    let (tcp, _) = dial(&exec(&server, "slow", true, false), SPDY).await;
    let (mut read, mut write) = tcp.into_split();
    let mut packer = Packer::new();
    let frames: Vec<Frame> = ["error", "stdin", "stdout", "stderr"]
        .iter()
        .zip([1, 3, 5, 7])
        .map(|(kind, id)| Frame::SynStream { id, headers: [("streamType", *kind)].into_iter().collect(), fin: false })
        .collect();
    for frame in frames {
        write.write_all(&frame.encode(&mut packer)).await.unwrap();
    }
    let sender = tokio::spawn(async move {
        for n in 0..400 {
            let frame = Frame::Data { id: 3, bytes: vec![b'x'; 32 << 10].into(), fin: n == 399 };
            write.write_all(&frame.encode(&mut packer)).await.unwrap();
        }
        write
    });
    let (mut got, mut unpacker) = (BTreeMap::<u32, Vec<u8>>::new(), Unpacker::new());
    while let Ok(frame) = Frame::read(&mut read, &mut unpacker).await {
        match frame {
            Frame::Data { id, bytes, .. } => got.entry(id).or_default().extend_from_slice(&bytes),
            Frame::GoAway => break,
            _ => {}
        }
    }
    assert_eq!((got[&5].len(), String::from_utf8_lossy(&got[&7]).as_ref()), (400 * (32 << 10), "13107200 bytes"));
    drop(sender.await.unwrap());
}

#[tokio::test]
async fn websocket_version_5_can_close_the_input() {
    let server = server(Config::default()).await;
    let mut socket = websocket(&exec(&server, "cat", true, false), "v5.channel.k8s.io").await;
    socket.send(Message::binary(&b"\0hello"[..])).await.unwrap();
    socket.send(Message::binary(&[255, 0][..])).await.unwrap();
    let mut got = BTreeMap::<u8, Vec<u8>>::new();
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Binary(bytes) = message {
            got.entry(bytes[0]).or_default().extend_from_slice(&bytes[1..]);
        }
    }
    assert_eq!((&got[&1][..], &got[&2][..]), (&b"hello"[..], &b"5 bytes"[..]));
    assert!(String::from_utf8_lossy(&got[&3]).contains("\"NonZeroExitCode\""));
}

#[tokio::test]
async fn a_failure_names_its_reason() {
    let server = server(Config::default()).await;
    let mut socket = websocket(&exec(&server, "missing", false, false), "v4.channel.k8s.io").await;
    let mut error = Vec::new();
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Binary(bytes) = message
            && bytes[0] == 3
        {
            error.extend_from_slice(&bytes[1..]);
        }
    }
    let status: serde_json::Value = serde_json::from_slice(&error).unwrap();
    assert_eq!((&status["status"], &status["code"]), (&"Failure".into(), &404.into()));
    assert!(status["message"].as_str().unwrap().contains("container missing"));
}

async fn forwards<C: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(mut client: Client<C>) {
    let mut pair = async |port: &str, request: &str| {
        let error = client.stream(&[("streamType", "error"), ("port", port), ("requestID", request)]).await;
        (error, client.stream(&[("streamType", "data"), ("port", port), ("requestID", request)]).await)
    };
    let (good_error, good) = pair("80", "0").await;
    let (bad_error, bad) = pair("1", "1").await;
    client.data(good, b"ping", true).await;
    client.until(|c| [good, good_error, bad, bad_error].iter().all(|id| c.ended.contains(id))).await;
    assert_eq!((client.text(good), client.text(good_error)), ("p:80:ping", ""));
    assert!(client.text(bad_error).contains("nobody listens") && client.text(bad).is_empty());
}

#[tokio::test]
async fn one_forwarded_port_that_refuses_leaves_the_others_alone() {
    let server = server(Config::default()).await;
    let upgrade = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: portforward.k8s.io\r\n";
    forwards(Client::new(dial(&ports(&server, &[]), upgrade).await.0)).await;
}

#[tokio::test]
async fn ports_are_forwarded_through_a_tunnel_in_a_websocket() {
    let server = server(Config::default()).await;
    let socket = websocket(&ports(&server, &[]), "SPDY/3.1+portforward.k8s.io").await;
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    tokio::spawn(async move {
        let (mut sink, mut source) = socket.split();
        let (mut read, mut write) = tokio::io::split(theirs);
        let up = async {
            let mut buffer = vec![0; 1000];
            while let Ok(n @ 1..) = read.read(&mut buffer).await {
                sink.send(Message::binary(Bytes::copy_from_slice(&buffer[..n]))).await.unwrap();
            }
        };
        let down = async {
            while let Some(Ok(Message::Binary(bytes))) = source.next().await {
                write.write_all(&bytes).await.unwrap();
            }
        };
        tokio::join!(up, down);
    });
    forwards(Client::new(ours)).await;
}

#[tokio::test]
async fn old_websocket_clients_forward_by_channels() {
    let server = server(Config::default()).await;
    let mut socket = websocket(&ports(&server, &[80]), "v4.channel.k8s.io").await;
    socket.send(Message::binary(&b"\0ping"[..])).await.unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"p:80:ping") {
        match socket.next().await {
            Some(Ok(Message::Binary(bytes))) if bytes[0] == 0 => got.extend_from_slice(&bytes[1..]),
            Some(Ok(_)) => {}
            other => panic!("{other:?} after {got:?}"),
        }
    }
    assert_eq!(got[..2], 80u16.to_le_bytes(), "each channel begins with its port");
}

#[tokio::test]
async fn a_connection_without_traffic_and_one_without_streams_end() {
    let server = server(Config { idle: Duration::from_millis(100), creation: Duration::from_millis(50), ..Default::default() }).await;
    for url in [exec(&server, "cat", false, false), ports(&server, &[])] {
        let protocol = if url.contains("/exec/") { "v4.channel.k8s.io" } else { "portforward.k8s.io" };
        let upgrade = format!("Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n");
        let (mut tcp, _) = dial(&url, &upgrade).await;
        let mut rest = Vec::new();
        tokio::time::timeout(Duration::from_secs(10), tcp.read_to_end(&mut rest)).await.expect("it ends").unwrap();
    }
}

#[tokio::test]
async fn streams_that_make_no_sense_and_too_many_urls_are_refused() {
    let server = server(Config::default()).await;
    let ask = |wanted: Wanted| server.url(Request::Attach { container: "c".into(), wanted });
    assert!(ask(Wanted::default()).is_err());
    assert!(ask(Wanted { tty: true, stderr: true, ..Default::default() }).is_err());
    for _ in 0..TOKENS {
        ports(&server, &[]);
    }
    let refused = server.url(Request::PortForward { pod: "p".into(), ports: vec![] }).unwrap_err();
    assert_eq!(refused.class, kernel::Class::ResourceExhausted);
}

/// A backend whose command never ends, and tells when it is dropped.
struct Endless(std::sync::Arc<tokio::sync::Notify>);

struct Told(std::sync::Arc<tokio::sync::Notify>);
impl Drop for Told {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Backend for Endless {
    fn exec(&self, _: String, _: Vec<String>, _: bool, io: Io) -> BoxFuture<'_, Result<i32>> {
        let told = Told(self.0.clone());
        async move {
            // It reads nothing, and writes nothing.
            let _held = (told, io);
            std::future::pending().await
        }
        .boxed()
    }
    fn attach(&self, _: String, _: Io) -> BoxFuture<'_, Result<()>> {
        async { Ok(()) }.boxed()
    }
    fn forward(&self, _: String, _: u16, _: DuplexStream) -> BoxFuture<'_, Result<()>> {
        async { Ok(()) }.boxed()
    }
}

#[tokio::test]
async fn a_client_that_vanishes_behind_unread_input_is_noticed() {
    let dropped = std::sync::Arc::new(tokio::sync::Notify::new());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = Config { grace: Duration::from_millis(10), ..Default::default() };
    let server = Server::new(Arc::new(Endless(dropped.clone())), listener.local_addr().unwrap(), config);
    tokio::spawn(server.clone().serve(listener, std::future::pending()));
    let mut client = websocket(&exec(&server, "x", false, false), "v5.channel.k8s.io").await;
    let mut message = vec![1u8; 32 << 10];
    message[0] = 0;
    // As much as all buffers hold, and more.
    while tokio::time::timeout(Duration::from_millis(500), client.send(Message::binary(message.clone()))).await.is_ok() {}
    drop(client);
    tokio::time::timeout(3 * PING + Duration::from_secs(2), dropped.notified()).await.unwrap();
}

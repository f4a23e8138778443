//! The control API over a real unix socket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use futures::future::{BoxFuture, FutureExt as _, pending, ready};
use kernel::{Actor, Cx, Handle, Reply, Result, Routes};
use messages::events::{Delivery, Event, Events, Reader, Subscribe};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use troupe_front as front;

/// A bus with one event after a gap.
struct Bus;

impl Actor for Bus {
    type Proto = Events;
    type Args = ();
    async fn start(_: (), _: Cx) -> Result<Self> {
        Ok(Self)
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Subscribe>()
    }
}

impl Handle<Subscribe> for Bus {
    fn handle(&mut self, m: Subscribe, _: Cx) -> Reply<Box<dyn Reader>> {
        if m.topics == ["/never"] {
            return Reply::ok(Box::new(Silence));
        }
        let event = Event {
            seq: 4,
            at: SystemTime::UNIX_EPOCH,
            namespace: "k8s.io".into(),
            topic: m.topics.concat(),
            payload: proto::any(&proto::events::TaskOom { container_id: "c1".into() }),
            traceparent: String::new(),
        };
        Reply::ok(Box::new(Deliveries(vec![Delivery::Event(event.into()), Delivery::Gap { missed: 3, next: 4 }])))
    }
}

struct Deliveries(Vec<Delivery>);

impl Reader for Deliveries {
    fn next(&mut self) -> BoxFuture<'_, Option<Delivery>> {
        ready(self.0.pop()).boxed()
    }
}

struct Silence;

impl Reader for Silence {
    fn next(&mut self) -> BoxFuture<'_, Option<Delivery>> {
        pending().boxed()
    }
}

/// Status and body of one request.
async fn request(path: &Path, method: &str, uri: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(path).await.unwrap();
    let length = body.len();
    let head = format!("{method} {uri} HTTP/1.1\r\nhost: troupe\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all((head + body).as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

struct Served {
    path: PathBuf,
    stop: oneshot::Sender<()>,
    server: tokio::task::JoinHandle<kernel::Result<()>>,
    _dir: TempDir,
}

async fn serve() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("troupe-control.sock");
    let system = kernel::testing::system(&[kernel::testing::spec("events", 0)]).unwrap();
    system.start::<Bus>(()).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let listener = front::socket::bind(&path).await.unwrap();
    let server = tokio::spawn(front::control::serve(system, listener, async move { stopped.await.unwrap_or_default() }));
    Served { path, stop, server, _dir: dir }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_sees_is_served_as_json() {
    let s = serve().await;
    for uri in ["/actors", "/ops", "/traces", "/chaos", "/healthz"] {
        let (status, body) = request(&s.path, "GET", uri, "").await;
        assert_eq!(status, 200, "{uri}: {body}");
        serde_json::from_str::<Value>(&body).unwrap_or_else(|e| panic!("{uri}: {e}: {body}"));
    }
    let (status, body) = request(&s.path, "GET", "/metrics", "").await;
    assert_eq!(status, 200);
    assert!(body.contains("# TYPE"), "{body}");
    s.stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(5), s.server).await.expect("stops in time").unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_told_with_their_class() {
    let s = serve().await;
    let (status, body) = request(&s.path, "GET", "/trace/0123456789abcdef0123456789abcdef", "").await;
    assert_eq!(status, 404, "{body}");
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["class"], "NotFound");
    let (status, body) = request(&s.path, "POST", "/chaos", "{not json").await;
    assert_eq!(status, 400, "{body}");
    s.stop.send(()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_come_as_lines_with_their_gaps() {
    let s = serve().await;
    let (status, body) = request(&s.path, "GET", "/events?follow=true&topic=/tasks/oom", "").await;
    assert_eq!(status, 200, "{body}");
    let lines: Vec<Value> = body.lines().filter(|l| l.starts_with('{')).map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 2, "{body}");
    assert_eq!((&lines[0]["missed"], &lines[1]["seq"]), (&3.into(), &4.into()));
    assert_eq!((&lines[1]["topic"], &lines[1]["event"]["container_id"]), (&"/tasks/oom".into(), &"c1".into()));
    s.stop.send(()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chaos_rules_come_and_go() {
    let s = serve().await;
    let (status, id) = request(&s.path, "POST", "/chaos", r#"{"actor":"events","fault":"panic","nth":1}"#).await;
    assert_eq!(status, 200, "{id}");
    let (_, rules) = request(&s.path, "GET", "/chaos", "").await;
    assert_eq!(serde_json::from_str::<Value>(&rules).unwrap()[0]["actor"], "events", "{rules}");
    let (status, body) = request(&s.path, "DELETE", &format!("/chaos/{id}"), "").await;
    assert_eq!(status, 200, "{body}");
    let (_, rules) = request(&s.path, "GET", "/chaos", "").await;
    assert_eq!(rules, "[]");
    s.stop.send(()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_does_not_hold_up_a_stop() {
    let s = serve().await;
    let mut follower = UnixStream::connect(&s.path).await.unwrap();
    follower.write_all(b"GET /events?follow=true&topic=/never HTTP/1.1\r\nhost: troupe\r\n\r\n").await.unwrap();
    let mut first = [0; 12];
    follower.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    s.stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(6), s.server).await.expect("stops in time").unwrap().unwrap();
}

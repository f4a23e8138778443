//! Events of shims over a real ttrpc socket, with a stand-in for the bus.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kernel::{Actor, Cx, Handle, Reply, Result, Routes};
use messages::events::{Events, Publish};
use proto::events::{Client, Envelope, ForwardRequest, TaskExit};
use proto::glue;
use proto::ttrpc::{Code, r#async::Client as Connection, context};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;
use troupe_front as front;

type Heard = Arc<Mutex<Sender<(Publish, String)>>>;

/// Tells what was published, and in which trace.
struct Bus(Heard);

impl Actor for Bus {
    type Proto = Events;
    type Args = Heard;
    async fn start(heard: Heard, _: Cx) -> Result<Self> {
        Ok(Self(heard))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Publish>()
    }
}

impl Handle<Publish> for Bus {
    fn handle(&mut self, m: Publish, cx: Cx) -> Reply<u64> {
        self.0.lock().unwrap().send((m, cx.trace_id())).unwrap();
        Reply::ok(1)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forwarded_event_is_on_the_bus_when_the_shim_gets_its_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("troupe.sock.ttrpc");
    let (tell, heard) = channel();
    let system = kernel::testing::system(&[kernel::testing::spec("events", 0)]).unwrap();
    system.start::<Bus>(Arc::new(Mutex::new(tell))).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let listener = front::socket::bind(&path).await.unwrap();
    let server = tokio::spawn(front::events::serve(system, listener, async move { stopped.await.unwrap_or_default() }));

    let client = Client::new(Connection::connect(&format!("unix://{}", path.display())).await.unwrap());
    let mut cx = context::with_duration(Duration::from_secs(5));
    cx.add("traceparent".into(), "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into());
    cx.add("containerd-namespace-ttrpc".into(), "k8s.io".into());
    let exit = TaskExit { container_id: "c1".into(), exit_status: 3, ..Default::default() };
    let envelope = Envelope { topic: "/tasks/exit".into(), event: Some(proto::any(&exit)), ..Default::default() };
    client.forward(cx.clone(), &ForwardRequest { envelope: Some(envelope) }).await.unwrap();
    let (event, trace) = heard.try_recv().unwrap();
    assert_eq!((event.topic.as_str(), event.namespace.as_str()), ("/tasks/exit", "k8s.io"));
    assert_eq!(proto::from_any::<TaskExit>(&event.payload), Some(exit));
    assert_eq!(trace, "4bf92f3577b34da6a3ce929d0e0e4736");

    let refused = client.forward(cx, &ForwardRequest::default()).await.unwrap_err();
    assert_eq!(glue::status(&refused).0, Code::INVALID_ARGUMENT);

    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), server).await.expect("stops in time").unwrap().unwrap();
}

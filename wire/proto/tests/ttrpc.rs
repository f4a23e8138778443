//! The ttrpc glue over a real socket, with our client and with a foreign one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proto::task::{self, StateRequest, StateResponse, Task};
use proto::ttrpc::{Code, Result, r#async as ttrpc, context};
use proto::{async_trait, glue};
use std::sync::Arc;
use std::time::Duration;
use troupe_proto as proto;

struct Fake;

#[async_trait]
impl Task for Fake {
    async fn state(&self, cx: &glue::Context, request: StateRequest) -> Result<StateResponse> {
        let namespace = glue::metadata(cx, "containerd-namespace-ttrpc").unwrap_or("none");
        Ok(StateResponse { id: request.id, bundle: namespace.to_owned(), pid: 42, ..Default::default() })
    }
    async fn kill(&self, _: &glue::Context, request: task::KillRequest) -> Result<()> {
        panic!("signal {} is not for me", request.signal);
    }
    async fn start(&self, _: &glue::Context, _: task::StartRequest) -> Result<task::StartResponse> {
        Err(glue::fault(Code::NOT_FOUND, "no such container"))
    }
}

struct Running {
    server: ttrpc::Server,
    address: String,
    _dir: tempfile::TempDir,
}

async fn serve() -> Running {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("unix://{}", dir.path().join("s").display());
    let mut server = ttrpc::Server::new().bind(&address).unwrap().register_service(task::serve_both(Arc::new(Fake)));
    server.start().await.unwrap();
    Running { server, address, _dir: dir }
}

impl Running {
    async fn connect(&self) -> ttrpc::Client {
        ttrpc::Client::connect(&self.address).await.unwrap()
    }
    async fn stop(mut self) {
        self.server.shutdown().await.unwrap();
    }
}

fn cx() -> context::Context {
    let mut cx = context::with_duration(Duration::from_secs(5));
    cx.add("containerd-namespace-ttrpc".into(), "k8s.io".into());
    cx
}

#[tokio::test]
async fn a_call_carries_its_metadata_under_both_versions() {
    let running = serve().await;
    for version in [2, 3] {
        let client = task::client(running.connect().await, version);
        let state = client.state(cx(), &StateRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
        assert_eq!((state.id.as_str(), state.bundle.as_str(), state.pid), ("c1", "k8s.io", 42), "version {version}");
    }
    running.stop().await;
}

#[tokio::test]
async fn a_foreign_client_is_understood() {
    let running = serve().await;
    let client = containerd_shim_protos::shim_async::TaskClient::new(running.connect().await);
    let request = containerd_shim_protos::api::StateRequest { id: "c2".into(), ..Default::default() };
    let state = client.state(cx(), &request).await.unwrap();
    assert_eq!((state.id(), state.bundle(), state.pid()), ("c2", "k8s.io", 42));
    running.stop().await;
}

#[tokio::test]
async fn failures_have_their_codes() {
    let running = serve().await;
    let client = task::Client::new(running.connect().await);
    let (code, text) = glue::status(&client.start(cx(), &task::StartRequest::default()).await.unwrap_err());
    assert_eq!((code, text.as_str()), (Code::NOT_FOUND, "no such container"));
    let (code, text) = glue::status(&client.pids(cx(), &task::PidsRequest::default()).await.unwrap_err());
    assert_eq!((code, text.as_str()), (Code::UNIMPLEMENTED, "containerd.task.v3.Task/Pids is not implemented"));
    let (code, text) = glue::status(&client.kill(cx(), &task::KillRequest { signal: 9, ..Default::default() }).await.unwrap_err());
    assert_eq!((code, text.as_str()), (Code::INTERNAL, "containerd.task.v3.Task/Kill panicked: signal 9 is not for me"));
    let state = client.state(cx(), &StateRequest::default()).await.unwrap();
    assert_eq!(state.pid, 42, "the connection goes on after a panic");
    running.stop().await;
}

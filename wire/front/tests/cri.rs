//! CRI over a real unix socket, with a stand-in for the sandbox actor.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kernel::{Actor, Cx, Fault, Handle, Reply, Result, Routes, System};
use messages::sandbox::{self, Sandboxes};
use proto::cri::runtime_service_client::RuntimeServiceClient;
use proto::cri::{
    ListPodSandboxRequest, PodSandboxStatus, PodSandboxStatusRequest, ReopenContainerLogRequest, StartContainerRequest, StatusRequest,
    StatusResponse, StopPodSandboxRequest, VersionRequest,
};
use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};
use troupe_front as front;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Tells the trace it sees; hangs, fails and panics on demand.
struct Fake;

impl Actor for Fake {
    type Proto = Sandboxes;
    type Args = ();
    async fn start(_: (), _: Cx) -> Result<Self> {
        Ok(Self)
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<sandbox::Status>().on::<sandbox::StopPod>().on::<sandbox::ReopenLog>().on::<sandbox::StartContainer>()
    }
}

impl Handle<sandbox::Status> for Fake {
    fn handle(&mut self, _: sandbox::Status, cx: Cx) -> Reply<StatusResponse> {
        let info = [("trace".to_owned(), cx.trace_id())].into();
        Reply::ok(StatusResponse { info, ..Default::default() })
    }
}
impl Handle<sandbox::StopPod> for Fake {
    fn handle(&mut self, m: sandbox::StopPod, _: Cx) -> Reply<()> {
        Reply::err(Fault::failed_precondition(format!("pod {} is busy", m.id)))
    }
}
impl Handle<sandbox::ReopenLog> for Fake {
    fn handle(&mut self, _: sandbox::ReopenLog, cx: Cx) -> Reply<()> {
        Reply::op(async move { cx.run("shim.reopen_log", |_| pending::<Result<()>>()).await })
    }
}
impl Handle<sandbox::StartContainer> for Fake {
    fn handle(&mut self, _: sandbox::StartContainer, _: Cx) -> Reply<()> {
        panic!("deliberate");
    }
}

async fn started() -> System {
    let system = kernel::testing::system(&[kernel::testing::spec("sandbox", 3)]).unwrap();
    system.start::<Fake>(()).await.unwrap();
    system
}

struct Daemon {
    system: System,
    pods: Arc<sandbox::View>,
    client: RuntimeServiceClient<Channel>,
    stop: Option<oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<Result<()>>,
    _dir: TempDir,
}

async fn daemon() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("troupe.sock");
    let system = started().await;
    let pods = Arc::<sandbox::View>::default();
    let about = front::cri::About { runtime_name: "containerd".into(), runtime_version: "1.2.3".into(), systemd_cgroup: false };
    let backend = Arc::new(front::cri::streams::Streams::new(system.clone(), pods.clone()));
    let streams = stream::Server::new(backend, "127.0.0.1:0".parse().unwrap(), Default::default());
    let cri = front::cri::Cri::new(system.clone(), pods.clone(), Arc::default(), about, streams).unwrap();
    let listener = front::socket::bind(&path).await.unwrap();
    let (stop, stopped) = oneshot::channel();
    let server = tokio::spawn(front::cri::serve(cri, listener, async move { stopped.await.unwrap_or_default() }));
    let channel = Endpoint::try_from(format!("unix://{}", path.display())).unwrap().connect().await.unwrap();
    Daemon { system, pods, client: RuntimeServiceClient::new(channel), stop: Some(stop), server, _dir: dir }
}

impl Daemon {
    async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        drop(self.client);
        tokio::time::timeout(Duration::from_secs(5), self.server).await.expect("stops in time").unwrap().unwrap();
    }
}

fn traced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("traceparent", TRACEPARENT.parse().unwrap());
    request
}

async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < Duration::from_secs(5), "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_call_comes_back_with_the_callers_trace() {
    let mut d = daemon().await;
    let response = d.client.version(traced(VersionRequest::default())).await.unwrap();
    let traceparent = response.metadata().get("traceparent").unwrap().to_str().unwrap();
    assert!(traceparent.contains(TRACE), "{traceparent}");
    let version = response.into_inner();
    assert_eq!((version.runtime_version.as_str(), version.runtime_api_version.as_str()), ("1.2.3", "v1"));
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_reaches_the_actor_within_the_callers_trace() {
    let mut d = daemon().await;
    let status = d.client.status(traced(StatusRequest::default())).await.unwrap().into_inner();
    assert_eq!(status.info["trace"], TRACE);
    let spans: Vec<_> = d.system.trace(TRACE).into_iter().map(|s| s.name.to_string()).collect();
    assert!(spans.iter().any(|s| s == "runtime.v1.RuntimeService/Status"), "{spans:?}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_has_its_code_and_names_its_trace() {
    let mut d = daemon().await;
    let status = d.client.stop_pod_sandbox(traced(StopPodSandboxRequest { pod_sandbox_id: "p1".into() })).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let metrics = d.system.metrics().gather();
    let handled = metrics.iter().find(|f| f.name() == "grpc_server_handled_total").expect("calls are counted");
    let labels: Vec<_> = handled.get_metric()[0].get_label().iter().map(|l| l.value()).collect();
    assert_eq!(labels, ["FailedPrecondition", "StopPodSandbox", "runtime.v1.RuntimeService", "unary"]);
    assert!(status.message().contains("pod p1 is busy") && status.message().contains(&format!("trace={TRACE})")), "{status}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeout_names_the_step_that_hung() {
    let mut d = daemon().await;
    let mut request = traced(ReopenContainerLogRequest { container_id: "c1".into() });
    request.set_timeout(Duration::from_millis(600));
    let status = d.client.reopen_container_log(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(status.message().contains("shim.reopen_log") && status.message().contains(TRACE), "{status}");
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_leaves_a_cancelled_operation() {
    let d = daemon().await;
    let mut client = d.client.clone();
    let call =
        tokio::spawn(async move { client.reopen_container_log(traced(ReopenContainerLogRequest { container_id: "c1".into() })).await });
    let hung = |s: &System| s.ops().iter().any(|o| o.step.contains("shim.reopen_log"));
    eventually("the operation hangs", || hung(&d.system)).await;
    call.abort();
    let cancelled =
        |s: &System| s.trace(TRACE).iter().any(|s| s.name.ends_with("/ReopenContainerLog") && s.outcome.starts_with("Canceled"));
    eventually("the operation is cancelled", || cancelled(&d.system)).await;
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crashed_actor_is_unavailable_and_serves_the_next_call() {
    let mut d = daemon().await;
    let status = d.client.start_container(traced(StartContainerRequest { container_id: "c1".into() })).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(d.client.status(StatusRequest::default()).await.is_ok());
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_never_incomplete_after_a_start() {
    let mut d = daemon().await;
    let mut early = Request::new(ListPodSandboxRequest::default());
    early.set_timeout(Duration::from_millis(400));
    let status = d.client.list_pod_sandbox(early).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().starts_with("server is not initialized yet"), "{status}");

    let status = PodSandboxStatus { id: "abc1".into(), ..Default::default() };
    let pod = sandbox::Pod { status, ..Default::default() };
    let pods = [("abc1".to_owned(), Arc::new(pod))].into();
    d.pods.0.store(Arc::new(sandbox::Picture { pods, recovered: true, ..Default::default() }));
    let list = d.client.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.items.len(), 1);
    let short = PodSandboxStatusRequest { pod_sandbox_id: "ab".into(), ..Default::default() };
    assert_eq!(d.client.pod_sandbox_status(short).await.unwrap().into_inner().status.unwrap().id, "abc1");
    d.stop().await;
}

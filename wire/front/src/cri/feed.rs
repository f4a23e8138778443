//! Answers in several messages: lists as streams, and container events.
use super::{Cri, lists};
use kernel::{Addr, Cx, Fault, Result};
use messages::stats::{self, Stats};
use proto::cri::*;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tonic::codegen::BoxStream;
use tonic::{Code, Status};

/// Items in one message: small enough for any client's buffer, large enough that a node's list is a handful of messages.
const PART: usize = 256;

/// A list in parts; an empty one has none.
pub(super) fn parts<T: Send + 'static, M: Send + 'static>(items: Vec<T>, wrap: fn(Vec<T>) -> M) -> BoxStream<M> {
    let mut items = items.into_iter();
    let parts = std::iter::from_fn(move || {
        let part: Vec<T> = items.by_ref().take(PART).collect();
        (!part.is_empty()).then(|| Ok(wrap(part)))
    });
    Box::pin(futures::stream::iter(parts))
}

impl Cri {
    /// The stats actor.
    pub(super) fn stats(&self) -> Addr<Stats> {
        self.system.addr()
    }

    /// Events from now on. A reader that fell behind is told how many it missed by an error that ends the stream: it lists, and opens another.
    pub(super) fn container_events(&self) -> BoxStream<ContainerEventResponse> {
        let events = BroadcastStream::new(self.pods.1.0.subscribe());
        let mut lost = false;
        let answers = events.map(|event| match event {
            Ok(event) => Ok((*event).clone()),
            Err(BroadcastStreamRecvError::Lagged(missed)) => {
                Err(Status::new(Code::DataLoss, format!("{missed} container events were missed by this reader: list again")))
            }
        });
        Box::pin(answers.take_while(move |answer| !std::mem::replace(&mut lost, answer.is_err())))
    }

    pub(super) async fn measure_containers(&self, cx: &Cx, filter: Option<ContainerStatsFilter>) -> Result<Vec<ContainerStats>> {
        let ids = lists::measured(&*self.picture(cx).await?, &filter.unwrap_or_default());
        if ids.is_empty() { Ok(vec![]) } else { self.stats().call(cx, stats::Containers { ids }).await }
    }

    pub(super) async fn measure_container(&self, cx: Cx, q: ContainerStatsRequest) -> Result<ContainerStatsResponse> {
        let picture = self.picture(&cx).await?;
        let found = lists::find(&picture.containers, &q.container_id, "container")?;
        let stopped = || Fault::failed_precondition(format!("container {} does not run: it has no statistics", found.status.id));
        if found.pid == 0 {
            return Err(stopped());
        }
        let stats = self.stats().call(&cx, stats::Containers { ids: vec![found.status.id.clone()] }).await?.pop();
        Ok(ContainerStatsResponse { stats: Some(stats.filter(|s| s.cpu.is_some()).ok_or_else(stopped)?) })
    }

    pub(super) async fn measure_pods(&self, cx: &Cx, filter: Option<PodSandboxStatsFilter>) -> Result<Vec<PodSandboxStats>> {
        let filter = filter.unwrap_or_default();
        let filter = PodSandboxFilter { id: filter.id, state: None, label_selector: filter.label_selector };
        let ids: Vec<String> = lists::pods(&*self.picture(cx).await?, Some(&filter)).into_iter().map(|p| p.id).collect();
        if ids.is_empty() { Ok(vec![]) } else { self.stats().call(cx, stats::Pods { ids }).await }
    }

    pub(super) async fn measure_pod(&self, cx: Cx, q: PodSandboxStatsRequest) -> Result<PodSandboxStatsResponse> {
        let picture = self.picture(&cx).await?;
        let id = lists::find(&picture.pods, &q.pod_sandbox_id, "pod sandbox")?.status.id.clone();
        let stats = self.stats().call(&cx, stats::Pods { ids: vec![id.clone()] }).await?.pop();
        let stats = stats.ok_or_else(|| Fault::unavailable(format!("pod sandbox {id} is not ready: it has no statistics")))?;
        Ok(PodSandboxStatsResponse { stats: Some(stats) })
    }
}

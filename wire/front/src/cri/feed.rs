//! Answers in several messages: lists as streams, and container events.
use super::{Cri, lists};
use kernel::{Addr, Cx, Fault, Result};
use messages::sandbox::View;
use messages::stats::{self, Stats};
use proto::cri::*;
use proto::prost::Message;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Code, Status};

/// Items in one message at most, and bytes: small enough for any client's buffer, large enough that a node's list is a handful of messages.
const PART: usize = 256;
const PART_BYTES: usize = 1 << 20;
/// Events that wait for the connection to take them; what does not fit stays in the feed.
const EVENTS: usize = 16;

/// A list in parts; an empty one has none. An item is sent once, alone if it is that large.
pub(super) fn parts<T: Message + 'static, M: Send + 'static>(items: Vec<T>, wrap: fn(Vec<T>) -> M) -> BoxStream<M> {
    let mut items = items.into_iter().peekable();
    let parts = std::iter::from_fn(move || {
        let mut part: Vec<T> = vec![];
        let mut bytes = 0;
        while part.len() < PART
            && let Some(item) = items.next_if(|i| part.is_empty() || bytes + i.encoded_len() <= PART_BYTES)
        {
            bytes += item.encoded_len();
            part.push(item);
        }
        (!part.is_empty()).then(|| Ok(wrap(part)))
    });
    Box::pin(futures::stream::iter(parts))
}

/// Passes events on until the reader is gone. One that fell behind is told how many it missed by an error that ends the stream: CRI's message has no
/// place for a gap, and a client whose stream ends lists anew and opens another.
async fn pass_events(view: Arc<View>, to: mpsc::Sender<Result<ContainerEventResponse, Status>>) {
    let mut reader = view.1.subscribe();
    loop {
        // First a place for it: while the client takes nothing, events wait where they are counted.
        let Ok(place) = to.reserve().await else { return };
        let next = tokio::select! {
            next = reader.next() => next,
            () = to.closed() => return,
        };
        match next {
            Some(Ok(event)) => place.send(Ok((*event).clone())),
            Some(Err(missed)) => {
                let text = format!(
                    "{missed} container events were missed by this reader, which is too slow: list pods and containers, then open another stream"
                );
                return place.send(Err(Status::new(Code::DataLoss, text)));
            }
            None => return,
        }
    }
}

impl Cri {
    /// The stats actor.
    pub(super) fn stats(&self) -> Addr<Stats> {
        self.system.addr()
    }

    /// Events from now on, and those before that nobody has read.
    pub(super) fn container_events(&self) -> BoxStream<ContainerEventResponse> {
        let (to, events) = mpsc::channel(EVENTS);
        tokio::spawn(pass_events(self.pods.clone(), to));
        Box::pin(ReceiverStream::new(events))
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt;

    fn image(id: usize, bytes: usize) -> Image {
        Image { id: id.to_string(), username: "x".repeat(bytes), ..Default::default() }
    }

    async fn sent(items: Vec<Image>) -> Vec<StreamImagesResponse> {
        parts(items, |images| StreamImagesResponse { images }).map(Result::unwrap).collect().await
    }

    #[tokio::test]
    async fn a_list_of_any_size_comes_in_messages_that_fit() {
        assert!(sent(vec![]).await.is_empty());
        // 40 MiB in all, with one item that is larger than a part.
        let items: Vec<Image> = (0..400).map(|n| image(n, if n == 200 { 3 << 20 } else { 95_000 })).collect();
        let all = sent(items).await;
        assert!(all.iter().all(|m| m.images.len() == 1 || m.encoded_len() <= PART_BYTES + 4096));
        let ids: Vec<String> = all.into_iter().flat_map(|m| m.images).map(|i| i.id).collect();
        assert_eq!(ids, (0..400).map(|n| n.to_string()).collect::<Vec<_>>());
        let small = sent((0..600).map(|n| image(n, 1)).collect()).await;
        assert_eq!(small.iter().map(|m| m.images.len()).collect::<Vec<_>>(), [256, 256, 88]);
    }
}

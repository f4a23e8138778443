//! `runtime.v1.RuntimeService`.

use super::{Cri, feed, info, lists, required, status};
use kernel::{Addr, Fault};
use messages::sandbox::{self as pods, Sandboxes};
use messages::stats;
use proto::async_trait;
use proto::cri::runtime_service_server::RuntimeService;
use proto::cri::*;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

/// The version of the kubelet's side that every runtime answers.
const KUBELET_API: &str = "0.1.0";
/// An ExecSync without any limit still has one.
const EXEC_LIMIT: Duration = Duration::from_secs(24 * 3600);

impl Cri {
    /// The sandbox actor.
    pub(super) fn sandboxes(&self) -> Addr<Sandboxes> {
        self.system.addr()
    }

    /// Completes a pod's id.
    pub(super) fn pod_id(&self, id: String) -> Result<String, Fault> {
        lists::complete(&self.glance().pods, id, "pod sandbox")
    }

    /// Completes a container's id.
    pub(super) fn container_id(&self, id: String) -> Result<String, Fault> {
        lists::complete(&self.glance().containers, id, "container")
    }
}

#[async_trait]
impl RuntimeService for Cri {
    async fn version(&self, request: Request<VersionRequest>) -> Answer<VersionResponse> {
        self.call("runtime.v1.RuntimeService/Version", request, |_, _| async move {
            Ok(VersionResponse {
                version: KUBELET_API.to_owned(),
                runtime_name: self.about.runtime_name.clone(),
                runtime_version: self.about.runtime_version.clone(),
                runtime_api_version: "v1".to_owned(),
            })
        })
        .await
    }

    async fn status(&self, request: Request<StatusRequest>) -> Answer<StatusResponse> {
        let name = "runtime.v1.RuntimeService/Status";
        self.call(name, request, |cx, q| async move { status::answer(self, &cx, q.verbose).await }).await
    }

    async fn runtime_config(&self, request: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        self.call("runtime.v1.RuntimeService/RuntimeConfig", request, |_, _| async move {
            let driver = if self.about.systemd_cgroup { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs };
            Ok(RuntimeConfigResponse { linux: Some(LinuxRuntimeConfiguration { cgroup_driver: driver.into() }) })
        })
        .await
    }

    async fn update_runtime_config(&self, request: Request<UpdateRuntimeConfigRequest>) -> Answer<UpdateRuntimeConfigResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/UpdateRuntimeConfig", request, |cx, q| async move {
            if let Some(network) = q.runtime_config.and_then(|c| c.network_config) {
                actor.call(&cx, pods::UpdateRuntimeConfig { pod_cidr: network.pod_cidr }).await?;
            }
            Ok(UpdateRuntimeConfigResponse {})
        })
        .await
    }

    async fn run_pod_sandbox(&self, request: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/RunPodSandbox", request, |cx, q| async move {
            let config = required(q.config, "config")?;
            if let Some(m) = &config.metadata {
                cx.attr("k8s.pod.name", &m.name);
                cx.attr("k8s.namespace.name", &m.namespace);
                cx.attr("k8s.pod.uid", &m.uid);
            }
            let id = actor.call(&cx, pods::RunPod { config, handler: q.runtime_handler }).await?;
            Ok(RunPodSandboxResponse { pod_sandbox_id: id })
        })
        .await
    }

    async fn stop_pod_sandbox(&self, request: Request<StopPodSandboxRequest>) -> Answer<StopPodSandboxResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/StopPodSandbox", request, |cx, q| async move {
            let id = self.pod_id(q.pod_sandbox_id)?;
            actor.call(&cx, pods::StopPod { id }).await?;
            Ok(StopPodSandboxResponse {})
        })
        .await
    }

    async fn remove_pod_sandbox(&self, request: Request<RemovePodSandboxRequest>) -> Answer<RemovePodSandboxResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/RemovePodSandbox", request, |cx, q| async move {
            let id = self.pod_id(q.pod_sandbox_id)?;
            actor.call(&cx, pods::RemovePod { id }).await?;
            Ok(RemovePodSandboxResponse {})
        })
        .await
    }

    async fn pod_sandbox_status(&self, request: Request<PodSandboxStatusRequest>) -> Answer<PodSandboxStatusResponse> {
        self.call("runtime.v1.RuntimeService/PodSandboxStatus", request, |cx, q| async move {
            // Before the picture is read: a reader drops events that are older than this, so it may be too early, never too late.
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let timestamp = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
            let picture = self.picture(&cx).await?;
            let pod = lists::find(&picture.pods, &q.pod_sandbox_id, "pod sandbox")?;
            let info = if q.verbose { info::pod(pod) } else { Default::default() };
            // One picture, so the containers are as they were at one time: a kubelet that goes by events need not ask for each.
            let containers_statuses = lists::newest_first(&picture, &pod.status.id);
            Ok(PodSandboxStatusResponse { status: Some(pod.status.clone()), info, containers_statuses, timestamp })
        })
        .await
    }

    async fn list_pod_sandbox(&self, request: Request<ListPodSandboxRequest>) -> Answer<ListPodSandboxResponse> {
        self.call("runtime.v1.RuntimeService/ListPodSandbox", request, |cx, q| async move {
            Ok(ListPodSandboxResponse { items: lists::pods(&*self.picture(&cx).await?, q.filter.as_ref()) })
        })
        .await
    }

    async fn create_container(&self, request: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/CreateContainer", request, |cx, q| async move {
            let config = required(q.config, "config")?;
            let sandbox_id = self.pod_id(q.pod_sandbox_id)?;
            cx.attr("k8s.pod.sandbox.id", &sandbox_id);
            if let Some(m) = &config.metadata {
                cx.attr("k8s.container.name", &m.name);
            }
            let sandbox_config = q.sandbox_config.unwrap_or_default();
            let id = actor.call(&cx, pods::CreateContainer { sandbox_id, config, sandbox_config }).await?;
            Ok(CreateContainerResponse { container_id: id })
        })
        .await
    }

    async fn start_container(&self, request: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/StartContainer", request, |cx, q| async move {
            let id = self.container_id(q.container_id)?;
            cx.attr("container.id", &id);
            actor.call(&cx, pods::StartContainer { id }).await?;
            Ok(StartContainerResponse {})
        })
        .await
    }

    async fn stop_container(&self, request: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/StopContainer", request, |cx, q| async move {
            let id = self.container_id(q.container_id)?;
            cx.attr("container.id", &id);
            actor.call(&cx, pods::StopContainer { id, grace_s: q.timeout }).await?;
            Ok(StopContainerResponse {})
        })
        .await
    }

    async fn remove_container(&self, request: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/RemoveContainer", request, |cx, q| async move {
            let id = self.container_id(q.container_id)?;
            cx.attr("container.id", &id);
            actor.call(&cx, pods::RemoveContainer { id }).await?;
            Ok(RemoveContainerResponse {})
        })
        .await
    }

    async fn list_containers(&self, request: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
        self.call("runtime.v1.RuntimeService/ListContainers", request, |cx, q| async move {
            Ok(ListContainersResponse { containers: lists::containers(&*self.picture(&cx).await?, q.filter.as_ref()) })
        })
        .await
    }

    async fn container_status(&self, request: Request<ContainerStatusRequest>) -> Answer<ContainerStatusResponse> {
        self.call("runtime.v1.RuntimeService/ContainerStatus", request, |cx, q| async move {
            let picture = self.picture(&cx).await?;
            let container = lists::find(&picture.containers, &q.container_id, "container")?;
            let pod = picture.pods.get(&container.sandbox_id).map(|p| &**p);
            let info = if q.verbose { info::container(container, pod) } else { Default::default() };
            Ok(ContainerStatusResponse { status: Some(lists::status(container, &self.images)), info })
        })
        .await
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/UpdateContainerResources", request, |cx, mut q| async move {
            q.container_id = self.container_id(q.container_id)?;
            cx.attr("container.id", &q.container_id);
            actor.call(&cx, pods::UpdateContainer { request: q }).await?;
            Ok(UpdateContainerResourcesResponse {})
        })
        .await
    }

    async fn reopen_container_log(&self, request: Request<ReopenContainerLogRequest>) -> Answer<ReopenContainerLogResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/ReopenContainerLog", request, |cx, q| async move {
            let id = self.container_id(q.container_id)?;
            actor.call(&cx, pods::ReopenLog { id }).await?;
            Ok(ReopenContainerLogResponse {})
        })
        .await
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/ExecSync", request, |cx, q| async move {
            let id = self.container_id(q.container_id)?;
            cx.attr("container.id", &id);
            // A caller that sets no limit waits as long as the command takes.
            let cx = cx.with_timeout(EXEC_LIMIT);
            actor.call(&cx, pods::ExecSync { id, cmd: q.cmd, timeout_s: q.timeout }).await
        })
        .await
    }

    async fn container_stats(&self, request: Request<ContainerStatsRequest>) -> Answer<ContainerStatsResponse> {
        self.call("runtime.v1.RuntimeService/ContainerStats", request, |cx, q| self.measure_container(cx, q)).await
    }

    async fn list_container_stats(&self, request: Request<ListContainerStatsRequest>) -> Answer<ListContainerStatsResponse> {
        self.call("runtime.v1.RuntimeService/ListContainerStats", request, |cx, q| async move {
            Ok(ListContainerStatsResponse { stats: self.measure_containers(&cx, q.filter).await? })
        })
        .await
    }

    async fn pod_sandbox_stats(&self, request: Request<PodSandboxStatsRequest>) -> Answer<PodSandboxStatsResponse> {
        self.call("runtime.v1.RuntimeService/PodSandboxStats", request, |cx, q| self.measure_pod(cx, q)).await
    }

    async fn list_pod_sandbox_stats(&self, request: Request<ListPodSandboxStatsRequest>) -> Answer<ListPodSandboxStatsResponse> {
        self.call("runtime.v1.RuntimeService/ListPodSandboxStats", request, |cx, q| async move {
            Ok(ListPodSandboxStatsResponse { stats: self.measure_pods(&cx, q.filter).await? })
        })
        .await
    }

    async fn list_metric_descriptors(&self, request: Request<ListMetricDescriptorsRequest>) -> Answer<ListMetricDescriptorsResponse> {
        self.call("runtime.v1.RuntimeService/ListMetricDescriptors", request, |cx, _| async move {
            Ok(ListMetricDescriptorsResponse { descriptors: self.stats().call(&cx, stats::Descriptors).await? })
        })
        .await
    }

    async fn list_pod_sandbox_metrics(&self, request: Request<ListPodSandboxMetricsRequest>) -> Answer<ListPodSandboxMetricsResponse> {
        self.call("runtime.v1.RuntimeService/ListPodSandboxMetrics", request, |cx, _| async move {
            Ok(ListPodSandboxMetricsResponse { pod_metrics: self.stats().call(&cx, stats::Metrics).await? })
        })
        .await
    }

    async fn get_container_events(&self, request: Request<GetEventsRequest>) -> Answer<BoxStream<ContainerEventResponse>> {
        self.call("runtime.v1.RuntimeService/GetContainerEvents", request, |_, _| async { Ok(self.container_events()) }).await
    }

    async fn stream_pod_sandboxes(&self, request: Request<StreamPodSandboxesRequest>) -> Answer<BoxStream<StreamPodSandboxesResponse>> {
        self.call("runtime.v1.RuntimeService/StreamPodSandboxes", request, |cx, q| async move {
            let items = lists::pods(&*self.picture(&cx).await?, q.filter.as_ref());
            Ok(feed::parts(items, |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes }))
        })
        .await
    }

    async fn stream_containers(&self, request: Request<StreamContainersRequest>) -> Answer<BoxStream<StreamContainersResponse>> {
        self.call("runtime.v1.RuntimeService/StreamContainers", request, |cx, q| async move {
            let items = lists::containers(&*self.picture(&cx).await?, q.filter.as_ref());
            Ok(feed::parts(items, |containers| StreamContainersResponse { containers }))
        })
        .await
    }

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Answer<BoxStream<StreamContainerStatsResponse>> {
        self.call("runtime.v1.RuntimeService/StreamContainerStats", request, |cx, q| async move {
            let items = self.measure_containers(&cx, q.filter).await?;
            Ok(feed::parts(items, |container_stats| StreamContainerStatsResponse { container_stats }))
        })
        .await
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Answer<BoxStream<StreamPodSandboxStatsResponse>> {
        self.call("runtime.v1.RuntimeService/StreamPodSandboxStats", request, |cx, q| async move {
            let items = self.measure_pods(&cx, q.filter).await?;
            Ok(feed::parts(items, |pod_sandbox_stats| StreamPodSandboxStatsResponse { pod_sandbox_stats }))
        })
        .await
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        request: Request<StreamPodSandboxMetricsRequest>,
    ) -> Answer<BoxStream<StreamPodSandboxMetricsResponse>> {
        self.call("runtime.v1.RuntimeService/StreamPodSandboxMetrics", request, |cx, _| async move {
            let items = self.stats().call(&cx, stats::Metrics).await?;
            Ok(feed::parts(items, |pod_sandbox_metrics| StreamPodSandboxMetricsResponse { pod_sandbox_metrics }))
        })
        .await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        let actor = self.sandboxes();
        self.call("runtime.v1.RuntimeService/UpdatePodSandboxResources", request, |cx, mut q| async move {
            q.pod_sandbox_id = self.pod_id(q.pod_sandbox_id)?;
            actor.call(&cx, pods::UpdatePod { request: q }).await?;
            Ok(UpdatePodSandboxResourcesResponse {})
        })
        .await
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ExecResponse> {
        self.call("runtime.v1.RuntimeService/Exec", request, |cx, q| self.open_exec(cx, q)).await
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Answer<AttachResponse> {
        self.call("runtime.v1.RuntimeService/Attach", request, |cx, q| self.open_attach(cx, q)).await
    }

    async fn port_forward(&self, request: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        self.call("runtime.v1.RuntimeService/PortForward", request, |cx, q| self.open_port_forward(cx, q)).await
    }

    async fn checkpoint_container(&self, request: Request<CheckpointContainerRequest>) -> Answer<CheckpointContainerResponse> {
        let name = "runtime.v1.RuntimeService/CheckpointContainer";
        let actor = self.sandboxes();
        self.call(name, request, |cx, mut q| async move {
            q.container_id = self.container_id(q.container_id)?;
            cx.attr("container.id", &q.container_id);
            actor.call(&cx, pods::Checkpoint { request: q }).await?;
            Ok(CheckpointContainerResponse {})
        })
        .await
    }
}

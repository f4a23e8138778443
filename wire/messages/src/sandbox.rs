//! `sandbox`: pods and their containers. CRI's runtime calls come here; lists and statuses are read from the published [`View`] instead.
use crate::feed::Feed;
use crate::task;
use arc_swap::ArcSwap;
use kernel::Protocol;
use proto::cri;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The sandbox actor's protocol.
pub struct Sandboxes;
impl Protocol for Sandboxes {
    const ACTOR: &'static str = "sandbox";
}

/// A pod as published.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// Status as CRI gives it.
    pub status: cri::PodSandboxStatus,
    /// Path of its network namespace; empty = the node's.
    pub netns: String,
    /// Configuration as the client gave it.
    pub config: Arc<cri::PodSandboxConfig>,
    /// Process that stands for it.
    pub pid: u32,
    /// How it is run.
    pub runtime: Arc<Runtime>,
    /// What an OCI specification would say of it, JSON: there is no process of its own.
    pub spec: Arc<str>,
    /// What its networks gave it, JSON as verbose statuses have it (`cniResult`); empty = `null`.
    pub cni: Arc<str>,
}

/// How a pod is run, as verbose statuses show it.
#[derive(Clone, Debug, Default)]
pub struct Runtime {
    /// Type as configured.
    pub kind: String,
    /// Options of the shim.
    pub options: task::Runtime,
}

/// A container as published.
#[derive(Clone, Debug, Default)]
pub struct Container {
    /// Its pod.
    pub sandbox_id: String,
    /// Status as CRI gives it.
    pub status: cri::ContainerStatus,
    /// Snapshotter of its root.
    pub snapshotter: String,
    /// It has a terminal.
    pub tty: bool,
    /// Pid of its init, 0 when it does not run.
    pub pid: u32,
    /// Its OCI specification, JSON.
    pub spec: Arc<str>,
    /// Its configuration as the client gave it, encoded: few ask for it.
    pub config: Arc<[u8]>,
    /// It is being removed.
    pub removing: bool,
}

/// Immutable picture of all pods and containers, replaced as a whole: readers never wait.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    /// Pods by id.
    pub pods: BTreeMap<String, Arc<Pod>>,
    /// Containers by id.
    pub containers: BTreeMap<String, Arc<Container>>,
    /// Recovery after a start is complete.
    pub recovered: bool,
}

/// Where the sandbox actor publishes its [`Picture`], and what changes in it.
#[derive(Default)]
pub struct View(pub ArcSwap<Picture>, pub Feed);

/// Runs a pod; answers its id. A retry of a creation in flight joins it.
#[derive(Clone, Debug)]
pub struct RunPod {
    /// Configuration.
    pub config: cri::PodSandboxConfig,
    /// Runtime handler, empty = default.
    pub handler: String,
}
/// Stops a pod; succeeds when absent.
#[derive(Clone, Debug)]
pub struct StopPod {
    /// Id or unique prefix.
    pub id: String,
}
/// Removes a pod and its containers; succeeds when absent.
#[derive(Clone, Debug)]
pub struct RemovePod {
    /// Id.
    pub id: String,
}
/// Creates a container; answers its id.
#[derive(Clone, Debug)]
pub struct CreateContainer {
    /// Pod's id.
    pub sandbox_id: String,
    /// Configuration.
    pub config: cri::ContainerConfig,
    /// Pod's configuration as the client repeats it.
    pub sandbox_config: cri::PodSandboxConfig,
}
/// Starts it.
#[derive(Clone, Debug)]
pub struct StartContainer {
    /// Id.
    pub id: String,
}
/// Stops it: signal, grace period, SIGKILL.
#[derive(Clone, Debug)]
pub struct StopContainer {
    /// Id.
    pub id: String,
    /// Seconds.
    pub grace_s: i64,
}
/// Removes it, killing it when it runs; succeeds when absent.
#[derive(Clone, Debug)]
pub struct RemoveContainer {
    /// Id.
    pub id: String,
}
/// Updates its resources.
#[derive(Clone, Debug)]
pub struct UpdateContainer {
    /// Request as it came.
    pub request: cri::UpdateContainerResourcesRequest,
}
/// Writes a running container down, so that it can be restored.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Request as it came.
    pub request: cri::CheckpointContainerRequest,
}
/// Reopens its log.
#[derive(Clone, Debug)]
pub struct ReopenLog {
    /// Id.
    pub id: String,
}
/// Runs a command in it.
#[derive(Clone, Debug)]
pub struct ExecSync {
    /// Id.
    pub id: String,
    /// Command.
    pub cmd: Vec<String>,
    /// Seconds; 0 = none.
    pub timeout_s: i64,
}
/// The OCI process (JSON) of a command in a running container, and the container's full id.
#[derive(Clone, Debug)]
pub struct ExecProcess {
    /// Id.
    pub id: String,
    /// Command.
    pub cmd: Vec<String>,
    /// With a terminal.
    pub terminal: bool,
}
/// Changes a pod's resources.
#[derive(Clone, Debug)]
pub struct UpdatePod {
    /// Request as it came.
    pub request: cri::UpdatePodSandboxResourcesRequest,
}
/// Runtime and network conditions, and verbose info.
#[derive(Clone, Debug)]
pub struct Status {
    /// With info.
    pub verbose: bool,
}
/// The kubelet's pod CIDR.
#[derive(Clone, Debug)]
pub struct UpdateRuntimeConfig {
    /// CIDRs.
    pub pod_cidr: String,
}

kernel::messages! { Sandboxes = "sandbox" => {
    RunPod -> String as idempotent,
    StopPod -> () as idempotent,
    RemovePod -> () as idempotent,
    CreateContainer -> String as idempotent,
    StartContainer -> () as idempotent,
    StopContainer -> () as idempotent,
    RemoveContainer -> () as idempotent,
    UpdateContainer -> () as idempotent,
    Checkpoint -> () as idempotent,
    ReopenLog -> () as idempotent,
    ExecSync -> cri::ExecSyncResponse,
    ExecProcess -> (String, Vec<u8>) as idempotent,
    UpdatePod -> () as idempotent,
    Status -> cri::StatusResponse as idempotent,
    UpdateRuntimeConfig -> () as idempotent,
} }

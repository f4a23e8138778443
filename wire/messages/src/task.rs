//! `task`: shims and what runs in them. The parent starts and adopts shims; a child actor `task.shim` for each shim talks to it,
//! so that a deaf shim delays its own pod only.
use crate::snapshot::Mount;
use crate::userns::UserNs;
use kernel::Protocol;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The task actor's protocol: all requests go to it; it forwards to the child that owns the shim.
pub struct Tasks;
impl Protocol for Tasks {
    const ACTOR: &'static str = "task";
}

/// Runtime type of Troupe's own shim.
pub const OWN_SHIM: &str = "io.containerd.troupe.v2";

/// How to run things: the runtime of a pod, from the configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Runtime {
    /// Runtime type (`io.containerd.troupe.v2`) or absolute path of a shim.
    pub name: String,
    /// `BinaryName` of the options: an external runc-compatible binary; empty = the shim's embedded engine.
    pub binary_name: String,
    /// `SystemdCgroup` of the options.
    pub systemd_cgroup: bool,
    /// `Root` of the options.
    pub root: String,
    /// `CriuImagePath` of the options.
    pub criu_image_path: String,
    /// `CriuWorkPath` of the options.
    pub criu_work_path: String,
    /// `IoUid` of the options.
    pub io_uid: u32,
    /// `IoGid` of the options.
    pub io_gid: u32,
    /// `NoNewKeyring` of the options.
    pub no_new_keyring: bool,
    /// `ShimCgroup` of the options.
    pub shim_cgroup: String,
    /// Options of a shim that is not like runc's, instead of those above.
    pub other: Option<Options>,
}

/// Options of a shim that is not like runc's (`runtimeoptions.v1.Options`).
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Options {
    /// What the body is.
    pub type_url: String,
    /// A file of the node.
    pub config_path: String,
    /// Or the options themselves, TOML.
    pub config_body: String,
}

/// Namespaces that a pod shares, for a sandbox without a pause process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PodNamespaces {
    /// Path of the pod's network namespace; `None` = the node's.
    pub network: Option<String>,
    /// `pod` or `node`.
    pub ipc: String,
    /// `pod`, `container` or `node`.
    pub pid: String,
    /// `pod` or `node`.
    pub uts: String,
    /// Hostname in the pod's UTS namespace.
    pub hostname: String,
    /// Sysctls, written inside the pod's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Cgroup of the pod.
    pub cgroup_parent: String,
    /// The pod's user namespace, which owns all the others. With a network namespace it is the one that owns that.
    #[serde(default)]
    pub userns: Option<UserNs>,
}

/// A started sandbox.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SandboxHandle {
    /// Process that stands for the pod (its init, or the shim).
    pub pid: u32,
    /// Paths of the pod's namespaces by OCI type (`user`, `ipc`, `uts`, `pid`), for the containers' specs.
    pub namespaces: BTreeMap<String, String>,
}

/// How a process ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, 128 + signal, 255 when unknown.
    pub code: u32,
    /// When, Unix nanoseconds.
    pub at_ns: i64,
    /// The container's cgroup saw an OOM kill.
    pub oom: bool,
    /// Which witness told it: `event`, `wait`, `pidfd`, `lost`.
    pub witness: String,
}

/// State of a task.
#[derive(Clone, Debug)]
pub enum TaskState {
    /// Created, not started.
    Created {
        /// Pid.
        pid: u32,
    },
    /// Running.
    Running {
        /// Pid.
        pid: u32,
    },
    /// Paused.
    Paused {
        /// Pid.
        pid: u32,
    },
    /// Ended.
    Exited(Exit),
}

/// Can pods have user namespaces with this runtime? Makes a container's root below `dir` as it would be made, and gives it back. `Err` says why not.
#[derive(Clone, Debug)]
pub struct ProbeUserns {
    /// Runtime.
    pub runtime: Runtime,
    /// A directory on the file system of the snapshots.
    pub dir: std::path::PathBuf,
}
/// Starts the pod's shim and its sandbox. Undone on failure.
#[derive(Clone, Debug)]
pub struct StartSandbox {
    /// Sandbox id.
    pub id: String,
    /// Runtime.
    pub runtime: Runtime,
    /// Namespaces.
    pub namespaces: PodNamespaces,
}
/// Tells the shim the pod's new resources. A shim that does not care is fine.
#[derive(Clone, Debug)]
pub struct UpdateSandbox {
    /// Sandbox id.
    pub id: String,
    /// JSON as containerd's `io.containerd.cri.v1/UpdatedResources`: `{"Overhead": …, "Resources": …}`, each CRI's `LinuxContainerResources`.
    pub resources: Vec<u8>,
}
/// Stops what is left in the sandbox; the shim stays until `RemoveSandbox`.
#[derive(Clone, Debug)]
pub struct StopSandbox {
    /// Sandbox id.
    pub id: String,
}
/// Shuts the shim down and deletes its bundle; kills it when it does not answer. Succeeds when absent.
#[derive(Clone, Debug)]
pub struct RemoveSandbox {
    /// Sandbox id.
    pub id: String,
}
/// Waits until the pod's shim, and all that it held, has ended; answers why. `NotFound` when there is no such pod.
#[derive(Clone, Debug)]
pub struct WaitSandbox {
    /// Sandbox id.
    pub id: String,
}
/// Where a process' streams go.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stdio {
    /// FIFO or empty.
    pub stdin: String,
    /// FIFO, `file://`, `cri-log://` or empty.
    pub stdout: String,
    /// The same.
    pub stderr: String,
    /// Terminal.
    pub terminal: bool,
}
/// Makes the container's bundle and creates its task in the pod's shim. Undone on failure. Answers the pid.
#[derive(Clone, Debug)]
pub struct Create {
    /// Container id.
    pub id: String,
    /// Its sandbox.
    pub sandbox_id: String,
    /// OCI runtime spec as JSON.
    pub spec: Vec<u8>,
    /// Root file system.
    pub rootfs: Vec<Mount>,
    /// Streams.
    pub stdio: Stdio,
}
/// Starts a created task.
#[derive(Clone, Debug)]
pub struct Start {
    /// Container id.
    pub id: String,
}
/// Signals it (or all its processes). `NotFound` when it has ended.
#[derive(Clone, Debug)]
pub struct Kill {
    /// Container id.
    pub id: String,
    /// Exec id; empty = the container's init.
    pub exec_id: String,
    /// Signal number.
    pub signal: u32,
    /// The whole cgroup.
    pub all: bool,
}
/// Waits for the end of a container's init. Survives restarts of actors.
#[derive(Clone, Debug)]
pub struct Wait {
    /// Container id.
    pub id: String,
}
/// Deletes an ended task and its bundle. Succeeds when absent.
#[derive(Clone, Debug)]
pub struct Delete {
    /// Container id.
    pub id: String,
}
/// State; `None` when there is no such task.
#[derive(Clone, Debug)]
pub struct State {
    /// Container id.
    pub id: String,
}
/// Updates resources (OCI `LinuxResources` as JSON).
#[derive(Clone, Debug)]
pub struct Update {
    /// Container id.
    pub id: String,
    /// JSON.
    pub resources: Vec<u8>,
}
/// Has CRIU write the container's processes down; they go on.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Container id.
    pub id: String,
    /// Directory of the images.
    pub images: PathBuf,
    /// Directory of the log.
    pub work: PathBuf,
}
/// Runs a process to its end with bounded output.
#[derive(Clone, Debug)]
pub struct ExecSync {
    /// Container id.
    pub id: String,
    /// OCI `Process` as JSON.
    pub process: Vec<u8>,
    /// Milliseconds; 0 = none. When it passes, the process is killed and the call fails with `DeadlineExceeded`.
    pub timeout_ms: u64,
    /// At most this many bytes are kept of both streams.
    pub max_output: usize,
}
/// Its result.
#[derive(Clone, Debug)]
pub struct ExecResult {
    /// Exit code.
    pub code: i32,
    /// Output.
    pub stdout: Vec<u8>,
    /// Errors.
    pub stderr: Vec<u8>,
}
/// FIFOs of a client's session: of an exec with streams of its own, or of an attached client. Empty paths are streams that nobody wants.
#[derive(Clone, Debug, Default)]
pub struct Session {
    /// Names the session, and the exec if it is one.
    pub exec_id: String,
    /// Client's input.
    pub stdin: String,
    /// Output.
    pub stdout: String,
    /// Errors.
    pub stderr: String,
}
/// Makes the FIFOs of a session. The caller opens them, then says [`RunExec`] or [`JoinStreams`], and in the end [`CloseSession`].
#[derive(Clone, Debug)]
pub struct OpenSession {
    /// Container id.
    pub id: String,
    /// Input wanted.
    pub stdin: bool,
    /// Output wanted.
    pub stdout: bool,
    /// Errors wanted.
    pub stderr: bool,
}
/// Runs a process with a session's streams.
#[derive(Clone, Debug)]
pub struct RunExec {
    /// Container id.
    pub id: String,
    /// Its streams.
    pub session: Session,
    /// OCI `Process` as JSON.
    pub process: Vec<u8>,
    /// With a terminal.
    pub terminal: bool,
}
/// Waits for its end; answers the exit code.
#[derive(Clone, Debug)]
pub struct WaitExec {
    /// Container id.
    pub id: String,
    /// Exec id.
    pub exec_id: String,
}
/// Joins a session to the container's own streams.
#[derive(Clone, Debug)]
pub struct JoinStreams {
    /// Container id.
    pub id: String,
    /// Its streams.
    pub session: Session,
}
/// Sets a terminal's size.
#[derive(Clone, Debug)]
pub struct Resize {
    /// Container id.
    pub id: String,
    /// Exec id; empty = the container's init.
    pub exec_id: String,
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}
/// Ends a process' input.
#[derive(Clone, Debug)]
pub struct CloseInput {
    /// Container id.
    pub id: String,
    /// Exec id.
    pub exec_id: String,
}
/// Gives a session back: its FIFOs, and its process, which is killed if it still runs.
#[derive(Clone, Debug)]
pub struct CloseSession {
    /// Container id.
    pub id: String,
    /// The session.
    pub session: Session,
    /// It ran a process.
    pub exec: bool,
}
/// Has the shim reopen the container's log file.
#[derive(Clone, Debug)]
pub struct ReopenLog {
    /// Container id.
    pub id: String,
}
/// Statistics: the shim's `Any` (cgroup metrics).
#[derive(Clone, Debug)]
pub struct Stats {
    /// Container id.
    pub id: String,
}
/// Sandbox and containers that are adopted, for recovery: ids with a live shim.
#[derive(Clone, Debug)]
pub struct Adopted;

kernel::messages! { Tasks = "task" => {
    ProbeUserns -> () as idempotent,
    StartSandbox -> SandboxHandle,
    UpdateSandbox -> () as idempotent,
    StopSandbox -> () as idempotent,
    RemoveSandbox -> () as idempotent,
    WaitSandbox -> String as idempotent,
    Create -> u32,
    Start -> u32,
    Kill -> () as idempotent,
    Wait -> Exit as idempotent,
    Delete -> Option<Exit> as idempotent,
    State -> Option<TaskState> as idempotent,
    Update -> () as idempotent,
    Checkpoint -> () as idempotent,
    ExecSync -> ExecResult,
    OpenSession -> Session,
    RunExec -> (),
    WaitExec -> i32 as idempotent,
    JoinStreams -> (),
    Resize -> () as idempotent,
    CloseInput -> () as idempotent,
    CloseSession -> () as idempotent,
    ReopenLog -> () as idempotent,
    Stats -> proto::prost_types::Any as idempotent,
    Adopted -> Vec<String> as idempotent,
} }

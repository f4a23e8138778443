//! The keys: containerd's names and defaults (`contracts/core.md` §8, `contracts/cri.md` §8), and Troupe's own tables.
mod cni;
mod duration;
mod handler;
mod images;
mod kernel;
mod registry;
mod runtime;
mod server;
mod validate;

pub use cni::Cni;
pub use duration::duration;
pub use handler::{Containerd, Handler};
pub use images::Images;
pub use kernel::{Chaos, Kernel, Network};
pub use registry::RegistryAuth;
pub use runtime::Runtime;
use serde::{Deserialize, Serialize};
pub use server::{CriServer, Grpc, Metrics, Shim, Socket, TasksService};
use std::collections::BTreeMap;
pub use validate::kernel;

/// The whole file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Format version.
    pub version: i64,
    /// Persistent state.
    pub root: String,
    /// State that a reboot may lose.
    pub state: String,
    /// Temporary directory, empty = the system's.
    pub temp: String,
    /// oom_score_adj of the daemon, 0 = unchanged.
    pub oom_score: i32,
    /// Further files.
    pub imports: Vec<String>,
    /// Plugins not to start.
    pub disabled_plugins: Vec<String>,
    /// Plugins that must start.
    pub required_plugins: Vec<String>,
    /// Logs.
    pub debug: Debug,
    /// The daemon's own cgroup.
    pub cgroup: Cgroup,
    /// Named time-outs.
    pub timeouts: BTreeMap<String, String>,
    /// Sections by plugin.
    pub plugins: Plugins,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            version: super::migrate::CURRENT,
            root: "/var/lib/troupe".into(),
            state: "/run/troupe".into(),
            temp: String::new(),
            oom_score: 0,
            imports: vec!["/etc/troupe/conf.d/*.toml".into()],
            disabled_plugins: vec![],
            required_plugins: vec![],
            debug: Debug::default(),
            cgroup: Cgroup::default(),
            timeouts: BTreeMap::new(),
            plugins: Plugins::default(),
        }
    }
}

/// Logs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Debug {
    /// `trace`, `debug`, `info`, `warn`, `error`; empty = info.
    pub level: String,
    /// `text` or `json`; empty = text.
    pub format: String,
    /// containerd's switch for trace ids in logs; Troupe always writes them.
    pub log_trace_id: bool,
}

/// The daemon's own cgroup.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Cgroup {
    /// Path, empty = stay.
    pub path: String,
}

/// Plugin sections that Troupe reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Plugins {
    /// gRPC socket.
    #[serde(rename = "io.containerd.server.v1.grpc")]
    pub grpc: Grpc,
    /// ttrpc socket, for shims.
    #[serde(rename = "io.containerd.server.v1.ttrpc")]
    pub ttrpc: Socket,
    /// Metrics and health over HTTP.
    #[serde(rename = "io.containerd.server.v1.metrics")]
    pub metrics: Metrics,
    /// Images.
    #[serde(rename = "io.containerd.cri.v1.images")]
    pub images: Images,
    /// Pods and containers.
    #[serde(rename = "io.containerd.cri.v1.runtime")]
    pub runtime: Runtime,
    /// Streaming server.
    #[serde(rename = "io.containerd.grpc.v1.cri")]
    pub cri: CriServer,
    /// Shims.
    #[serde(rename = "io.containerd.shim.v1.manager")]
    pub shim: Shim,
    /// Classes of block input and output, and of RDT.
    #[serde(rename = "io.containerd.service.v1.tasks-service")]
    pub tasks: TasksService,
    /// Troupe's kernel.
    #[serde(rename = "io.troupe.kernel.v1.kernel")]
    pub kernel: Kernel,
    /// Fault injection.
    #[serde(rename = "io.troupe.kernel.v1.chaos")]
    pub chaos: Chaos,
    /// Networks.
    #[serde(rename = "io.troupe.network.v1.cni")]
    pub network: Network,
}

impl Config {
    /// The gRPC socket.
    pub fn grpc_address(&self) -> String {
        or(&self.plugins.grpc.address, || format!("{}/troupe.sock", self.state))
    }

    /// The ttrpc socket that shims send events to.
    pub fn ttrpc_address(&self) -> String {
        or(&self.plugins.ttrpc.address, || format!("{}.ttrpc", self.grpc_address()))
    }

    /// The control socket.
    pub fn control_address(&self) -> String {
        or(&self.plugins.kernel.control_address, || format!("{}/control.sock", self.state))
    }
}

fn or(value: &str, default: impl FnOnce() -> String) -> String {
    if value.is_empty() { default() } else { value.to_owned() }
}

//! The keys: containerd's names and defaults (`contracts/core.md` §8, `contracts/cri.md` §8), and Troupe's own tables.
use anyhow::bail;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

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
    /// Troupe's kernel.
    #[serde(rename = "io.troupe.kernel.v1.kernel")]
    pub kernel: Kernel,
    /// Fault injection.
    #[serde(rename = "io.troupe.kernel.v1.chaos")]
    pub chaos: Chaos,
}

/// gRPC socket.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Grpc {
    /// Path; empty = `<state>/troupe.sock`.
    pub address: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes; 0 = 16 MiB.
    pub max_recv_message_size: usize,
    /// Bytes; 0 = 16 MiB.
    pub max_send_message_size: usize,
}

/// A unix socket.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Socket {
    /// Path; empty = the gRPC address + `.ttrpc`.
    pub address: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Metrics and health over HTTP.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// `host:port`; empty = none (the control socket always serves them).
    pub address: String,
}

/// `io.containerd.cri.v1.images`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Images {
    /// Default snapshotter.
    pub snapshotter: String,
    /// Images that garbage collection must keep, by role.
    pub pinned_images: BTreeMap<String, String>,
    /// Registries.
    pub registry: Registry,
    /// Layers fetched side by side in one pull.
    pub max_concurrent_downloads: usize,
    /// Time without a byte after which a fetch is given up and tried again (Go duration).
    pub image_pull_progress_timeout: String,
    /// Accepted for compatibility: snapshots are always synced.
    pub image_pull_with_sync_fs: bool,
    /// Accepted for compatibility.
    pub disable_snapshot_annotations: bool,
    /// Drop a layer's blob once it is unpacked.
    pub discard_unpacked_layers: bool,
    /// Seconds between collections of statistics.
    pub stats_collect_period: u64,
    /// Accepted for compatibility.
    pub use_local_image_pull: bool,
}

impl Default for Images {
    fn default() -> Self {
        Self {
            snapshotter: "overlayfs".into(),
            pinned_images: BTreeMap::from([("sandbox".into(), "registry.k8s.io/pause:3.10.2".into())]),
            registry: Registry::default(),
            max_concurrent_downloads: 3,
            image_pull_progress_timeout: "5m0s".into(),
            image_pull_with_sync_fs: false,
            disable_snapshot_annotations: true,
            discard_unpacked_layers: false,
            stats_collect_period: 10,
            use_local_image_pull: false,
        }
    }
}

/// Registries.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Registry {
    /// Directories of `hosts.toml` files, separated by `:`.
    pub config_path: String,
    /// Extra request headers.
    pub headers: BTreeMap<String, Vec<String>>,
}

impl Default for Registry {
    fn default() -> Self {
        Self { config_path: "/etc/containerd/certs.d:/etc/docker/certs.d".into(), headers: BTreeMap::new() }
    }
}

/// `io.containerd.cri.v1.runtime`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Runtime {
    /// Bytes of a log line before it is split.
    pub max_container_log_line_size: i64,
    /// Never ask for a lower oom_score_adj than the daemon's own.
    pub restrict_oom_score_adj: bool,
    /// AppArmor off.
    pub disable_apparmor: bool,
    /// SELinux on.
    pub enable_selinux: bool,
    /// Profile for containers that set none: empty = unconfined, `runtime/default`, or `localhost/<path>`.
    pub unset_seccomp_profile: String,
    /// A missing hugetlb controller is no error.
    pub tolerate_missing_hugetlb_controller: bool,
    /// Hugepage limits are left out.
    pub disable_hugetlb_controller: bool,
    /// Pods may bind ports below 1024 without a capability.
    pub enable_unprivileged_ports: bool,
    /// Pods may ping without a capability.
    pub enable_unprivileged_icmp: bool,
    /// Network namespaces below the state directory instead of /var/run/netns.
    pub netns_mounts_under_state_dir: bool,
    /// No volumes for an image's VOLUMEs.
    pub ignore_image_defined_volumes: bool,
    /// How long to drain the streams of an ExecSync after its end (Go duration).
    pub drain_exec_sync_io_timeout: String,
    /// CDI on.
    pub enable_cdi: bool,
    /// CDI specifications.
    pub cdi_spec_dirs: Vec<String>,
    /// Runtimes.
    pub containerd: Containerd,
    /// CNI.
    pub cni: Cni,
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            max_container_log_line_size: 16384,
            restrict_oom_score_adj: false,
            disable_apparmor: false,
            enable_selinux: false,
            unset_seccomp_profile: String::new(),
            tolerate_missing_hugetlb_controller: true,
            disable_hugetlb_controller: true,
            enable_unprivileged_ports: true,
            enable_unprivileged_icmp: true,
            netns_mounts_under_state_dir: false,
            ignore_image_defined_volumes: false,
            drain_exec_sync_io_timeout: "0s".into(),
            enable_cdi: true,
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            containerd: Containerd::default(),
            cni: Cni::default(),
        }
    }
}

/// Runtimes by handler.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Containerd {
    /// Handler of pods that name none.
    pub default_runtime_name: String,
    /// Runtimes.
    pub runtimes: BTreeMap<String, Handler>,
}

impl Default for Containerd {
    fn default() -> Self {
        Self { default_runtime_name: "runc".into(), runtimes: BTreeMap::from([("runc".into(), Handler::default())]) }
    }
}

/// One runtime handler.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Handler {
    /// Shim by type; containerd's `io.containerd.runc.v2` is served by Troupe's own shim.
    pub runtime_type: String,
    /// Shim by path.
    pub runtime_path: String,
    /// Pod annotations handed to the OCI spec.
    pub pod_annotations: Vec<String>,
    /// Container annotations handed to the OCI spec.
    pub container_annotations: Vec<String>,
    /// Privileged containers get no host devices.
    pub privileged_without_host_devices: bool,
    /// OCI spec to start from, empty = built in.
    pub base_runtime_spec: String,
    /// Snapshotter, empty = default.
    pub snapshotter: String,
    /// `podsandbox` or `shim`: Troupe's pods have no pause process either way.
    pub sandboxer: String,
    /// Options of the shim.
    pub options: RuncOptions,
}

impl Default for Handler {
    fn default() -> Self {
        Self {
            runtime_type: "io.containerd.runc.v2".into(),
            runtime_path: String::new(),
            pod_annotations: vec![],
            container_annotations: vec![],
            privileged_without_host_devices: false,
            base_runtime_spec: String::new(),
            snapshotter: String::new(),
            sandboxer: "podsandbox".into(),
            options: RuncOptions::default(),
        }
    }
}

/// Options of the runc shim.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RuncOptions {
    /// External runc-compatible binary; empty = the shim's embedded engine.
    pub binary_name: String,
    /// State directory of the runtime.
    pub root: String,
    /// cgroups through systemd.
    pub systemd_cgroup: bool,
}

/// CNI.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Cni {
    /// Plugins.
    pub bin_dirs: Vec<String>,
    /// Old name of `bin_dirs`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub bin_dir: String,
    /// Configurations.
    pub conf_dir: String,
    /// How many of them, 0 = all.
    pub max_conf_num: usize,
    /// Networks one after another.
    pub setup_serially: bool,
    /// Template of a configuration, empty = none.
    pub conf_template: String,
    /// Which address is the pod's: `ipv4`, `ipv6`, `cni`; empty = ipv4.
    pub ip_pref: String,
    /// Loopback without the plugin: Troupe always does it itself.
    pub use_internal_loopback: bool,
}

impl Default for Cni {
    fn default() -> Self {
        Self {
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            bin_dir: String::new(),
            conf_dir: "/etc/cni/net.d".into(),
            max_conf_num: 1,
            setup_serially: false,
            conf_template: String::new(),
            ip_pref: String::new(),
            use_internal_loopback: true,
        }
    }
}

/// `io.containerd.grpc.v1.cri`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct CriServer {
    /// No streaming over TCP beside the kubelet's.
    pub disable_tcp_service: bool,
    /// Address of the streaming server.
    pub stream_server_address: String,
    /// Port, `0` = any.
    pub stream_server_port: String,
    /// Idle time-out (Go duration).
    pub stream_idle_timeout: String,
    /// TLS.
    pub enable_tls_streaming: bool,
}

impl Default for CriServer {
    fn default() -> Self {
        Self {
            disable_tcp_service: true,
            stream_server_address: "127.0.0.1".into(),
            stream_server_port: "0".into(),
            stream_idle_timeout: "4h0m0s".into(),
            enable_tls_streaming: false,
        }
    }
}

/// `io.containerd.shim.v1.manager`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Shim {
    /// Environment of shims.
    pub env: Vec<String>,
    /// Directory of their sockets; empty = `<state>/s`.
    pub socket_dir: String,
}

/// Troupe's kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Kernel {
    /// Shared actor threads.
    pub threads: usize,
    /// Spans kept by the flight recorder.
    pub recorder_spans: usize,
    /// Milliseconds between looks of the watchdog.
    pub watchdog_period_ms: u64,
    /// Restarts of one actor within ten seconds before it is put down; 0 = the manifest's. For chaos labs that kill faster than that.
    pub max_restarts: u32,
    /// Control socket of the `troupe` command; empty = `<state>/control.sock`.
    pub control_address: String,
}

impl Default for Kernel {
    fn default() -> Self {
        Self { threads: 2, recorder_spans: 16384, watchdog_period_ms: 1000, max_restarts: 0, control_address: String::new() }
    }
}

/// Fault injection.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Chaos {
    /// Rules are refused unless this is set.
    pub enabled: bool,
    /// Seed of probabilities, 0 = random (logged).
    pub seed: u64,
}

impl Config {
    /// Refuses what cannot work, naming the key.
    pub fn validate(&self) -> anyhow::Result<()> {
        let containerd = &self.plugins.runtime.containerd;
        if !containerd.runtimes.contains_key(&containerd.default_runtime_name) {
            bail!("containerd.default_runtime_name: no runtime {:?} is configured", containerd.default_runtime_name);
        }
        duration("image_pull_progress_timeout", &self.plugins.images.image_pull_progress_timeout)?;
        duration("drain_exec_sync_io_timeout", &self.plugins.runtime.drain_exec_sync_io_timeout)?;
        duration("stream_idle_timeout", &self.plugins.cri.stream_idle_timeout)?;
        for (name, value) in &self.timeouts {
            duration(name, value)?;
        }
        for dir in [&self.root, &self.state] {
            if !dir.starts_with('/') {
                bail!("root and state must be absolute paths, got {dir:?}");
            }
        }
        Ok(())
    }

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

/// Reads a Go duration such as `5m0s`, `300ms`, `1.5h`. The error names `key`.
pub fn duration(key: &str, text: &str) -> anyhow::Result<Duration> {
    let bad = || anyhow::anyhow!("{key}: {text:?} is not a duration such as 5m0s");
    if text.is_empty() || text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut total) = (text, 0.0);
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let value: f64 = rest[..number].parse().map_err(|_| bad())?;
        rest = &rest[number..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += value
            * match &rest[..unit] {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(bad()),
            };
        rest = &rest[unit..];
    }
    Ok(Duration::from_secs_f64(total))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn go_durations() {
        for (text, ms) in [("5m0s", 300_000), ("300ms", 300), ("1.5h", 5_400_000), ("0s", 0), ("", 0), ("1m30s", 90_000)] {
            assert_eq!(duration("k", text).unwrap().as_millis(), ms, "{text}");
        }
        for text in ["5", "x", "5 m", "-1s", "5y"] {
            assert!(duration("k", text).unwrap_err().to_string().starts_with("k:"), "{text}");
        }
    }
}

//! Runtime handlers.
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Runtimes by handler.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Containerd {
    /// Handler of pods that name none.
    pub default_runtime_name: String,
    /// A class of block input and output that a pod asks for is passed over while the feature is off.
    pub ignore_blockio_not_enabled_errors: bool,
    /// The same for RDT.
    pub ignore_rdt_not_enabled_errors: bool,
    /// Runtimes. `runc` is there without being named, as in containerd, whose files may only add others.
    #[serde(deserialize_with = "with_runc")]
    pub runtimes: BTreeMap<String, Handler>,
}

impl Default for Containerd {
    fn default() -> Self {
        Self {
            default_runtime_name: "runc".into(),
            ignore_blockio_not_enabled_errors: false,
            ignore_rdt_not_enabled_errors: false,
            runtimes: BTreeMap::from([("runc".into(), Handler::default())]),
        }
    }
}

fn with_runc<'de, D: serde::Deserializer<'de>>(given: D) -> Result<BTreeMap<String, Handler>, D::Error> {
    let mut all = BTreeMap::<String, Handler>::deserialize(given)?;
    all.entry("runc".into()).or_default();
    Ok(all)
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
    /// They may still use all devices that they make.
    pub privileged_without_host_devices_all_devices_allowed: bool,
    /// Containers may write to their cgroup (version 2 only).
    pub cgroup_writable: bool,
    /// OCI spec to start from, empty = built in.
    pub base_runtime_spec: String,
    /// CNI configurations of this handler's pods, empty = everybody's.
    pub cni_conf_dir: String,
    /// How many of them, 0 = all.
    pub cni_max_conf_num: usize,
    /// Snapshotter, empty = default.
    pub snapshotter: String,
    /// `podsandbox` or `shim`: Troupe's pods have no pause process either way.
    pub sandboxer: String,
    /// `fifo` or `streaming`; empty = fifo. Troupe's own shim writes logs itself either way.
    pub io_type: String,
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
            privileged_without_host_devices_all_devices_allowed: false,
            cgroup_writable: false,
            base_runtime_spec: String::new(),
            cni_conf_dir: String::new(),
            cni_max_conf_num: 0,
            snapshotter: String::new(),
            sandboxer: "podsandbox".into(),
            io_type: String::new(),
            options: RuncOptions::default(),
        }
    }
}

/// Options of the shim: runc's by name, everything else as it is written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct RuncOptions {
    /// External runc-compatible binary; empty = the shim's embedded engine.
    pub binary_name: String,
    /// CRIU.
    pub criu_image_path: String,
    /// Working directory of CRIU.
    pub criu_work_path: String,
    /// Group of the streams.
    pub io_gid: u32,
    /// Owner of the streams.
    pub io_uid: u32,
    /// No session keyring of its own for each container.
    pub no_new_keyring: bool,
    /// State directory of the runtime.
    pub root: String,
    /// Cgroup of the shim.
    pub shim_cgroup: String,
    /// cgroups through systemd.
    pub systemd_cgroup: bool,
    /// Options of other runtimes.
    #[serde(flatten)]
    pub other: toml::Table,
}

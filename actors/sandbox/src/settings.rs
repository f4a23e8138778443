//! What the configuration says about pods and containers.
use crate::spec::apparmor;
use crate::spec::classes::{BlockIo, Class, Rdt};
use crate::spec::resources::Controllers;
use messages::task;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Settings of the configuration.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Handler of pods that name none.
    pub default_handler: String,
    /// Handlers by name.
    pub handlers: BTreeMap<String, Handler>,
    /// Never ask for a lower oom_score_adj than the daemon's.
    pub restrict_oom_score_adj: bool,
    /// Seccomp profile of containers that name none.
    pub unset_seccomp: String,
    /// Masked and read-only paths stay those of the base.
    pub disable_proc_mount: bool,
    /// No AppArmor profiles.
    pub disable_apparmor: bool,
    /// Where the host shows AppArmor.
    pub apparmor: apparmor::Host,
    /// SELinux labels.
    pub selinux: bool,
    /// Categories of their levels.
    pub selinux_range: u32,
    /// Devices belong to the container's user.
    pub device_ownership: bool,
    /// What cgroups can do.
    pub controllers: Controllers,
    /// CDI.
    pub cdi: bool,
    /// Directories of its descriptions.
    pub cdi_dirs: Vec<String>,
    /// Classes of block input and output.
    pub blockio: Class<BlockIo>,
    /// Classes of RDT.
    pub rdt: Class<Rdt>,
    /// What in the configuration will not be understood for ever: text by id.
    pub deprecations: BTreeMap<String, String>,
    /// Checkpoints.
    pub criu: bool,
    /// Pods may bind low ports.
    pub unprivileged_ports: bool,
    /// Pods may ping.
    pub unprivileged_icmp: bool,
    /// Bytes of a log line.
    pub max_log_line: i64,
    /// No volumes for an image's VOLUMEs.
    pub ignore_image_volumes: bool,
    /// Snapshotters of handlers that have one of their own.
    pub snapshotters: BTreeMap<String, String>,
    /// Snapshotter of the others.
    pub snapshotter: String,
    /// The configuration as verbose Status shows it, JSON.
    pub info: String,
}

/// A runtime handler.
#[derive(Clone, Debug, Default)]
pub struct Handler {
    /// How its pods are run.
    pub runtime: task::Runtime,
    /// `runtime_type` as configured.
    pub kind: String,
    /// Patterns of pod annotations that go to the specification.
    pub pod_annotations: Vec<String>,
    /// Patterns of container annotations that go there.
    pub container_annotations: Vec<String>,
    /// Privileged containers get no devices of the host.
    pub privileged_without_host_devices: bool,
    /// They may use what they make all the same.
    pub all_devices_allowed: bool,
    /// Containers may write to their cgroup.
    pub cgroup_writable: bool,
    /// It can make mounts read-only recursively.
    pub recursive_read_only: bool,
    /// Specification to start from, instead of the built-in one.
    pub base_spec: Option<Arc<Value>>,
}

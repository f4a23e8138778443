//! Pods and containers: `io.containerd.cri.v1.runtime` without the handlers and CNI.
use super::{Cni, Containerd};
use serde::{Deserialize, Serialize};

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
    /// How many categories there are for containers' levels.
    pub selinux_category_range: u32,
    /// Masked and read-only paths stay those of the base specification, whatever the client sends.
    pub disable_proc_mount: bool,
    /// Profile for containers that set none: empty = unconfined, `runtime/default`, or `localhost/<path>`.
    pub unset_seccomp_profile: String,
    /// A missing hugetlb controller is no error.
    pub tolerate_missing_hugetlb_controller: bool,
    /// Hugepage limits are left out.
    pub disable_hugetlb_controller: bool,
    /// A container's devices belong to its user.
    pub device_ownership_from_security_context: bool,
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
    /// Deprecations that the condition `ContainerdHasNoDeprecationWarnings` passes over.
    pub ignore_deprecation_warnings: Vec<String>,
    /// Time between samples of statistics; empty = one second (Go duration).
    pub stats_collect_period: String,
    /// How long samples are kept; empty = two minutes (Go duration).
    pub stats_retention_period: String,
    /// Checkpoints on.
    pub enable_criu: bool,
    /// CreateContainer restores checkpoints.
    pub enable_experimental_restore_via_create: bool,
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
            selinux_category_range: 1024,
            disable_proc_mount: false,
            unset_seccomp_profile: String::new(),
            tolerate_missing_hugetlb_controller: true,
            disable_hugetlb_controller: true,
            device_ownership_from_security_context: false,
            enable_unprivileged_ports: true,
            enable_unprivileged_icmp: true,
            netns_mounts_under_state_dir: false,
            ignore_image_defined_volumes: false,
            drain_exec_sync_io_timeout: "0s".into(),
            enable_cdi: true,
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            ignore_deprecation_warnings: vec![],
            stats_collect_period: String::new(),
            stats_retention_period: String::new(),
            enable_criu: true,
            enable_experimental_restore_via_create: false,
            containerd: Containerd::default(),
            cni: Cni::default(),
        }
    }
}

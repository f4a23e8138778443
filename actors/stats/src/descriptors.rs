//! The table of cAdvisor's metrics that CRI's clients ask for: name, kind, help, labels, and how the value is had. Descriptors and metrics both come
//! from it, so they cannot differ. CRI carries whole numbers only: seconds are rounded down.
use crate::cgroup::Figures;
use messages::sandbox::Container;
use messages::snapshot::Usage;
use proto::cri::{MetricDescriptor, MetricType};

/// What a container's metrics are made of.
pub(crate) struct Subject<'a> {
    pub container: &'a Container,
    pub figures: Option<&'a Figures>,
    pub disk: Usage,
}

/// Values of the labels beyond the base, and the number.
pub(crate) type Values = Vec<(Vec<String>, u64)>;

/// A row.
pub(crate) struct Row {
    pub name: &'static str,
    pub kind: MetricType,
    help: &'static str,
    pub labels: &'static [&'static str],
    pub values: fn(&Subject<'_>) -> Values,
}

/// Labels of every metric, in this order.
pub(crate) const BASE: [&str; 5] = ["pod", "namespace", "container", "id", "image"];
/// Metrics of a pod's network: name, help, and where the number is among the counters (received first).
pub(crate) const NETWORK: [(&str, &str, bool, usize); 8] = [
    ("container_network_receive_bytes_total", "Cumulative count of bytes received", true, 0),
    ("container_network_receive_packets_total", "Cumulative count of packets received", true, 1),
    ("container_network_receive_errors_total", "Cumulative count of errors encountered while receiving", true, 2),
    ("container_network_receive_packets_dropped_total", "Cumulative count of packets dropped while receiving", true, 3),
    ("container_network_transmit_bytes_total", "Cumulative count of bytes transmitted", false, 0),
    ("container_network_transmit_packets_total", "Cumulative count of packets transmitted", false, 1),
    ("container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting", false, 2),
    ("container_network_transmit_packets_dropped_total", "Cumulative count of packets dropped while transmitting", false, 3),
];

fn one(s: &Subject<'_>, value: fn(&Figures) -> u64) -> Values {
    s.figures.map(|f| (vec![], value(f))).into_iter().collect()
}

fn disks(s: &Subject<'_>, value: fn(&crate::cgroup::Disk) -> u64) -> Values {
    s.figures.map(|f| f.disks.iter().map(|d| (vec![d.device.clone()], value(d))).collect()).unwrap_or_default()
}

/// Counts something below /proc of the container's processes.
fn count(s: &Subject<'_>, of: fn(u32) -> u64) -> Values {
    s.figures.map(|f| (vec![], f.processes.iter().map(|p| of(*p)).sum())).into_iter().collect()
}

fn descriptors_of(pid: u32, socket: bool) -> u64 {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    all.filter(|e| !socket || std::fs::read_link(e.path()).is_ok_and(|l| l.to_string_lossy().starts_with("socket:"))).count() as u64
}

fn limits(s: &Subject<'_>) -> Values {
    let Some(pid) = s.figures.and_then(|f| f.processes.first()) else { return vec![] };
    let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let soft = text.lines().find_map(|l| l.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok());
    soft.map(|n| (vec!["max_open_files".to_owned()], n)).into_iter().collect()
}

const SECOND: u64 = 1_000_000_000;
use MetricType::{Counter, Gauge};

macro_rules! rows { ($($name:literal $kind:ident $help:literal [$($label:literal)*] $values:expr;)*) => {
    &[$(Row { name: $name, kind: $kind, help: $help, labels: &[$($label),*], values: $values }),*]
} }

/// The table of containers' metrics.
pub(crate) const CONTAINER: &[Row] = rows! {
    "container_cpu_usage_seconds_total" Counter "Cumulative cpu time consumed" [] |s| one(s, |f| f.cpu.usage_ns / SECOND);
    "container_cpu_user_seconds_total" Counter "Cumulative user cpu time consumed" [] |s| one(s, |f| f.cpu.user_ns / SECOND);
    "container_cpu_system_seconds_total" Counter "Cumulative system cpu time consumed" [] |s| one(s, |f| f.cpu.system_ns / SECOND);
    "container_cpu_cfs_periods_total" Counter "Number of elapsed enforcement period intervals" [] |s| one(s, |f| f.cpu.periods);
    "container_cpu_cfs_throttled_periods_total" Counter "Number of throttled period intervals" [] |s| one(s, |f| f.cpu.throttled_periods);
    "container_cpu_cfs_throttled_seconds_total" Counter "Total time duration the container has been throttled" []
        |s| one(s, |f| f.cpu.throttled_ns / SECOND);
    "container_memory_cache" Gauge "Number of bytes of page cache memory" [] |s| one(s, |f| f.memory.cache);
    "container_memory_rss" Gauge "Size of RSS" [] |s| one(s, |f| f.memory.rss);
    "container_memory_kernel_usage" Gauge "Size of kernel memory allocated" [] |s| one(s, |f| f.memory.kernel);
    "container_memory_mapped_file" Gauge "Size of memory mapped files" [] |s| one(s, |f| f.memory.mapped);
    "container_memory_swap" Gauge "Container swap usage" [] |s| one(s, |f| f.memory.swap);
    "container_memory_failcnt" Gauge "Number of memory usage hits limits" [] |s| one(s, |f| f.memory.failures);
    "container_memory_usage_bytes" Gauge "Current memory usage, including all memory regardless of when it was accessed" []
        |s| one(s, |f| f.memory.usage);
    "container_memory_max_usage_bytes" Gauge "Maximum memory usage recorded" [] |s| one(s, |f| f.memory.max_usage);
    "container_memory_working_set_bytes" Gauge "Current working set" [] |s| one(s, |f| f.memory.working_set());
    "container_memory_total_active_file_bytes" Gauge "Current total active file" [] |s| one(s, |f| f.memory.active_file);
    "container_memory_total_inactive_file_bytes" Gauge "Current total inactive file" [] |s| one(s, |f| f.memory.inactive_file);
    "container_memory_failures_total" Counter "Cumulative count of memory allocation failures" ["failure_type" "scope"] |s| {
        let row = |kind: &str, n| (vec![kind.to_owned(), "container".to_owned()], n);
        s.figures.map(|f| vec![row("pgfault", f.memory.page_faults), row("pgmajfault", f.memory.major_page_faults)]).unwrap_or_default()
    };
    "container_oom_events_total" Counter "Count of out of memory events observed for the container" [] |s| one(s, |f| f.memory.oom_kills);
    "container_fs_usage_bytes" Gauge "Number of bytes that are consumed by the container's writable layer" ["device"]
        |s| vec![(vec!["/".into()], s.disk.bytes)];
    "container_fs_inodes_total" Gauge "Number of inodes of the container's writable layer" ["device"] |s| vec![(vec!["/".into()], s.disk.inodes)];
    "container_fs_reads_bytes_total" Counter "Cumulative count of bytes read" ["device"] |s| disks(s, |d| d.read_bytes);
    "container_fs_writes_bytes_total" Counter "Cumulative count of bytes written" ["device"] |s| disks(s, |d| d.write_bytes);
    "container_fs_reads_total" Counter "Cumulative count of reads completed" ["device"] |s| disks(s, |d| d.reads);
    "container_fs_writes_total" Counter "Cumulative count of writes completed" ["device"] |s| disks(s, |d| d.writes);
    "container_processes" Gauge "Number of processes running inside the container" []
        |s| one(s, |f| f.processes.len() as u64);
    "container_threads" Gauge "Number of threads running inside the container" [] |s| one(s, |f| f.threads);
    "container_threads_max" Gauge "Maximum number of threads allowed inside the container, 0 if unlimited" [] |s| one(s, |f| f.pids_limit);
    "container_file_descriptors" Gauge "Number of open file descriptors for the container" [] |s| count(s, |p| descriptors_of(p, false));
    "container_sockets" Gauge "Number of open sockets for the container" [] |s| count(s, |p| descriptors_of(p, true));
    "container_ulimits_soft" Gauge "Soft ulimit values for the container root process" ["ulimit"] limits;
    "container_last_seen" Gauge "Last time a container was seen, Unix seconds" [] |s| one(s, |f| f.at_ns as u64 / SECOND);
    "container_start_time_seconds" Gauge "Start time of the container, Unix seconds" []
        |s| vec![(vec![], s.container.status.started_at.max(0) as u64 / SECOND)];
    "container_spec_cpu_period" Gauge "CPU period of the container" [] |s| one(s, |f| f.cpu.period_us);
    "container_spec_cpu_shares" Gauge "CPU share of the container" [] |s| one(s, |f| f.cpu.shares);
    "container_spec_memory_limit_bytes" Gauge "Memory limit for the container, 0 if unlimited" [] |s| one(s, |f| f.memory.limit.unwrap_or(0));
    "container_spec_memory_reservation_limit_bytes" Gauge "Memory reservation limit for the container" [] |s| one(s, |f| f.memory.reservation);
    "container_spec_memory_swap_limit_bytes" Gauge "Memory swap limit for the container, 0 if unlimited" []
        |s| one(s, |f| f.memory.swap_limit.unwrap_or(0));
};

/// ListMetricDescriptors' answer.
pub fn descriptors() -> Vec<MetricDescriptor> {
    let row = |name: &str, help: &str, more: &[&str]| MetricDescriptor {
        name: name.into(),
        help: help.into(),
        label_keys: BASE.iter().chain(more).map(|l| (*l).to_owned()).collect(),
    };
    let network = NETWORK.iter().map(|(name, help, ..)| row(name, help, &["interface"]));
    CONTAINER.iter().map(|r| row(r.name, r.help, r.labels)).chain(network).collect()
}

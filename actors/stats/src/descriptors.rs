//! The table of cAdvisor's metrics that CRI's clients ask for: name, kind, help, labels, and how the value is had. Descriptors and metrics both come
//! from it, so they cannot differ. CRI carries whole numbers only, so seconds of CPU time are whole seconds: that is the message's limit, not ours.
use crate::cgroup::{Cpu, Disk, Figures, Memory};
use crate::metrics::FileSystem;
use messages::sandbox::Container;
use messages::snapshot::Usage;
use proto::cri::{MetricDescriptor, MetricType};

/// What a container's metrics are made of.
pub(crate) struct Subject<'a> {
    pub container: &'a Container,
    pub figures: Option<&'a Figures>,
    pub disk: Usage,
    pub system: Option<FileSystem>,
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

fn cpu(s: &Subject<'_>, value: fn(&Cpu) -> u64) -> Values {
    s.figures.and_then(|f| f.cpu.as_ref()).map(|c| (vec![], value(c))).into_iter().collect()
}

/// What the kernel does not tell is no metric, instead of a zero.
fn memory(s: &Subject<'_>, value: fn(&Memory) -> Option<u64>) -> Values {
    s.figures.and_then(|f| f.memory.as_ref()).and_then(value).map(|n| (vec![], n)).into_iter().collect()
}

/// Kind of pressure (CPU, memory, IO) and its degree (some, full).
fn pressure(s: &Subject<'_>, kind: usize, degree: usize) -> Values {
    s.figures.and_then(|f| f.pressure[kind]).map(|p| (vec![], p[degree].0 / SECOND)).into_iter().collect()
}

fn disks(s: &Subject<'_>, value: fn(&Disk) -> u64) -> Values {
    s.figures.map(|f| f.disks.iter().map(|d| (vec![d.device.clone()], value(d))).collect()).unwrap_or_default()
}

fn device_usage(s: &Subject<'_>) -> Values {
    let of = |d: &Disk| {
        let (major, minor) = d.device.split_once(':').unwrap_or((&d.device, ""));
        let link = std::fs::read_link(format!("/sys/dev/block/{}", d.device)).ok();
        let name = link.as_deref().and_then(|l| l.file_name()).map(|n| format!("/dev/{}", n.to_string_lossy())).unwrap_or_default();
        let row = |(kind, n): &(String, u64)| (vec![name.clone(), major.to_owned(), minor.to_owned(), kind.clone()], *n);
        d.bytes.iter().map(row).collect::<Vec<_>>()
    };
    s.figures.map(|f| f.disks.iter().flat_map(of).collect()).unwrap_or_default()
}

fn system(s: &Subject<'_>, value: fn(&FileSystem) -> u64) -> Values {
    s.system.as_ref().map(|f| (vec!["/".to_owned()], value(f))).into_iter().collect()
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
    "container_cpu_usage_seconds_total" Counter "Cumulative cpu time consumed" [] |s| cpu(s, |c| c.usage_ns / SECOND);
    "container_cpu_user_seconds_total" Counter "Cumulative user cpu time consumed" [] |s| cpu(s, |c| c.user_ns / SECOND);
    "container_cpu_system_seconds_total" Counter "Cumulative system cpu time consumed" [] |s| cpu(s, |c| c.system_ns / SECOND);
    "container_cpu_cfs_periods_total" Counter "Number of elapsed enforcement period intervals" [] |s| cpu(s, |c| c.periods);
    "container_cpu_cfs_throttled_periods_total" Counter "Number of throttled period intervals" [] |s| cpu(s, |c| c.throttled_periods);
    "container_cpu_cfs_throttled_seconds_total" Counter "Total time duration the container has been throttled" []
        |s| cpu(s, |c| c.throttled_ns / SECOND);
    "container_memory_cache" Gauge "Number of bytes of page cache memory" [] |s| memory(s, |m| Some(m.cache));
    "container_memory_rss" Gauge "Size of RSS" [] |s| memory(s, |m| Some(m.rss));
    "container_memory_kernel_usage" Gauge "Size of kernel memory allocated" [] |s| memory(s, |m| Some(m.kernel));
    "container_memory_mapped_file" Gauge "Size of memory mapped files" [] |s| memory(s, |m| Some(m.mapped));
    "container_memory_swap" Gauge "Container swap usage" [] |s| memory(s, |m| m.swap);
    "container_memory_failcnt" Gauge "Number of memory usage hits limits" [] |s| memory(s, |m| Some(m.failures));
    "container_memory_usage_bytes" Gauge "Current memory usage, including all memory regardless of when it was accessed" []
        |s| memory(s, |m| Some(m.usage));
    "container_memory_max_usage_bytes" Gauge "Maximum memory usage recorded" [] |s| memory(s, |m| m.max_usage);
    "container_memory_working_set_bytes" Gauge "Current working set" [] |s| memory(s, |m| Some(m.working_set()));
    "container_memory_total_active_file_bytes" Gauge "Current total active file" [] |s| memory(s, |m| Some(m.active_file));
    "container_memory_total_inactive_file_bytes" Gauge "Current total inactive file" [] |s| memory(s, |m| Some(m.inactive_file));
    "container_memory_failures_total" Counter "Cumulative count of memory allocation failures" ["failure_type" "scope"] |s| {
        let row = |kind: &str, n| (vec![kind.to_owned(), "container".to_owned()], n);
        let memory = s.figures.and_then(|f| f.memory.as_ref());
        memory.map(|m| vec![row("pgfault", m.page_faults), row("pgmajfault", m.major_page_faults)]).unwrap_or_default()
    };
    "container_oom_events_total" Counter "Count of out of memory events observed for the container" [] |s| memory(s, |m| Some(m.oom_kills));
    "container_pressure_cpu_waiting_seconds_total" Counter "Time in which some tasks waited for CPU" [] |s| pressure(s, 0, 0);
    "container_pressure_cpu_stalled_seconds_total" Counter "Time in which no task could go on for want of CPU" [] |s| pressure(s, 0, 1);
    "container_pressure_memory_waiting_seconds_total" Counter "Time in which some tasks waited for memory" [] |s| pressure(s, 1, 0);
    "container_pressure_memory_stalled_seconds_total" Counter "Time in which no task could go on for want of memory" [] |s| pressure(s, 1, 1);
    "container_pressure_io_waiting_seconds_total" Counter "Time in which some tasks waited for IO" [] |s| pressure(s, 2, 0);
    "container_pressure_io_stalled_seconds_total" Counter "Time in which no task could go on for want of IO" [] |s| pressure(s, 2, 1);
    "container_fs_usage_bytes" Gauge "Number of bytes that are consumed by the container's writable layer" ["device"]
        |s| vec![(vec!["/".into()], s.disk.bytes)];
    "container_fs_limit_bytes" Gauge "Number of bytes of the file system that holds the container's writable layer" ["device"] |s| system(s, |f| f.bytes);
    "container_fs_inodes_total" Gauge "Number of inodes of that file system" ["device"] |s| system(s, |f| f.inodes);
    "container_fs_inodes_free" Gauge "Number of free inodes of that file system" ["device"] |s| system(s, |f| f.free_inodes);
    "container_blkio_device_usage_total" Counter "Bytes moved, by device and operation" ["device" "major" "minor" "operation"] device_usage;
    "container_fs_reads_bytes_total" Counter "Cumulative count of bytes read" ["device"] |s| disks(s, |d| d.read_bytes);
    "container_fs_writes_bytes_total" Counter "Cumulative count of bytes written" ["device"] |s| disks(s, |d| d.write_bytes);
    "container_fs_reads_total" Counter "Cumulative count of reads completed" ["device"] |s| disks(s, |d| d.reads);
    "container_fs_writes_total" Counter "Cumulative count of writes completed" ["device"] |s| disks(s, |d| d.writes);
    "container_processes" Gauge "Number of processes running inside the container" []
        |s| one(s, |f| f.processes.len() as u64);
    "container_threads" Gauge "Number of threads running inside the container" [] |s| one(s, |f| f.threads);
    "container_threads_max" Gauge "Maximum number of threads allowed inside the container, 0 if unlimited" [] |s| one(s, |f| f.tasks_limit);
    "container_file_descriptors" Gauge "Number of open file descriptors for the container" [] |s| count(s, |p| descriptors_of(p, false));
    "container_sockets" Gauge "Number of open sockets for the container" [] |s| count(s, |p| descriptors_of(p, true));
    "container_ulimits_soft" Gauge "Soft ulimit values for the container root process" ["ulimit"] limits;
    "container_last_seen" Gauge "Last time a container was seen, Unix seconds" [] |s| one(s, |f| f.at_ns as u64 / SECOND);
    "container_start_time_seconds" Gauge "Start time of the container, Unix seconds" []
        |s| vec![(vec![], s.container.status.started_at.max(0) as u64 / SECOND)];
    "container_spec_cpu_period" Gauge "CPU period of the container" [] |s| cpu(s, |c| c.period_us);
    "container_spec_cpu_shares" Gauge "CPU share of the container" [] |s| cpu(s, |c| c.shares);
    "container_spec_memory_limit_bytes" Gauge "Memory limit for the container, 0 if unlimited" [] |s| memory(s, |m| Some(m.limit.unwrap_or(0)));
    "container_spec_memory_reservation_limit_bytes" Gauge "Memory reservation limit for the container" [] |s| memory(s, |m| Some(m.reservation));
    "container_spec_memory_swap_limit_bytes" Gauge "Memory swap limit for the container, 0 if unlimited" []
        |s| memory(s, |m| Some(m.configured_swap_limit.unwrap_or(0)));
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

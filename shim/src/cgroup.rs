//! The cgroup of a container: its processes and its figures, on version 1 and 2.
use proto::prost_types::Any;
use proto::{cgroups1, cgroups2};
use std::path::{Path, PathBuf};

/// Directory of a process' cgroup: version 2's, or version 1's for a controller.
fn directory(pid: u32, controller: &str) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let root = Path::new("/sys/fs/cgroup");
    let mut unified = None;
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, names, path) = (parts.next()?, parts.next()?, parts.next()?.trim_start_matches('/'));
        if names.split(',').any(|n| n == controller) {
            return Some(root.join(controller).join(path));
        }
        if names.is_empty() {
            unified = Some(root.join(path));
        }
    }
    unified.filter(|d| d.join("cgroup.controllers").exists())
}

/// A container's cgroups, found while its init lives, kept for after.
#[derive(Clone, Default)]
pub struct Cgroup {
    memory: Option<PathBuf>,
    cpu: Option<PathBuf>,
    pids: Option<PathBuf>,
}

fn number(dir: &Option<PathBuf>, file: &str) -> u64 {
    let text = dir.as_ref().and_then(|d| std::fs::read_to_string(d.join(file)).ok()).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn keyed(dir: &Option<PathBuf>, file: &str, key: &str) -> u64 {
    let text = dir.as_ref().and_then(|d| std::fs::read_to_string(d.join(file)).ok()).unwrap_or_default();
    let mut rows = text.lines().filter_map(|l| l.split_once(' '));
    rows.find(|(k, _)| *k == key).and_then(|(_, v)| v.trim().parse().ok()).unwrap_or(0)
}

impl Cgroup {
    /// Of a living process.
    pub fn of(pid: u32) -> Cgroup {
        Cgroup { memory: directory(pid, "memory"), cpu: directory(pid, "cpuacct"), pids: directory(pid, "pids") }
    }
    /// Its processes, those of cgroups that the container made itself included.
    pub fn processes(&self) -> Vec<u32> {
        let mut found = vec![];
        let mut open: Vec<PathBuf> = self.pids.iter().chain(&self.memory).take(1).cloned().collect();
        while let Some(dir) = open.pop() {
            let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()));
            let below = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            open.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        }
        found
    }
    /// OOM kills so far.
    pub fn oom_kills(&self) -> u64 {
        keyed(&self.memory, "memory.events", "oom_kill").max(keyed(&self.memory, "memory.oom_control", "oom_kill"))
    }
    /// The figures, as containerd packs them.
    pub fn metrics(&self) -> Any {
        if self.memory.as_ref().is_some_and(|d| d.join("memory.current").exists()) {
            let cpu = |key| keyed(&self.cpu, "cpu.stat", key);
            let cpu = cgroups2::CpuStat {
                usage_usec: cpu("usage_usec"),
                user_usec: cpu("user_usec"),
                system_usec: cpu("system_usec"),
                nr_periods: cpu("nr_periods"),
                nr_throttled: cpu("nr_throttled"),
                throttled_usec: cpu("throttled_usec"),
                ..Default::default()
            };
            let memory = cgroups2::MemoryStat {
                usage: number(&self.memory, "memory.current"),
                usage_limit: number(&self.memory, "memory.max"),
                inactive_file: keyed(&self.memory, "memory.stat", "inactive_file"),
                active_file: keyed(&self.memory, "memory.stat", "active_file"),
                anon: keyed(&self.memory, "memory.stat", "anon"),
                file: keyed(&self.memory, "memory.stat", "file"),
                pgfault: keyed(&self.memory, "memory.stat", "pgfault"),
                pgmajfault: keyed(&self.memory, "memory.stat", "pgmajfault"),
                swap_usage: number(&self.memory, "memory.swap.current"),
                swap_limit: number(&self.memory, "memory.swap.max"),
                ..Default::default()
            };
            let events = cgroups2::MemoryEvents {
                oom: keyed(&self.memory, "memory.events", "oom"),
                oom_kill: keyed(&self.memory, "memory.events", "oom_kill"),
                max: keyed(&self.memory, "memory.events", "max"),
                ..Default::default()
            };
            let pids = cgroups2::PidsStat { current: number(&self.pids, "pids.current"), limit: number(&self.pids, "pids.max") };
            return proto::any(&cgroups2::Metrics {
                cpu: Some(cpu),
                memory: Some(memory),
                pids: Some(pids),
                memory_events: Some(events),
                ..Default::default()
            });
        }
        let usage = cgroups1::CpuUsage { total: number(&self.cpu, "cpuacct.usage"), ..Default::default() };
        let entry = cgroups1::MemoryEntry {
            usage: number(&self.memory, "memory.usage_in_bytes"),
            limit: number(&self.memory, "memory.limit_in_bytes"),
            max: number(&self.memory, "memory.max_usage_in_bytes"),
            failcnt: number(&self.memory, "memory.failcnt"),
        };
        let memory = cgroups1::MemoryStat {
            usage: Some(entry),
            total_inactive_file: keyed(&self.memory, "memory.stat", "total_inactive_file"),
            total_active_file: keyed(&self.memory, "memory.stat", "total_active_file"),
            total_rss: keyed(&self.memory, "memory.stat", "total_rss"),
            total_cache: keyed(&self.memory, "memory.stat", "total_cache"),
            total_pg_fault: keyed(&self.memory, "memory.stat", "total_pgfault"),
            total_pg_maj_fault: keyed(&self.memory, "memory.stat", "total_pgmajfault"),
            ..Default::default()
        };
        let control = |key| keyed(&self.memory, "memory.oom_control", key);
        let oom = cgroups1::MemoryOomControl {
            oom_kill_disable: control("oom_kill_disable"),
            under_oom: control("under_oom"),
            oom_kill: control("oom_kill"),
        };
        let pids = cgroups1::PidsStat { current: number(&self.pids, "pids.current"), limit: number(&self.pids, "pids.max") };
        proto::any(&cgroups1::Metrics {
            cpu: Some(cgroups1::CpuStat { usage: Some(usage), throttling: None }),
            memory: Some(memory),
            pids: Some(pids),
            memory_oom_control: Some(oom),
            ..Default::default()
        })
    }
}

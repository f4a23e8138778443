//! The cgroup of a container: its processes and its figures, on version 1 and 2.
use proto::prost_types::Any;
use proto::{cgroups1, cgroups2};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

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

/// Puts a process into a cgroup (`ShimCgroup`), which is made if it is not there: in every hierarchy of version 1.
pub fn enter(path: &str, pid: u32) -> std::io::Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies: Vec<PathBuf> = if root.join("cgroup.controllers").exists() {
        vec![root.into()]
    } else {
        // Links are second names of a hierarchy; those without rules for processes are not hierarchies.
        let dirs = std::fs::read_dir(root)?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path());
        dirs.filter(|d| d.join("cgroup.procs").exists() && !d.join("cpuset.cpus").exists()).collect()
    };
    for hierarchy in hierarchies {
        let dir = hierarchy.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("cgroup.procs"), pid.to_string())?;
    }
    Ok(())
}

/// A container's cgroups, found while its init lives, kept for after.
#[derive(Clone, Default)]
pub struct Cgroup {
    memory: Option<PathBuf>,
    cpu: Option<PathBuf>,
    pids: Option<PathBuf>,
    freezer: Option<PathBuf>,
    unified: bool,
    /// OOM kills, once its init has ended.
    closed: Arc<OnceLock<u64>>,
}

/// OOM kills below a parent, on the unified hierarchy.
#[derive(Default)]
struct Family {
    /// What was there before the first child, and what children that have ended account for.
    accounted: u64,
    living: Vec<PathBuf>,
}

/// The parents of this server's containers.
static FAMILIES: Mutex<BTreeMap<PathBuf, Family>> = Mutex::new(BTreeMap::new());

fn oom_kills_in(dir: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(dir.join("memory.events")).ok()?;
    text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok())
}

impl Family {
    /// A child has ended. systemd removes a cgroup as soon as it is empty, maybe before we look. Its parent goes on counting what its children
    /// counted: what nobody else accounts for is this child's.
    fn close(&mut self, parent: &Path, dir: &Path) -> u64 {
        self.living.retain(|d| d != dir);
        let own = oom_kills_in(dir).unwrap_or_else(|| {
            let others: u64 = self.living.iter().filter_map(|d| oom_kills_in(d)).sum();
            oom_kills_in(parent).unwrap_or(0).saturating_sub(self.accounted + others)
        });
        self.accounted += own;
        own
    }
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
        let (memory, cpu, pids) = (directory(pid, "memory"), directory(pid, "cpuacct"), directory(pid, "pids"));
        let unified = memory.as_ref().is_some_and(|d| d.join("memory.current").exists());
        if let (true, Some(dir)) = (unified, &memory)
            && let Some(parent) = dir.parent()
        {
            let mut families = FAMILIES.lock().unwrap_or_else(PoisonError::into_inner);
            let first = || Family { accounted: oom_kills_in(parent).unwrap_or(0), living: vec![] };
            families.entry(parent.to_owned()).or_insert_with(first).living.push(dir.clone());
        }
        Cgroup { memory, cpu, pids, freezer: directory(pid, "freezer"), unified, closed: Arc::default() }
    }
    /// Its init has ended: what must be known later is read now, for the cgroup may vanish at any moment.
    pub fn close(&self) {
        let mut families = FAMILIES.lock().unwrap_or_else(PoisonError::into_inner);
        let family = self.memory.as_ref().filter(|_| self.unified).and_then(|dir| {
            let parent = dir.parent()?;
            Some(families.get_mut(parent)?.close(parent, dir))
        });
        let _ = self.closed.set(family.unwrap_or_else(|| self.count()));
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
    /// Lets frozen processes of version 1 go on, which otherwise do not even die; in version 2 they do.
    pub fn thaw(&self) {
        if let Some(dir) = &self.freezer {
            // Without the file there is nothing to thaw.
            let _ = std::fs::write(dir.join("freezer.state"), "THAWED");
        }
    }
    /// OOM kills so far.
    pub fn oom_kills(&self) -> u64 {
        self.closed.get().copied().unwrap_or_else(|| self.count())
    }
    fn count(&self) -> u64 {
        keyed(&self.memory, "memory.events", "oom_kill").max(keyed(&self.memory, "memory.oom_control", "oom_kill"))
    }
    /// The figures, as containerd packs them.
    pub fn metrics(&self) -> Any {
        if self.unified {
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
                oom_kill: self.oom_kills(),
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
            oom_kill: self.oom_kills(),
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_is_known_even_after_its_cgroup_has_gone() {
        let parent = tempfile::tempdir().unwrap();
        let parent = parent.path();
        let count = |dir: &Path, n: u64| {
            std::fs::create_dir_all(dir).unwrap();
            std::fs::write(dir.join("memory.events"), format!("low 0\nmax 9\noom 1\noom_kill {n}\noom_group_kill 0\n")).unwrap();
        };
        let [a, b, c] = ["a", "b", "c"].map(|n| parent.join(n));
        count(parent, 5);
        let mut family = Family { accounted: 5, living: vec![a.clone(), b.clone(), c.clone()] };
        count(&b, 1);
        count(&c, 0);
        // `a` had two and has gone, `b` lives and has one.
        count(parent, 8);
        assert_eq!(family.close(parent, &a), 2);
        // `c` had none and has gone.
        std::fs::remove_dir_all(&c).unwrap();
        assert_eq!(family.close(parent, &c), 0);
        assert_eq!(family.close(parent, &b), 1);
    }
}

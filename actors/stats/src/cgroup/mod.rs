//! A cgroup's figures, on version 1 and 2. Units: nanoseconds, bytes. What a kernel does not tell is absent, or 0 where CRI knows no absence.
//! Only the controllers that are asked for are read: on a node with hundreds of containers each file counts.
mod v1;
mod v2;

use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A limit above this is none (version 1 writes a huge number).
const UNLIMITED: u64 = 1 << 62;
/// Cgroups below a container's that are looked at: one that makes more than this is not worth the time.
const BELOW: usize = 256;

/// CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    pub usage_ns: u64,
    pub user_ns: u64,
    pub system_ns: u64,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_ns: u64,
    pub shares: u64,
    pub period_us: u64,
}

/// Memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub usage: u64,
    /// `None` = no limit.
    pub limit: Option<u64>,
    /// `None` = this kernel keeps no record (version 2 before Linux 5.19).
    pub max_usage: Option<u64>,
    pub rss: u64,
    pub cache: u64,
    pub mapped: u64,
    pub kernel: u64,
    pub active_file: u64,
    pub inactive_file: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    pub failures: u64,
    /// `None` = swap is not accounted for.
    pub swap: Option<u64>,
    /// Of swap alone.
    pub swap_limit: Option<u64>,
    /// As the controller has it: version 1 limits memory and swap together.
    pub configured_swap_limit: Option<u64>,
    pub reservation: u64,
    pub oom_kills: u64,
}

impl Memory {
    /// What cannot be reclaimed at once.
    pub fn working_set(&self) -> u64 {
        self.usage.saturating_sub(self.inactive_file)
    }
    fn plus(self, o: Memory) -> Memory {
        Memory {
            usage: self.usage + o.usage,
            rss: self.rss + o.rss,
            inactive_file: self.inactive_file + o.inactive_file,
            page_faults: self.page_faults + o.page_faults,
            major_page_faults: self.major_page_faults + o.major_page_faults,
            ..Memory::default()
        }
    }
}

/// Pressure: some, full; each with total nanoseconds and averages over 10, 60, 300 seconds.
pub type Pressure = [(u64, f64, f64, f64); 2];

/// What a device moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// `major:minor`.
    pub device: String,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub reads: u64,
    pub writes: u64,
    /// Bytes by kind of operation, as the kernel lists them: `Read`, `Write`, `Discard`, …
    pub bytes: Vec<(String, u64)>,
}

/// Figures of one moment.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub at_ns: i64,
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    /// Tasks that may exist; 0 = no limit.
    pub tasks_limit: u64,
    pub threads: u64,
    pub processes: Vec<u32>,
    /// Of CPU, memory, IO.
    pub pressure: [Option<Pressure>; 3],
    pub disks: Vec<Disk>,
}

/// What is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Want {
    pub cpu: bool,
    pub memory: bool,
    pub processes: bool,
    pub pressure: bool,
    /// Disks, threads, limits.
    pub rest: bool,
}

impl Want {
    /// For a sample.
    pub const CPU: Want = Want { cpu: true, memory: false, processes: false, pressure: false, rest: false };
    /// For a pod's own statistics.
    pub const POD: Want = Want { memory: true, pressure: true, ..Want::CPU };
    /// For a container's.
    pub const CONTAINER: Want = Want { processes: true, ..Want::POD };
    /// For metrics.
    pub const ALL: Want = Want { rest: true, ..Want::CONTAINER };
}

/// Unix nanoseconds.
pub fn now_ns() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64)
}

/// Where a host keeps what is read.
pub struct Host {
    cgroups: PathBuf,
    proc: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Host { cgroups: "/sys/fs/cgroup".into(), proc: "/proc".into() }
    }
}

impl Host {
    fn v2(&self) -> bool {
        self.cgroups.join("cgroup.controllers").exists()
    }
    /// A container's, by a process of it.
    pub fn of_container(&self, id: &str, pid: u32, want: Want) -> Option<Figures> {
        let text = std::fs::read_to_string(self.proc.join(pid.to_string()).join("cgroup")).ok()?;
        self.read(want, |controller| {
            text.lines().find_map(|l| {
                let mut parts = l.splitn(3, ':').skip(1);
                let (names, path) = (parts.next()?, parts.next()?);
                names.split(',').any(|n| n == controller).then(|| own(path, id))
            })
        })
    }
    /// A pod's, by the parent that the kubelet names: a path, or a systemd slice.
    pub fn of_parent(&self, parent: &str, want: Want) -> Option<Figures> {
        if parent.trim_matches('/').is_empty() {
            return None;
        }
        let path =
            if parent.ends_with(".slice") && !parent.trim_start_matches('/').contains('/') { slice(parent) } else { parent.to_owned() };
        self.read(want, |_| Some(path.trim_start_matches('/').to_owned()))
    }
    /// `path` answers a controller's place; `""` stands for version 2.
    fn read(&self, want: Want, path: impl Fn(&str) -> Option<String>) -> Option<Figures> {
        let v2 = self.v2();
        let at = |controller: &str| {
            let dir = if v2 { self.cgroups.join(path("")?) } else { self.cgroups.join(controller).join(path(controller)?) };
            dir.is_dir().then_some(Dir(dir))
        };
        let figures = if v2 { v2::read(&at("")?, want) } else { v1::read(&at, want)? };
        Some(Figures { at_ns: now_ns(), ..figures })
    }
}

/// A container may have made cgroups in its own, and moved its init there: the container's is the one that bears its id.
fn own(path: &str, id: &str) -> String {
    let path = path.trim_start_matches('/');
    let Some(at) = path.find(id).filter(|_| !id.is_empty()) else { return path.to_owned() };
    path[at..].find('/').map_or(path, |end| &path[..at + end]).to_owned()
}

/// `a-b.slice` lies in `a.slice`.
fn slice(name: &str) -> String {
    let stem = name.trim_start_matches('/').trim_end_matches(".slice");
    let cuts = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    cuts.map(|at| format!("{}.slice", &stem[..at])).collect::<Vec<_>>().join("/")
}

/// A cgroup's directory.
struct Dir(PathBuf);

impl Dir {
    fn path(&self) -> &Path {
        &self.0
    }
    fn text(&self, file: &str) -> String {
        std::fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }
    fn number(&self, file: &str) -> u64 {
        self.maybe(file).unwrap_or(0)
    }
    fn maybe(&self, file: &str) -> Option<u64> {
        self.text(file).trim().parse().ok()
    }
    fn limit(&self, file: &str) -> Option<u64> {
        self.maybe(file).filter(|n| *n < UNLIMITED)
    }
    fn keyed(&self, file: &str) -> Keyed {
        Keyed(self.text(file))
    }
    /// Lines of a file of this cgroup and those below it.
    fn all(&self, file: &str) -> Vec<u32> {
        let (mut found, mut open, mut seen) = (vec![], vec![self.0.clone()], 0);
        while let Some(dir) = open.pop() {
            let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
            found.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()));
            seen += 1;
            if seen >= BELOW {
                break;
            }
            let below = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            open.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        }
        found
    }
    fn pressure(&self, file: &str) -> Option<Pressure> {
        let text = self.text(file);
        let row = |kind: &str| {
            let line = text.lines().find(|l| l.starts_with(kind))?;
            let value = |key: &str| line.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('='));
            let average = |key: &str| value(key).and_then(|v| v.parse().ok()).unwrap_or(0.0);
            // The kernel counts microseconds.
            Some((value("total")?.parse::<u64>().ok()? * 1000, average("avg10"), average("avg60"), average("avg300")))
        };
        Some([row("some")?, row("full").unwrap_or_default()])
    }
}

/// A file of `key value` lines.
struct Keyed(String);

impl Keyed {
    fn maybe(&self, key: &str) -> Option<u64> {
        self.0.lines().filter_map(|l| l.split_once(' ')).find(|(k, _)| *k == key).and_then(|(_, v)| v.trim().parse().ok())
    }
    fn get(&self, key: &str) -> u64 {
        self.maybe(key).unwrap_or(0)
    }
}

/// The sum of several: a pod without a cgroup of its own uses what its containers use.
pub fn sum<'a>(all: impl Iterator<Item = &'a Figures>) -> Option<Figures> {
    all.fold(None, |sum: Option<Figures>, f| {
        let mut sum = sum.unwrap_or_default();
        sum.at_ns = f.at_ns;
        if let Some(c) = &f.cpu {
            sum.cpu.get_or_insert_default().usage_ns += c.usage_ns;
        }
        if let Some(m) = f.memory {
            sum.memory = Some(sum.memory.unwrap_or_default().plus(m));
        }
        Some(sum)
    })
}

#[cfg(test)]
mod tests;

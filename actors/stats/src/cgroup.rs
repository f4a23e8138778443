//! A cgroup's figures, on version 1 and 2. Units: nanoseconds, bytes. What a kernel does not tell is 0 or absent.
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const ROOT: &str = "/sys/fs/cgroup";
/// A limit above this is none (version 1 writes a huge number).
const UNLIMITED: u64 = 1 << 62;

/// CPU.
#[derive(Clone, Copy, Debug, Default)]
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
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    pub usage: u64,
    /// `None` = no limit.
    pub limit: Option<u64>,
    pub max_usage: u64,
    pub rss: u64,
    pub cache: u64,
    pub mapped: u64,
    pub kernel: u64,
    pub active_file: u64,
    pub inactive_file: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    pub failures: u64,
    pub swap: u64,
    pub swap_limit: Option<u64>,
    pub reservation: u64,
    pub oom_kills: u64,
}

impl Memory {
    /// What cannot be reclaimed at once.
    pub fn working_set(&self) -> u64 {
        self.usage.saturating_sub(self.inactive_file)
    }
}

/// Pressure: some, full; each with total nanoseconds and averages over 10, 60, 300 seconds.
pub type Pressure = [(u64, f64, f64, f64); 2];

/// Reads and writes of a device.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub device: String,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub at_ns: i64,
    pub cpu: Cpu,
    pub memory: Memory,
    pub pids: u64,
    pub pids_limit: u64,
    pub threads: u64,
    pub processes: Vec<u32>,
    pub pressure: [Option<Pressure>; 3],
    pub disks: Vec<Disk>,
}

/// Unix nanoseconds.
pub fn now_ns() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64)
}

fn v2() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// The cgroup of a living process.
pub fn of_process(pid: u32) -> Option<Figures> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let find = |controller: &str| {
        text.lines().find_map(|l| {
            let mut parts = l.splitn(3, ':').skip(1);
            let (names, path) = (parts.next()?, parts.next()?);
            names.split(',').any(|n| n == controller).then(|| path.trim_start_matches('/').to_owned())
        })
    };
    read(|controller| find(controller))
}

/// A pod's cgroup by the parent that the kubelet names: a path, or a systemd slice.
pub fn of_parent(parent: &str) -> Option<Figures> {
    if parent.is_empty() {
        return None;
    }
    let path = if parent.ends_with(".slice") && !parent.trim_start_matches('/').contains('/') { slice(parent) } else { parent.to_owned() };
    let path = path.trim_start_matches('/').to_owned();
    read(|_| Some(path.clone()))
}

/// `a-b.slice` lies in `a.slice`.
fn slice(name: &str) -> String {
    let stem = name.trim_start_matches('/').trim_end_matches(".slice");
    let cuts = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    cuts.map(|at| format!("{}.slice", &stem[..at])).collect::<Vec<_>>().join("/")
}

/// `path` answers a controller's place; `""` stands for version 2.
fn read(path: impl Fn(&str) -> Option<String>) -> Option<Figures> {
    let at = |controller: &str| {
        let dir = if v2() { Path::new(ROOT).join(path("")?) } else { Path::new(ROOT).join(controller).join(path(controller)?) };
        dir.is_dir().then_some(Dir(dir))
    };
    let mut f = if v2() { unified(&at("")?) } else { legacy(&at)? };
    f.at_ns = now_ns();
    Some(f)
}

struct Dir(PathBuf);

impl Dir {
    fn text(&self, file: &str) -> String {
        std::fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }
    fn number(&self, file: &str) -> u64 {
        self.text(file).trim().parse().unwrap_or(0)
    }
    fn limit(&self, file: &str) -> Option<u64> {
        self.text(file).trim().parse().ok().filter(|n| *n < UNLIMITED)
    }
    fn keyed(&self, file: &str) -> impl Fn(&str) -> u64 {
        let text = self.text(file);
        move |key| {
            text.lines().filter_map(|l| l.split_once(' ')).find(|(k, _)| *k == key).and_then(|(_, v)| v.trim().parse().ok()).unwrap_or(0)
        }
    }
    fn processes(&self) -> Vec<u32> {
        self.text("cgroup.procs").lines().filter_map(|l| l.parse().ok()).collect()
    }
    fn pressure(&self, file: &str) -> Option<Pressure> {
        let text = self.text(file);
        let row = |kind: &str| {
            let line = text.lines().find(|l| l.starts_with(kind))?;
            let value = |key: &str| line.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('='));
            let average = |key: &str| value(key).and_then(|v| v.parse().ok()).unwrap_or(0.0);
            Some((value("total")?.parse::<u64>().ok()? * 1000, average("avg10"), average("avg60"), average("avg300")))
        };
        Some([row("some")?, row("full").unwrap_or_default()])
    }
}

fn unified(dir: &Dir) -> Figures {
    let (cpu, memory, events) = (dir.keyed("cpu.stat"), dir.keyed("memory.stat"), dir.keyed("memory.events"));
    let period = dir.text("cpu.max");
    Figures {
        cpu: Cpu {
            usage_ns: cpu("usage_usec") * 1000,
            user_ns: cpu("user_usec") * 1000,
            system_ns: cpu("system_usec") * 1000,
            periods: cpu("nr_periods"),
            throttled_periods: cpu("nr_throttled"),
            throttled_ns: cpu("throttled_usec") * 1000,
            // The kernel's weight 1–10000 back to shares 2–262144.
            shares: dir.number("cpu.weight").checked_sub(1).map_or(0, |w| 2 + w * 262_142 / 9999),
            period_us: period.split_whitespace().nth(1).and_then(|p| p.parse().ok()).unwrap_or(0),
        },
        memory: Memory {
            usage: dir.number("memory.current"),
            limit: dir.limit("memory.max"),
            max_usage: dir.number("memory.peak"),
            rss: memory("anon"),
            cache: memory("file"),
            mapped: memory("file_mapped"),
            kernel: memory("kernel"),
            active_file: memory("active_file"),
            inactive_file: memory("inactive_file"),
            page_faults: memory("pgfault"),
            major_page_faults: memory("pgmajfault"),
            failures: events("max"),
            swap: dir.number("memory.swap.current"),
            swap_limit: dir.limit("memory.swap.max"),
            reservation: dir.number("memory.low"),
            oom_kills: events("oom_kill"),
        },
        pids: dir.number("pids.current"),
        pids_limit: dir.limit("pids.max").unwrap_or(0),
        threads: dir.text("cgroup.threads").lines().count() as u64,
        processes: dir.processes(),
        pressure: [dir.pressure("cpu.pressure"), dir.pressure("memory.pressure"), dir.pressure("io.pressure")],
        disks: dir.text("io.stat").lines().filter_map(disk).collect(),
        ..Default::default()
    }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`
fn disk(line: &str) -> Option<Disk> {
    let (device, rest) = line.split_once(' ')?;
    let value = |key: &str| rest.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('=')?.parse().ok()).unwrap_or(0);
    Some(Disk {
        device: device.into(),
        read_bytes: value("rbytes"),
        write_bytes: value("wbytes"),
        reads: value("rios"),
        writes: value("wios"),
    })
}

fn legacy(at: &impl Fn(&str) -> Option<Dir>) -> Option<Figures> {
    let (cpu, memory) = (at("cpuacct")?, at("memory")?);
    let scheduler = at("cpu").unwrap_or(Dir(PathBuf::new()));
    let (times, throttled, stat) = (cpu.keyed("cpuacct.stat"), scheduler.keyed("cpu.stat"), memory.keyed("memory.stat"));
    let pids = at("pids").unwrap_or(Dir(PathBuf::new()));
    let usage = memory.number("memory.usage_in_bytes");
    // The kernel counts in hundredths of a second here.
    let tick = 10_000_000;
    Some(Figures {
        cpu: Cpu {
            usage_ns: cpu.number("cpuacct.usage"),
            user_ns: times("user") * tick,
            system_ns: times("system") * tick,
            periods: throttled("nr_periods"),
            throttled_periods: throttled("nr_throttled"),
            throttled_ns: throttled("throttled_time"),
            shares: scheduler.number("cpu.shares"),
            period_us: scheduler.number("cpu.cfs_period_us"),
        },
        memory: Memory {
            usage,
            limit: memory.limit("memory.limit_in_bytes"),
            max_usage: memory.number("memory.max_usage_in_bytes"),
            rss: stat("total_rss"),
            cache: stat("total_cache"),
            mapped: stat("total_mapped_file"),
            kernel: memory.number("memory.kmem.usage_in_bytes"),
            active_file: stat("total_active_file"),
            inactive_file: stat("total_inactive_file"),
            page_faults: stat("total_pgfault"),
            major_page_faults: stat("total_pgmajfault"),
            failures: memory.number("memory.failcnt"),
            swap: memory.number("memory.memsw.usage_in_bytes").saturating_sub(usage),
            swap_limit: memory.limit("memory.memsw.limit_in_bytes"),
            reservation: memory.limit("memory.soft_limit_in_bytes").unwrap_or(0),
            oom_kills: memory.keyed("memory.oom_control")("oom_kill"),
        },
        pids: pids.number("pids.current"),
        pids_limit: pids.limit("pids.max").unwrap_or(0),
        threads: pids.text("tasks").lines().count() as u64,
        processes: pids.processes(),
        pressure: [None; 3],
        ..Default::default()
    })
}

/// The sum of several.
pub fn sum<'a>(all: impl Iterator<Item = &'a Figures>) -> Option<Figures> {
    all.fold(None, |sum: Option<Figures>, f| {
        let mut sum = sum.unwrap_or_default();
        sum.at_ns = f.at_ns;
        sum.cpu.usage_ns += f.cpu.usage_ns;
        sum.memory.usage += f.memory.usage;
        sum.memory.rss += f.memory.rss;
        sum.memory.inactive_file += f.memory.inactive_file;
        sum.memory.page_faults += f.memory.page_faults;
        sum.memory.major_page_faults += f.memory.major_page_faults;
        sum.pids += f.pids;
        Some(sum)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_lies_in_its_prefixes() {
        assert_eq!(slice("kubepods-besteffort-pod1.slice"), "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice");
        assert_eq!(slice("/kubepods.slice"), "kubepods.slice");
    }

    #[test]
    fn this_process_has_figures() {
        let f = of_process(std::process::id()).unwrap();
        assert!(f.at_ns > 0 && f.cpu.usage_ns > 0, "{f:?}");
        assert!(of_parent("/no/such/cgroup").is_none() && of_parent("").is_none());
    }

    #[test]
    fn disks_are_read_by_key() {
        let d = disk("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0").unwrap();
        assert_eq!((d.device.as_str(), d.read_bytes, d.write_bytes, d.reads, d.writes), ("8:0", 1, 2, 3, 4));
    }
}

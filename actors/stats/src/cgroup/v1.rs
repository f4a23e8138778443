//! Version 1: a directory for each controller.
use super::{Cpu, Dir, Disk, Figures, Memory, Want};
use std::collections::BTreeMap;

/// The kernel counts user and system time in hundredths of a second here.
const TICK_NS: u64 = 10_000_000;

pub(super) fn read(at: &impl Fn(&str) -> Option<Dir>, want: Want) -> Option<Figures> {
    let mut f = Figures::default();
    if want.cpu {
        f.cpu = Some(cpu(&at("cpuacct")?, at("cpu"), want.rest));
    }
    if want.memory {
        f.memory = at("memory").map(|dir| memory(&dir));
    }
    let processes = if want.processes || want.rest { at("pids").or_else(|| at("memory")) } else { None };
    if want.processes
        && let Some(dir) = &processes
    {
        f.processes = dir.all("cgroup.procs");
    }
    if want.rest {
        if let Some(dir) = &processes {
            f.threads = dir.all("tasks").len() as u64;
            f.tasks_limit = dir.limit("pids.max").unwrap_or(0);
        }
        f.disks = at("blkio").map(|dir| disks(&dir)).unwrap_or_default();
    }
    Some(f)
}

fn cpu(dir: &Dir, scheduler: Option<Dir>, settings: bool) -> Cpu {
    let times = dir.keyed("cpuacct.stat");
    let mut cpu = Cpu {
        usage_ns: dir.number("cpuacct.usage"),
        user_ns: times.get("user") * TICK_NS,
        system_ns: times.get("system") * TICK_NS,
        ..Cpu::default()
    };
    if let Some(dir) = scheduler.filter(|_| settings) {
        let stat = dir.keyed("cpu.stat");
        (cpu.periods, cpu.throttled_periods, cpu.throttled_ns) =
            (stat.get("nr_periods"), stat.get("nr_throttled"), stat.get("throttled_time"));
        (cpu.shares, cpu.period_us) = (dir.number("cpu.shares"), dir.number("cpu.cfs_period_us"));
    }
    cpu
}

fn memory(dir: &Dir) -> Memory {
    let stat = dir.keyed("memory.stat");
    let usage = dir.number("memory.usage_in_bytes");
    let (limit, both) = (dir.limit("memory.limit_in_bytes"), dir.limit("memory.memsw.limit_in_bytes"));
    Memory {
        usage,
        limit,
        max_usage: dir.maybe("memory.max_usage_in_bytes"),
        rss: stat.get("total_rss"),
        cache: stat.get("total_cache"),
        mapped: stat.get("total_mapped_file"),
        kernel: dir.number("memory.kmem.usage_in_bytes"),
        active_file: stat.get("total_active_file"),
        inactive_file: stat.get("total_inactive_file"),
        page_faults: stat.get("total_pgfault"),
        major_page_faults: stat.get("total_pgmajfault"),
        failures: dir.number("memory.failcnt"),
        swap: dir.maybe("memory.memsw.usage_in_bytes").map(|n| n.saturating_sub(usage)),
        swap_limit: both.zip(limit).map(|(both, memory)| both.saturating_sub(memory)),
        configured_swap_limit: both,
        reservation: dir.limit("memory.soft_limit_in_bytes").unwrap_or(0),
        oom_kills: dir.keyed("memory.oom_control").get("oom_kill"),
    }
}

/// Lines of `8:0 Read 4096`; the sum of all devices at the end has no device.
fn disks(dir: &Dir) -> Vec<Disk> {
    let mut all: BTreeMap<String, Disk> = BTreeMap::new();
    let rows = |file: &str| {
        let text = if dir.path().join(file).exists() { dir.text(file) } else { dir.text(&file.replace("throttle.", "")) };
        let row = |line: &str| {
            let mut words = line.split_whitespace();
            Some((words.next()?.to_owned(), words.next()?.to_owned(), words.next()?.parse::<u64>().ok()?))
        };
        text.lines().filter_map(row).collect::<Vec<_>>()
    };
    for (device, kind, n) in rows("blkio.throttle.io_service_bytes_recursive") {
        let disk = all.entry(device).or_default();
        match kind.as_str() {
            "Read" => disk.read_bytes = n,
            "Write" => disk.write_bytes = n,
            _ => {}
        }
        disk.bytes.push((kind, n));
    }
    for (device, kind, n) in rows("blkio.throttle.io_serviced_recursive") {
        let disk = all.entry(device).or_default();
        match kind.as_str() {
            "Read" => disk.reads = n,
            "Write" => disk.writes = n,
            _ => {}
        }
    }
    all.into_iter().map(|(device, disk)| Disk { device, ..disk }).collect()
}

//! Version 2: one directory.
use super::{Cpu, Dir, Disk, Figures, Memory, Want};

pub(super) fn read(dir: &Dir, want: Want) -> Figures {
    let mut f = Figures::default();
    if want.cpu {
        f.cpu = Some(cpu(dir, want.rest));
    }
    if want.memory {
        f.memory = dir.maybe("memory.current").map(|usage| memory(dir, usage));
    }
    if want.processes {
        f.processes = dir.all("cgroup.procs");
    }
    if want.pressure {
        f.pressure = ["cpu.pressure", "memory.pressure", "io.pressure"].map(|file| dir.pressure(file));
    }
    if want.rest {
        f.threads = dir.all("cgroup.threads").len() as u64;
        f.tasks_limit = dir.limit("pids.max").unwrap_or(0);
        f.disks = dir.text("io.stat").lines().filter_map(disk).collect();
    }
    f
}

fn cpu(dir: &Dir, settings: bool) -> Cpu {
    let stat = dir.keyed("cpu.stat");
    let period = if settings { dir.text("cpu.max") } else { String::new() };
    Cpu {
        usage_ns: stat.get("usage_usec") * 1000,
        user_ns: stat.get("user_usec") * 1000,
        system_ns: stat.get("system_usec") * 1000,
        periods: stat.get("nr_periods"),
        throttled_periods: stat.get("nr_throttled"),
        throttled_ns: stat.get("throttled_usec") * 1000,
        // The kernel's weight 1–10000 back to shares 2–262144.
        shares: if settings { dir.number("cpu.weight").checked_sub(1).map_or(0, |w| 2 + w * 262_142 / 9999) } else { 0 },
        period_us: period.split_whitespace().nth(1).and_then(|p| p.parse().ok()).unwrap_or(0),
    }
}

fn memory(dir: &Dir, usage: u64) -> Memory {
    let (stat, events) = (dir.keyed("memory.stat"), dir.keyed("memory.events"));
    // Kernels before 5.18 tell the parts only.
    let parts = || ["kernel_stack", "pagetables", "percpu", "sock", "vmalloc", "slab"].iter().map(|k| stat.get(k)).sum();
    let swap_limit = dir.limit("memory.swap.max");
    Memory {
        usage,
        limit: dir.limit("memory.max"),
        max_usage: dir.maybe("memory.peak"),
        rss: stat.get("anon"),
        cache: stat.get("file"),
        mapped: stat.get("file_mapped"),
        kernel: stat.maybe("kernel").unwrap_or_else(parts),
        active_file: stat.get("active_file"),
        inactive_file: stat.get("inactive_file"),
        page_faults: stat.get("pgfault"),
        major_page_faults: stat.get("pgmajfault"),
        failures: events.get("max"),
        swap: dir.maybe("memory.swap.current"),
        swap_limit,
        configured_swap_limit: swap_limit,
        reservation: dir.number("memory.low"),
        oom_kills: events.get("oom_kill"),
    }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`
fn disk(line: &str) -> Option<Disk> {
    let (device, rest) = line.split_once(' ')?;
    let value = |key: &str| rest.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('=')?.parse().ok()).unwrap_or(0);
    let bytes = [("Read", "rbytes"), ("Write", "wbytes"), ("Discard", "dbytes")].map(|(name, key)| (name.to_owned(), value(key)));
    Some(Disk {
        device: device.into(),
        read_bytes: value("rbytes"),
        write_bytes: value("wbytes"),
        reads: value("rios"),
        writes: value("wios"),
        bytes: bytes.into(),
    })
}

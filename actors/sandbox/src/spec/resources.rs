//! Resources: from CRI's to OCI's.
use proto::cri::LinuxContainerResources;
use serde_json::{Map, Value, json};

/// `linux.resources`, without devices. Zero means: not set.
pub fn linux(r: &LinuxContainerResources) -> Value {
    let mut all = Map::new();
    let mut cpu = Map::new();
    let mut set = |key: &str, value: i64| {
        if value != 0 {
            cpu.insert(key.into(), value.into());
        }
    };
    set("shares", r.cpu_shares);
    set("quota", r.cpu_quota);
    set("period", r.cpu_period);
    for (key, value) in [("cpus", &r.cpuset_cpus), ("mems", &r.cpuset_mems)] {
        if !value.is_empty() {
            cpu.insert(key.into(), value.as_str().into());
        }
    }
    if !cpu.is_empty() {
        all.insert("cpu".into(), cpu.into());
    }
    let mut memory = Map::new();
    if r.memory_limit_in_bytes != 0 {
        memory.insert("limit".into(), r.memory_limit_in_bytes.into());
        if r.memory_swap_limit_in_bytes != 0 {
            memory.insert("swap".into(), r.memory_swap_limit_in_bytes.into());
        }
    }
    if !memory.is_empty() {
        all.insert("memory".into(), memory.into());
    }
    if !r.unified.is_empty() {
        all.insert("unified".into(), json!(r.unified));
    }
    all.into()
}

/// The daemon's own oom_score_adj: where lowering is not allowed, nothing below it may be asked for.
pub fn oom_score(wanted: i64, restrict: bool) -> i64 {
    if !restrict {
        return wanted;
    }
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0);
    wanted.max(own)
}

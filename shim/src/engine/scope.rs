//! A container's scope: what systemd is told of it, so that it does not undo at its next reload what the cgroup's files were given.
use super::bus::{Body, Bus, Properties, Variant};
use serde_json::Value;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// systemd moves the first process within milliseconds of its answer.
const MOVED: Duration = Duration::from_secs(10);
/// Of CPU time for each second, systemd keeps whole hundredths.
const HUNDREDTH_US: u64 = 10_000;
const SECOND_US: u64 = 1_000_000;
const PERIOD_US: u64 = 100_000;

/// `slice:prefix:name`.
pub struct Scope {
    slice: String,
    /// The unit.
    pub unit: String,
}

impl Scope {
    /// Reads `cgroupsPath`; `None` if it is a plain path.
    pub fn parse(path: &str) -> io::Result<Option<Scope>> {
        if path.starts_with('/') || !path.contains(':') {
            return Ok(None);
        }
        let wrong = || io::Error::new(io::ErrorKind::InvalidInput, format!("cgroupsPath {path:?} is neither a path nor slice:prefix:name"));
        let [slice, prefix, name] = path.split(':').collect::<Vec<_>>()[..] else { return Err(wrong()) };
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let stem = slice.strip_suffix(".slice").ok_or_else(wrong)?;
        let whole = stem == "-" || stem.split('-').all(|part| !part.is_empty());
        if !whole || slice.contains('/') || name.is_empty() {
            return Err(wrong());
        }
        let unit = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
        Ok(Some(Scope { slice: slice.into(), unit }))
    }

    /// Below the hierarchy's root: `a-b.slice` lies in `a.slice`.
    pub fn path(&self) -> PathBuf {
        let stem = self.slice.trim_end_matches(".slice");
        let mut path = PathBuf::from("/");
        if stem != "-" {
            let cuts = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
            cuts.for_each(|at| path.push(format!("{}.slice", &stem[..at])));
        }
        path.join(&self.unit)
    }

    /// Has systemd make the scope around a process, with its limits, and waits until the process is there.
    pub fn start(&self, pid: u32, resources: &Value) -> io::Result<()> {
        let mut all: Properties = vec![
            ("Description", Variant::Text(format!("container {}", self.unit.trim_end_matches(".scope")))),
            ("Slice", Variant::Text(self.slice.clone())),
            ("PIDs", Variant::Numbers(vec![pid])),
            // Below it the cgroups are not systemd's; and an OOM kill of one process does not end the others.
            ("Delegate", Variant::Flag(true)),
            ("DefaultDependencies", Variant::Flag(false)),
            // A scope that "failed" (an OOM kill) is forgotten as one that ended well.
            ("CollectMode", Variant::Text("inactive-or-failed".into())),
            ("MemoryAccounting", Variant::Flag(true)),
            ("CPUAccounting", Variant::Flag(true)),
            ("IOAccounting", Variant::Flag(true)),
            ("TasksAccounting", Variant::Flag(true)),
        ];
        all.extend(properties(resources)?);
        let mut body = Body::default();
        body.text(&self.unit);
        body.text("fail");
        body.properties(&all);
        body.no_units();
        Bus::connect()?.manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body).map_err(|e| self.failed("is not started", &e))?;
        let (place, end) = (format!("0::{}\n", self.path().display()), Instant::now() + MOVED);
        while std::fs::read_to_string(format!("/proc/{pid}/cgroup"))? != place {
            if Instant::now() > end {
                return Err(self.failed("is not started", &io::Error::from(io::ErrorKind::TimedOut)));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Tells systemd of new limits.
    pub fn update(&self, resources: &Value) -> io::Result<()> {
        let all = properties(resources)?;
        if all.is_empty() {
            return Ok(());
        }
        let mut body = Body::default();
        body.text(&self.unit);
        // For this boot only.
        body.flag(true);
        body.properties(&all);
        Bus::connect()?.manager("SetUnitProperties", "sba(sv)", body).map_err(|e| self.failed("is not updated", &e))
    }

    fn failed(&self, what: &str, e: &io::Error) -> io::Error {
        io::Error::new(e.kind(), format!("scope {} in {} {what}: {e}", self.unit, self.slice))
    }
}

/// OCI resources in systemd's words. What systemd has no word for is in the cgroup's files alone.
fn properties(resources: &Value) -> io::Result<Properties> {
    let mut all = Properties::new();
    let number = |path: &str| resources.pointer(path).and_then(Value::as_i64);
    let limit = |n: i64| Variant::Number(u64::try_from(n).unwrap_or(u64::MAX));
    if let Some(shares) = number("/cpu/shares").filter(|s| *s > 0) {
        all.push(("CPUWeight", Variant::Number(weight(shares as u64))));
    }
    quota(&mut all, number("/cpu/quota"), number("/cpu/period"));
    for (path, name) in [("/memory/limit", "MemoryMax"), ("/memory/reservation", "MemoryLow"), ("/pids/limit", "TasksMax")] {
        if let Some(n) = number(path).filter(|n| *n != 0) {
            all.push((name, limit(n)));
        }
    }
    if let (Some(swap), memory) = (number("/memory/swap"), number("/memory/limit")) {
        // The specification counts memory and swap together.
        let own = if swap < 0 { swap } else { (swap - memory.unwrap_or(0)).max(0) };
        all.push(("MemorySwapMax", limit(own)));
    }
    for (path, name) in [("/cpu/cpus", "AllowedCPUs"), ("/cpu/mems", "AllowedMemoryNodes")] {
        if let Some(list) = resources.pointer(path).and_then(Value::as_str).filter(|l| !l.is_empty()) {
            all.push((name, Variant::Bytes(mask(list)?)));
        }
    }
    for (file, value) in resources["unified"].as_object().into_iter().flatten() {
        unified(&mut all, file, value.as_str().unwrap_or_default())?;
    }
    Ok(all)
}

fn quota(all: &mut Properties, quota: Option<i64>, period: Option<i64>) {
    let period = period.and_then(|p| u64::try_from(p).ok()).filter(|p| *p > 0);
    if let Some(period) = period {
        all.push(("CPUQuotaPeriodUSec", Variant::Number(period)));
    }
    if let Some(quota) = quota.filter(|q| *q != 0) {
        let each_second = |q: u64| (q.saturating_mul(SECOND_US) / period.unwrap_or(PERIOD_US)).next_multiple_of(HUNDREDTH_US);
        all.push(("CPUQuotaPerSecUSec", Variant::Number(u64::try_from(quota).map_or(u64::MAX, each_second))));
    }
}

/// Files of the unified hierarchy that systemd has a word for.
fn unified(all: &mut Properties, file: &str, value: &str) -> io::Result<()> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, format!("unified {file}: {value:?} is not a value of it"));
    let number = |text: &str| if text == "max" { Ok(u64::MAX) } else { text.parse::<u64>().map_err(|_| wrong()) };
    let name = match file {
        "memory.min" => "MemoryMin",
        "memory.low" => "MemoryLow",
        "memory.high" => "MemoryHigh",
        "memory.max" => "MemoryMax",
        "memory.swap.max" => "MemorySwapMax",
        "pids.max" => "TasksMax",
        "cpu.weight" => "CPUWeight",
        "cpuset.cpus" | "cpuset.mems" => {
            let name = if file == "cpuset.cpus" { "AllowedCPUs" } else { "AllowedMemoryNodes" };
            all.push((name, Variant::Bytes(mask(value)?)));
            return Ok(());
        }
        "cpu.max" => {
            let mut words = value.split_whitespace();
            let (max, period) = (words.next().ok_or_else(wrong)?, words.next().map(str::parse::<i64>).transpose().map_err(|_| wrong())?);
            quota(all, Some(i64::try_from(number(max)?).unwrap_or(-1)), period);
            return Ok(());
        }
        _ => return Ok(()),
    };
    all.push((name, Variant::Number(number(value)?)));
    Ok(())
}

/// `0-2,4` as a mask, the lowest first.
fn mask(list: &str) -> io::Result<Vec<u8>> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, format!("{list:?} is not a list of CPUs or memory nodes"));
    let mut mask = Vec::new();
    for part in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().map_err(|_| wrong())?, last.trim().parse().map_err(|_| wrong())?);
        // More CPUs than any kernel is built for are a mistake.
        if first > last || last >= 1 << 16 {
            return Err(wrong());
        }
        if mask.len() <= last / 8 {
            mask.resize(last / 8 + 1, 0);
        }
        (first..=last).for_each(|n| mask[n / 8] |= 1 << (n % 8));
    }
    Ok(mask)
}

/// Shares (2–262144, 1024 usual) to a weight (1–10000, 100 usual): the curve through those three points on which runtimes have agreed.
fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil() as u64
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_scope_has_a_place() {
        let scope = Scope::parse("kubepods-besteffort-pod1.slice:cri-containerd:abc").unwrap().unwrap();
        let place = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-abc.scope";
        assert_eq!(scope.path(), PathBuf::from(place));
        assert_eq!(Scope::parse(":p:n").unwrap().unwrap().path(), PathBuf::from("/system.slice/p-n.scope"));
        assert_eq!(Scope::parse("-.slice:p:n").unwrap().unwrap().path(), PathBuf::from("/p-n.scope"));
        assert!(Scope::parse("/kubepods/pod1/abc").unwrap().is_none());
        for bad in ["a.slice:b", "a:b:c", "a--b.slice:p:n", "a/b.slice:p:n", "a.slice:p:"] {
            assert!(Scope::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn resources_in_systemds_words() {
        let resources = json!({"cpu": {"shares": 1024, "quota": 12_345, "cpus": "0-2,9"}, "memory": {"limit": 100, "swap": 150},
            "unified": {"memory.high": "max", "cpu.max": "max 5000", "misc.max": "x"}});
        let all = properties(&resources).unwrap();
        let find = |name: &str| all.iter().filter(|(n, _)| *n == name).map(|(_, v)| v.clone()).collect::<Vec<_>>();
        assert_eq!(find("CPUWeight"), [Variant::Number(100)]);
        assert_eq!(find("CPUQuotaPerSecUSec"), [Variant::Number(130_000), Variant::Number(u64::MAX)]);
        assert_eq!(find("AllowedCPUs"), [Variant::Bytes(vec![0b111, 0b10])]);
        assert_eq!((find("MemoryMax"), find("MemorySwapMax")), (vec![Variant::Number(100)], vec![Variant::Number(50)]));
        assert_eq!(find("MemoryHigh"), [Variant::Number(u64::MAX)]);
        assert!(properties(&json!({"cpu": {"cpus": "3-1"}})).is_err() && properties(&json!({})).unwrap().is_empty());
    }

    #[test]
    fn weights_meet_the_points_that_matter() {
        assert_eq!([2, 1024, 262_144].map(weight), [1, 100, 10_000]);
    }
}

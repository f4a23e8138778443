//! Resources: from CRI's to OCI's.
use kernel::{Fault, Result};
use proto::cri::LinuxContainerResources;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// What the node's cgroups can do, and what the configuration wants of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Controllers {
    /// Swap is accounted.
    pub swap: bool,
    /// Huge pages are limited: the controller is there and not disabled.
    pub huge: Huge,
}

/// What happens to limits of huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Huge {
    /// Left out without a word: `disable_hugetlb_controller`.
    #[default]
    Disabled,
    /// Applied.
    Present,
    /// There is no controller; tolerated.
    Tolerated,
    /// There is no controller: an error.
    Missing,
}

impl Controllers {
    /// Looks at this node.
    pub fn probe(disable_huge: bool, tolerate_missing: bool) -> Controllers {
        let root = Path::new("/sys/fs/cgroup");
        let unified = root.join("cgroup.controllers");
        let has_huge = match std::fs::read_to_string(&unified) {
            Ok(list) => list.split_whitespace().any(|c| c == "hugetlb"),
            Err(_) => root.join("hugetlb").exists(),
        };
        let swap =
            if unified.exists() { own_cgroup(root).join("memory.swap.max") } else { root.join("memory/memory.memsw.limit_in_bytes") };
        let huge = match (disable_huge, has_huge, tolerate_missing) {
            (true, ..) => Huge::Disabled,
            (false, true, _) => Huge::Present,
            (false, false, true) => Huge::Tolerated,
            (false, false, false) => Huge::Missing,
        };
        Controllers { swap: swap.exists(), huge }
    }
}

/// The daemon's cgroup of version 2. The root has no limits; a child of it tells what there is.
fn own_cgroup(root: &Path) -> PathBuf {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = text.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
    if !own.is_empty() {
        return root.join(own);
    }
    let child = std::fs::read_dir(root).into_iter().flatten().flatten().find(|e| e.path().is_dir());
    child.map_or_else(|| root.to_owned(), |e| e.path())
}

/// `linux.resources`, without devices. Zero means: not set.
pub fn linux(r: &LinuxContainerResources, controllers: &Controllers) -> Result<Value> {
    let mut all = Map::new();
    let mut cpu = Map::new();
    for (key, value) in [("shares", r.cpu_shares), ("quota", r.cpu_quota), ("period", r.cpu_period)] {
        if value != 0 {
            cpu.insert(key.into(), value.into());
        }
    }
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
    }
    // Without a limit of its own swap gets none beyond memory's: a container does not swap unless it was asked for.
    match (r.memory_swap_limit_in_bytes, r.memory_limit_in_bytes) {
        (0, 0) => {}
        (0, limit) if controllers.swap => drop(memory.insert("swap".into(), limit.into())),
        (0, _) => {}
        (swap, _) => drop(memory.insert("swap".into(), swap.into())),
    }
    if !memory.is_empty() {
        all.insert("memory".into(), memory.into());
    }
    let pages = huge(r, controllers.huge)?;
    if !pages.is_empty() {
        all.insert("hugepageLimits".into(), pages.into());
    }
    if !r.unified.is_empty() {
        all.insert("unified".into(), json!(r.unified));
    }
    Ok(all.into())
}

fn huge(r: &LinuxContainerResources, what: Huge) -> Result<Vec<Value>> {
    if r.hugepage_limits.is_empty() || what == Huge::Disabled {
        return Ok(vec![]);
    }
    match what {
        Huge::Missing => Err(Fault::failed_precondition(
            "hugepage_limits are given, but this node has no hugetlb controller: set tolerate_missing_hugetlb_controller to run without them",
        )),
        Huge::Tolerated => {
            tracing::warn!("hugetlb cgroup controller is absent: limits of huge pages are left out");
            Ok(vec![])
        }
        _ => Ok(r.hugepage_limits.iter().map(|l| json!({"pageSize": l.page_size, "limit": l.limit})).collect()),
    }
}

/// Brings new resources into old ones: what is set replaces, what is not stays. Limits of huge pages go by their size, `unified` by its keys.
pub fn merge(old: &mut Value, new: &Value) {
    let (Some(into), Some(from)) = (old.as_object_mut(), new.as_object()) else {
        *old = new.clone();
        return;
    };
    for (key, value) in from {
        match into.get_mut(key) {
            Some(Value::Array(list)) if key == "hugepageLimits" => {
                for page in value.as_array().into_iter().flatten() {
                    list.retain(|p| p["pageSize"] != page["pageSize"]);
                    list.push(page.clone());
                }
            }
            Some(inner) if inner.is_object() && value.is_object() => merge(inner, value),
            _ => drop(into.insert(key.clone(), value.clone())),
        }
    }
}

/// The same for CRI's own form, which ContainerStatus shows.
pub fn merge_cri(old: &mut LinuxContainerResources, new: &LinuxContainerResources) {
    macro_rules! number { ($($field:ident)*) => { $( if new.$field != 0 { old.$field = new.$field; } )* } }
    number!(cpu_period cpu_quota cpu_shares memory_limit_in_bytes oom_score_adj memory_swap_limit_in_bytes);
    for (old, new) in [(&mut old.cpuset_cpus, &new.cpuset_cpus), (&mut old.cpuset_mems, &new.cpuset_mems)] {
        if !new.is_empty() {
            old.clone_from(new);
        }
    }
    for limit in &new.hugepage_limits {
        old.hugepage_limits.retain(|l| l.page_size != limit.page_size);
        old.hugepage_limits.push(limit.clone());
    }
    old.unified.extend(new.unified.clone());
}

/// The daemon's own oom_score_adj: where lowering is not allowed, nothing below it may be asked for.
pub fn oom_score(wanted: i64, restrict: bool) -> i64 {
    if !restrict {
        return wanted;
    }
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0);
    wanted.max(own)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proto::cri::HugepageLimit;

    fn pages(limit: u64) -> LinuxContainerResources {
        LinuxContainerResources { hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit }], ..Default::default() }
    }

    #[test]
    fn swap_follows_memory_and_huge_pages_the_controller() {
        let asked = LinuxContainerResources { memory_limit_in_bytes: 100, ..pages(7) };
        let with = |swap, huge| linux(&asked, &Controllers { swap, huge });
        assert_eq!(with(true, Huge::Disabled).unwrap(), json!({"memory": {"limit": 100, "swap": 100}}));
        assert_eq!(with(false, Huge::Tolerated).unwrap(), json!({"memory": {"limit": 100}}));
        assert_eq!(with(false, Huge::Present).unwrap()["hugepageLimits"], json!([{"pageSize": "2MB", "limit": 7}]));
        assert!(with(false, Huge::Missing).unwrap_err().message.contains("hugetlb"));
        let asked = LinuxContainerResources { memory_limit_in_bytes: 100, memory_swap_limit_in_bytes: 150, ..Default::default() };
        assert_eq!(linux(&asked, &Controllers::default()).unwrap()["memory"]["swap"], 150);
    }

    #[test]
    fn an_update_replaces_what_it_names_and_nothing_twice() {
        let controllers = Controllers { swap: false, huge: Huge::Present };
        let mut old = linux(&LinuxContainerResources { cpu_shares: 2, cpu_quota: 5, ..pages(7) }, &controllers).unwrap();
        old["devices"] = json!([1]);
        let mut new = LinuxContainerResources { cpu_shares: 9, ..pages(8) };
        new.unified.insert("memory.high".into(), "5".into());
        merge(&mut old, &linux(&new, &controllers).unwrap());
        let want = json!({"cpu": {"shares": 9, "quota": 5}, "hugepageLimits": [{"pageSize": "2MB", "limit": 8}],
            "unified": {"memory.high": "5"}, "devices": [1]});
        assert_eq!(old, want);
        let mut cri = LinuxContainerResources { cpu_quota: 5, ..pages(7) };
        merge_cri(&mut cri, &new);
        assert_eq!((cri.cpu_quota, cri.cpu_shares, cri.hugepage_limits.len(), cri.hugepage_limits[0].limit), (5, 9, 1, 8));
    }
}

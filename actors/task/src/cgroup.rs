//! Cgroups, where this actor has to do with them itself: killing all of a container whose shim does not answer, and the pod's cgroup parent. On a node with a kubelet it exists before the pod and belongs to the kubelet; otherwise the runtime makes it, and it is ours to remove.
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// Directories of `parent`, in every hierarchy, that do not exist yet; deepest first.
pub fn missing(parent: &str, systemd: bool) -> Vec<PathBuf> {
    if parent.is_empty() || systemd {
        // systemd removes its slices itself.
        return Vec::new();
    }
    hierarchies(Path::new(ROOT)).iter().flat_map(|root| missing_below(root, parent)).collect()
}

/// Removes those that are empty.
pub fn remove(dirs: &[PathBuf]) {
    for dir in dirs {
        // Not empty or gone: somebody else's, or nothing to do.
        let _ = std::fs::remove_dir(dir);
    }
}

/// Kills everything in the cgroup of container `id`, to which the living process `pid` belongs.
pub fn kill(pid: u32, id: &str) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let root = Path::new(ROOT);
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(names), Some(path)) = (parts.next(), parts.next()) else { continue };
        // Only a cgroup that bears the container's name is its own.
        if !path.rsplit('/').next().is_some_and(|last| last.contains(id)) {
            continue;
        }
        let dir = root.join(names).join(path.trim_start_matches('/'));
        // Frozen processes of version 1 do not die before they are thawed.
        let _ = std::fs::write(dir.join("freezer.state"), "THAWED");
        if std::fs::write(dir.join("cgroup.kill"), "1").is_ok() {
            continue;
        }
        let procs = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for process in procs.lines().filter_map(|l| l.parse().ok()).filter_map(Pid::from_raw) {
            let _ = kill_process(process, Signal::KILL);
        }
    }
}

fn hierarchies(root: &Path) -> Vec<PathBuf> {
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    // Links are second names (`cpu` of `cpu,cpuacct`).
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

fn missing_below(root: &Path, parent: &str) -> Vec<PathBuf> {
    let clean: PathBuf = Path::new(parent).components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect();
    clean.ancestors().filter(|a| !a.as_os_str().is_empty()).map(|a| root.join(a)).take_while(|d| !d.exists()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_missing_is_removed_and_only_when_empty() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("kubepods")).unwrap();
        let ours = missing_below(root, "/kubepods/../pod1/inner");
        assert_eq!(ours, [root.join("kubepods/pod1/inner"), root.join("kubepods/pod1")]);
        std::fs::create_dir_all(root.join("kubepods/pod1/inner")).unwrap();
        std::fs::create_dir_all(root.join("kubepods/pod1/other")).unwrap();
        remove(&ours);
        assert!(!root.join("kubepods/pod1/inner").exists() && root.join("kubepods/pod1/other").exists() && root.join("kubepods").exists());
        assert!(missing_below(root, "/kubepods").is_empty());
    }
}

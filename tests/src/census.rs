//! A census: what of a daemon is on the machine. After everything is removed, nothing may be left.
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Processes beside the daemon.
    pub processes: Vec<(u32, String)>,
    /// Mount points below its directory.
    pub mounts: Vec<String>,
    /// Cgroups with its tag.
    pub cgroups: Vec<String>,
    /// Addresses that host-local has handed out.
    pub addresses: Vec<String>,
    /// Results in CNI's cache.
    pub results: Vec<String>,
    /// FIFOs and sockets of containers.
    pub fifos: Vec<String>,
    /// Bundles and sandbox directories.
    pub directories: Vec<String>,
    /// Interfaces on its bridge.
    pub interfaces: Vec<String>,
}

/// Counts everything that belongs to `daemon`, apart from the daemon itself and its images. What is only passing (a CNI plugin that is asked for its
/// version) is waited out for a moment.
pub fn take(daemon: &crate::daemon::Daemon) -> Census {
    let mut last = count(daemon);
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(20));
        let now = count(daemon);
        if now == last {
            break;
        }
        last = now;
    }
    last
}

/// Gives what goes on in the background up to `limit`; then the census must be what it was.
pub async fn settle(daemon: &crate::daemon::Daemon, before: &Census, limit: Duration, what: &str) {
    let end = Instant::now() + limit;
    while take(daemon) != *before && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(take(daemon), *before, "{what}");
}

fn count(daemon: &crate::daemon::Daemon) -> Census {
    let files = walk(&daemon.dir.join("state"), 6);
    let is_bundle = |p: &&PathBuf| p.parent().is_some_and(|d| d.ends_with("k8s.io") || d.ends_with("sandboxes")) && p.is_dir();
    Census {
        processes: daemon.processes(),
        mounts: mounts_below(&daemon.dir),
        cgroups: cgroups_of(&daemon.tag).iter().filter(|c| !c.ends_with(&daemon.tag)).map(|c| c.display().to_string()).collect(),
        addresses: walk(&daemon.dir.join("ipam"), 2)
            .iter()
            .filter_map(name)
            .filter(|n| n.starts_with("10.") || n.starts_with("fd"))
            .collect(),
        results: walk(&daemon.dir.join("cnicache/results"), 1).iter().filter_map(name).collect(),
        fifos: files.iter().filter(|p| is_stream(p)).map(|p| p.display().to_string()).collect(),
        directories: files.iter().filter(is_bundle).map(|p| p.display().to_string()).collect(),
        interfaces: interfaces_on(&daemon.tag),
    }
}

#[allow(clippy::ptr_arg, reason = "it is mapped over paths by reference")]
fn name(path: &PathBuf) -> Option<String> {
    path.file_name().map(|n| n.to_string_lossy().into_owned())
}

/// FIFOs, and the sockets of shims.
fn is_stream(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let of_shim = || path.parent().is_some_and(|d| d.ends_with("s"));
    path.symlink_metadata().is_ok_and(|m| m.file_type().is_fifo() || m.file_type().is_socket() && of_shim())
}

fn walk(dir: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if depth > 0 && entry.file_type().is_ok_and(|t| t.is_dir()) && name(&path).is_none_or(|n| n != "rootfs") {
            found.append(&mut walk(&path, depth - 1));
        }
        found.push(path);
    }
    found
}

/// Mount points below `dir`, outermost first.
pub fn mounts_below(dir: &Path) -> Vec<String> {
    let prefix = format!("{}/", dir.display());
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with(&prefix)).map(str::to_owned).collect()
}

/// Processes whose command line or environment names `dir`, or that are in a cgroup named `tag`.
pub fn processes_of(dir: &Path, tag: &str) -> Vec<(u32, String)> {
    let needle = dir.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        if pid == std::process::id() {
            continue;
        }
        let read = |file: &str| String::from_utf8_lossy(&std::fs::read(entry.path().join(file)).unwrap_or_default()).replace('\0', " ");
        let command = read("cmdline");
        let ours = command.contains(&needle) || read("cgroup").contains(&format!("/{tag}")) || read("environ").contains(&needle);
        let zombie = read("stat").contains(") Z ");
        if ours && !zombie {
            found.push((pid, command));
        }
    }
    found
}

/// Directories in the cgroup trees that carry `tag` in their path.
pub fn cgroups_of(tag: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let controllers = std::fs::read_dir(root).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir());
    let mut found = Vec::new();
    for tree in controllers.chain([root.to_owned()]) {
        let top = tree.join(tag);
        if top.is_dir() {
            found.push(top.clone());
            found.extend(walk(&top, 6).into_iter().filter(|p| p.is_dir()));
        }
    }
    found
}

/// Removes the cgroups of `tag`, innermost first.
pub fn remove_cgroups(tag: &str) {
    let mut all = cgroups_of(tag);
    all.sort_by_key(|p| std::cmp::Reverse(p.components().count()));
    for dir in all {
        let _ = std::fs::remove_dir(dir);
    }
}

fn interfaces_on(bridge: &str) -> Vec<String> {
    let bridge: String = bridge.chars().take(15).collect();
    walk(&Path::new("/sys/class/net").join(bridge).join("brif"), 0).iter().filter_map(name).collect()
}

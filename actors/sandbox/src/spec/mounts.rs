//! Mounts: what every container has, what the client wants, and the pod's files.
use super::selinux::relabel;
use kernel::{Class, Fault, Result};
use proto::cri::{self, MountPropagation};
use serde_json::{Value, json};
use std::path::{Component, Path, PathBuf};

pub(super) fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": kind, "source": source, "options": options})
}

/// Mounts of the built-in base specification.
pub fn base() -> Vec<Value> {
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ]
}

/// The cgroup mount. `shared` says that the container is in the node's cgroup namespace: then mounting sets the options of the node's one file
/// system, so those that the node has must be said again.
pub fn cgroup(writable: bool, shared: bool) -> Value {
    let mut options = vec!["nosuid", "noexec", "nodev", "relatime", if writable { "rw" } else { "ro" }];
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if shared {
        options.extend(node_options(&table));
    }
    mount("/sys/fs/cgroup", "cgroup", "cgroup", &options)
}

/// Options of the node's own mount of cgroups that another mount must not take away.
fn node_options(table: &str) -> Vec<&str> {
    let line = table.lines().rev().find(|l| l.split(' ').nth(4) == Some("/sys/fs/cgroup")).unwrap_or_default();
    let of_file_system = line.split(" - ").nth(1).and_then(|t| t.split(' ').nth(2)).unwrap_or_default();
    of_file_system.split(',').filter(|o| matches!(*o, "nsdelegate" | "memory_recursiveprot")).collect()
}

/// A bind of one of the pod's files, unless there is none or the client mounts something there.
pub fn pod_file(wanted: &[cri::Mount], destination: &str, source: &Path, options: &[&str]) -> Option<Value> {
    let taken = wanted.iter().any(|m| clean(&m.container_path) == Path::new(destination));
    (!taken && source.exists()).then(|| mount(destination, "bind", &source.to_string_lossy(), options))
}

/// A path without `.`, `..` and double slashes, absolute.
pub fn clean(path: &str) -> PathBuf {
    let mut all = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => all.push(name),
            Component::ParentDir => drop(all.pop()),
            _ => {}
        }
    }
    all
}

/// Takes away what the client's mounts replace: what is mounted on the same place, and all below /dev for a /dev of the client's own.
pub fn without_replaced(base: &mut Vec<Value>, wanted: &[cri::Mount]) {
    let places: Vec<PathBuf> = wanted.iter().map(|m| clean(&m.container_path)).collect();
    let own_dev = places.iter().any(|p| p == Path::new("/dev"));
    base.retain(|m| {
        let place = clean(m["destination"].as_str().unwrap_or_default());
        let below_own_dev = own_dev && place.starts_with("/dev") && place != Path::new("/dev");
        !places.contains(&place) && !below_own_dev
    });
}

/// What a runtime handler must be able to do for the client's mounts.
pub struct Wanted<'a> {
    /// Recursive read-only mounts.
    pub recursive_read_only: bool,
    /// Label of files, may be empty.
    pub label: &'a str,
}

impl Wanted<'_> {
    /// The client's mounts, outer ones before inner ones. Blocking: it looks at the host's paths, and makes those that are missing.
    pub fn mounts(&self, list: &[cri::Mount]) -> Result<Vec<Value>> {
        let mut sorted: Vec<&cri::Mount> = list.iter().collect();
        sorted.sort_by_key(|m| clean(&m.container_path).components().count());
        sorted.into_iter().map(|m| self.one(m)).collect()
    }

    fn one(&self, m: &cri::Mount) -> Result<Value> {
        if m.container_path.is_empty() {
            return Err(Fault::invalid_argument("mounts.container_path is empty"));
        }
        let access = self.access(m)?;
        let source = source(m)?;
        let propagation = match MountPropagation::try_from(m.propagation) {
            Ok(MountPropagation::PropagationBidirectional) => {
                peers(&source, &["shared:"])?;
                "rshared"
            }
            Ok(MountPropagation::PropagationHostToContainer) => {
                peers(&source, &["shared:", "master:"])?;
                "rslave"
            }
            _ => "rprivate",
        };
        if m.selinux_relabel {
            relabel(&source, self.label)?;
        }
        let mut made = mount(&m.container_path, "bind", &source.to_string_lossy(), &["rbind", propagation, access]);
        super::userns::of_mount(m, &mut made)?;
        Ok(made)
    }

    fn access(&self, m: &cri::Mount) -> Result<&'static str> {
        let at = format!("(hostPath={:?})", m.host_path);
        match (m.readonly, m.recursive_read_only) {
            (false, false) => Ok("rw"),
            (true, false) => Ok("ro"),
            (false, true) => Err(Fault::invalid_argument(format!("recursive read-only mount conflicts with RW mount {at}"))),
            // Clients know this error by the beginning of its text alone.
            (true, true) if !self.recursive_read_only => {
                Err(Fault::new(Class::Unknown, format!("RROUnsupported: runtime handler does not support recursive read-only mounts {at}")))
            }
            (true, true) if m.propagation != MountPropagation::PropagationPrivate as i32 => {
                let got = MountPropagation::try_from(m.propagation).map_or("an unknown one", |p| p.as_str_name());
                Err(Fault::invalid_argument(format!("recursive read-only mount needs private propagation, got {got} {at}")))
            }
            (true, true) => Ok("rro"),
        }
    }
}

/// The host's path, without links. A missing one is made as a directory, as containerd does.
fn source(m: &cri::Mount) -> Result<PathBuf> {
    let what = |e: std::io::Error| Fault::from(e).context(format!("mounts {}: host path {:?}", m.container_path, m.host_path));
    match std::fs::canonicalize(&m.host_path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(&m.host_path).map_err(what)?;
            std::fs::canonicalize(&m.host_path).map_err(what)
        }
        other => other.map_err(what),
    }
}

/// Propagation needs a host mount that takes part in it.
fn peers(source: &Path, kinds: &[&str]) -> Result<()> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").map_err(Fault::from)?;
    let place = |line: &str| Some(line.split(' ').nth(4)?.replace("\\040", " "));
    let found = text.lines().filter(|l| place(l).is_some_and(|p| source.starts_with(p)));
    // The longest path is the mount that the source lies on; of equals the last one covers the others.
    let on = found.max_by_key(|l| place(l).map_or(0, |p| p.len())).unwrap_or_default();
    let optional = on.split(' ').skip(6).take_while(|f| *f != "-");
    if optional.into_iter().any(|f| kinds.iter().any(|k| f.starts_with(k))) {
        return Ok(());
    }
    let wanted = if kinds.len() > 1 { "shared or slave" } else { "shared" };
    Err(Fault::failed_precondition(format!(
        "path {:?} is mounted on {:?} but it is not a {wanted} mount",
        source,
        place(on).unwrap_or_default()
    )))
}

/// What the root file system's propagation must be for these mounts: the strongest of theirs; `None` leaves it as it is.
pub fn root_propagation(mounts: &[Value]) -> Option<&'static str> {
    let has = |kind: &str| mounts.iter().any(|m| m["options"].as_array().is_some_and(|o| o.iter().any(|o| o == kind)));
    ["rshared", "rslave"].into_iter().find(|kind| has(kind))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ABLE: Wanted<'static> = Wanted { recursive_read_only: true, label: "" };

    fn on(to: &str) -> cri::Mount {
        cri::Mount { container_path: to.into(), host_path: "/proc".into(), readonly: true, ..Default::default() }
    }

    #[test]
    fn outer_mounts_come_first_and_equals_keep_their_order() {
        let all = ABLE.mounts(&[on("/a/b"), on("/z"), on("/a/./c"), on("/a/")]).unwrap();
        let places: Vec<&str> = all.iter().map(|m| m["destination"].as_str().unwrap()).collect();
        assert_eq!(places, ["/z", "/a/", "/a/b", "/a/./c"]);
        assert_eq!(all[0]["options"], json!(["rbind", "rprivate", "ro"]));
    }

    #[test]
    fn recursive_read_only_has_its_rules() {
        let rro = cri::Mount { recursive_read_only: true, ..on("/x") };
        assert_eq!(ABLE.mounts(std::slice::from_ref(&rro)).unwrap()[0]["options"][2], "rro");
        let unable = Wanted { recursive_read_only: false, label: "" };
        assert!(unable.mounts(std::slice::from_ref(&rro)).unwrap_err().message.starts_with("RROUnsupported"));
        let slave = cri::Mount { propagation: 1, ..rro.clone() };
        assert!(ABLE.mounts(&[slave]).unwrap_err().message.contains("private propagation"));
        let writable = cri::Mount { readonly: false, ..rro };
        assert!(ABLE.mounts(&[writable]).unwrap_err().message.contains("conflicts with RW"));
    }

    #[test]
    fn a_dev_of_the_clients_own_replaces_all_of_it() {
        let mut all = base();
        without_replaced(&mut all, &[on("/dev/")]);
        let left: Vec<&str> = all.iter().map(|m| m["destination"].as_str().unwrap()).collect();
        assert_eq!(left, ["/proc", "/sys"]);
        assert!(pod_file(&[on("/dev/shm/")], "/dev/shm", Path::new("/tmp"), &[]).is_none());
        assert!(pod_file(&[], "/etc/hosts", Path::new("/no/such"), &[]).is_none());
    }

    #[test]
    fn a_missing_path_is_made_and_links_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(dir.join("real"), dir.join("link")).unwrap();
        std::fs::create_dir(dir.join("real")).unwrap();
        let from = |p: PathBuf| cri::Mount { host_path: p.to_string_lossy().into(), ..on("/x") };
        let link = ABLE.mounts(&[from(dir.join("link"))]).unwrap();
        assert_eq!(link[0]["source"], dir.join("real").to_str().unwrap());
        ABLE.mounts(&[from(dir.join("new/deep"))]).unwrap();
        assert!(dir.join("new/deep").is_dir());
    }

    #[test]
    fn the_nodes_cgroup_options_are_kept() {
        let table = "30 20 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
        assert_eq!(node_options(table), ["nsdelegate", "memory_recursiveprot"]);
        assert!(node_options("").is_empty());
    }
}

//! Mounts: what every container has, what the client wants, and the pod's files.
use kernel::{Fault, Result};
use proto::cri::{self, MountPropagation};
use serde_json::{Value, json};
use std::path::Path;

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": kind, "source": source, "options": options})
}

/// Mounts of the base specification.
pub fn base(privileged: bool) -> Vec<Value> {
    let rw = if privileged { "rw" } else { "ro" };
    let cgroup = ["nosuid", "noexec", "nodev", "relatime", rw];
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", rw]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &cgroup),
    ]
}

/// A bind of one of the pod's files, unless the client mounts something there.
pub fn pod_file(all: &mut Vec<Value>, wanted: &[cri::Mount], destination: &str, source: &Path, read_only: bool) {
    if wanted.iter().any(|m| m.container_path.trim_end_matches('/') == destination) {
        return;
    }
    let rw = if read_only { "ro" } else { "rw" };
    all.push(mount(destination, "bind", &source.to_string_lossy(), &["rbind", "rprivate", rw]));
}

/// The client's mounts. Blocking: it looks at the host's paths, and makes those that are missing as directories, as containerd does.
pub fn wanted(list: &[cri::Mount]) -> Result<Vec<Value>> {
    let mut sorted: Vec<&cri::Mount> = list.iter().collect();
    sorted.sort_by_key(|m| Path::new(&m.container_path).components().count());
    sorted.into_iter().map(one).collect()
}

fn one(m: &cri::Mount) -> Result<Value> {
    if m.container_path.is_empty() {
        return Err(Fault::invalid_argument("mounts.container_path is empty"));
    }
    if m.recursive_read_only && !m.readonly {
        return Err(Fault::invalid_argument(format!("mounts {}: recursive_read_only needs readonly", m.container_path)));
    }
    if m.recursive_read_only && m.propagation != MountPropagation::PropagationPrivate as i32 {
        return Err(Fault::invalid_argument(format!("mounts {}: recursive_read_only needs private propagation", m.container_path)));
    }
    let what = |e: std::io::Error| Fault::from(e).context(format!("mounts {}: host path {:?}", m.container_path, m.host_path));
    let source = match std::fs::canonicalize(&m.host_path) {
        Ok(path) => path,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(&m.host_path).map_err(what)?;
            std::fs::canonicalize(&m.host_path).map_err(what)?
        }
        Err(e) => return Err(what(e)),
    };
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
    let access = match (m.readonly, m.recursive_read_only) {
        (true, true) => "rro",
        (true, false) => "ro",
        (false, _) => "rw",
    };
    let mut made = mount(&m.container_path, "bind", &source.to_string_lossy(), &["rbind", propagation, access]);
    super::userns::of_mount(m, &mut made)?;
    Ok(made)
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

/// What the root file system's propagation must be for these mounts: the strongest of theirs.
pub fn root_propagation(mounts: &[Value]) -> &'static str {
    let has = |kind: &str| mounts.iter().any(|m| m["options"].as_array().is_some_and(|o| o.iter().any(|o| o == kind)));
    if has("rshared") {
        "rshared"
    } else if has("rslave") {
        "rslave"
    } else {
        "private"
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn mounts_are_ordered_and_bad_ones_named() {
        let m = |to: &str| cri::Mount { container_path: to.into(), host_path: "/proc".into(), readonly: true, ..Default::default() };
        let all = wanted(&[m("/a/b"), m("/a")]).unwrap();
        assert_eq!((all[0]["destination"].as_str(), all[0]["options"][2].as_str()), (Some("/a"), Some("ro")));
        let bad = cri::Mount { recursive_read_only: true, readonly: false, ..m("/x") };
        assert!(wanted(&[bad]).unwrap_err().message.contains("/x"));
    }
}

//! A cgroup that the container may divide: with a cgroup namespace of its own and a writable mount of version 2, the specification of OCI gives it to
//! the container's first user. The files with limits stay root's, so the container can raise none.
use libcontainer::oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};
use std::io;
use std::path::Path;

/// The kernel's list of files that go with a cgroup, and what it was before there was a list.
const LIST: &str = "/sys/kernel/cgroup/delegate";
const FILES: &str = "cgroup.procs cgroup.subtree_control cgroup.threads";

/// Gives the cgroup at `dir` to whom the specification wants it given to, if to anybody.
pub fn give(dir: &Path, spec: &Spec) -> io::Result<()> {
    let Some(uid) = receiver(spec) else { return Ok(()) };
    let list = std::fs::read_to_string(LIST).unwrap_or_else(|_| FILES.into());
    for path in std::iter::once(dir.to_owned()).chain(list.split_whitespace().map(|file| dir.join(file))) {
        match std::os::unix::fs::chown(&path, Some(uid), None) {
            // The list names the files of all controllers.
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(io::Error::new(e.kind(), format!("give {} to user {uid}: {e}", path.display())));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The node's id of the user who may divide the container's cgroup, if that is not root.
fn receiver(spec: &Spec) -> Option<u32> {
    let linux = spec.linux().as_ref()?;
    let space = |kind| linux.namespaces().iter().flatten().any(|n| n.typ() == kind);
    let writable = |m: &Mount| {
        let has = |option: &str| m.options().iter().flatten().any(|o| o == option);
        m.typ().as_deref().is_some_and(|t| matches!(t, "cgroup" | "cgroup2")) && !has("ro")
    };
    if !space(LinuxNamespaceType::Cgroup) || !spec.mounts().iter().flatten().any(writable) {
        return None;
    }
    let inside = spec.process().as_ref()?.user().uid();
    let outside = |m: &LinuxIdMapping| Some(m.host_id() + inside.checked_sub(m.container_id()).filter(|n| *n < m.size())?);
    let uid = match space(LinuxNamespaceType::User) {
        true => linux.uid_mappings().iter().flatten().find_map(outside)?,
        false => inside,
    };
    (uid != 0).then_some(uid)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn spec(uid: u32, option: &str, spaces: &[&str]) -> Spec {
        let namespaces: Vec<Value> = spaces.iter().map(|kind| json!({"type": kind})).collect();
        let maps = json!([{"containerID": 0, "hostID": 5000, "size": 100}]);
        serde_json::from_value(json!({"ociVersion": "1.2.0", "process": {"cwd": "/", "user": {"uid": uid, "gid": 0}},
            "mounts": [{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", option]}],
            "linux": {"namespaces": namespaces, "uidMappings": maps}}))
        .unwrap()
    }

    #[test]
    fn it_goes_to_the_first_user() {
        assert_eq!(receiver(&spec(7, "rw", &["cgroup", "user"])), Some(5007));
        assert_eq!(receiver(&spec(7, "rw", &["cgroup"])), Some(7));
        assert_eq!(receiver(&spec(0, "rw", &["cgroup"])), None, "root's already");
        assert_eq!(receiver(&spec(7, "rw", &["user"])), None, "the node's cgroups");
        assert_eq!(receiver(&spec(7, "ro", &["cgroup", "user"])), None);
        assert_eq!(receiver(&spec(700, "rw", &["cgroup", "user"])), None, "nobody");
    }
}

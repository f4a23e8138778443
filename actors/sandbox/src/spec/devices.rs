//! Device nodes and the rules of the device cgroup.
use kernel::{Fault, Result};
use nix::sys::stat::{SFlag, major, minor, stat};
use proto::cri;
use serde_json::{Value, json};
use std::path::Path;

/// null, zero, full, random, urandom, tty, ptmx: the engine makes them in every container.
const ALWAYS: [(u32, u32); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];
/// Pseudo terminals.
const PTS: u32 = 136;

/// Which of the host's devices a privileged container gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// Not privileged.
    None,
    /// All of them.
    AllDevices,
    /// None, but it may use all that it makes.
    AllAllowed,
    /// None.
    NoDevices,
}

/// `linux.devices` and `linux.resources.devices`. `owner` is the user and group whose devices they shall be.
pub fn of(config: &cri::ContainerConfig, privilege: Privilege, owner: Option<(u32, u32)>) -> Result<(Vec<Value>, Vec<Value>)> {
    let all = matches!(privilege, Privilege::AllDevices | Privilege::AllAllowed);
    let mut rules = vec![json!({"allow": all, "access": "rwm"})];
    let mut nodes: Vec<Value> = vec![];
    for device in &config.devices {
        for mut node in asked(device)? {
            if let Some((uid, gid)) = owner {
                (node["uid"], node["gid"]) = (uid.into(), gid.into());
            }
            rules.push(rule(&node, &device.permissions));
            nodes.retain(|n| n["path"] != node["path"]);
            nodes.push(node);
        }
    }
    if privilege == Privilege::AllDevices {
        let taken: Vec<Value> = nodes.iter().map(|n| n["path"].clone()).collect();
        nodes.extend(of_host().into_iter().filter(|n| !taken.contains(&n["path"])));
    }
    if !all {
        let allow = |minor: Option<u32>, major: u32| {
            let mut rule = json!({"allow": true, "type": "c", "major": major, "access": "rwm"});
            if let Some(minor) = minor {
                rule["minor"] = minor.into();
            }
            rule
        };
        rules.extend(ALWAYS.map(|(major, minor)| allow(Some(minor), major)));
        rules.push(allow(None, PTS));
    }
    Ok((nodes, rules))
}

/// A rule for a node.
pub fn rule(node: &Value, permissions: &str) -> Value {
    let access = if permissions.is_empty() { "rwm" } else { permissions };
    json!({"allow": true, "type": node["type"], "major": node["major"], "minor": node["minor"], "access": access})
}

/// A device of the host, as it is to be in the container.
pub fn node(host: &str, inside: &str) -> Option<Value> {
    let found = stat(Path::new(host)).ok()?;
    let kind = match SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFCHR => "c",
        SFlag::S_IFBLK => "b",
        _ => return None,
    };
    Some(json!({"path": inside, "type": kind, "major": major(found.st_rdev), "minor": minor(found.st_rdev),
        "fileMode": found.st_mode & 0o777, "uid": found.st_uid, "gid": found.st_gid}))
}

/// What one entry of the client's list stands for: a device, or all devices below a directory of the host. None at all is an error.
fn asked(device: &cri::Device) -> Result<Vec<Value>> {
    let (asked, inside) = (&device.host_path, if device.container_path.is_empty() { &device.host_path } else { &device.container_path });
    if let Some(c) = device.permissions.chars().find(|c| !"rwm".contains(*c)) {
        return Err(Fault::invalid_argument(format!(
            "devices {asked:?}: permissions {:?} have a {c:?} beside r, w and m",
            device.permissions
        )));
    }
    let host = std::fs::canonicalize(asked).map_err(|e| Fault::from(e).context(format!("devices: host path {asked:?}")))?;
    let mut nodes: Vec<Value> = node(&host.to_string_lossy(), inside).into_iter().collect();
    if host.is_dir() {
        walk(&host, &mut |path| {
            let below = path.strip_prefix(&host).unwrap_or(path);
            nodes.extend(node(&path.to_string_lossy(), &Path::new(inside).join(below).to_string_lossy()));
        });
    }
    if nodes.is_empty() {
        return Err(Fault::invalid_argument(format!("devices: {asked:?} is not a device on this node")));
    }
    Ok(nodes)
}

/// All device nodes below /dev, for privileged containers.
fn of_host() -> Vec<Value> {
    let mut nodes = vec![];
    walk(Path::new("/dev"), &mut |path| {
        let path = path.to_string_lossy();
        nodes.extend(node(&path, &path).filter(|_| !matches!(&*path, "/dev/console" | "/dev/ptmx")));
    });
    nodes
}

/// Everything below a directory that is not a link, without the places that belong to somebody's instance of a file system (the list is runc's).
fn walk(dir: &Path, found: &mut impl FnMut(&Path)) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(t)
                if t.is_dir()
                    && matches!(entry.file_name().to_str(), Some("pts" | "shm" | "fd" | "mqueue" | ".lxc" | ".lxd-mounts" | ".udev")) => {}
            Ok(t) if t.is_dir() => walk(&entry.path(), found),
            Ok(t) if !t.is_symlink() => found(&entry.path()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn config(host: &str, inside: &str, permissions: &str) -> cri::ContainerConfig {
        let device = cri::Device { host_path: host.into(), container_path: inside.into(), permissions: permissions.into() };
        cri::ContainerConfig { devices: vec![device], ..Default::default() }
    }

    #[test]
    fn a_device_its_rule_and_its_owner() {
        let (nodes, rules) = of(&config("/dev/null", "/dev/hole", "rw"), Privilege::None, Some((7, 8))).unwrap();
        assert_eq!((nodes[0]["path"].as_str(), nodes[0]["uid"].as_u64(), nodes[0]["gid"].as_u64()), (Some("/dev/hole"), Some(7), Some(8)));
        assert_eq!(rules[0], json!({"allow": false, "access": "rwm"}));
        assert_eq!(rules[1], json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"}));
    }

    #[test]
    fn a_directory_stands_for_its_devices() {
        let dir = tempfile::tempdir().unwrap();
        assert!(of(&config(dir.path().to_str().unwrap(), "/x", ""), Privilege::None, None).unwrap_err().message.contains("not a device"));
        let (nodes, _) = of(&config("/dev", "/devices", "r"), Privilege::None, None).unwrap();
        assert!(nodes.iter().any(|n| n["path"] == "/devices/null") && nodes.len() > 5);
        assert!(of(&config("/dev/null", "/x", "rwx"), Privilege::None, None).unwrap_err().message.contains('x'));
        assert!(of(&config("/no/such", "/x", ""), Privilege::None, None).unwrap_err().message.contains("/no/such"));
    }

    #[test]
    fn privileged_without_devices_and_with_leave_to_make_them() {
        let first = |p| of(&cri::ContainerConfig::default(), p, None).unwrap();
        assert!(first(Privilege::AllDevices).0.len() > 5 && first(Privilege::AllDevices).1[0]["allow"] == true);
        assert!(first(Privilege::AllAllowed).0.is_empty() && first(Privilege::AllAllowed).1 == [json!({"allow": true, "access": "rwm"})]);
        assert!(first(Privilege::NoDevices).0.is_empty() && first(Privilege::NoDevices).1[0]["allow"] == false);
    }
}

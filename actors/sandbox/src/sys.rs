//! Device nodes of the host.
use nix::sys::stat::{SFlag, major, minor, stat};
use serde_json::{Value, json};
use std::path::Path;

fn node(host: &str, inside: &str) -> Option<Value> {
    let found = stat(Path::new(host)).ok()?;
    let kind = match SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFCHR => "c",
        SFlag::S_IFBLK => "b",
        _ => return None,
    };
    Some(json!({"path": inside, "type": kind, "major": major(found.st_rdev), "minor": minor(found.st_rdev),
        "fileMode": found.st_mode & 0o777, "uid": found.st_uid, "gid": found.st_gid}))
}

/// A node for the container and its cgroup rule; `None` if there is no such device.
pub fn device(host: &str, inside: &str, permissions: &str) -> Option<(Value, Value)> {
    let node = node(host, inside)?;
    let access = if permissions.is_empty() { "rwm" } else { permissions };
    let rule = json!({"allow": true, "type": node["type"], "major": node["major"], "minor": node["minor"], "access": access});
    Some((node, rule))
}

/// All device nodes directly below /dev, for privileged containers.
pub fn host_devices() -> Vec<Value> {
    let entries = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let paths = entries.map(|e| e.path().to_string_lossy().into_owned()).filter(|p| !matches!(p.as_str(), "/dev/console" | "/dev/ptmx"));
    paths.filter_map(|p| node(&p, &p)).collect()
}

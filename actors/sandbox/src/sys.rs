//! Device nodes of the host.
use kernel::{Fault, Result};
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

/// Nodes for the container and their cgroup rules. A directory of the host stands for all devices below it; no device at all is an error.
pub fn devices(host: &str, inside: &str, permissions: &str) -> Result<Vec<(Value, Value)>> {
    let inside = if inside.is_empty() { host } else { inside };
    let mut nodes: Vec<Value> = node(host, inside).into_iter().collect();
    if Path::new(host).is_dir() {
        walk(Path::new(host), &mut |path| {
            let below = path.strip_prefix(host).unwrap_or(path);
            nodes.extend(node(&path.to_string_lossy(), &Path::new(inside).join(below).to_string_lossy()));
        });
    }
    if nodes.is_empty() {
        return Err(Fault::invalid_argument(format!("devices: {host:?} is not a device on this node")));
    }
    let access = if permissions.is_empty() { "rwm" } else { permissions };
    let rule =
        |node: &Value| json!({"allow": true, "type": node["type"], "major": node["major"], "minor": node["minor"], "access": access});
    Ok(nodes.into_iter().map(|n| (n.clone(), rule(&n))).collect())
}

/// All device nodes below /dev, for privileged containers.
pub fn host_devices() -> Vec<Value> {
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

//! cgroup version 1 in a container. libcontainer looks for the container's cgroup by a pid that, in a PID namespace which is joined, is another
//! process' outside or nobody's; it mounts writable what was asked for read-only; and it shows the node's own tree of systemd. So its one mount of
//! type `cgroup` is spelled out: each hierarchy is a bind of the container's own directory.
use super::place::{below, hierarchies};
use serde_json::{Value, json};
use std::io;
use std::path::Path;

/// Where cgroups are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// Replaces the mount. Version 2, containers with a cgroup namespace and paths by systemd's name stay as they are.
pub fn spell_out(config: &mut Value) -> io::Result<()> {
    let spaces = config.pointer("/linux/namespaces").and_then(Value::as_array);
    let own = spaces.is_some_and(|all| all.iter().any(|n| n["type"] == "cgroup"));
    let path = config.pointer("/linux/cgroupsPath").and_then(Value::as_str).filter(|p| p.starts_with('/')).map(str::to_owned);
    let (Some(path), false, false) = (path, own, Path::new(ROOT).join("cgroup.controllers").exists()) else { return Ok(()) };
    let Some(mounts) = config["mounts"].as_array_mut() else { return Ok(()) };
    let Some(at) = mounts.iter().position(|m| m["type"] == "cgroup") else { return Ok(()) };
    let destination = mounts[at]["destination"].as_str().unwrap_or(ROOT).to_owned();
    let read_only = mounts[at]["options"].as_array().is_some_and(|o| o.iter().any(|o| o == "ro"));
    let access = if read_only { "ro" } else { "rw" };
    let options = ["nosuid", "noexec", "nodev", "mode=755"];
    let mut all = vec![json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options})];
    let known = hierarchies()?;
    for entry in std::fs::read_dir(ROOT)?.flatten() {
        // Controllers that share a hierarchy have links to it.
        let Some(root) = entry.path().canonicalize().ok().filter(|p| known.contains(p)) else { continue };
        let name = entry.file_name();
        all.push(json!({"destination": Path::new(&destination).join(name), "type": "bind", "source": below(&root, Path::new(&path)),
            "options": ["rbind", "nosuid", "noexec", "nodev", access]}));
    }
    mounts.splice(at..=at, all);
    Ok(())
}

/// Is this a directory of a cgroup? The container's are made later than its mounts are looked at.
pub fn is_one(path: &str) -> bool {
    Path::new(path).starts_with(ROOT)
}

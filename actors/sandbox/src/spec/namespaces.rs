//! Namespaces of a container: most are the pod's.
use crate::record::PodRow;
use kernel::{Fault, Result};
use proto::cri::{NamespaceMode, NamespaceOption};
use serde_json::{Value, json};
use std::path::Path;

/// Cgroups of version 2.
pub fn unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// `linux.namespaces`. `target` is the pid of the container whose processes this one shall see.
pub fn of(options: &NamespaceOption, pod: &PodRow, privileged: bool, target: Option<u32>) -> Result<Vec<Value>> {
    let mut all = vec![json!({"type": "mount"})];
    if unified() && !privileged {
        all.push(json!({"type": "cgroup"}));
    }
    if !pod.netns.is_empty() {
        all.push(json!({"type": "network", "path": pod.netns}));
    }
    for kind in ["ipc", "uts"] {
        if let Some(path) = pod.handle.namespaces.get(kind) {
            all.push(json!({"type": kind, "path": path}));
        }
    }
    match NamespaceMode::try_from(options.pid) {
        Ok(NamespaceMode::Container) => all.push(json!({"type": "pid"})),
        Ok(NamespaceMode::Pod) => match pod.handle.namespaces.get("pid") {
            Some(path) => all.push(json!({"type": "pid", "path": path})),
            None => return Err(Fault::failed_precondition("the pod has no shared PID namespace")),
        },
        Ok(NamespaceMode::Node) => {}
        Ok(NamespaceMode::Target) => {
            let pid = target.ok_or_else(|| Fault::invalid_argument("namespace_options.pid: TARGET without a process"))?;
            all.push(json!({"type": "pid", "path": super::target::path(pid)}));
        }
        Err(_) => return Err(Fault::invalid_argument(format!("namespace_options.pid {} is not known", options.pid))),
    }
    Ok(all)
}

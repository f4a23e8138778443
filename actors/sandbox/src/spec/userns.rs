//! User namespaces of pods (`contracts/cri.md` §3.10): what a request may ask for, and what of the specification they change.
use crate::record::PodRow;
use kernel::{Fault, Result};
use messages::userns::{GID_LABEL, IdMap, UID_LABEL, UserNs};
use proto::cri::{self, NamespaceMode};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What a pod or container asks for; `None` are the node's users.
pub fn wanted(options: &cri::NamespaceOption) -> Result<Option<UserNs>> {
    let Some(asked) = &options.userns_options else { return Ok(None) };
    let field = "namespace_options.userns_options";
    match NamespaceMode::try_from(asked.mode) {
        Ok(NamespaceMode::Pod) => {
            let map = UserNs { uid: one(&asked.uids, field, "uids")?, gid: one(&asked.gids, field, "gids")? };
            Ok(Some(map))
        }
        Ok(NamespaceMode::Node) if asked.uids.is_empty() && asked.gids.is_empty() => Ok(None),
        Ok(NamespaceMode::Node) => {
            Err(Fault::invalid_argument(format!("{field}: mode NODE means the node's users, so it takes no mappings")))
        }
        Ok(other) => Err(Fault::invalid_argument(format!("{field}.mode: unsupported user namespace mode {}", other.as_str_name()))),
        Err(_) => Err(Fault::invalid_argument(format!("{field}.mode: {} is not a namespace mode", asked.mode))),
    }
}

fn one(list: &[cri::IdMapping], field: &str, name: &str) -> Result<IdMap> {
    let bad = |what: &str| Err(Fault::invalid_argument(format!("{field}.{name}: {what}")));
    let [m] = list else {
        return bad(&format!("mode POD takes exactly one mapping, there are {}", list.len()));
    };
    let map = IdMap { container: m.container_id, host: m.host_id, size: m.length };
    if map.size == 0 {
        return bad("the mapping has length 0");
    }
    if map.host.checked_add(map.size).is_none() || map.container.checked_add(map.size).is_none() {
        return bad("the mapping goes past the largest id");
    }
    if map.container != 0 {
        return bad(&format!(
            "id 0 of the container is not mapped (the mapping begins at {}), and nothing can be set up without root",
            map.container
        ));
    }
    Ok(map)
}

/// Of a pod. It was checked when the pod was made.
pub fn of_pod(pod: &PodRow) -> Option<UserNs> {
    let security = pod.config.0.linux.as_ref()?.security_context.as_ref()?;
    wanted(security.namespace_options.as_ref()?).ok().flatten()
}

/// A container has its pod's users: it cannot have others.
pub fn fits(options: &cri::NamespaceOption, pod: &PodRow) -> Result<()> {
    let (container, pod_has) = (wanted(options)?, of_pod(pod));
    if container == pod_has {
        return Ok(());
    }
    let name = |userns: Option<UserNs>| match userns {
        None => "the node's users".to_owned(),
        Some(u) => format!("uids {} and gids {}", u.uid.label(), u.gid.label()),
    };
    Err(Fault::invalid_argument(format!(
        "namespace_options.userns_options: the container asks for {}, its pod has {}; they must be the same",
        name(container),
        name(pod_has)
    )))
}

/// Labels of a snapshot that the pod's users write to.
pub fn labels(pod: &PodRow) -> BTreeMap<String, String> {
    let maps = of_pod(pod).map(|u| [(UID_LABEL.to_owned(), u.uid.label()), (GID_LABEL.to_owned(), u.gid.label())]);
    maps.into_iter().flatten().collect()
}

fn oci(m: &IdMap) -> Value {
    json!([{"containerID": m.container, "hostID": m.host, "size": m.size}])
}

/// A mount's own mapping, as CRI gives it.
pub fn of_mount(m: &cri::Mount, into: &mut Value) -> Result<()> {
    let bad = |what: &str| Err(Fault::invalid_argument(format!("mounts {}: {what}", m.container_path)));
    match (m.uid_mappings.is_empty(), m.gid_mappings.is_empty()) {
        (true, true) => return Ok(()),
        (false, false) => {}
        _ => return bad("uidMappings and gidMappings go together"),
    }
    for (key, list) in [("uidMappings", &m.uid_mappings), ("gidMappings", &m.gid_mappings)] {
        if list.iter().any(|i| i.length == 0) {
            return bad(&format!("{key}: a mapping has length 0"));
        }
        into[key] = list.iter().map(|i| json!({"containerID": i.container_id, "hostID": i.host_id, "size": i.length})).collect();
    }
    Ok(())
}

/// Changes a specification for the pod's user namespace.
pub fn adapt(linux: &mut Map<String, Value>, mounts: &mut Vec<Value>, options: &cri::NamespaceOption, pod: &PodRow) -> Result<()> {
    let Some(userns) = of_pod(pod) else { return Ok(()) };
    let path = pod.handle.namespaces.get("user");
    let path = path.ok_or_else(|| Fault::failed_precondition(format!("the shim of pod {} holds no user namespace", pod.id)))?;
    if let Some(spaces) = linux.get_mut("namespaces").and_then(Value::as_array_mut) {
        spaces.insert(0, json!({"type": "user", "path": path}));
    }
    linux.insert("uidMappings".into(), oci(&userns.uid));
    linux.insert("gidMappings".into(), oci(&userns.gid));
    // The kernel lets the pod's root mount these only where it owns the namespace that they show; where it is the node's, they come from there.
    let nodes = |mode: i32| mode == NamespaceMode::Node as i32;
    for (kind, place, missing) in
        [("sysfs", "/sys", pod.netns.is_empty()), ("proc", "/proc", nodes(options.pid)), ("mqueue", "/dev/mqueue", nodes(options.ipc))]
    {
        // Blocking, as all of the specification's making: what the node has not is not there.
        if missing && !Path::new(place).exists() {
            mounts.retain(|m| m["type"] != kind);
        }
        for m in mounts.iter_mut().filter(|m| missing && m["type"] == kind) {
            let access = if kind == "sysfs" { "rro" } else { "rw" };
            *m = json!({"destination": m["destination"], "type": "bind", "source": place,
                "options": ["rbind", "rprivate", "nosuid", "noexec", "nodev", access]});
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn options(mode: NamespaceMode, uids: &[(u32, u32, u32)], gids: &[(u32, u32, u32)]) -> cri::NamespaceOption {
        let list = |all: &[(u32, u32, u32)]| {
            all.iter().map(|(c, h, l)| cri::IdMapping { container_id: *c, host_id: *h, length: *l }).collect::<Vec<_>>()
        };
        let userns = cri::UserNamespace { mode: mode as i32, uids: list(uids), gids: list(gids) };
        cri::NamespaceOption { userns_options: Some(userns), ..Default::default() }
    }

    #[test]
    fn only_one_mapping_of_users_and_one_of_groups_that_includes_root_is_taken() {
        let good = (0, 1000, 65536);
        let found = wanted(&options(NamespaceMode::Pod, &[good], &[good])).unwrap().unwrap();
        assert_eq!((found.uid.label().as_str(), found.root()), ("0:1000:65536", (1000, 1000)));
        for (uids, gids, text) in [
            (vec![], vec![good], "uids: mode POD takes exactly one"),
            (vec![good], vec![], "gids: mode POD takes exactly one"),
            (vec![good, (65536, 200_000, 1)], vec![good], "there are 2"),
            (vec![(0, 1000, 0)], vec![good], "length 0"),
            (vec![(1, 1000, 10)], vec![good], "id 0 of the container is not mapped"),
            (vec![(0, u32::MAX, 2)], vec![good], "largest id"),
        ] {
            let fault = wanted(&options(NamespaceMode::Pod, &uids, &gids)).unwrap_err();
            assert!(fault.message.contains(text), "{fault} lacks {text:?}");
        }
        assert_eq!(wanted(&options(NamespaceMode::Node, &[], &[])).unwrap(), None);
        assert!(wanted(&options(NamespaceMode::Node, &[good], &[])).unwrap_err().message.contains("no mappings"));
        for mode in [NamespaceMode::Container, NamespaceMode::Target] {
            assert!(wanted(&options(mode, &[good], &[good])).unwrap_err().message.contains("unsupported user namespace mode"));
        }
    }
}

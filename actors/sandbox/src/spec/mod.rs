//! The OCI specification of a container, from CRI's configuration, the image's, and the pod's.
pub mod mounts;
pub mod resources;
pub mod security;
pub mod target;
pub mod user;
pub mod userns;

use crate::Settings;
use crate::record::PodRow;
use kernel::{Fault, Result};
use messages::image::Image;
use messages::snapshot::Mount;
use proto::cri::{self, NamespaceMode, SupplementalGroupsPolicy};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// What a specification is made of.
pub struct Input<'a> {
    /// Container id.
    pub id: &'a str,
    /// Its configuration.
    pub config: &'a cri::ContainerConfig,
    /// Its pod.
    pub pod: &'a PodRow,
    /// Its image.
    pub image: &'a Image,
    /// Mounts of its root.
    pub rootfs: &'a [Mount],
    /// Directory of the pod's files.
    pub files: PathBuf,
    /// The pod's /dev/shm.
    pub shm: PathBuf,
    /// Process whose PID namespace is joined (mode TARGET).
    pub target: Option<u32>,
    /// The daemon's settings.
    pub settings: &'a Settings,
}

fn strings(config: &Value, key: &str) -> Vec<String> {
    let list = config.pointer(&format!("/config/{key}")).and_then(Value::as_array).cloned().unwrap_or_default();
    list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

/// The command: the client's over the image's, as Kubernetes documents it.
fn args(config: &cri::ContainerConfig, image: &Value) -> Result<Vec<String>> {
    let (mut command, mut arguments) = (config.command.clone(), config.args.clone());
    if command.is_empty() {
        command = strings(image, "Entrypoint");
        if arguments.is_empty() {
            arguments = strings(image, "Cmd");
        }
    }
    command.extend(arguments);
    if command.is_empty() { Err(Fault::invalid_argument("no command: neither the container nor its image names one")) } else { Ok(command) }
}

fn environment(config: &cri::ContainerConfig, image: &Value, hostname: &str) -> Vec<String> {
    let mut all = strings(image, "Env");
    if !all.iter().any(|e| e.starts_with("PATH=")) {
        all.push("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    }
    let mut set = |key: &str, value: &str| {
        all.retain(|e| e.split('=').next() != Some(key));
        all.push(format!("{key}={value}"));
    };
    set("HOSTNAME", hostname);
    if config.tty {
        set("TERM", "xterm");
    }
    for pair in &config.envs {
        set(&pair.key, &String::from_utf8_lossy(&pair.value));
    }
    all
}

/// User, group and supplemental groups.
fn user(config: &cri::ContainerConfig, input: &Input<'_>) -> Result<user::User> {
    let context = config.linux.as_ref().and_then(|l| l.security_context.clone()).unwrap_or_default();
    let layers = user::layers(input.rootfs);
    let (passwd, group) = (user::read(&layers, "/etc/passwd"), user::read(&layers, "/etc/group"));
    let named = match (&context.run_as_user, context.run_as_username.as_str()) {
        (Some(uid), _) => uid.value.to_string(),
        (None, "") if context.run_as_group.is_some() => {
            return Err(Fault::invalid_argument("run_as_group needs run_as_user or run_as_username"));
        }
        (None, "") => input.image.user().to_owned(),
        (None, name) => name.to_owned(),
    };
    let named = match &context.run_as_group {
        Some(gid) => format!("{}:{}", named.split(':').next().unwrap_or_default(), gid.value),
        None => named,
    };
    let strict = context.supplemental_groups_policy == SupplementalGroupsPolicy::Strict as i32;
    let mut found = user::resolve(&named, &passwd, &group, !strict)?;
    for extra in &context.supplemental_groups {
        let extra = u32::try_from(*extra).map_err(|_| Fault::invalid_argument(format!("supplemental_groups: {extra} is not a group")))?;
        if !found.groups.contains(&extra) {
            found.groups.push(extra);
        }
    }
    Ok(found)
}

fn namespaces(options: &cri::NamespaceOption, pod: &PodRow, target: Option<u32>) -> Result<Vec<Value>> {
    let mut all = vec![json!({"type": "mount"})];
    if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
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
            let pid = target.ok_or_else(|| Fault::internal("namespace_options.pid: TARGET without a process"))?;
            all.push(json!({"type": "pid", "path": target::path(pid)}));
        }
        Err(_) => return Err(Fault::invalid_argument(format!("namespace_options.pid: {} is not a namespace mode", options.pid))),
    }
    Ok(all)
}

fn devices(config: &cri::ContainerConfig, privileged: bool) -> Result<(Vec<Value>, Vec<Value>)> {
    let mut rules = vec![json!({"allow": privileged, "access": "rwm"})];
    let mut nodes = vec![];
    for device in &config.devices {
        for (node, rule) in crate::sys::devices(&device.host_path, &device.container_path, &device.permissions)? {
            nodes.push(node);
            rules.push(rule);
        }
    }
    if privileged {
        let asked: Vec<Value> = nodes.iter().map(|n| n["path"].clone()).collect();
        nodes.extend(crate::sys::host_devices().into_iter().filter(|n| !asked.contains(&n["path"])));
    } else {
        for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)] {
            rules.push(json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"}));
        }
        rules.push(json!({"allow": true, "type": "c", "major": 136, "access": "rwm"}));
    }
    Ok((nodes, rules))
}

/// Where the container's cgroup is: `slice:cri-containerd:<id>` for systemd, a path otherwise.
fn cgroups_path(parent: &str, id: &str, systemd: bool) -> String {
    if systemd {
        let slice = Path::new(parent).file_name().map_or_else(|| "system.slice".into(), |n| n.to_string_lossy().into_owned());
        return format!("{slice}:cri-containerd:{id}");
    }
    let parent = if parent.is_empty() { "/k8s.io" } else { parent };
    format!("{}/{id}", parent.trim_end_matches('/'))
}

/// Builds it. Blocking: it looks at files of the image and of the host.
pub fn build(input: &Input<'_>) -> Result<Value> {
    let config = input.config;
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.clone().unwrap_or_default();
    let pod = &input.pod.config.0;
    let pod_linux = pod.linux.clone().unwrap_or_default();
    let privileged = context.privileged;
    if privileged && !pod_linux.security_context.as_ref().is_some_and(|s| s.privileged) {
        return Err(Fault::invalid_argument("no privileged container allowed in sandbox: the pod is not privileged"));
    }
    let options = context.namespace_options.clone().unwrap_or_default();
    let (caps, ambient) = security::capabilities(&context)?;
    let user = user(config, input)?;
    let hostname = std::fs::read_to_string(input.files.join("hostname")).unwrap_or_default().trim().to_owned();
    let cwd =
        [config.working_dir.as_str(), input.image.config.pointer("/config/WorkingDir").and_then(Value::as_str).unwrap_or_default(), "/"];
    let cwd = cwd.into_iter().find(|d| !d.is_empty()).unwrap_or("/");

    let mut mounts = mounts::base(privileged);
    mounts::pod_file(&mut mounts, &config.mounts, "/dev/shm", &input.shm, false);
    mounts::pod_file(&mut mounts, &config.mounts, "/etc/hostname", &input.files.join("hostname"), context.readonly_rootfs);
    mounts::pod_file(&mut mounts, &config.mounts, "/etc/hosts", &input.files.join("hosts"), context.readonly_rootfs);
    mounts::pod_file(&mut mounts, &config.mounts, "/etc/resolv.conf", &input.files.join("resolv.conf"), context.readonly_rootfs);
    let wanted = mounts::wanted(&config.mounts)?;
    // What the client mounts on a place of the base replaces it.
    mounts.retain(|m| !wanted.iter().any(|w| w["destination"] == m["destination"]));
    mounts.extend(wanted);

    let (nodes, rules) = devices(config, privileged)?;
    let limits = linux.resources.clone().unwrap_or_default();
    let mut resources = resources::linux(&limits);
    resources["devices"] = rules.into();
    let mut oci = Map::new();
    oci.insert("namespaces".into(), namespaces(&options, input.pod, input.target)?.into());
    oci.insert("resources".into(), resources);
    oci.insert("devices".into(), nodes.into());
    oci.insert("cgroupsPath".into(), cgroups_path(&pod_linux.cgroup_parent, input.id, input.settings.systemd_cgroup).into());
    if !privileged {
        let or = |list: &[String], default: &[&str]| if list.is_empty() { json!(default) } else { json!(list) };
        oci.insert("maskedPaths".into(), or(&context.masked_paths, security::MASKED));
        oci.insert("readonlyPaths".into(), or(&context.readonly_paths, security::READ_ONLY));
    }
    userns::adapt(&mut oci, &mut mounts, &options, input.pod)?;
    oci.insert("rootfsPropagation".into(), mounts::root_propagation(&mounts).into());
    if let Some(profile) = security::seccomp(context.seccomp.as_ref(), privileged, &input.settings.unset_seccomp, &caps)? {
        oci.insert("seccomp".into(), profile);
    }
    let metadata = pod.metadata.clone().unwrap_or_default();
    let annotations = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": input.pod.id,
        "io.kubernetes.cri.sandbox-name": metadata.name,
        "io.kubernetes.cri.sandbox-namespace": metadata.namespace,
        "io.kubernetes.cri.sandbox-uid": metadata.uid,
        "io.kubernetes.cri.container-name": config.metadata.clone().unwrap_or_default().name,
        "io.kubernetes.cri.image-name": config.image.clone().unwrap_or_default().image,
    });
    let mut process = json!({
        "terminal": config.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": args(config, &input.image.config)?,
        "env": environment(config, &input.image.config, &hostname),
        "cwd": cwd,
        "capabilities": security::capabilities_json(&caps, &ambient),
        "noNewPrivileges": context.no_new_privs,
        "oomScoreAdj": resources::oom_score(limits.oom_score_adj, input.settings.restrict_oom_score_adj),
    });
    if user.uid != 0 && !privileged {
        // A user that is not root has its capabilities only by the ambient set.
        process["capabilities"]["effective"] = process["capabilities"]["ambient"].clone();
        process["capabilities"]["permitted"] = process["capabilities"]["ambient"].clone();
    }
    Ok(json!({
        "ociVersion": "1.1.0",
        "process": process,
        "root": {"path": "rootfs", "readonly": context.readonly_rootfs},
        "mounts": mounts,
        "annotations": annotations,
        "linux": oci,
    }))
}

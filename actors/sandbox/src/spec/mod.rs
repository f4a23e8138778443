//! The OCI specification of a container, from CRI's configuration, the image's, the pod's, and the daemon's settings.
//!
//! It is made of a base (built in, or the handler's `base_runtime_spec`), over which each module puts its part. Order matters where one part goes by
//! another: seccomp by the final capabilities, devices by the user, annotations that identify by nothing that came before.
pub mod annotations;
pub mod apparmor;
pub mod capabilities;
pub mod cdi;
pub mod cgroups;
pub mod classes;
pub mod devices;
pub mod mounts;
pub mod namespaces;
pub mod process;
pub mod resources;
pub mod seccomp;
pub mod selinux;
pub mod target;
pub mod user;
pub mod userns;
pub mod yaml;

use crate::record::PodRow;
use crate::{Handler, Settings};
use devices::Privilege;
use kernel::{Fault, Result};
use messages::image::Image;
use messages::snapshot::Mount;
use proto::cri::{self, SupplementalGroupsPolicy};
use selinux::Labels;
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// What a specification is made of.
pub struct Input<'a> {
    /// Container id.
    pub id: &'a str,
    /// Its configuration.
    pub config: &'a cri::ContainerConfig,
    /// Its pod.
    pub pod: &'a PodRow,
    /// The pod's configuration as the request has it: what it says counts, not what was said when the pod was made.
    pub sandbox: &'a cri::PodSandboxConfig,
    /// Its image.
    pub image: &'a Image,
    /// Mounts of its root.
    pub rootfs: &'a [Mount],
    /// Directory of the pod's files.
    pub files: PathBuf,
    /// The pod's /dev/shm.
    pub shm: PathBuf,
    /// Pid of the container whose processes it shall see.
    pub target: Option<u32>,
    /// SELinux labels.
    pub labels: &'a Labels,
    /// The pod's handler.
    pub handler: &'a Handler,
    /// The daemon's settings.
    pub settings: &'a Settings,
}

impl Input<'_> {
    fn context(&self) -> cri::LinuxContainerSecurityContext {
        self.config.linux.as_ref().and_then(|l| l.security_context.clone()).unwrap_or_default()
    }
    fn privileged(&self) -> bool {
        self.context().privileged
    }
    fn name(&self) -> &str {
        self.config.metadata.as_ref().map_or("", |m| m.name.as_str())
    }
}

/// Masked and read-only paths of the built-in base, which `disable_proc_mount` keeps.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/interrupts",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn base(handler: &Handler) -> Value {
    if let Some(base) = &handler.base_spec {
        return (**base).clone();
    }
    json!({"ociVersion": "1.1.0", "process": {}, "mounts": mounts::base(), "linux": {"maskedPaths": MASKED, "readonlyPaths": READ_ONLY}})
}

/// Builds it. Blocking: it looks at files of the image and of the host.
pub fn build(input: &Input<'_>) -> Result<Value> {
    let of_pod = input.sandbox.linux.as_ref().and_then(|l| l.security_context.as_ref());
    if input.privileged() && !of_pod.is_some_and(|s| s.privileged) {
        return Err(Fault::invalid_argument("no privileged container allowed in sandbox: the pod is not privileged"));
    }
    let mut spec = base(input.handler);
    if !spec["linux"].is_object() {
        spec["linux"] = json!({});
    }
    put_process(&mut spec, input)?;
    put_security(&mut spec, input)?;
    put_mounts(&mut spec, input)?;
    put_linux(&mut spec, input)?;
    put_users(&mut spec, input)?;
    cdi::inject(&mut spec, &cdi::asked(input.config, input.settings.cdi)?, &input.settings.cdi_dirs)?;
    put_annotations(&mut spec, input);
    Ok(spec)
}

/// User, group and supplemental groups.
fn user(input: &Input<'_>) -> Result<user::User> {
    let context = input.context();
    let layers = user::layers(input.rootfs);
    let (passwd, group) = (user::read(&layers, "/etc/passwd")?, user::read(&layers, "/etc/group")?);
    let named = match (context.run_as_username.as_str(), &context.run_as_user) {
        ("", None) if context.run_as_group.is_some() => {
            return Err(Fault::invalid_argument("user group is specified without user: run_as_group needs run_as_user or run_as_username"));
        }
        ("", None) => input.image.user().to_owned(),
        ("", Some(uid)) => uid.value.to_string(),
        (name, _) => name.to_owned(),
    };
    let named = match &context.run_as_group {
        Some(gid) => format!("{}:{}", named.split(':').next().unwrap_or_default(), gid.value),
        None => named,
    };
    let merge = match SupplementalGroupsPolicy::try_from(context.supplemental_groups_policy) {
        Ok(policy) => policy == SupplementalGroupsPolicy::Merge,
        Err(_) => {
            return Err(Fault::invalid_argument(format!("supplemental_groups_policy {} is not known", context.supplemental_groups_policy)));
        }
    };
    let mut found = user::resolve(&named, &passwd, &group, merge)?;
    for extra in &context.supplemental_groups {
        let extra = u32::try_from(*extra).map_err(|_| Fault::invalid_argument(format!("supplemental_groups: {extra} is not a group")))?;
        found.groups.insert(extra);
    }
    Ok(found)
}

fn put_process(spec: &mut Value, input: &Input<'_>) -> Result<()> {
    let (config, image) = (input.config, &input.image.config);
    let user = user(input)?;
    let base: Vec<String> = serde_json::from_value(spec["process"]["env"].clone()).unwrap_or_default();
    let of_node = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let hostname = Some(input.sandbox.hostname.clone()).filter(|h| !h.is_empty()).unwrap_or_else(of_node);
    let context = input.context();
    let capabilities = capabilities::of(&context, input.handler.base_spec.as_ref().and_then(|b| b.pointer("/process/capabilities")))?;
    let process = &mut spec["process"];
    process["terminal"] = config.tty.into();
    process["user"] = json!({"uid": user.uid, "gid": user.gid, "additionalGids": user.groups});
    process["args"] = process::args(config, image)?.into();
    process["env"] = process::environment(&base, config, image, &hostname).into();
    process["cwd"] = process::directory(config, image).into();
    process["capabilities"] = capabilities.json();
    process["noNewPrivileges"] = context.no_new_privs.into();
    // Without a word of anybody it would inherit the daemon's own, which is to keep the daemon alive, not its containers.
    let asked = config.linux.as_ref().and_then(|l| l.resources.as_ref()).map(|r| r.oom_score_adj);
    if asked.is_some() || process["oomScoreAdj"].is_null() {
        process["oomScoreAdj"] = resources::oom_score(asked.unwrap_or(0), input.settings.restrict_oom_score_adj).into();
    }
    // A file from elsewhere may have a root of its own.
    spec["root"] = json!({"path": "rootfs", "readonly": context.readonly_rootfs});
    #[allow(deprecated, reason = "clients of before Kubernetes 1.30 send the old field")]
    let old = context.seccomp_profile_path.as_str();
    let profile = seccomp::of(context.seccomp.as_ref(), old, context.privileged, &input.settings.unset_seccomp, &capabilities.all)?;
    match profile {
        Some(profile) => spec["linux"]["seccomp"] = profile,
        None if context.privileged => remove(spec, "/linux", "seccomp"),
        None => {}
    }
    Ok(())
}

fn remove(spec: &mut Value, at: &str, key: &str) {
    if let Some(all) = spec.pointer_mut(at).and_then(Value::as_object_mut) {
        all.remove(key);
    }
}

/// AppArmor, SELinux, masked and read-only paths.
fn put_security(spec: &mut Value, input: &Input<'_>) -> Result<()> {
    let (context, settings) = (input.context(), input.settings);
    #[allow(deprecated, reason = "clients of before Kubernetes 1.30 send the old field")]
    let old = context.apparmor_profile.as_str();
    match settings.apparmor.profile(context.apparmor.as_ref(), old, context.privileged, settings.disable_apparmor)? {
        Some(profile) => spec["process"]["apparmorProfile"] = profile.into(),
        None if context.privileged => remove(spec, "/process", "apparmorProfile"),
        None => {}
    }
    if !input.labels.process.is_empty() {
        spec["linux"]["mountLabel"] = input.labels.mount.as_str().into();
        // A privileged container runs as if there were no SELinux.
        if !context.privileged {
            let machine = input.handler.kind.contains("kata");
            let label = if machine { selinux::for_machine(&input.labels.process) } else { input.labels.process.clone() };
            spec["process"]["selinuxLabel"] = label.into();
        }
    }
    let linux = &mut spec["linux"];
    if context.privileged {
        remove(linux, "", "maskedPaths");
        remove(linux, "", "readonlyPaths");
    } else if !settings.disable_proc_mount {
        // Exactly what the client says, were it nothing: an unmasked /proc is asked for by empty lists.
        linux["maskedPaths"] = json!(context.masked_paths);
        linux["readonlyPaths"] = json!(context.readonly_paths);
    }
    Ok(())
}

fn put_mounts(spec: &mut Value, input: &Input<'_>) -> Result<()> {
    let (config, context) = (input.config, input.context());
    let mut all: Vec<Value> = spec["mounts"].as_array().cloned().unwrap_or_default();
    all.retain(|m| !matches!(m["destination"].as_str(), Some("/run" | "/sys/fs/cgroup" | "/dev/shm")));
    if context.privileged {
        let sys = all.iter_mut().filter(|m| m["destination"] == "/sys").filter_map(|m| m["options"].as_array_mut());
        sys.flatten().filter(|o| *o == "ro").for_each(|o| *o = "rw".into());
    }
    let own_cgroups = namespaces::unified() && !context.privileged;
    all.push(mounts::cgroup(context.privileged || input.handler.cgroup_writable, !own_cgroups));
    mounts::without_replaced(&mut all, &config.mounts);
    let access = if context.readonly_rootfs { "ro" } else { "rw" };
    all.extend(mounts::pod_file(&config.mounts, "/dev/shm", &input.shm, &["rbind", "rprivate", "nosuid", "nodev", "noexec", "rw"]));
    for name in ["hostname", "hosts", "resolv.conf"] {
        let source = input.files.join(name);
        if !input.labels.mount.is_empty() {
            selinux::relabel(&source, &input.labels.mount)?;
        }
        all.extend(mounts::pod_file(&config.mounts, &format!("/etc/{name}"), &source, &["rbind", "rprivate", access]));
    }
    let wanted = mounts::Wanted { recursive_read_only: input.handler.recursive_read_only, label: &input.labels.mount };
    all.extend(wanted.mounts(&config.mounts)?);
    if let Some(propagation) = mounts::root_propagation(&all) {
        spec["linux"]["rootfsPropagation"] = propagation.into();
    }
    spec["mounts"] = all.into();
    Ok(())
}

/// Namespaces, devices, resources, classes, the cgroup.
fn put_linux(spec: &mut Value, input: &Input<'_>) -> Result<()> {
    let (config, settings, context) = (input.config, input.settings, input.context());
    let options = context.namespace_options.clone().unwrap_or_default();
    let privilege = match (context.privileged, input.handler.privileged_without_host_devices, input.handler.all_devices_allowed) {
        (false, ..) => Privilege::None,
        (true, false, _) => Privilege::AllDevices,
        (true, true, true) => Privilege::AllAllowed,
        (true, true, false) => Privilege::NoDevices,
    };
    let id = |value: &Option<cri::Int64Value>| value.as_ref().map_or(0, |v| v.value as u32);
    let owner = settings.device_ownership.then(|| (id(&context.run_as_user), id(&context.run_as_group)));
    let (nodes, rules) = devices::of(config, privilege, owner)?;
    let limits = config.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
    let linux = &mut spec["linux"];
    linux["namespaces"] = namespaces::of(&options, input.pod, context.privileged, input.target)?.into();
    let mut resources = linux["resources"].take();
    if !resources.is_object() {
        resources = json!({});
    }
    resources::merge(&mut resources, &resources::linux(&limits, &settings.controllers)?);
    resources["devices"] = rules.into();
    let (own, of_pod) = (&config.annotations, &input.sandbox.annotations);
    if let Some(blockio) = classes::blockio(&settings.blockio, input.name(), own, of_pod)? {
        resources["blockIO"] = blockio;
    }
    if let Some(rdt) = classes::rdt(&settings.rdt, input.name(), own, of_pod)? {
        linux["intelRdt"] = rdt;
    }
    linux["resources"] = resources;
    let mut devices = linux["devices"].as_array().cloned().unwrap_or_default();
    devices.retain(|d| !nodes.iter().any(|n| n["path"] == d["path"]));
    devices.extend(nodes);
    linux["devices"] = devices.into();
    let parent = input.sandbox.linux.as_ref().map_or("", |l| l.cgroup_parent.as_str());
    linux["cgroupsPath"] = cgroups::path(parent, input.id, input.handler.runtime.systemd_cgroup).into();
    Ok(())
}

/// The pod's user namespace, where it has one.
fn put_users(spec: &mut Value, input: &Input<'_>) -> Result<()> {
    let options = input.context().namespace_options.unwrap_or_default();
    let mut mounts = spec["mounts"].take();
    if let (Some(linux), Some(mounts)) = (spec["linux"].as_object_mut(), mounts.as_array_mut()) {
        userns::adapt(linux, mounts, &options, input.pod)?;
    }
    spec["mounts"] = mounts;
    Ok(())
}

fn put_annotations(spec: &mut Value, input: &Input<'_>) {
    let mut all = spec["annotations"].as_object().cloned().unwrap_or_else(Map::new);
    annotations::passed(&input.sandbox.annotations, &input.handler.pod_annotations, &mut all);
    annotations::passed(&input.config.annotations, &input.handler.container_annotations, &mut all);
    let image = input.config.image.clone().unwrap_or_default();
    let first = input.image.repo_tags.first().or(input.image.repo_digests.first()).unwrap_or(&input.image.id);
    let image = if image.user_specified_image.is_empty() { first } else { &image.user_specified_image };
    annotations::identity(&input.pod.id, input.sandbox, input.name(), image, &mut all);
    spec["annotations"] = all.into();
}

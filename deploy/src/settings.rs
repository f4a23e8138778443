//! From the configuration to what the sandbox actor goes by. What has to be read or probed on the node for it is read here, once, at the start.
use crate::config::Config;
use crate::config::schema::{Handler, kernel};
use anyhow::Context;
use messages::task::{Options, Runtime};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use troupe_sandbox::Settings;
use troupe_sandbox::spec::classes::{self, Class};
use troupe_sandbox::spec::resources::Controllers;

/// Containerd's runc shim, whose work Troupe's own shim does.
const RUNC_V2: &str = "io.containerd.runc.v2";
/// Troupe's own.
const TROUPE_V2: &str = "io.containerd.troupe.v2";
/// Mounts can be made read-only recursively since this kernel.
const RECURSIVE_READ_ONLY: (u32, u32) = (5, 12);

/// All of it.
pub fn of(config: &Config) -> anyhow::Result<Settings> {
    let (runtime, tasks) = (&config.plugins.runtime, &config.plugins.tasks);
    let file = |path: &str| (!path.is_empty()).then(|| Path::new(path).to_owned());
    let blockio = file(&tasks.blockio_config_file).map(|p| classes::read_blockio(&p)).transpose().context("blockio_config_file")?;
    let rdt = file(&tasks.rdt_config_file).map(|p| classes::read_rdt(&p)).transpose().context("rdt_config_file")?;
    let handlers = runtime.containerd.runtimes.iter().map(|(name, h)| Ok((name.clone(), handler(config, name, h)?)));
    Ok(Settings {
        default_handler: runtime.containerd.default_runtime_name.clone(),
        handlers: handlers.collect::<anyhow::Result<BTreeMap<_, _>>>()?,
        restrict_oom_score_adj: runtime.restrict_oom_score_adj,
        unset_seccomp: runtime.unset_seccomp_profile.clone(),
        disable_proc_mount: runtime.disable_proc_mount,
        disable_apparmor: runtime.disable_apparmor,
        apparmor: Default::default(),
        selinux: runtime.enable_selinux,
        selinux_range: runtime.selinux_category_range,
        device_ownership: runtime.device_ownership_from_security_context,
        controllers: Controllers::probe(runtime.disable_hugetlb_controller, runtime.tolerate_missing_hugetlb_controller),
        cdi: runtime.enable_cdi,
        cdi_dirs: runtime.cdi_spec_dirs.clone(),
        blockio: Class { known: blockio, ignore: runtime.containerd.ignore_blockio_not_enabled_errors },
        rdt: Class { known: rdt, ignore: runtime.containerd.ignore_rdt_not_enabled_errors },
        deprecations: deprecations(config),
        criu: runtime.enable_criu,
        unprivileged_ports: runtime.enable_unprivileged_ports,
        unprivileged_icmp: runtime.enable_unprivileged_icmp && kernel() >= (4, 11),
        max_log_line: runtime.max_container_log_line_size,
        ignore_image_volumes: runtime.ignore_image_defined_volumes,
        snapshotters: runtime.containerd.runtimes.keys().map(|h| (h.clone(), crate::compose::snapshotter(config, h))).collect(),
        snapshotter: config.plugins.images.snapshotter.clone(),
        info: info(config)?,
    })
}

fn handler(config: &Config, name: &str, h: &Handler) -> anyhow::Result<troupe_sandbox::Handler> {
    let base_spec = match h.base_runtime_spec.as_str() {
        "" => None,
        path => Some(base_spec(path).with_context(|| format!("containerd.runtimes.{name}.base_runtime_spec {path:?}"))?),
    };
    Ok(troupe_sandbox::Handler {
        runtime: runtime(config, h)?,
        kind: h.runtime_type.clone(),
        pod_annotations: h.pod_annotations.clone(),
        container_annotations: h.container_annotations.clone(),
        privileged_without_host_devices: h.privileged_without_host_devices,
        all_devices_allowed: h.privileged_without_host_devices_all_devices_allowed,
        cgroup_writable: h.cgroup_writable,
        recursive_read_only: kernel() >= RECURSIVE_READ_ONLY,
        base_spec: base_spec.map(Arc::new),
    })
}

fn base_spec(path: &str) -> anyhow::Result<Value> {
    let spec: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    anyhow::ensure!(spec["ociVersion"].is_string(), "it is not an OCI specification: it has no ociVersion");
    Ok(spec)
}

fn runtime(config: &Config, h: &Handler) -> anyhow::Result<Runtime> {
    let o = &h.options;
    let name = match (h.runtime_path.as_str(), h.runtime_type.as_str()) {
        ("", RUNC_V2 | "") => TROUPE_V2.into(),
        ("", other) => other.into(),
        (path, _) => path.into(),
    };
    // A shim that is neither runc's nor ours gets its options as they are written: a file's path, or the table itself.
    let other = match h.runtime_type.as_str() {
        "" | RUNC_V2 | TROUPE_V2 => None,
        _ if o.other.is_empty() => None,
        _ => {
            let text = |key: &str| o.other.get(key).and_then(toml::Value::as_str).unwrap_or_default().to_owned();
            let (type_url, config_path) = (text("TypeUrl"), text("ConfigPath"));
            let body = if config_path.is_empty() { toml::to_string(&o.other)? } else { String::new() };
            Some(Options { type_url, config_path, config_body: body })
        }
    };
    Ok(Runtime {
        name,
        binary_name: o.binary_name.clone(),
        systemd_cgroup: o.systemd_cgroup,
        root: if o.root.is_empty() { format!("{}/runc", config.state) } else { o.root.clone() },
        criu_image_path: o.criu_image_path.clone(),
        criu_work_path: o.criu_work_path.clone(),
        io_uid: o.io_uid,
        io_gid: o.io_gid,
        no_new_keyring: o.no_new_keyring,
        shim_cgroup: o.shim_cgroup.clone(),
        other,
    })
}

/// Which driver answers for the node: the default handler's, or of the first handler by name whose options say; systemd's where systemd runs otherwise.
pub fn systemd_cgroup(config: &Config) -> bool {
    let containerd = &config.plugins.runtime.containerd;
    let says = |h: &&Handler| matches!(h.runtime_type.as_str(), "" | RUNC_V2 | TROUPE_V2);
    let default = containerd.runtimes.get(&containerd.default_runtime_name);
    let first = default.into_iter().chain(containerd.runtimes.values()).find(says);
    first.map_or_else(|| Path::new("/run/systemd/system").exists(), |h| h.options.systemd_cgroup)
}

/// The configuration as clients of containerd read it in verbose Status: its names, in camel case.
fn info(config: &Config) -> anyhow::Result<String> {
    let mut all = match camel(serde_json::to_value(&config.plugins.runtime)?) {
        Value::Object(all) => all,
        _ => Map::new(),
    };
    for (key, value) in [
        ("containerdRootDir", json!(config.root)),
        ("containerdEndpoint", json!(config.grpc_address())),
        ("rootDir", json!(config.root)),
        ("stateDir", json!(config.state)),
    ] {
        all.insert(key.into(), value);
    }
    Ok(Value::Object(all).to_string())
}

/// Keys that were `snake_case` in `camelCase`. Names of handlers and options stay as they are.
fn camel(value: Value) -> Value {
    let rename = |key: &str| match key {
        "device_ownership_from_security_context" => key.to_owned(),
        _ if key.starts_with(|c: char| c.is_ascii_uppercase()) => key.to_owned(),
        _ => {
            let mut parts = key.split('_').filter(|p| !p.is_empty());
            let first = parts.next().unwrap_or_default().to_owned();
            let rest = parts.map(|p| match p {
                "cdi" | "cni" | "criu" | "icmp" | "io" => p.to_uppercase(),
                "selinux" => "Selinux".into(),
                "netns" => "NetNS".into(),
                p => p[..1].to_uppercase() + &p[1..],
            });
            first + &rest.collect::<String>()
        }
    };
    match value {
        Value::Object(all) => all
            .into_iter()
            .map(|(k, v)| match (k.as_str(), v) {
                ("runtimes", Value::Object(handlers)) => (k, handlers.into_iter().map(|(n, h)| (n, camel(h))).collect()),
                (_, v) => (rename(&k), camel(v)),
            })
            .collect(),
        Value::Array(all) => all.into_iter().map(camel).collect(),
        other => other,
    }
}

/// What in the configuration will not be understood for ever, without what the configuration says to pass over.
fn deprecations(config: &Config) -> BTreeMap<String, String> {
    let runtime = &config.plugins.runtime;
    let all = [
        (!runtime.cni.bin_dir.is_empty(), "cri-cni-bin-dir", "`bin_dir` of the CNI table is deprecated: use `bin_dirs`"),
        (!runtime.enable_cdi, "cri-enable-cdi", "`enable_cdi` is deprecated: CDI will always be on"),
    ];
    let found =
        all.into_iter().filter(|(used, ..)| *used).map(|(_, id, text)| (format!("io.containerd.deprecation/{id}"), text.to_owned()));
    found.filter(|(id, _)| !runtime.ignore_deprecation_warnings.contains(id)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn status_names_things_as_containerd_does() {
        let config = Config { state: "/run/x".into(), ..Default::default() };
        let said: Value = serde_json::from_str(&info(&config).unwrap()).unwrap();
        assert_eq!(said["stateDir"], "/run/x");
        assert_eq!(said["maxContainerLogLineSize"], 16384);
        assert_eq!(said["containerd"]["defaultRuntimeName"], "runc");
        assert_eq!(said["containerd"]["runtimes"]["runc"]["runtimeType"], RUNC_V2);
        assert_eq!(said["containerd"]["runtimes"]["runc"]["options"]["SystemdCgroup"], false);
        assert_eq!(said["cni"]["confDir"], "/etc/cni/net.d");
        assert_eq!(said["enableCDI"], true);
        assert_eq!(said["restrictOomScoreAdj"], false);
    }

    #[test]
    fn handlers_bring_their_shims_and_options() {
        let mut config = Config::default();
        let mut kata = Handler { runtime_type: "io.containerd.kata.v2".into(), ..Default::default() };
        kata.options.other.insert("ConfigPath".into(), "/etc/kata.toml".into());
        config.plugins.runtime.containerd.runtimes.insert("kata".into(), kata);
        let mut gvisor = Handler { runtime_type: "io.containerd.runsc.v1".into(), runtime_path: "/opt/shim".into(), ..Default::default() };
        gvisor.options.other.insert("platform".into(), "kvm".into());
        config.plugins.runtime.containerd.runtimes.insert("runsc".into(), gvisor);
        let all = of(&config).unwrap().handlers;
        assert_eq!((all["runc"].runtime.name.as_str(), &all["runc"].runtime.other), (TROUPE_V2, &None));
        assert_eq!(all["kata"].runtime.other.as_ref().unwrap().config_path, "/etc/kata.toml");
        assert_eq!(all["runsc"].runtime.name, "/opt/shim");
        assert!(all["runsc"].runtime.other.as_ref().unwrap().config_body.contains("platform = \"kvm\""));
    }

    #[test]
    fn the_default_handler_decides_the_driver() {
        let mut config = Config::default();
        assert!(!systemd_cgroup(&config));
        config.plugins.runtime.containerd.runtimes.get_mut("runc").unwrap().options.systemd_cgroup = true;
        assert!(systemd_cgroup(&config));
        let kata = Handler { runtime_type: "io.containerd.kata.v2".into(), ..Default::default() };
        config.plugins.runtime.containerd.runtimes.insert("kata".into(), kata);
        config.plugins.runtime.containerd.default_runtime_name = "kata".into();
        assert!(systemd_cgroup(&config), "kata does not say, runc does");
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let mut config = Config::default();
        config.plugins.runtime.containerd.runtimes.get_mut("runc").unwrap().base_runtime_spec = "/no/such.json".into();
        let said = format!("{:#}", of(&config).err().unwrap());
        assert!(said.contains("runtimes.runc.base_runtime_spec") && said.contains("/no/such.json"), "{said}");
    }
}

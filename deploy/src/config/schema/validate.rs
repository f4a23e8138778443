//! What cannot work is refused at the start, with the key's name.
use super::{Config, Handler, duration};
use anyhow::{bail, ensure};
use std::path::Path;

/// Types whose options are runc's.
const RUNC_LIKE: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.troupe.v2"];
/// Groups of ICMP sockets exist since this kernel.
const PING_GROUPS: (u32, u32) = (4, 11);

impl Config {
    /// Refuses what cannot work, naming the key; answers what there is to warn about.
    pub fn validate(&self) -> anyhow::Result<Vec<String>> {
        let mut warnings = self.runtimes()?;
        self.plugins.images.registry.validate()?;
        warnings.extend(self.plugins.images.registry.warnings());
        self.durations()?;
        self.streaming()?;
        for dir in [&self.root, &self.state] {
            ensure!(dir.starts_with('/'), "root and state must be absolute paths, got {dir:?}");
        }
        let runtime = &self.plugins.runtime;
        if runtime.enable_unprivileged_icmp && kernel() < PING_GROUPS {
            warnings.push("enable_unprivileged_icmp: this kernel is older than 4.11, pods cannot ping without a capability".into());
        }
        if !runtime.enable_cdi {
            warnings.push("enable_cdi = false is deprecated: CDI will always be on".into());
        }
        if runtime.selinux_category_range < 2 {
            bail!("selinux_category_range: {} leaves no pair of categories", runtime.selinux_category_range);
        }
        if runtime.max_container_log_line_size == 0 {
            warnings.push("max_container_log_line_size = 0: lines of logs are not limited".into());
        }
        if !matches!(runtime.cni.ip_pref.as_str(), "" | "ipv4" | "ipv6" | "cni") {
            warnings.push(format!("cni.ip_pref: {:?} is neither ipv4, ipv6 nor cni; ipv4 is taken", runtime.cni.ip_pref));
        }
        if !seccomp_name(&runtime.unset_seccomp_profile) {
            bail!(
                "unset_seccomp_profile: {:?} is neither unconfined, runtime/default, docker/default nor localhost/<path>",
                runtime.unset_seccomp_profile
            );
        }
        Ok(warnings)
    }

    fn runtimes(&self) -> anyhow::Result<Vec<String>> {
        let containerd = &self.plugins.runtime.containerd;
        let default = &containerd.default_runtime_name;
        ensure!(!default.is_empty(), "containerd.default_runtime_name is empty");
        ensure!(containerd.runtimes.contains_key(default), "containerd.default_runtime_name: no runtime {default:?} is configured");
        let mut warnings = vec![];
        for (name, handler) in &containerd.runtimes {
            one_handler(name, handler, &mut warnings)?;
        }
        Ok(warnings)
    }

    fn durations(&self) -> anyhow::Result<()> {
        let runtime = &self.plugins.runtime;
        duration("image_pull_progress_timeout", &self.plugins.images.image_pull_progress_timeout)?;
        duration("drain_exec_sync_io_timeout", &runtime.drain_exec_sync_io_timeout)?;
        duration("stats_collect_period", &runtime.stats_collect_period)?;
        duration("stats_retention_period", &runtime.stats_retention_period)?;
        duration("stream_idle_timeout", &self.plugins.cri.stream_idle_timeout)?;
        ensure!(!duration("plugin_timeout", &self.plugins.network.plugin_timeout)?.is_zero(), "plugin_timeout: a plugin needs some time");
        duration("retry_after", &self.plugins.network.retry_after)?;
        self.timeouts.iter().try_for_each(|(name, value)| duration(name, value).map(drop))
    }

    fn streaming(&self) -> anyhow::Result<()> {
        let server = &self.plugins.cri;
        let port = &server.stream_server_port;
        ensure!(port.parse::<u16>().is_ok(), "stream_server_port: {port:?} is not a port");
        let pair = &server.x509_key_pair_streaming;
        let (cert, key) = (!pair.tls_cert_file.is_empty(), !pair.tls_key_file.is_empty());
        ensure!(cert == key, "x509_key_pair_streaming: tls_cert_file and tls_key_file must be given together");
        ensure!(!cert || server.enable_tls_streaming, "x509_key_pair_streaming is set, but enable_tls_streaming is not");
        for file in [&pair.tls_cert_file, &pair.tls_key_file] {
            ensure!(file.is_empty() || Path::new(file).is_file(), "x509_key_pair_streaming: there is no file {file:?}");
        }
        Ok(())
    }
}

fn one_handler(name: &str, handler: &Handler, warnings: &mut Vec<String>) -> anyhow::Result<()> {
    let at = format!("containerd.runtimes.{name}");
    if handler.privileged_without_host_devices_all_devices_allowed && !handler.privileged_without_host_devices {
        bail!("{at}: privileged_without_host_devices_all_devices_allowed needs privileged_without_host_devices");
    }
    ensure!(
        !handler.cgroup_writable || Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
        "{at}: cgroup_writable needs cgroup version 2"
    );
    ensure!(matches!(handler.io_type.as_str(), "" | "fifo" | "streaming"), "{at}: io_type is fifo or streaming, not {:?}", handler.io_type);
    ensure!(
        matches!(handler.sandboxer.as_str(), "" | "podsandbox" | "shim"),
        "{at}: sandboxer is podsandbox or shim, not {:?}",
        handler.sandboxer
    );
    let path = &handler.runtime_path;
    ensure!(path.is_empty() || Path::new(path).is_absolute(), "{at}: runtime_path {path:?} is not an absolute path");
    for pattern in handler.pod_annotations.iter().chain(&handler.container_annotations) {
        ensure!(glob_is_whole(pattern), "{at}: annotation pattern {pattern:?} has an open bracket or ends with a backslash");
    }
    if RUNC_LIKE.contains(&handler.runtime_type.as_str()) {
        let unknown = handler.options.other.keys().map(|k| format!("configuration key {at}.options.{k} is unknown and ignored"));
        warnings.extend(unknown);
        warnings.extend(without_effect(&at, handler));
    }
    Ok(())
}

/// What is set, and changes nothing.
fn without_effect(at: &str, handler: &Handler) -> impl Iterator<Item = String> {
    let o = &handler.options;
    let all = [
        (o.io_uid != 0, "options.IoUid", "the streams belong to the container's user"),
        (o.io_gid != 0, "options.IoGid", "the streams belong to the container's group"),
        (!o.criu_image_path.is_empty(), "options.CriuImagePath", "a checkpoint goes where its request says"),
        (!o.criu_work_path.is_empty(), "options.CriuWorkPath", "CRIU's log goes into the checkpoint"),
        (handler.io_type == "streaming", "io_type", "Troupe's shim writes logs itself"),
    ];
    all.into_iter().filter(|(set, ..)| *set).map(move |(_, key, why)| format!("configuration key {at}.{key} has no effect: {why}"))
}

/// No character class is left open, nothing is left to escape.
fn glob_is_whole(pattern: &str) -> bool {
    let (mut chars, mut open) = (pattern.chars(), false);
    while let Some(c) = chars.next() {
        match c {
            '\\' if chars.next().is_none() => return false,
            '[' => open = true,
            ']' => open = false,
            _ => {}
        }
    }
    !open
}

fn seccomp_name(name: &str) -> bool {
    matches!(name, "" | "unconfined" | "runtime/default" | "docker/default") || name.starts_with("localhost/")
}

/// Version of the running kernel; newest when it cannot be read.
pub fn kernel() -> (u32, u32) {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = text.split(['.', '-']).map_while(|p| p.parse().ok());
    (parts.next().unwrap_or(u32::MAX), parts.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn refused(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::default();
        change(&mut config);
        config.validate().err().map(|e| e.to_string()).unwrap_or_default()
    }
    fn runc(config: &mut Config) -> &mut Handler {
        config.plugins.runtime.containerd.runtimes.get_mut("runc").unwrap()
    }

    #[test]
    fn the_defaults_are_valid_and_each_mistake_is_named() {
        assert_eq!(Config::default().validate().unwrap(), Vec::<String>::new());
        let default = |c: &mut Config| c.plugins.runtime.containerd.default_runtime_name.clear();
        assert!(refused(default).contains("default_runtime_name"));
        let devices = |c: &mut Config| runc(c).privileged_without_host_devices_all_devices_allowed = true;
        assert!(refused(devices).contains("privileged_without_host_devices"));
        assert!(refused(|c| runc(c).io_type = "pipe".into()).contains("io_type"));
        assert!(refused(|c| runc(c).sandboxer = "pause".into()).contains("sandboxer"));
        assert!(refused(|c| runc(c).pod_annotations = vec!["a.[b".into()]).contains("a.[b"));
        assert!(refused(|c| c.plugins.runtime.stats_collect_period = "often".into()).contains("stats_collect_period"));
        assert!(refused(|c| c.plugins.runtime.unset_seccomp_profile = "default".into()).contains("unset_seccomp_profile"));
        assert!(refused(|c| c.plugins.cri.stream_server_port = "http".into()).contains("stream_server_port"));
        let half = |c: &mut Config| c.plugins.cri.x509_key_pair_streaming.tls_cert_file = "/x".into();
        assert!(refused(half).contains("together"));
        let off = |c: &mut Config| {
            half(c);
            c.plugins.cri.x509_key_pair_streaming.tls_key_file = "/x".into();
        };
        assert!(refused(off).contains("enable_tls_streaming"));
    }

    #[test]
    fn a_key_without_effect_is_warned_about() {
        let mut config = Config::default();
        (runc(&mut config).options.io_uid, runc(&mut config).io_type) = (1000, "streaming".into());
        let warnings = config.validate().unwrap();
        assert!(warnings.len() == 2 && warnings[0].contains("runc.options.IoUid has no effect"), "{warnings:?}");
        assert!(warnings[1].contains("io_type"), "{warnings:?}");
    }

    #[test]
    fn an_option_that_runc_does_not_know_is_warned_about() {
        let mut config = Config::default();
        runc(&mut config).options.other.insert("SystemdCgroups".into(), true.into());
        assert!(config.validate().unwrap()[0].contains("options.SystemdCgroups"));
        runc(&mut config).runtime_type = "io.containerd.kata.v2".into();
        assert_eq!(config.validate().unwrap(), Vec::<String>::new());
    }
}

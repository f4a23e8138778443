//! The configuration: containerd's own file format, version 4, plus Troupe's tables.
//!
//! A file is read as a TOML table ([`file`]), brought to version 4 ([`migrate`]), merged over its imports, and read into the structs of
//! [`schema`], whose defaults are containerd's. Unknown keys are warned about and ignored, wrong types are errors that name the key
//! (`contracts/core.md` §8).
pub mod file;
pub mod migrate;
pub mod schema;

pub use schema::Config;
use std::path::Path;

/// A loaded configuration and what there is to say about it.
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Warnings for the log: unknown keys, migrations.
    pub warnings: Vec<String>,
}

/// Loads `path`. A missing file is an error only if `explicit`; otherwise the defaults apply.
pub fn load(path: &Path, explicit: bool) -> anyhow::Result<Loaded> {
    if !explicit && !path.exists() {
        return Ok(Loaded { config: Config::default(), warnings: vec![] });
    }
    let mut warnings = Vec::new();
    let table = file::load(path, &mut warnings)?;
    let config: Config =
        toml::Value::Table(table.clone()).try_into().map_err(|e| anyhow::anyhow!("configuration {}: {e}", path.display()))?;
    let known = toml::Table::try_from(&config)?;
    file::unknown_keys("", &table, &known, &mut warnings);
    warnings.extend(config.validate()?);
    Ok(Loaded { config, warnings })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn load_text(text: &str) -> anyhow::Result<Loaded> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        load(&path, true)
    }

    #[test]
    fn the_printed_default_reads_back_without_warnings() {
        let text = toml::to_string(&Config::default()).unwrap();
        let loaded = load_text(&text).unwrap();
        assert_eq!(loaded.warnings, Vec::<String>::new());
        assert_eq!(toml::to_string(&loaded.config).unwrap(), text);
    }

    #[test]
    fn a_version_2_file_is_brought_to_version_4() {
        let loaded = load_text(
            r#"
            version = 2
            [grpc]
            address = "/run/x/c.sock"
            [metrics]
            address = "127.0.0.1:1338"
            [plugins."io.containerd.grpc.v1.cri"]
            sandbox_image = "registry.k8s.io/pause:3.9"
            restrict_oom_score_adj = true
            max_concurrent_downloads = 7
            [plugins."io.containerd.grpc.v1.cri".registry]
            config_path = "/etc/certs.d"
            [plugins."io.containerd.grpc.v1.cri".cni]
            bin_dir = "/usr/lib/cni"
            conf_dir = "/etc/cni/x"
            [plugins."io.containerd.grpc.v1.cri".containerd]
            snapshotter = "native"
            default_runtime_name = "runc"
            [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
            runtime_type = "io.containerd.runc.v2"
            [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
            SystemdCgroup = true
            "#,
        )
        .unwrap();
        let c = loaded.config;
        assert_eq!(c.plugins.grpc.address, "/run/x/c.sock");
        assert_eq!(c.plugins.ttrpc.address, "/run/x/c.sock.ttrpc");
        assert_eq!(c.plugins.metrics.address, "127.0.0.1:1338");
        assert_eq!(c.plugins.images.snapshotter, "native");
        assert_eq!(c.plugins.images.max_concurrent_downloads, 7);
        assert_eq!(c.plugins.images.registry.config_path, "/etc/certs.d");
        assert_eq!(c.plugins.images.pinned_images["sandbox"], "registry.k8s.io/pause:3.9");
        assert!(c.plugins.runtime.restrict_oom_score_adj);
        assert_eq!(c.plugins.runtime.cni.bin_dirs, ["/usr/lib/cni"]);
        assert!(c.plugins.runtime.containerd.runtimes["runc"].options.systemd_cgroup);
        assert!(loaded.warnings.iter().any(|w| w.contains("migrated from version 2")), "{:?}", loaded.warnings);
    }

    #[test]
    fn a_file_that_adds_to_a_table_of_defaults_keeps_them() {
        let text = "version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.more]\nruntime_type = \"io.containerd.runc.v2\"\n\
            [plugins.\"io.containerd.cri.v1.images\".pinned_images]\nmore = \"quay.io/x:1\"\n";
        let plugins = load_text(text).unwrap().config.plugins;
        assert_eq!(plugins.runtime.containerd.runtimes.keys().collect::<Vec<_>>(), ["more", "runc"]);
        assert_eq!(plugins.images.pinned_images.keys().collect::<Vec<_>>(), ["more", "sandbox"]);
    }

    #[test]
    fn an_unknown_key_is_warned_about_and_a_wrong_type_is_refused() {
        let loaded = load_text("version = 4\n[plugins.\"io.containerd.cri.v1.runtime\"]\nenable_everything = true\n").unwrap();
        assert!(loaded.warnings.iter().any(|w| w.contains("enable_everything")), "{:?}", loaded.warnings);
        let refused = load_text("version = 4\nroot = 7\n").err().unwrap().to_string();
        assert!(refused.contains("root"), "{refused}");
        assert!(load_text("version = 5\n").is_err());
    }

    #[test]
    fn an_import_overrides_key_by_key() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("drop.toml"), "version = 4\n[plugins.\"io.containerd.cri.v1.runtime\".cni]\nconf_dir = \"/b\"\n")
            .unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "version = 4\nimports = [\"drop*.toml\"]\n[plugins.\"io.containerd.cri.v1.runtime\".cni]\nconf_dir = \"/a\"\nmax_conf_num = 3\n")
            .unwrap();
        let c = load(&path, true).unwrap().config;
        assert_eq!((c.plugins.runtime.cni.conf_dir.as_str(), c.plugins.runtime.cni.max_conf_num), ("/b", 3));
    }

    #[test]
    fn inline_registries_are_read_and_kept_apart_from_certs_d() {
        let images = "version = 4\n[plugins.\"io.containerd.cri.v1.images\".registry";
        let text = format!(
            "{images}.mirrors.\"docker.io\"]\nendpoint = [\"https://m\"]\n{}.configs.\"m\".auth]\nusername = \"u\"\n{}.auths.\"https://r:1/v1\"]\nidentitytoken = \"t\"\n",
            images.trim_start_matches("version = 4\n"),
            images.trim_start_matches("version = 4\n"),
        );
        let loaded = load_text(&text).unwrap();
        let registry = &loaded.config.plugins.images.registry;
        assert_eq!(registry.mirrors["docker.io"].endpoint, ["https://m"]);
        let credentials = registry.credentials();
        assert_eq!((credentials["m"].username.as_str(), credentials["r:1"].identitytoken.as_str()), ("u", "t"));
        assert_eq!(loaded.warnings.iter().filter(|w| w.contains("deprecated")).count(), 3, "{:?}", loaded.warnings);
        let both = format!("{images}]\nconfig_path = \"/etc/mine\"\n[plugins.\"io.containerd.cri.v1.images\".registry.mirrors.x]\n");
        let refused = load_text(&both).err().unwrap().to_string();
        assert!(refused.contains("config_path") && refused.contains("/etc/mine"), "{refused}");
    }

    #[test]
    fn a_default_runtime_that_does_not_exist_is_refused() {
        let text = "version = 4\n[plugins.\"io.containerd.cri.v1.runtime\".containerd]\ndefault_runtime_name = \"kata\"\n";
        let refused = load_text(text).err().unwrap().to_string();
        assert!(refused.contains("kata"), "{refused}");
    }
}

//! Older files, step by step to version 4 (`contracts/core.md` §8.2).
use anyhow::bail;
use std::path::Path;
use toml::{Table, Value};

/// The version that this daemon reads.
pub const CURRENT: i64 = 4;

const CRI: &str = "io.containerd.grpc.v1.cri";
const IMAGES: &str = "io.containerd.cri.v1.images";
const RUNTIME: &str = "io.containerd.cri.v1.runtime";

/// Keys of the old CRI table that stay with the CRI server.
const SERVER_KEYS: &[&str] = &[
    "disable_tcp_service",
    "stream_server_address",
    "stream_server_port",
    "stream_idle_timeout",
    "enable_tls_streaming",
    "x509_key_pair_streaming",
];
/// Keys of the old CRI table that move to the images table.
const IMAGE_KEYS: &[&str] = &[
    "registry",
    "image_decryption",
    "max_concurrent_downloads",
    "image_pull_progress_timeout",
    "image_pull_with_sync_fs",
    "stats_collect_period",
];

/// Brings `table` to version 4 in place.
pub fn to_current(table: &mut Table, path: &Path, warnings: &mut Vec<String>) -> anyhow::Result<()> {
    let version = table.get("version").and_then(Value::as_integer).unwrap_or(1).max(1);
    if version > CURRENT {
        bail!("{}: expected containerd config version equal to or less than {CURRENT}, got {version}", path.display());
    }
    if version < 2 {
        name_plugins_by_uri(table);
    }
    if version < 3 {
        split_cri(table);
    }
    if version < 4 {
        move_server_sections(table);
        warnings.push(format!(
            "{}: configuration migrated from version {version}; `troupe config migrate` prints it in version 4",
            path.display()
        ));
    }
    table.insert("version".into(), Value::Integer(CURRENT));
    Ok(())
}

fn plugins(table: &mut Table) -> Option<&mut Table> {
    table.entry("plugins").or_insert_with(|| Value::Table(Table::new())).as_table_mut()
}

fn name_plugins_by_uri(table: &mut Table) {
    let Some(plugins) = plugins(table) else { return };
    for (name, value) in std::mem::take(plugins) {
        plugins.insert(plugin_uri(&name), value);
    }
}

fn plugin_uri(name: &str) -> String {
    let kind = match name {
        _ if name.contains('.') => return name.to_owned(),
        "cgroups" => "io.containerd.monitor.v1",
        "linux" => "io.containerd.runtime.v1",
        "scheduler" => "io.containerd.gc.v1",
        "bolt" => "io.containerd.metadata.v1",
        "task" => "io.containerd.runtime.v2",
        "opt" | "restart" | "tracing" => "io.containerd.internal.v1",
        "otlp" => "io.containerd.tracing.processor.v1",
        "aufs" | "btrfs" | "devmapper" | "native" | "overlayfs" | "zfs" => "io.containerd.snapshotter.v1",
        _ if name.ends_with("-service") => "io.containerd.service.v1",
        _ => "io.containerd.grpc.v1",
    };
    format!("{kind}.{name}")
}

/// The one CRI table of versions 1 and 2 becomes images, runtime and server tables.
fn split_cri(table: &mut Table) {
    let Some(plugins) = plugins(table) else { return };
    let Some(Value::Table(old)) = plugins.remove(CRI) else { return };
    let (mut images, mut runtime, mut server) = (Table::new(), Table::new(), Table::new());
    for (key, value) in old {
        match (key.as_str(), value) {
            ("sandbox_image", value) => {
                images.insert("pinned_images".into(), Value::Table(Table::from_iter([("sandbox".to_owned(), value)])));
            }
            ("containerd", Value::Table(mut containerd)) => {
                for key in ["snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers"] {
                    if let Some(value) = containerd.remove(key) {
                        images.insert(key.into(), value);
                    }
                }
                rename_sandbox_modes(&mut containerd);
                runtime.insert(key, Value::Table(containerd));
            }
            ("cni", Value::Table(mut cni)) => {
                if let Some(dir) = cni.remove("bin_dir") {
                    cni.entry("bin_dirs").or_insert_with(|| Value::Array(vec![dir]));
                }
                runtime.insert(key, Value::Table(cni));
            }
            (name, value) if SERVER_KEYS.contains(&name) => {
                server.insert(key, value);
            }
            (name, value) if IMAGE_KEYS.contains(&name) => {
                images.insert(key, value);
            }
            (_, value) => {
                runtime.insert(key, value);
            }
        }
    }
    for (uri, section) in [(IMAGES, images), (RUNTIME, runtime), (CRI, server)] {
        plugins.entry(uri).or_insert(Value::Table(section));
    }
}

fn rename_sandbox_modes(containerd: &mut Table) {
    let Some(Value::Table(runtimes)) = containerd.get_mut("runtimes") else { return };
    for (_, runtime) in runtimes.iter_mut() {
        if let Some(runtime) = runtime.as_table_mut()
            && let Some(mode) = runtime.remove("sandbox_mode")
        {
            runtime.entry("sandboxer").or_insert(mode);
        }
    }
}

/// `[grpc]`, `[ttrpc]`, `[metrics]` and the sockets of `[debug]` become server plugins. Existing version 4 sections are never overwritten.
fn move_server_sections(table: &mut Table) {
    let grpc = table.remove("grpc").and_then(into_table);
    let mut ttrpc = table.remove("ttrpc").and_then(into_table);
    let metrics = table.remove("metrics").and_then(into_table);
    let grpc_address = grpc.as_ref().and_then(|g| g.get("address")).and_then(Value::as_str).map(str::to_owned);
    if let Some(address) = grpc_address {
        let section = ttrpc.get_or_insert_default();
        section.entry("address").or_insert(Value::String(format!("{address}.ttrpc")));
    }
    let debug = table.get_mut("debug").and_then(Value::as_table_mut).map(|debug| {
        let moved = ["address", "uid", "gid"].into_iter().filter_map(|key| debug.remove(key).map(|value| (key.to_owned(), value)));
        Table::from_iter(moved)
    });
    let Some(plugins) = plugins(table) else { return };
    let sections = [("grpc", grpc), ("ttrpc", ttrpc), ("metrics", metrics), ("debug", debug.filter(|d| !d.is_empty()))];
    for (name, section) in sections {
        if let Some(section) = section {
            plugins.entry(format!("io.containerd.server.v1.{name}")).or_insert(Value::Table(section));
        }
    }
}

fn into_table(value: Value) -> Option<Table> {
    match value {
        Value::Table(table) => Some(table),
        _ => None,
    }
}

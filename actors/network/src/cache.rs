//! Results on disk, where libcni keeps them (`<dir>/results/<network>-<container>-<interface>`), for tools that look there and for the runtime that may
//! come after us. Ours alone are written and removed; others' are only read, to know that their pods exist.
use crate::Args;
use crate::conf::Network;
use base64::{Engine, engine::general_purpose::STANDARD};
use kernel::{Class, Result, ResultExt, absent};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// One attachment.
pub(crate) struct Entry<'a> {
    pub id: &'a str,
    pub ifname: &'a str,
    pub network: &'a Network,
    pub netns: &'a str,
    pub arguments: &'a [(&'static str, String)],
    pub offered: &'a Map<String, Value>,
    pub result: &'a Value,
}

impl Entry<'_> {
    /// The document.
    pub fn document(&self) -> Value {
        let config = json!({"cniVersion": self.network.cni_version, "name": self.network.name, "disableCheck": self.network.disable_check,
            "disableGC": self.network.disable_gc, "plugins": self.network.plugins});
        json!({"kind": "cniCacheV1", "containerId": self.id, "config": STANDARD.encode(config.to_string()), "ifName": self.ifname,
            "networkName": self.network.name, "netns": self.netns, "cniArgs": self.arguments, "capabilityArgs": self.offered, "result": self.result})
    }
}

fn path(args: &Args, network: &str, id: &str, ifname: &str) -> PathBuf {
    args.cache_dir.join("results").join(format!("{network}-{id}-{ifname}"))
}

/// Where an attachment's document is.
pub(crate) fn path_of(args: &Args, entry: &Entry<'_>) -> PathBuf {
    path(args, &entry.network.name, entry.id, entry.ifname)
}

/// Writes documents. They are not synced: the store's row is what we go by.
pub(crate) fn write(all: &[(PathBuf, Value)]) -> Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    for (path, document) in all {
        let options = || std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        let file = match options() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let dir = path.parent().unwrap_or(Path::new("/"));
                std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(|| format!("create {}", dir.display()))?;
                options()
            }
            other => other,
        };
        let file = file.with_context(|| format!("write {}", path.display()))?;
        serde_json::to_writer(file, document).class(Class::Internal, path.display())?;
    }
    Ok(())
}

/// Removes an attachment's document.
pub(crate) fn remove(args: &Args, network: &str, id: &str, ifname: &str) -> Result<()> {
    let path = path(args, network, id, ifname);
    absent(std::fs::remove_file(&path)).with_context(|| format!("remove {}", path.display()))
}

/// The result that was recorded.
pub(crate) fn result(args: &Args, network: &str, id: &str, ifname: &str) -> Option<Value> {
    let document: Value = serde_json::from_slice(&std::fs::read(path(args, network, id, ifname)).ok()?).ok()?;
    document.get("result").cloned()
}

/// All attachments to a network that any runtime of this node has recorded.
pub(crate) fn attachments(args: &Args, network: &str) -> Vec<(String, String)> {
    let files = std::fs::read_dir(args.cache_dir.join("results")).into_iter().flatten().flatten();
    let documents = files.filter_map(|f| serde_json::from_slice::<Value>(&std::fs::read(f.path()).ok()?).ok());
    let ours = documents.filter(|d| d.get("networkName").and_then(Value::as_str) == Some(network));
    let text = |d: &Value, key: &str| d.get(key).and_then(Value::as_str).map(str::to_owned);
    ours.filter_map(|d| Some((text(&d, "containerId")?, text(&d, "ifName")?))).collect()
}

//! CNI configurations: `*.conf`, `*.conflist`, `*.json`, sorted by name.
use kernel::{Class, Fault, Result, ResultExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// A network: a chain of plugins.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Network {
    /// Version of the specification.
    #[serde(default)]
    pub cni_version: String,
    /// Name.
    pub name: String,
    /// CHECK is not wanted.
    #[serde(default)]
    pub disable_check: bool,
    /// Plugins, each as it is written.
    pub plugins: Vec<Value>,
}

/// The first `most` networks of a directory (0 = all). A missing directory has none; an invalid file is an error that names it.
pub(crate) fn load(dir: &Path, most: usize) -> Result<Vec<Network>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(Fault::from(e).context(dir.display())),
    };
    let mut paths: Vec<_> = entries.flatten().map(|e| e.path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json"));
    paths.sort();
    if most > 0 {
        paths.truncate(most);
    }
    paths.iter().map(|p| read(p)).collect()
}

fn read(path: &Path) -> Result<Network> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let value: Value = serde_json::from_slice(&bytes).class(Class::InvalidArgument, path.display())?;
    let network = if value.get("plugins").is_some() {
        serde_json::from_value(value).class(Class::InvalidArgument, path.display())?
    } else {
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        Network { cni_version: text("cniVersion"), name: text("name"), disable_check: false, plugins: vec![value] }
    };
    if network.name.is_empty() || network.plugins.is_empty() || network.plugins.iter().any(|p| kind(p).is_empty()) {
        return Err(Fault::invalid_argument(format!("{}: a network needs a name and plugins with a type", path.display())));
    }
    Ok(network)
}

/// Name of the plugin's binary.
pub(crate) fn kind(plugin: &Value) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

//! CNI configurations as they are written: `*.conf`, `*.conflist`, `*.json`, sorted by name.
use kernel::{Class, Fault, Result, ResultExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A configuration takes a few kilobytes; what is larger than this is something else.
const LARGEST: u64 = 1 << 20;
/// The newest version of the specification that is spoken here.
const NEWEST: (u32, u32, u32) = (1, 1, 0);

/// A network: a chain of plugins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// GC is not wanted.
    #[serde(default)]
    pub disable_gc: bool,
    /// Plugins, each as it is written.
    pub plugins: Vec<Value>,
}

impl Network {
    /// Does the configuration's version have what came with `major.minor`?
    pub fn since(&self, major: u32, minor: u32) -> bool {
        version(&self.cni_version) >= (major, minor, 0)
    }
}

/// A version as numbers; nothing or nonsense is the oldest.
pub(crate) fn version(text: &str) -> (u32, u32, u32) {
    let mut parts = text.split('.').map(|p| p.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next())
}

/// The first `most` networks of a directory (0 = all). A missing directory has none; an invalid file is an error that names it, and hides the others:
/// with a part of the networks a pod would come up on the wrong one.
pub(crate) fn load(dir: &Path, most: usize) -> Result<Vec<Network>> {
    let mut paths = files(dir, &["conf", "conflist", "json"])?;
    if most > 0 {
        paths.truncate(most);
    }
    paths.iter().map(|p| read(p)).collect()
}

fn files(dir: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(Fault::from(e).context(dir.display())),
    };
    let mut paths: Vec<_> = entries.flatten().map(|e| e.path()).collect();
    paths.retain(|p| !p.is_dir() && p.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)));
    paths.sort();
    Ok(paths)
}

fn parse(path: &Path) -> Result<Value> {
    let size = std::fs::metadata(path).with_context(|| path.display().to_string())?.len();
    if size > LARGEST {
        return Err(Fault::invalid_argument(format!("{}: {size} bytes are more than a network configuration has", path.display())));
    }
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&bytes).class(Class::InvalidArgument, path.display())
}

fn read(path: &Path) -> Result<Network> {
    network(&parse(path)?, path).with_context(|| path.display())
}

/// Reads a network; `path` says where plugins in files of their own would lie.
pub(crate) fn network(value: &Value, path: &Path) -> Result<Network> {
    let list = value.get("plugins").is_some() || path.extension().is_some_and(|e| e == "conflist");
    let name = text(value, "name")?;
    if !is_name(&name) {
        return Err(Fault::invalid_argument(format!("a network needs a name of letters, digits, '.', '_' and '-', not {name:?}")));
    }
    let mut plugins = match (list, value.get("plugins")) {
        (false, _) => vec![value.clone()],
        (true, None) => vec![],
        (true, Some(Value::Array(plugins))) => plugins.clone(),
        (true, Some(_)) => return Err(Fault::invalid_argument("\"plugins\" must be a list")),
    };
    if list && !flag(value, "loadOnlyInlinedPlugins")? {
        let dir = path.parent().unwrap_or(Path::new("")).join(&name);
        plugins.extend(files(&dir, &["conf"])?.iter().map(|p| parse(p)).collect::<Result<Vec<_>>>()?);
    }
    if plugins.is_empty() {
        return Err(Fault::invalid_argument("the network has no plugins"));
    }
    if let Some(wrong) = plugins.iter().find(|p| kind(p).is_empty() || kind(p).contains('/')) {
        return Err(Fault::invalid_argument(format!("every plugin needs the name of its binary as \"type\": {wrong}")));
    }
    let (disable_check, disable_gc) = (flag(value, "disableCheck")?, flag(value, "disableGC")?);
    Ok(Network { cni_version: chosen_version(value)?, name, disable_check, disable_gc, plugins })
}

/// Of several versions the newest that both sides speak.
fn chosen_version(value: &Value) -> Result<String> {
    let single = text(value, "cniVersion")?;
    let listed = value.get("cniVersions").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let best = listed.chain([single.as_str()]).filter(|v| version(v) <= NEWEST).max_by_key(|v| version(v));
    match best {
        Some(best) => Ok(best.to_owned()),
        None => Err(Fault::invalid_argument(format!("version {single} of CNI is newer than 1.1.0, the newest that is known here"))),
    }
}

fn text(value: &Value, key: &str) -> Result<String> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(Fault::invalid_argument(format!("{key:?} must be a text"))),
    }
}

/// A truth value; people write it as text, too.
fn flag(value: &Value, key: &str) -> Result<bool> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(Value::String(text)) if ["true", "True", "TRUE", "1", "t", "T"].contains(&text.as_str()) => Ok(true),
        Some(Value::String(text)) if ["false", "False", "FALSE", "0", "f", "F"].contains(&text.as_str()) => Ok(false),
        Some(_) => Err(Fault::invalid_argument(format!("{key:?} must be true or false"))),
    }
}

/// Names become parts of paths and of the plugins' environment.
pub(crate) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Name of the plugin's binary.
pub(crate) fn kind(plugin: &Value) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn dir(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, value.as_str().map_or_else(|| value.to_string(), str::to_owned)).unwrap();
        }
        dir
    }

    #[test]
    fn the_first_files_by_name_count_and_one_broken_file_is_named() {
        let one = |name: &str| json!({"name": name, "cniVersion": "1.0.0", "type": "x"});
        let all = dir(&[("20-b.conf", one("b")), ("10-a.json", one("a")), ("30-c.txt", "no".into()), ("9.conflist", "{".into())]);
        let names = |most| load(all.path(), most).map(|n| n.into_iter().map(|n| n.name).collect::<Vec<_>>());
        assert_eq!(names(2).unwrap(), ["a", "b"]);
        assert!(names(0).unwrap_err().message.contains("9.conflist"));
        assert!(load(&all.path().join("absent"), 1).unwrap().is_empty());
    }

    #[test]
    fn plugins_lie_in_files_of_their_own_unless_the_list_says_otherwise() {
        let list = |only| json!({"name": "n", "cniVersion": "1.1.0", "loadOnlyInlinedPlugins": only, "disableCheck": "true", "plugins": [{"type": "a"}]});
        let all = dir(&[("1.conflist", list(false)), ("n/2.conf", json!({"type": "c"})), ("n/1.conf", json!({"type": "b"}))]);
        let network = load(all.path(), 1).unwrap().remove(0);
        assert_eq!(network.plugins.iter().map(kind).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert!(network.disable_check && !network.disable_gc && network.since(1, 1));
        std::fs::write(all.path().join("1.conflist"), list(true).to_string()).unwrap();
        assert_eq!(load(all.path(), 1).unwrap()[0].plugins.len(), 1);
    }

    #[test]
    fn versions_are_negotiated_and_nonsense_is_explained() {
        let read = |value: Value| network(&value, Path::new("/x/1.conflist"));
        let several = json!({"name": "n", "cniVersion": "0.4.0", "cniVersions": ["1.0.0", "9.0.0"], "plugins": [{"type": "a"}]});
        assert_eq!(read(several).unwrap().cni_version, "1.0.0");
        for (value, text) in [
            (json!({"name": "n", "cniVersion": "2.0.0", "plugins": [{"type": "a"}]}), "newer"),
            (json!({"name": "../n", "plugins": [{"type": "a"}]}), "name"),
            (json!({"name": "n", "plugins": [{"type": "../sh"}]}), "type"),
            (json!({"name": "n", "plugins": []}), "no plugins"),
            (json!({"name": "n", "disableCheck": 3, "plugins": [{"type": "a"}]}), "disableCheck"),
        ] {
            let fault = read(value).unwrap_err();
            assert!(fault.message.contains(text), "{fault}");
        }
    }
}

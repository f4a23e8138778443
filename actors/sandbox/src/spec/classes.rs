//! Classes of block input and output and of Intel RDT, by which a pod's annotations choose limits that the administrator wrote.
use super::yaml;
use kernel::{Fault, Result};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// What the configuration says about one of the two.
#[derive(Clone, Debug, Default)]
pub struct Class<T> {
    /// `None` = the feature is off.
    pub known: Option<T>,
    /// A class that is asked for while the feature is off is passed over.
    pub ignore: bool,
}

/// Classes of block input and output, by name.
pub type BlockIo = BTreeMap<String, Vec<Value>>;
/// Names of classes of RDT.
pub type Rdt = BTreeSet<String>;

/// The class that a container's annotation or its pod's asks for.
fn asked<'a>(kind: &str, name: &str, container: &'a HashMap<String, String>, pod: &'a HashMap<String, String>) -> Option<&'a str> {
    let prefix = format!("{kind}.resources.beta.kubernetes.io");
    let found = container.get(&format!("io.kubernetes.cri.{kind}-class"));
    let found = found.or_else(|| pod.get(&format!("{prefix}/container.{name}"))).or_else(|| pod.get(&format!("{prefix}/pod")));
    found.map(String::as_str).filter(|c| !c.is_empty())
}

fn off(kind: &str, class: &str, key: &str) -> Fault {
    Fault::failed_precondition(format!("{kind} class {class:?} is requested, but {kind} is not enabled: set {key} of the tasks service"))
}

/// `linux.resources.blockIO`, if a class is asked for.
pub fn blockio(
    config: &Class<BlockIo>,
    name: &str,
    container: &HashMap<String, String>,
    pod: &HashMap<String, String>,
) -> Result<Option<Value>> {
    let Some(class) = asked("blockio", name, container, pod) else { return Ok(None) };
    match &config.known {
        None if config.ignore => Ok(None),
        None => Err(off("blockio", class, "blockio_config_file")),
        Some(all) => {
            let parameters = all.get(class);
            let parameters =
                parameters.ok_or_else(|| Fault::invalid_argument(format!("blockio class {class:?} is not in the configuration")))?;
            limits(parameters).map(Some)
        }
    }
}

/// `linux.intelRdt`, if a class is asked for.
pub fn rdt(config: &Class<Rdt>, name: &str, container: &HashMap<String, String>, pod: &HashMap<String, String>) -> Result<Option<Value>> {
    let Some(class) = asked("rdt", name, container, pod) else { return Ok(None) };
    match &config.known {
        None if config.ignore => Ok(None),
        None => Err(off("rdt", class, "rdt_config_file")),
        Some(all) if all.contains(class) => Ok(Some(json!({"closID": class}))),
        Some(_) => Err(Fault::invalid_argument(format!("rdt class {class:?} is not in the configuration"))),
    }
}

/// Reads the file of classes of block input and output.
pub fn read_blockio(path: &Path) -> Result<BlockIo> {
    let text = std::fs::read_to_string(path).map_err(|e| Fault::from(e).context(path.display().to_string()))?;
    let bad = |why: &str| Fault::invalid_argument(format!("{}: {why}", path.display()));
    let all = yaml::parse(&text).map_err(|e| bad(&e))?;
    let classes = all.get("Classes").and_then(Value::as_object).ok_or_else(|| bad("it has no Classes"))?;
    let mut read = BlockIo::new();
    for (name, list) in classes {
        let list = list.as_array().cloned().unwrap_or_default();
        for entry in &list {
            for (key, value) in entry.as_object().into_iter().flatten().filter(|(k, _)| *k != "Devices") {
                if !KEYS.iter().any(|(k, _)| k == key) && key != "Weight" {
                    return Err(bad(&format!("class {name}: {key:?} is not known")));
                }
                quantity(value).ok_or_else(|| bad(&format!("class {name}: {key}: {value} is not a quantity such as 50M")))?;
            }
        }
        read.insert(name.clone(), list);
    }
    Ok(read)
}

/// Reads the names of the classes of RDT: partitions have classes, which are groups of resctrl.
pub fn read_rdt(path: &Path) -> Result<Rdt> {
    let text = std::fs::read_to_string(path).map_err(|e| Fault::from(e).context(path.display().to_string()))?;
    let all = yaml::parse(&text).map_err(|e| Fault::invalid_argument(format!("{}: {e}", path.display())))?;
    let partitions = all.get("partitions").and_then(Value::as_object).into_iter().flat_map(Map::values);
    let classes = partitions.filter_map(|p| p.get("classes")?.as_object()).flat_map(Map::keys);
    Ok(classes.cloned().collect())
}

/// Keys of a class' limits on devices, and their names in the specification.
const KEYS: [(&str, &str); 4] = [
    ("ThrottleReadBps", "throttleReadBpsDevice"),
    ("ThrottleWriteBps", "throttleWriteBpsDevice"),
    ("ThrottleReadIOPS", "throttleReadIOPSDevice"),
    ("ThrottleWriteIOPS", "throttleWriteIOPSDevice"),
];

/// Later entries win where they name the same device again.
fn limits(parameters: &[Value]) -> Result<Value> {
    let mut all = Map::new();
    for entry in parameters {
        let devices = entry.get("Devices").and_then(Value::as_array).cloned().unwrap_or_default();
        let devices: BTreeSet<(u64, u64)> = devices.iter().filter_map(Value::as_str).flat_map(block_devices).collect();
        let weight = entry.get("Weight").and_then(quantity);
        if let (Some(weight), None) = (weight, entry.get("Devices")) {
            all.insert("weight".into(), weight.into());
        }
        let mut set = |key: &str, what: &str, value: u64| {
            let list = all.entry(key).or_insert_with(|| json!([]));
            for (major, minor) in &devices {
                if let Some(list) = list.as_array_mut() {
                    list.retain(|d| d["major"] != *major || d["minor"] != *minor);
                    list.push(json!({"major": major, "minor": minor, what: value}));
                }
            }
        };
        if let (Some(weight), Some(_)) = (weight, entry.get("Devices")) {
            set("weightDevice", "weight", weight);
        }
        for (key, name) in KEYS {
            if let Some(rate) = entry.get(key).and_then(quantity) {
                set(name, "rate", rate);
            }
        }
    }
    Ok(all.into())
}

/// A number with Kubernetes' suffixes.
fn quantity(value: &Value) -> Option<u64> {
    if let Some(n) = value.as_u64() {
        return Some(n);
    }
    let text = value.as_str()?.trim();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let factor: u64 = match &text[split..] {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return None,
    };
    text[..split].parse::<u64>().ok()?.checked_mul(factor)
}

/// Numbers of the block devices that a path with wildcards in its last part stands for.
fn block_devices(pattern: &str) -> Vec<(u64, u64)> {
    let path = Path::new(pattern);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else { return vec![] };
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let hits = entries.filter(|e| e.file_name().to_str().is_some_and(|n| super::annotations::matches(name, n))).map(|e| e.path());
    hits.filter_map(|p: PathBuf| {
        let node = super::devices::node(&p.canonicalize().ok()?.to_string_lossy(), "")?;
        (node["type"] == "b").then(|| Some((node["major"].as_u64()?, node["minor"].as_u64()?)))?
    })
    .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn notes(key: &str, value: &str) -> HashMap<String, String> {
        HashMap::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn the_most_particular_annotation_counts() {
        let none = HashMap::new();
        let mut pod = notes("blockio.resources.beta.kubernetes.io/pod", "slow");
        assert_eq!(asked("blockio", "c", &none, &pod), Some("slow"));
        pod.extend(notes("blockio.resources.beta.kubernetes.io/container.c", "fast"));
        assert_eq!(asked("blockio", "c", &none, &pod), Some("fast"));
        assert_eq!(asked("blockio", "d", &none, &pod), Some("slow"));
        assert_eq!(asked("blockio", "c", &notes("io.kubernetes.cri.blockio-class", "own"), &pod), Some("own"));
    }

    #[test]
    fn a_class_needs_the_feature_unless_it_may_be_passed_over() {
        let (none, wish) = (HashMap::new(), notes("io.kubernetes.cri.rdt-class", "gold"));
        let mut config = Class::<Rdt>::default();
        assert!(rdt(&config, "c", &wish, &none).unwrap_err().message.contains("not enabled"));
        assert!(rdt(&config, "c", &none, &none).unwrap().is_none());
        config.ignore = true;
        assert!(rdt(&config, "c", &wish, &none).unwrap().is_none());
        config.known = Some(BTreeSet::from(["gold".into()]));
        assert_eq!(rdt(&config, "c", &wish, &none).unwrap().unwrap()["closID"], "gold");
        assert!(rdt(&config, "c", &notes("io.kubernetes.cri.rdt-class", "tin"), &none).is_err());
    }

    #[test]
    fn files_of_classes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.yaml");
        std::fs::write(&file, "Classes:\n  slow:\n  - Weight: 20\n  - Devices: [/dev/none*]\n    ThrottleReadBps: 50M\n").unwrap();
        let config = Class { known: Some(read_blockio(&file).unwrap()), ignore: false };
        let got = blockio(&config, "c", &notes("io.kubernetes.cri.blockio-class", "slow"), &HashMap::new()).unwrap().unwrap();
        assert_eq!((got["weight"].as_u64(), got["throttleReadBpsDevice"].as_array().unwrap().len()), (Some(20), 0));
        assert_eq!((quantity(&json!("50M")), quantity(&json!("2Ki")), quantity(&json!("5x"))), (Some(50_000_000), Some(2048), None));
        std::fs::write(&file, "Classes:\n  slow:\n  - ThrotleReadBps: 1\n").unwrap();
        assert!(read_blockio(&file).unwrap_err().message.contains("ThrotleReadBps"));
        std::fs::write(&file, "partitions:\n  p:\n    l3Allocation: 60%\n    classes:\n      gold:\n        l3Allocation: 100%\n").unwrap();
        assert_eq!(read_rdt(&file).unwrap(), BTreeSet::from(["gold".into()]));
    }
}

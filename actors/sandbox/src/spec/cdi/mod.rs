//! Container Device Interface: devices by name, described by files that vendors put on the node.
//!
//! The files are read when a container asks for a device: few do, and what was installed a moment ago counts.
mod edits;

use super::yaml;
use kernel::{Fault, Result};
use proto::cri;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Annotations by which device plugins of older clients name devices.
const ANNOTATION: &str = "cdi.k8s.io/";

/// Names of the devices that a container asks for, each once: by field first, then by annotation. `enabled` = false refuses the field.
pub fn asked(config: &cri::ContainerConfig, enabled: bool) -> Result<Vec<String>> {
    let fields: Vec<&str> = config.cdi_devices.iter().map(|d| d.name.as_str()).collect();
    if !enabled {
        return match fields.is_empty() {
            true => Ok(vec![]),
            false => Err(Fault::failed_precondition(format!(
                "CDI devices ({}) requested but CDI support is explicitly disabled: set enable_cdi",
                fields.join(", ")
            ))),
        };
    }
    let mut keys: Vec<&String> = config.annotations.keys().filter(|k| k.starts_with(ANNOTATION)).collect();
    keys.sort();
    let annotated = keys.into_iter().flat_map(|k| config.annotations[k].split(','));
    let (mut seen, mut all) = (BTreeSet::new(), vec![]);
    for name in fields.into_iter().chain(annotated) {
        if !name_is_whole(name) {
            return Err(Fault::invalid_argument(format!("CDI device {name:?} is not a name such as vendor.com/class=device")));
        }
        if seen.insert(name.to_owned()) {
            all.push(name.to_owned());
        }
    }
    Ok(all)
}

fn name_is_whole(name: &str) -> bool {
    let word = |text: &str, more: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.ends_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    name.split_once('=').is_some_and(|(kind, device)| kind_is_whole(kind) && word(device, "_-.:"))
}

fn kind_is_whole(kind: &str) -> bool {
    let word = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
    };
    kind.split_once('/').is_some_and(|(vendor, class)| word(vendor) && word(class))
}

/// A description file.
#[derive(Debug)]
struct Description {
    path: PathBuf,
    body: Value,
}

/// Devices of the node by name: the description, and the device's place in it.
#[derive(Default)]
struct Inventory {
    files: Vec<Description>,
    devices: BTreeMap<String, (usize, usize)>,
}

impl Inventory {
    /// Reads all directories; a later one overrides an earlier one. A bad file is told of and left out, a device that two files of one directory
    /// describe is left out.
    fn read(dirs: &[String]) -> Inventory {
        let mut all = Inventory::default();
        for dir in dirs {
            let mut paths: Vec<PathBuf> = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
            paths.retain(|p| p.extension().is_some_and(|e| e == "json" || e == "yaml"));
            paths.sort();
            let (mut here, mut twice) = (BTreeSet::new(), BTreeSet::new());
            for path in paths {
                let body = match read(&path) {
                    Ok(body) => body,
                    Err(error) => {
                        tracing::warn!(path = %path.display(), error, "a CDI description is left out");
                        continue;
                    }
                };
                let kind = body["kind"].as_str().unwrap_or_default().to_owned();
                for (n, device) in body["devices"].as_array().into_iter().flatten().enumerate() {
                    let name = format!("{kind}={}", device["name"].as_str().unwrap_or_default());
                    if !here.insert(name.clone()) {
                        tracing::warn!(path = %path.display(), name, "two CDI descriptions have this device");
                        twice.insert(name.clone());
                    }
                    all.devices.insert(name, (all.files.len(), n));
                }
                all.files.push(Description { path, body });
            }
            all.devices.retain(|name, _| !twice.contains(name));
        }
        all
    }
}

fn read(path: &Path) -> Result<Value, String> {
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let body = yaml::parse(&text)?;
    // A version such as 1.0 is a number to YAML.
    if !body["cdiVersion"].is_string() && !body["cdiVersion"].is_number() {
        return Err("it has no cdiVersion".into());
    }
    let kind = body["kind"].as_str().unwrap_or_default();
    if !kind_is_whole(kind) {
        return Err(format!("its kind {kind:?} is not like vendor.com/class"));
    }
    for device in body["devices"].as_array().into_iter().flatten() {
        let name =
            device["name"].as_str().map(str::to_owned).or_else(|| device["name"].as_u64().map(|n| n.to_string())).unwrap_or_default();
        if !name_is_whole(&format!("{kind}={name}")) {
            return Err(format!("it has a device with the name {name:?}"));
        }
    }
    Ok(body)
}

/// Puts devices into a specification: of each file first what it says of all its devices, once, then the devices.
pub fn inject(spec: &mut Value, names: &[String], dirs: &[String]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let all = Inventory::read(dirs);
    let missing: Vec<&str> = names.iter().filter(|n| !all.devices.contains_key(*n)).map(String::as_str).collect();
    if !missing.is_empty() {
        return Err(Fault::not_found(format!(
            "CDI device injection failed: unresolvable CDI devices {} (described nowhere in {})",
            missing.join(", "),
            dirs.join(", ")
        )));
    }
    let mut seen = BTreeSet::new();
    for name in names {
        let (file, device) = all.devices[name];
        let Description { path, body } = &all.files[file];
        let at = |fault: Fault| fault.context(format!("CDI device {name} of {}", path.display()));
        if seen.insert(file) {
            edits::apply(spec, &body["containerEdits"]).map_err(at)?;
        }
        edits::apply(spec, &body["devices"][device]["containerEdits"]).map_err(at)?;
    }
    edits::sort_mounts(spec);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;
    use std::collections::HashMap;

    fn config(fields: &[&str], annotation: &str) -> cri::ContainerConfig {
        let cdi_devices = fields.iter().map(|n| cri::CdiDevice { name: n.to_string() }).collect();
        let annotations = HashMap::from([("cdi.k8s.io/plugin".to_owned(), annotation.to_owned())]);
        cri::ContainerConfig {
            cdi_devices,
            annotations: if annotation.is_empty() { HashMap::new() } else { annotations },
            ..Default::default()
        }
    }

    #[test]
    fn a_device_named_twice_is_one_device() {
        assert_eq!(
            asked(&config(&["v.com/c=a", "v.com/c=b"], "v.com/c=b,v.com/c=d"), true).unwrap(),
            ["v.com/c=a", "v.com/c=b", "v.com/c=d"]
        );
        assert!(asked(&config(&["v.com/c=a"], ""), false).unwrap_err().message.contains("disabled"));
        assert!(asked(&config(&[], "v.com/c=a"), false).unwrap().is_empty());
        for bad in ["v.com=a", "v.com/c", "v.com/c=", "/c=a", "v/c=-a"] {
            assert!(asked(&config(&[bad], ""), true).is_err(), "{bad}");
        }
    }

    #[test]
    fn later_directories_win_and_what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir_all(&a).unwrap();
        std::fs::create_dir_all(&b).unwrap();
        std::fs::write(
            a.join("x.json"),
            r#"{"cdiVersion":"0.6.0","kind":"v.com/c","containerEdits":{"env":["ALL=1"]},"devices":[
            {"name":"one","containerEdits":{"env":["WHO=a"]}},{"name":"two","containerEdits":{"env":["TWO=a"]}}]}"#,
        )
        .unwrap();
        std::fs::write(b.join("y.yaml"), "cdiVersion: 0.6.0\nkind: v.com/c\ndevices:\n- name: one\n  containerEdits:\n    env: [WHO=b]\n")
            .unwrap();
        std::fs::write(b.join("bad.yaml"), "kind: [").unwrap();
        let dirs = [a.to_string_lossy().into_owned(), b.to_string_lossy().into_owned()];
        let mut spec = json!({"process": {"env": ["ALL=0"]}});
        inject(&mut spec, &["v.com/c=one".into(), "v.com/c=two".into()], &dirs).unwrap();
        assert_eq!(spec["process"]["env"], json!(["ALL=1", "WHO=b", "TWO=a"]));
        let said = inject(&mut spec, &["v.com/c=ten".into()], &dirs).unwrap_err().message;
        assert!(said.contains("unresolvable CDI devices v.com/c=ten"), "{said}");
        std::fs::copy(b.join("y.yaml"), b.join("z.yaml")).unwrap();
        assert!(inject(&mut spec, &["v.com/c=one".into()], &dirs).is_err(), "two files of one directory have it");
    }
}

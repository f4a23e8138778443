//! What a device changes in a specification: environment, device nodes, mounts, hooks, groups, RDT.
use crate::spec::{devices, mounts};
use kernel::{Fault, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Kinds of hooks that the specification knows.
const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

fn list<'a>(edits: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    edits.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    let found = value.get(key).and_then(Value::as_str).filter(|t| !t.is_empty());
    found.ok_or_else(|| Fault::invalid_argument(format!("containerEdits: {key} is missing")))
}

/// Changes an array of the specification, made if it is not there.
fn array(spec: &mut Value, path: &[&str], change: impl FnOnce(&mut Vec<Value>)) {
    let mut at = spec;
    for key in path {
        if !at.is_object() {
            *at = json!({});
        }
        at = &mut at[*key];
    }
    if !at.is_array() {
        *at = json!([]);
    }
    if let Some(list) = at.as_array_mut() {
        change(list);
    }
}

/// Applies `containerEdits`.
pub fn apply(spec: &mut Value, edits: &Value) -> Result<()> {
    for entry in list(edits, "env").filter_map(Value::as_str) {
        let key = entry.split('=').next().unwrap_or_default();
        array(spec, &["process", "env"], |all| {
            match all.iter_mut().find(|e| e.as_str().is_some_and(|e| e.split('=').next() == Some(key))) {
                Some(old) => *old = entry.into(),
                None => all.push(entry.into()),
            }
        });
    }
    list(edits, "deviceNodes").try_for_each(|d| device(spec, d))?;
    list(edits, "mounts").try_for_each(|m| mount(spec, m))?;
    list(edits, "hooks").try_for_each(|h| hook(spec, h))?;
    for gid in list(edits, "additionalGids").filter_map(Value::as_u64).filter(|g| *g != 0) {
        array(spec, &["process", "user", "additionalGids"], |all| {
            if !all.contains(&gid.into()) {
                all.push(gid.into());
            }
        });
    }
    if let Some(rdt) = edits.get("intelRdt").filter(|r| r.is_object()) {
        spec["linux"]["intelRdt"] = rdt.clone();
    }
    Ok(())
}

fn device(spec: &mut Value, asked: &Value) -> Result<()> {
    let path = text(asked, "path")?;
    let host = asked["hostPath"].as_str().filter(|p| !p.is_empty()).unwrap_or(path);
    let mut node = json!({"path": path});
    let copy = |node: &mut Value, key: &str| {
        if let Some(value) = asked.get(key).filter(|v| !v.is_null()) {
            node[key] = value.clone();
        }
    };
    let complete = asked["type"].is_string() && (asked["type"] == "p" || asked["major"].as_i64().is_some_and(|m| m != 0));
    if !complete {
        let found = devices::node(host, path);
        let found = found.ok_or_else(|| Fault::not_found(format!("containerEdits: {host} is not a device on this node")))?;
        for key in ["type", "major", "minor"] {
            node[key] = found[key].clone();
        }
    }
    ["type", "major", "minor", "fileMode", "uid", "gid"].iter().for_each(|key| copy(&mut node, key));
    for key in ["uid", "gid"] {
        // The container's user can use a device that nobody is named for.
        let of_user = spec.pointer(&format!("/process/user/{key}")).and_then(Value::as_u64).filter(|n| *n > 0);
        if let (true, Some(id)) = (node.get(key).is_none(), of_user) {
            node[key] = id.into();
        }
    }
    if node["type"] == "b" || node["type"] == "c" {
        let rule = devices::rule(&node, asked["permissions"].as_str().unwrap_or_default());
        array(spec, &["linux", "resources", "devices"], |all| all.push(rule));
    }
    array(spec, &["linux", "devices"], |all| {
        all.retain(|d| d["path"] != node["path"]);
        all.push(node);
    });
    Ok(())
}

fn mount(spec: &mut Value, asked: &Value) -> Result<()> {
    let (from, to) = (text(asked, "hostPath")?, text(asked, "containerPath")?);
    let kind = asked["type"].as_str().filter(|t| !t.is_empty()).unwrap_or("bind");
    let options: Vec<&str> = list(asked, "options").filter_map(Value::as_str).collect();
    array(spec, &["mounts"], |all| {
        all.retain(|m| m["destination"].as_str().is_none_or(|d| mounts::clean(d) != mounts::clean(to)));
        all.push(mounts::mount(to, kind, from, &options));
    });
    Ok(())
}

fn hook(spec: &mut Value, asked: &Value) -> Result<()> {
    let (name, path) = (text(asked, "hookName")?, text(asked, "path")?);
    if !HOOKS.contains(&name) {
        return Err(Fault::invalid_argument(format!("containerEdits: there is no kind of hook {name:?}")));
    }
    if !Path::new(path).is_absolute() {
        return Err(Fault::invalid_argument(format!("containerEdits: the hook's path {path:?} is not absolute")));
    }
    let mut hook = Map::from_iter([("path".to_owned(), path.into())]);
    for key in ["args", "env", "timeout"] {
        if let Some(value) = asked.get(key).filter(|v| !v.is_null()) {
            hook.insert(key.into(), value.clone());
        }
    }
    array(spec, &["hooks", name], |all| all.push(hook.into()));
    Ok(())
}

/// Outer mounts before inner ones.
pub fn sort_mounts(spec: &mut Value) {
    let depth = |m: &Value| mounts::clean(m["destination"].as_str().unwrap_or_default()).components().count();
    array(spec, &["mounts"], |all| all.sort_by_key(depth));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn everything_that_a_device_may_change() {
        let mut spec = json!({"process": {"env": ["A=1"], "user": {"uid": 1000, "gid": 0}}, "mounts": [{"destination": "/lib/x"}]});
        let edits = json!({
            "env": ["A=2", "B=3"],
            "deviceNodes": [{"path": "/dev/hole", "hostPath": "/dev/null", "permissions": "rw"}, {"path": "/dev/pipe", "type": "p"}],
            "mounts": [{"hostPath": "/proc", "containerPath": "/lib/x/", "options": ["ro"]}, {"hostPath": "/a", "containerPath": "/a"}],
            "hooks": [{"hookName": "createContainer", "path": "/bin/h", "args": ["h", "x"]}],
            "additionalGids": [5, 5, 0], "intelRdt": {"closID": "x"}});
        apply(&mut spec, &edits).unwrap();
        sort_mounts(&mut spec);
        assert_eq!(spec["process"]["env"], json!(["A=2", "B=3"]));
        assert_eq!(spec["process"]["user"]["additionalGids"], json!([5]));
        let nodes = &spec["linux"]["devices"];
        assert_eq!((nodes[0]["major"].as_u64(), nodes[0]["uid"].as_u64(), nodes[1]["type"].as_str()), (Some(1), Some(1000), Some("p")));
        assert_eq!(spec["linux"]["resources"]["devices"], json!([{"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"}]));
        assert_eq!(spec["mounts"][0]["destination"], "/a");
        assert_eq!((spec["mounts"].as_array().unwrap().len(), &spec["mounts"][1]["options"]), (2, &json!(["ro"])));
        assert_eq!(spec["hooks"]["createContainer"], json!([{"path": "/bin/h", "args": ["h", "x"]}]));
        assert_eq!(spec["linux"]["intelRdt"]["closID"], "x");
    }

    #[test]
    fn mistakes_are_named() {
        for (edits, part) in [
            (json!({"deviceNodes": [{"path": "/dev/no_such"}]}), "/dev/no_such"),
            (json!({"deviceNodes": [{}]}), "path"),
            (json!({"hooks": [{"hookName": "later", "path": "/x"}]}), "later"),
            (json!({"hooks": [{"hookName": "poststop", "path": "x"}]}), "absolute"),
            (json!({"mounts": [{"hostPath": "/x"}]}), "containerPath"),
        ] {
            let said = apply(&mut json!({}), &edits).unwrap_err().message;
            assert!(said.contains(part), "{said}");
        }
    }
}

//! Verbose info: what tools and people read of pods and containers beside their statuses, under containerd's keys. Pure functions.
use messages::image::Image;
use messages::sandbox::{Container, Pod, Runtime};
use proto::cri;
use proto::prost::Message as _;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// Of a container; `pod` is gone only while it is being removed.
pub fn container(c: &Container, pod: Option<&Pod>) -> HashMap<String, String> {
    let config = cri::ContainerConfig::decode(&*c.config).map(|c| shown(&c)).unwrap_or_default();
    let mut info = json!({
        "sandboxID": c.sandbox_id,
        "pid": c.pid,
        "removing": c.removing,
        "snapshotKey": c.status.id,
        "snapshotter": c.snapshotter,
        "config": config,
        "runtimeSpec": document(&c.spec),
    });
    of_runtime(&mut info, pod.map(|p| &*p.runtime));
    one(&info)
}

/// Of a pod.
pub fn pod(p: &Pod) -> HashMap<String, String> {
    let status = &p.status;
    let ready = status.state == cri::PodSandboxState::SandboxReady as i32;
    let network = status.network.clone().unwrap_or_default();
    let addresses: Vec<String> = std::iter::once(network.ip.clone())
        .chain(network.additional_ips.iter().map(|ip| ip.ip.clone()))
        .filter(|ip| !ip.is_empty())
        .collect();
    let metadata = status.metadata.clone().unwrap_or_default();
    let linux = p.config.linux.clone().unwrap_or_default();
    let mut info = json!({
        "pid": p.pid,
        "processStatus": if ready { "running" } else { "deleted" },
        "netNamespaceClosed": !ready && !p.netns.is_empty(),
        // There is no pause process, so no image and no snapshot of one.
        "image": "",
        "snapshotKey": "",
        "snapshotter": "",
        "runtimeHandler": status.runtime_handler,
        "config": shown(&*p.config),
        "runtimeSpec": document(&p.spec),
        "cniResult": document(&p.cni),
        "sandboxMetadata": {
            "ID": status.id,
            "Name": format!("{}_{}_{}_{}", metadata.name, metadata.namespace, metadata.uid, metadata.attempt),
            "NetNSPath": p.netns,
            "IP": network.ip,
            "AdditionalIPs": addresses.get(1..).unwrap_or_default(),
            "RuntimeHandler": status.runtime_handler,
        },
    });
    of_runtime(&mut info, Some(&p.runtime));
    for (key, value) in [("overhead", linux.overhead), ("resources", linux.resources)] {
        if let Some(value) = value {
            info[key] = shown(&value);
        }
    }
    one(&info)
}

/// Of an image.
pub fn image(i: &Image) -> HashMap<String, String> {
    one(&json!({ "chainID": i.chain_id, "imageSpec": i.config }))
}

fn one(info: &Value) -> HashMap<String, String> {
    HashMap::from([("info".to_owned(), info.to_string())])
}

fn document(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

fn of_runtime(info: &mut Value, runtime: Option<&Runtime>) {
    let Some(runtime) = runtime else { return };
    info["runtimeType"] = runtime.kind.as_str().into();
    let mut options = serde_json::to_value(&runtime.options).unwrap_or_default();
    if let Some(all) = options.as_object_mut() {
        // The type is shown above.
        all.remove("name");
    }
    info["runtimeOptions"] = without_unset(options);
}

/// A message as JSON, without what is not set.
fn shown<T: Serialize>(message: &T) -> Value {
    without_unset(serde_json::to_value(message).unwrap_or_default())
}

fn without_unset(value: Value) -> Value {
    let unset = |v: &Value| match v {
        Value::Null | Value::Bool(false) => true,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        _ => false,
    };
    match value {
        Value::Object(all) => all.into_iter().filter(|(_, v)| !unset(v)).map(|(k, v)| (k, without_unset(v))).collect::<Map<_, _>>().into(),
        Value::Array(all) => all.into_iter().map(without_unset).collect(),
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_configuration_is_shown_under_its_names_without_what_is_unset() {
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
            envs: vec![cri::KeyValue { key: "A".into(), value: b"1".to_vec() }],
            log_path: "c.log".into(),
            ..Default::default()
        };
        let bytes: Arc<[u8]> = config.encode_to_vec().into();
        let container = Container { config: bytes, spec: "{\"x\":1}".into(), pid: 7, ..Default::default() };
        let runtime = Arc::new(Runtime { kind: "io.containerd.runc.v2".into(), options: Default::default() });
        let info = super::container(&container, Some(&Pod { runtime, ..Default::default() }));
        let info: Value = serde_json::from_str(&info["info"]).unwrap();
        assert_eq!(info["config"]["envs"], json!([{"key": "A", "value": "1"}]));
        assert_eq!(
            (info["config"]["log_path"].as_str(), info["config"].get("tty"), info["config"]["metadata"].get("attempt")),
            (Some("c.log"), None, None)
        );
        assert_eq!(
            (info["pid"].as_u64(), info["runtimeSpec"]["x"].as_u64(), info["runtimeType"].as_str()),
            (Some(7), Some(1), Some("io.containerd.runc.v2"))
        );
    }
}

//! What a pod offers to plugins: capability arguments (each plugin gets those that it declares) and `CNI_ARGS`.
use kernel::{Fault, Result};
use messages::network::PodNetwork;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Kubernetes' names have 253 characters at most; this is room for four of them, and far below the kernel's 128 KiB for one variable.
const ARGS: usize = 4096;

/// All that the pod offers, by capability.
pub(crate) fn offered(pod: &PodNetwork) -> Result<Map<String, Value>> {
    let mut all = Map::new();
    all.insert("io.kubernetes.cri.pod-annotations".into(), json!(pod.annotations));
    let ports: Vec<&_> = pod.ports.iter().filter(|p| p.host_port > 0).collect();
    for port in &ports {
        let is_port = |p: i32| (1..=65535).contains(&p);
        let is_address = port.host_ip.is_empty() || port.host_ip.parse::<std::net::IpAddr>().is_ok();
        if !is_port(port.host_port) || !is_port(port.container_port) || !is_address {
            return Err(Fault::invalid_argument(format!("port_mappings: {port:?} is no mapping of ports")));
        }
    }
    if !ports.is_empty() {
        all.insert("portMappings".into(), json!(ports));
    }
    let (servers, searches, options) = &pod.dns;
    if !(servers.is_empty() && searches.is_empty() && options.is_empty()) {
        all.insert("dns".into(), json!({"servers": servers, "searches": searches, "options": options}));
    }
    if !pod.cgroup_parent.is_empty() {
        all.insert("cgroupPath".into(), json!(pod.cgroup_parent));
    }
    if let Some(bandwidth) = bandwidth(&pod.annotations)? {
        all.insert("bandwidth".into(), bandwidth);
    }
    Ok(all)
}

/// Those of the `offered` that a plugin declares.
pub(crate) fn wanted(plugin: &Value, offered: &Map<String, Value>) -> Map<String, Value> {
    let declares = |name: &str| plugin.get("capabilities").and_then(|c| c.get(name)) == Some(&Value::Bool(true));
    offered.iter().filter(|(name, _)| declares(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// `CNI_ARGS` in order.
pub(crate) fn arguments(pod: &PodNetwork) -> Result<Vec<(&'static str, String)>> {
    let all = vec![
        ("IgnoreUnknown", "1".to_owned()),
        ("K8S_POD_NAMESPACE", pod.namespace.clone()),
        ("K8S_POD_NAME", pod.name.clone()),
        ("K8S_POD_INFRA_CONTAINER_ID", pod.id.clone()),
        ("K8S_POD_UID", pod.uid.clone()),
    ];
    if let Some((key, value)) = all.iter().find(|(_, v)| v.contains([';', '\0', '\n'])) {
        return Err(Fault::invalid_argument(format!(
            "metadata: {value:?} cannot be handed to CNI plugins as {key}: it has a separator in it"
        )));
    }
    let length: usize = all.iter().map(|(k, v)| k.len() + v.len() + 2).sum();
    if length > ARGS {
        return Err(Fault::invalid_argument(format!(
            "metadata: name, namespace and uid are too long for CNI plugins: {length} of {ARGS} bytes"
        )));
    }
    Ok(all)
}

/// The pod's bandwidth annotations, in bits a second.
fn bandwidth(annotations: &BTreeMap<String, String>) -> Result<Option<Value>> {
    let mut all = Map::new();
    for (direction, name) in [("ingress", "kubernetes.io/ingress-bandwidth"), ("egress", "kubernetes.io/egress-bandwidth")] {
        let Some(text) = annotations.get(name) else { continue };
        let wrong = |why: &str| Fault::invalid_argument(format!("annotation {name}={text:?}: {why}"));
        let rate = quantity(text).ok_or_else(|| wrong("not a quantity such as 10M"))?;
        match rate {
            ..1_000 => return Err(wrong("resource is unreasonably small (< 1kbit)")),
            1_000_000_000_000_001.. => return Err(wrong("resource is unreasonably large (> 1Pbit)")),
            _ => {}
        }
        all.insert(format!("{direction}Rate"), json!(rate as u64));
        // The bucket must not limit what the rate allows: as large as the kernel's 32 bits let it be.
        all.insert(format!("{direction}Burst"), json!(u32::MAX));
    }
    Ok((!all.is_empty()).then(|| all.into()))
}

/// A Kubernetes quantity (`1.5M`, `10Ki`, `2e3`) as a whole number, rounded up.
fn quantity(text: &str) -> Option<i128> {
    let (negative, text) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if number.len() > 20 || (whole.is_empty() && part.is_empty()) || part.contains('.') {
        return None;
    }
    let digits: i128 = format!("{whole}{part}").parse().ok()?;
    let power = |base: i128, n: u32| base.pow(n);
    let (times, over) = match suffix {
        "n" => (1, power(10, 9)),
        "u" => (1, power(10, 6)),
        "m" => (1, 1000),
        "" => (1, 1),
        "k" => (1000, 1),
        "M" => (power(10, 6), 1),
        "G" => (power(10, 9), 1),
        "T" => (power(10, 12), 1),
        "P" => (power(10, 15), 1),
        "E" => (power(10, 18), 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => match suffix.strip_prefix(['e', 'E'])?.parse::<i32>().ok()? {
            n @ 0..=18 => (power(10, n as u32), 1),
            n @ -18..0 => (1, power(10, n.unsigned_abs())),
            _ => return None,
        },
    };
    let over = over * power(10, part.len() as u32);
    let value = (digits.checked_mul(times)? + over - 1) / over;
    Some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn quantities_are_kubernetes_own() {
        for (text, value) in [
            ("10M", 10_000_000),
            ("1k", 1000),
            ("1.5Ki", 1536),
            ("2e3", 2000),
            ("1", 1),
            ("100m", 1),
            ("1P", 10i128.pow(15)),
            ("-1k", -1000),
        ] {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for text in ["", "M", "10 M", "10K", "1.2.3", "x", "1e99", "99999999999999999999999"] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn bandwidth_out_of_bounds_is_refused_by_name() {
        let of = |text: &str| bandwidth(&BTreeMap::from([("kubernetes.io/egress-bandwidth".to_owned(), text.to_owned())]));
        assert_eq!(of("10M").unwrap().unwrap(), json!({"egressRate": 10_000_000, "egressBurst": u32::MAX}));
        assert!(of("1k").is_ok() && of("1P").is_ok());
        for (text, why) in [("999", "small"), ("-5M", "small"), ("1001T", "large"), ("fast", "quantity")] {
            let fault = of(text).unwrap_err();
            assert!(fault.message.contains("egress-bandwidth") && fault.message.contains(why), "{fault}");
        }
        assert_eq!(bandwidth(&BTreeMap::new()).unwrap(), None);
    }

    #[test]
    fn a_plugin_gets_what_it_declares_and_nothing_else() {
        let port =
            messages::network::PortMapping { host_port: 80, container_port: 8080, protocol: "tcp".into(), host_ip: "127.0.0.1".into() };
        let pod = PodNetwork { ports: vec![port.clone()], cgroup_parent: "/k".into(), ..Default::default() };
        let offered = offered(&pod).unwrap();
        let plugin = json!({"type": "portmap", "capabilities": {"portMappings": true, "cgroupPath": false, "bandwidth": true}});
        let expected = json!({"portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp", "hostIP": "127.0.0.1"}]});
        assert_eq!(Value::from(wanted(&plugin, &offered)), expected);
        let wrong = PodNetwork { ports: vec![messages::network::PortMapping { host_ip: "here".into(), ..port }], ..Default::default() };
        assert!(super::offered(&wrong).is_err());
    }

    #[test]
    fn arguments_are_bounded() {
        let pod = |name: &str| PodNetwork { id: "1".into(), name: name.into(), ..Default::default() };
        assert_eq!(arguments(&pod("p")).unwrap().len(), 5);
        assert!(arguments(&pod("a;b=c")).unwrap_err().message.contains("separator"));
        assert!(arguments(&pod(&"x".repeat(200_000))).unwrap_err().message.contains("too long"));
    }
}

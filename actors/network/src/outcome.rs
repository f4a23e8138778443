//! Results of ADD, in every version of the specification.
use crate::conf::version;
use crate::plugin;
use kernel::{Fault, Result};
use serde_json::{Value, json};
use std::net::IpAddr;

/// The pod's interface whose addresses are the pod's.
pub(crate) const POD: &str = "eth0";

/// One address of a result.
struct Address<'a> {
    interface: &'a str,
    ip: IpAddr,
    gateway: &'a str,
}

/// Reads what a plugin printed: a result of the network's version, or an error that says what is wrong with it.
pub(crate) fn read(out: &[u8], cni_version: &str) -> Result<Value> {
    plugin::complete(out)?;
    let head = || String::from_utf8_lossy(&out[..out.len().min(200)]).into_owned();
    let mut result: Value = match serde_json::from_slice(out) {
        Ok(result @ Value::Object(_)) => result,
        _ => return Err(Fault::internal(format!("it ended well, but its result is not a JSON object: {:?}", head()))),
    };
    let of = result.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
    if of.is_empty() {
        result["cniVersion"] = cni_version.into();
    } else if version(of) > (1, 1, 0) {
        return Err(Fault::internal(format!("its result has version {of} of CNI; {cni_version} was asked for")));
    }
    addresses(&result, POD)?;
    Ok(result)
}

/// All addresses of a result. One that names no interface is on `ifname`, the one that the plugins were asked to make.
fn addresses<'a>(result: &'a Value, ifname: &'a str) -> Result<Vec<Address<'a>>> {
    let wrong = |what: &Value| Fault::internal(format!("its result has an address that is none: {what}"));
    let parse = |text: &str| text.split('/').next().and_then(|ip| ip.parse().ok());
    let of = |v: &'a Value, key: &str| v.get(key).and_then(Value::as_str).unwrap_or_default();
    let mut all = vec![];
    // Before 0.3.0.
    for old in ["ip4", "ip6"].iter().filter_map(|key| result.get(key)) {
        all.push(Address { interface: ifname, ip: parse(of(old, "ip")).ok_or_else(|| wrong(old))?, gateway: of(old, "gateway") });
    }
    for listed in list(result, "ips") {
        let ip = parse(of(listed, "address")).ok_or_else(|| wrong(listed))?;
        let interface = match listed.get("interface").filter(|i| !i.is_null()) {
            None => ifname,
            Some(index) => {
                let named = index.as_u64().and_then(|i| list(result, "interfaces").get(i as usize));
                of(named.ok_or_else(|| wrong(listed))?, "name")
            }
        };
        all.push(Address { interface, ip, gateway: of(listed, "gateway") });
    }
    Ok(all)
}

fn list<'a>(result: &'a Value, key: &str) -> &'a [Value] {
    result.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The pod's addresses: those of `eth0` in all networks' results, the one that is preferred first, the others in their order.
pub(crate) fn pod_ips(results: &[(String, Value)], preference: &str) -> Result<Vec<String>> {
    let mut ips: Vec<IpAddr> = vec![];
    for (ifname, result) in results {
        ips.extend(addresses(result, ifname)?.into_iter().filter(|a| a.interface == POD).map(|a| a.ip));
    }
    if ips.is_empty() {
        return Err(Fault::internal(format!("failed to find network info for sandbox: the plugins gave no address to an interface {POD}")));
    }
    let first = match preference {
        "cni" => 0,
        "ipv6" => ips.iter().position(IpAddr::is_ipv6).unwrap_or(0),
        _ => ips.iter().position(IpAddr::is_ipv4).unwrap_or(0),
    };
    let first = ips.remove(first);
    ips.insert(0, first);
    Ok(ips.iter().map(IpAddr::to_string).collect())
}

/// All networks' results as one, as verbose `PodSandboxStatus` has it.
pub(crate) fn summary(results: &[(String, Value)]) -> Value {
    let mut interfaces = serde_json::Map::new();
    let (mut dns, mut routes) = (vec![], vec![]);
    for (ifname, result) in results {
        let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        for listed in list(result, "interfaces") {
            let value = json!({"IPConfigs": [], "Mac": text(listed, "mac"), "Sandbox": text(listed, "sandbox")});
            interfaces.insert(text(listed, "name"), value);
        }
        for address in addresses(result, ifname).unwrap_or_default() {
            let entry = interfaces.entry(address.interface).or_insert_with(|| json!({"IPConfigs": [], "Mac": "", "Sandbox": ""}));
            if let Some(configs) = entry["IPConfigs"].as_array_mut() {
                configs.push(json!({"IP": address.ip, "Gateway": address.gateway}));
            }
        }
        dns.extend(result.get("dns").cloned());
        routes.extend(list(result, "routes").iter().cloned());
    }
    json!({"Interfaces": interfaces, "DNS": dns, "Routes": routes})
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ips(result: Value, preference: &str) -> Result<Vec<String>> {
        pod_ips(&[("eth0".into(), read(result.to_string().as_bytes(), "1.0.0")?)], preference)
    }

    #[test]
    fn the_preferred_family_comes_first_and_the_rest_keep_their_order() {
        let result = json!({"interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/x"}], "ips": [
            {"address": "fd00::2/64", "interface": 1}, {"address": "10.0.0.2/24", "interface": 1}, {"address": "fd00::3/64", "interface": 1},
            {"address": "10.0.0.1/24", "interface": 0}]});
        assert_eq!(ips(result.clone(), "").unwrap(), ["10.0.0.2", "fd00::2", "fd00::3"]);
        assert_eq!(ips(result.clone(), "ipv6").unwrap(), ["fd00::2", "10.0.0.2", "fd00::3"]);
        assert_eq!(ips(result, "cni").unwrap(), ["fd00::2", "10.0.0.2", "fd00::3"]);
    }

    #[test]
    fn only_eth0_counts() {
        let other = json!({"interfaces": [{"name": "net1"}], "ips": [{"address": "10.0.0.2/24", "interface": 0}]});
        assert!(ips(other, "").unwrap_err().message.contains("failed to find network info for sandbox"));
        assert_eq!(ips(json!({"ips": [{"address": "10.0.0.2/24"}]}), "").unwrap(), ["10.0.0.2"]);
        assert_eq!(
            ips(json!({"cniVersion": "0.2.0", "ip4": {"ip": "10.0.0.9/24"}, "ip6": {"ip": "fd00::9/64"}}), "").unwrap(),
            ["10.0.0.9", "fd00::9"]
        );
        // What a second network gives belongs to eth1 unless it says otherwise.
        let both = [
            ("eth0".to_owned(), json!({"ips": [{"address": "10.0.0.2/24"}]})),
            ("eth1".to_owned(), json!({"ips": [{"address": "10.1.0.2/24"}]})),
        ];
        assert_eq!(pod_ips(&both, "").unwrap(), ["10.0.0.2"]);
        assert_eq!(summary(&both)["Interfaces"]["eth1"]["IPConfigs"][0]["IP"], "10.1.0.2");
    }

    #[test]
    fn lies_are_told_apart() {
        for (out, text) in [
            ("hello", "not a JSON object"),
            ("[]", "not a JSON object"),
            ("", "not a JSON object"),
            (r#"{"cniVersion": "7.0.0"}"#, "version 7.0.0"),
            (r#"{"ips": [{"address": "nowhere"}]}"#, "none"),
            (r#"{"ips": [{"address": "10.0.0.1/8", "interface": 3}]}"#, "none"),
        ] {
            let fault = read(out.as_bytes(), "1.0.0").unwrap_err();
            assert!(fault.message.contains(text), "{fault}");
        }
        assert!(read(&vec![b' '; 3 << 20], "1.0.0").unwrap_err().message.contains("longer"));
    }
}

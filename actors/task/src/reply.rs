//! What a shim binary answers to `start`: protobuf from new ones, JSON or a bare address from old ones (`contracts/core.md` §5.3).
use kernel::{Fault, Result};
use proto::bootstrap::BootstrapResult;
use proto::prost::Message as _;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How to reach a shim; `bootstrap.json` of a bundle.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Version of the task service.
    pub version: i32,
    /// `unix://…`, `vsock://…`, or a bare abstract name.
    pub address: String,
    /// `ttrpc` or `grpc`.
    #[serde(default)]
    pub protocol: String,
    /// What else it said.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

impl Endpoint {
    /// Is it Troupe's own shim?
    pub fn is_troupe(&self) -> bool {
        self.metadata.get("troupe.shim").is_some_and(|v| v == "1")
    }
    /// The address as the ttrpc library wants it.
    pub fn dial(&self) -> Result<String> {
        match self.protocol.as_str() {
            "" | "ttrpc" => {}
            other => return Err(Fault::unimplemented(format!("shims that speak {other} are not supported, only ttrpc"))),
        }
        match self.address.split_once("://") {
            Some(("unix" | "vsock", _)) => Ok(self.address.clone()),
            Some((scheme, _)) => Err(Fault::unimplemented(format!("shim address {}: scheme {scheme} is not supported", self.address))),
            None => Ok(format!("unix://@{}", self.address)),
        }
    }
}

/// Reads the reply.
pub fn parse(output: &[u8]) -> Result<Endpoint> {
    // A text that happens to be a message (of unknown fields) has no address in it: containerd would go on with an empty one, we read the text.
    if let Ok(r) = BootstrapResult::decode(output)
        && !r.address.is_empty()
    {
        let protocol = if r.protocol.is_empty() { "ttrpc".into() } else { r.protocol };
        return Ok(Endpoint { version: r.version, address: r.address, protocol, metadata: r.metadata.into_iter().collect() });
    }
    let text = std::str::from_utf8(output).map_err(|_| Fault::internal("the shim's reply is neither a BootstrapResult nor text"))?.trim();
    if text.is_empty() {
        return Err(Fault::internal("the shim started, but did not say its address"));
    }
    let endpoint = match serde_json::from_str::<Endpoint>(text) {
        Ok(e) if e.version >= 2 => e,
        _ => Endpoint { version: 2, address: text.to_owned(), protocol: "ttrpc".into(), metadata: BTreeMap::new() },
    };
    if endpoint.version > 3 {
        return Err(Fault::unimplemented(format!("unsupported shim version {}: 2 and 3 are known", endpoint.version)));
    }
    Ok(endpoint)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kernel::Class;

    #[test]
    fn protobuf_with_its_metadata() {
        let metadata = [("troupe.shim".to_owned(), "1".to_owned())].into();
        let reply =
            BootstrapResult { version: 3, address: "unix:///run/s/1".into(), protocol: "ttrpc".into(), metadata, ..Default::default() };
        let e = parse(&reply.encode_to_vec()).unwrap();
        assert!(e.is_troupe());
        assert_eq!((e.version, e.dial().unwrap().as_str()), (3, "unix:///run/s/1"));
    }

    #[test]
    fn json_and_bare_addresses_of_old_shims() {
        let e = parse(b" {\"version\":3,\"address\":\"unix:///run/s/2\",\"protocol\":\"ttrpc\"}\n").unwrap();
        assert_eq!((e.version, e.address.as_str()), (3, "unix:///run/s/2"));
        let e = parse(b"unix:///run/containerd/s/abc\n").unwrap();
        assert_eq!((e.version, e.address.as_str(), e.protocol.as_str()), (2, "unix:///run/containerd/s/abc", "ttrpc"));
        let e = parse(b"/containerd-shim/abc.sock").unwrap();
        assert_eq!(e.dial().unwrap(), "unix://@/containerd-shim/abc.sock", "bare = abstract");
    }

    #[test]
    fn what_cannot_work_is_refused_with_a_reason() {
        assert_eq!(parse(b"").unwrap_err().class, Class::Internal);
        assert_eq!(parse(b"{\"version\":4,\"address\":\"unix:///x\",\"protocol\":\"ttrpc\"}").unwrap_err().class, Class::Unimplemented);
        let grpc = parse(b"{\"version\":3,\"address\":\"unix:///x\",\"protocol\":\"grpc\"}").unwrap();
        assert_eq!(grpc.dial().unwrap_err().class, Class::Unimplemented);
    }
}

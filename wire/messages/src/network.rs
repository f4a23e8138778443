//! `network`: pod network namespaces and CNI chains.
use crate::userns::UserNs;
use kernel::Protocol;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The network actor's protocol.
pub struct Network;
impl Protocol for Network {
    const ACTOR: &'static str = "network";
}

/// A port mapping for the `portMappings` capability.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Port on the host.
    pub host_port: i32,
    /// Port in the pod.
    pub container_port: i32,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Address on the host, empty = all.
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// What a pod's attachment needs.
#[derive(Clone, Debug, Serialize, Deserialize, Default)]
pub struct PodNetwork {
    /// Sandbox id.
    pub id: String,
    /// Pod name.
    pub name: String,
    /// Pod namespace.
    pub namespace: String,
    /// Pod uid.
    pub uid: String,
    /// Cgroup parent, for the `cgroupPath` capability.
    pub cgroup_parent: String,
    /// Port mappings.
    pub ports: Vec<PortMapping>,
    /// DNS servers, searches, options.
    pub dns: (Vec<String>, Vec<String>, Vec<String>),
    /// Pod annotations.
    pub annotations: BTreeMap<String, String>,
    /// The pod's user namespace, which then owns the network namespace.
    #[serde(default)]
    pub userns: Option<UserNs>,
}

/// A pod's attachment as recorded.
#[derive(Clone, Debug, Serialize, Deserialize, Default)]
pub struct Attachment {
    /// Path of the pinned network namespace.
    pub netns: String,
    /// Addresses, the primary one first.
    pub ips: Vec<String>,
    /// CNI result as JSON by network name.
    pub result: serde_json::Value,
}

/// Why the network is (not) ready, for CRI Status.
#[derive(Clone, Debug)]
pub struct NetworkStatus {
    /// Ready.
    pub ready: bool,
    /// CamelCase reason, empty when ready.
    pub reason: String,
    /// Text.
    pub message: String,
    /// The loaded configurations, for verbose info.
    pub config: serde_json::Value,
}

/// Makes the namespace and runs ADD. On failure everything is undone (DEL, namespace removed).
#[derive(Clone, Debug)]
pub struct Attach(pub PodNetwork);
/// Runs DEL and removes the namespace; succeeds if there is nothing left to do.
#[derive(Clone, Debug)]
pub struct Detach {
    /// Sandbox id.
    pub id: String,
}
/// The recorded attachment.
#[derive(Clone, Debug)]
pub struct Lookup {
    /// Sandbox id.
    pub id: String,
}
/// Runs CHECK where the configuration's version has it.
#[derive(Clone, Debug)]
pub struct Check {
    /// Sandbox id.
    pub id: String,
}
/// Connects to a TCP port on a pod's loopback. `Unavailable` when nobody listens.
#[derive(Clone, Debug)]
pub struct Dial {
    /// Path of the network namespace; empty = the node's.
    pub netns: String,
    /// Port.
    pub port: u16,
}
/// Readiness.
#[derive(Clone, Debug)]
pub struct Status;

kernel::messages! { Network = "network" => {
    Attach -> Attachment,
    Detach -> () as idempotent,
    Lookup -> Option<Attachment> as idempotent,
    Check -> () as idempotent,
    Dial -> std::net::TcpStream as idempotent,
    Status -> NetworkStatus as idempotent,
} }

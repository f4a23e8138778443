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
    /// Runtime handler: one may have networks of its own.
    #[serde(default)]
    pub handler: String,
}

/// A pod's attachment as recorded.
#[derive(Clone, Debug, Serialize, Deserialize, Default)]
pub struct Attachment {
    /// Path of the pinned network namespace.
    pub netns: String,
    /// Addresses, the primary one first.
    pub ips: Vec<String>,
    /// The results of all networks as one, as verbose `PodSandboxStatus` has it (`cniResult`).
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
    /// For the verbose answer: `cniconfig`, `lastCNILoadStatus` and `lastCNILoadStatus.<handler>`.
    pub info: BTreeMap<String, String>,
}

/// Makes the pod's namespace, with `lo` up, and answers its path. Runs no plugin, so the pod's shim can be started while [`Attach`] runs them.
#[derive(Clone, Debug)]
pub struct Prepare(pub PodNetwork);
/// Runs ADD in the namespace that [`Prepare`] made. After a failure the caller sends [`Detach`].
#[derive(Clone, Debug)]
pub struct Attach(pub PodNetwork);
/// Ends an [`Attach`] under way, runs DEL and removes the namespace; succeeds if there is nothing left to do. Where a plugin does not acknowledge it, the
/// actor goes on trying by itself, also after a restart; meanwhile this answers an error if the pod had its network, so that nobody forgets the pod.
#[derive(Clone, Debug)]
pub struct Detach {
    /// Sandbox id.
    pub id: String,
    /// For a pod whose `Attach` may have been cut off before its record was durable: what it was asked with.
    pub pod: Option<Box<PodNetwork>>,
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
/// The node's pod addresses, comma-separated: a configuration is rendered from the template, if there is one and none is there.
#[derive(Clone, Debug)]
pub struct Configure {
    /// Ranges.
    pub pod_cidr: String,
}
/// Readiness, as last seen: never waits.
#[derive(Clone, Debug)]
pub struct Status;

kernel::messages! { Network = "network" => {
    Prepare -> String as idempotent,
    Attach -> Attachment,
    Detach -> () as idempotent,
    Check -> () as idempotent,
    Dial -> std::net::TcpStream as idempotent,
    Configure -> () as idempotent,
    Status -> NetworkStatus as idempotent,
} }

//! Sockets, the streaming server, shims.
use serde::{Deserialize, Serialize};

/// gRPC socket.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Grpc {
    /// Path; empty = `<state>/troupe.sock`.
    pub address: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes; 0 = 16 MiB.
    pub max_recv_message_size: usize,
    /// Bytes; 0 = 16 MiB.
    pub max_send_message_size: usize,
}

/// A unix socket.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Socket {
    /// Path; empty = the gRPC address + `.ttrpc`.
    pub address: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Metrics and health over HTTP.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// `host:port`; empty = none (the control socket always serves them).
    pub address: String,
}

/// `io.containerd.grpc.v1.cri`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct CriServer {
    /// No streaming over TCP beside the kubelet's.
    pub disable_tcp_service: bool,
    /// Address of the streaming server.
    pub stream_server_address: String,
    /// Port, `0` = any.
    pub stream_server_port: String,
    /// Idle time-out (Go duration).
    pub stream_idle_timeout: String,
    /// TLS.
    pub enable_tls_streaming: bool,
    /// Certificate and key for it; without, a certificate of its own is made at each start.
    pub x509_key_pair_streaming: KeyPair,
}

/// Files of a certificate and its key.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyPair {
    /// Certificate chain, PEM.
    pub tls_cert_file: String,
    /// Private key, PEM.
    pub tls_key_file: String,
}

impl Default for CriServer {
    fn default() -> Self {
        Self {
            disable_tcp_service: true,
            stream_server_address: "127.0.0.1".into(),
            stream_server_port: "0".into(),
            stream_idle_timeout: "4h0m0s".into(),
            enable_tls_streaming: false,
            x509_key_pair_streaming: KeyPair::default(),
        }
    }
}

/// `io.containerd.shim.v1.manager`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Shim {
    /// Environment of shims.
    pub env: Vec<String>,
    /// Directory of their sockets; empty = `<state>/s`.
    pub socket_dir: String,
}

/// `io.containerd.service.v1.tasks-service`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TasksService {
    /// Classes of block input and output (YAML or JSON); empty = the feature is off.
    pub blockio_config_file: String,
    /// Classes of Intel RDT (YAML or JSON); empty = the feature is off.
    pub rdt_config_file: String,
}

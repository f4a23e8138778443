//! Rows of pods and containers. A row is written before the first thing it owns is made, so that whatever a crash leaves has an owner.
use base64::{Engine, engine::general_purpose::STANDARD};
use kernel::{Class, Result, ResultExt};
use messages::task::{Exit, Runtime, SandboxHandle};
use proto::{cri, prost::Message};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::sync::Arc;

/// A protobuf message within a JSON row.
#[derive(Clone, Debug, Default)]
pub struct Proto<M>(pub M);

impl<M: Message> Serialize for Proto<M> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&STANDARD.encode(self.0.encode_to_vec()))
    }
}
impl<'de, M: Message + Default> Deserialize<'de> for Proto<M> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bytes = STANDARD.decode(String::deserialize(d)?).map_err(serde::de::Error::custom)?;
        M::decode(&bytes[..]).map(Proto).map_err(serde::de::Error::custom)
    }
}

/// JSON that is kept as text: a parsed specification takes several times the memory. Shared, not copied.
#[derive(Clone, Debug)]
pub struct Json(Arc<str>);

impl Json {
    /// Keeps a value.
    pub fn of(value: &serde_json::Value) -> Json {
        Json(value.to_string().into())
    }
    /// The text.
    pub fn text(&self) -> &Arc<str> {
        &self.0
    }
    /// Parsed.
    pub fn value(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.0).class(Class::DataLoss, "a stored document")
    }
}

impl Default for Json {
    fn default() -> Self {
        Json("null".into())
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let raw: &serde_json::value::RawValue = serde_json::from_str(&self.0).map_err(serde::ser::Error::custom)?;
        raw.serialize(s)
    }
}
impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Box::<serde_json::value::RawValue>::deserialize(d).map(|raw| Json(raw.get().into()))
    }
}

/// Phase of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodPhase {
    /// Being made; a later generation takes it down.
    Creating,
    /// Could not be made, and not all of it could be undone: shown as not ready, taken down in the background.
    Failed,
    /// Ready.
    Ready,
    /// Stopped.
    Stopped,
}

/// A pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodRow {
    /// Id.
    pub id: String,
    /// Configuration.
    pub config: Proto<cri::PodSandboxConfig>,
    /// Runtime handler.
    pub handler: String,
    /// Phase.
    pub phase: PodPhase,
    /// Unix nanoseconds.
    pub created_ns: i64,
    /// Network namespace, empty = the node's.
    pub netns: String,
    /// Addresses.
    pub ips: Vec<String>,
    /// The shim's answer.
    pub handle: SandboxHandle,
    /// Boot in which it was made.
    pub boot: String,
    /// What CNI answered.
    #[serde(default)]
    pub cni: Json,
    /// How it is run: as its handler was when it was made.
    #[serde(default)]
    pub runtime: Runtime,
    /// SELinux label of its processes.
    #[serde(default)]
    pub label: String,
}

/// Phase of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Being made; a later generation takes it down.
    Creating,
    /// Made.
    Created,
    /// Being started.
    Starting,
    /// Runs.
    Running,
    /// Ended.
    Exited,
}

/// A container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerRow {
    /// Id.
    pub id: String,
    /// Pod.
    pub sandbox_id: String,
    /// Configuration.
    pub config: Proto<cri::ContainerConfig>,
    /// OCI spec.
    pub spec: Json,
    /// Image id.
    pub image_id: String,
    /// What ContainerStatus calls the image's reference.
    pub image_ref: String,
    /// Snapshotter of its root.
    pub snapshotter: String,
    /// Log file, may be empty.
    pub log_path: String,
    /// Signal to stop it.
    pub stop_signal: u32,
    /// Phase.
    pub phase: Phase,
    /// Pid while it runs.
    pub pid: u32,
    /// Unix nanoseconds.
    pub created_ns: i64,
    /// Unix nanoseconds.
    pub started_ns: i64,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Reason and message of the end.
    pub reason: (String, String),
    /// Boot in which it was made.
    pub boot: String,
    /// SELinux label of its process.
    #[serde(default)]
    pub label: String,
}

/// What a reboot has ended. The rows are saved later: until then the next start finds the same.
pub fn after_reboot(pod: &mut Option<PodRow>, containers: &mut [ContainerRow], boot: &str) {
    if let Some(pod) = pod
        && pod.boot != boot
        && pod.phase == PodPhase::Ready
    {
        pod.phase = PodPhase::Stopped;
    }
    for row in containers.iter_mut().filter(|c| c.boot != boot && matches!(c.phase, Phase::Starting | Phase::Running)) {
        row.exit = Some(Exit { code: 255, at_ns: now_ns(), oom: false, witness: "reboot".into() });
        row.reason = ("Unknown".into(), "the node was started again".into());
        (row.phase, row.pid) = (Phase::Exited, 0);
    }
}

/// The name that a pod reserves.
pub fn pod_name(config: &cri::PodSandboxConfig) -> Result<String> {
    let m = config.metadata.as_ref().ok_or("config must include metadata").class(Class::InvalidArgument, "sandbox")?;
    Ok(format!("{}_{}_{}_{}", m.name, m.namespace, m.uid, m.attempt))
}

/// The name that a container reserves within its pod.
pub fn container_name(config: &cri::ContainerConfig, pod: &PodRow) -> Result<String> {
    let m = config.metadata.as_ref().ok_or("config must include metadata").class(Class::InvalidArgument, "container")?;
    Ok(format!("{}_{}_{}", m.name, pod_name(&pod.config.0)?, m.attempt))
}

/// Now, Unix nanoseconds.
pub fn now_ns() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64)
}

/// A new id: 64 hex digits.
pub fn new_id() -> String {
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}

/// This boot.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

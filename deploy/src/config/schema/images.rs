//! Images.
use super::registry::Registry;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `io.containerd.cri.v1.images`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Images {
    /// Default snapshotter.
    pub snapshotter: String,
    /// Images that garbage collection must keep, by role. A file that names others keeps `sandbox`, as in containerd.
    #[serde(deserialize_with = "with_sandbox")]
    pub pinned_images: BTreeMap<String, String>,
    /// Registries.
    pub registry: Registry,
    /// Layers fetched side by side in one pull.
    pub max_concurrent_downloads: usize,
    /// Time without a byte after which a fetch is given up and tried again (Go duration).
    pub image_pull_progress_timeout: String,
    /// Accepted for compatibility: snapshots are always synced.
    pub image_pull_with_sync_fs: bool,
    /// Accepted for compatibility.
    pub disable_snapshot_annotations: bool,
    /// Drop a layer's blob once it is unpacked.
    pub discard_unpacked_layers: bool,
    /// Seconds between collections of statistics.
    pub stats_collect_period: u64,
    /// Accepted for compatibility.
    pub use_local_image_pull: bool,
    /// Bytes of the pieces in which large layers are fetched side by side; below 512 = in one piece.
    pub concurrent_layer_fetch_buffer: u64,
    /// What images are for, by runtime handler.
    pub runtime_platforms: BTreeMap<String, RuntimePlatform>,
    /// Decryption of layers; accepted for compatibility.
    pub image_decryption: ImageDecryption,
}

/// What a runtime handler's images are for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RuntimePlatform {
    /// Accepted for compatibility: images are for this machine.
    pub platform: String,
    /// Snapshotter, empty = default.
    pub snapshotter: String,
}

/// Decryption of layers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageDecryption {
    /// Where the keys are.
    pub key_model: String,
}

impl Default for ImageDecryption {
    fn default() -> Self {
        Self { key_model: "node".into() }
    }
}

/// The sandbox image's role and name. Pods have none, but tools look for it, and a kubelet must not remove it.
const SANDBOX: (&str, &str) = ("sandbox", "registry.k8s.io/pause:3.10.2");

fn with_sandbox<'de, D: serde::Deserializer<'de>>(given: D) -> Result<BTreeMap<String, String>, D::Error> {
    let mut all = BTreeMap::<String, String>::deserialize(given)?;
    all.entry(SANDBOX.0.into()).or_insert_with(|| SANDBOX.1.into());
    Ok(all)
}

impl Default for Images {
    fn default() -> Self {
        Self {
            snapshotter: "overlayfs".into(),
            pinned_images: BTreeMap::from([(SANDBOX.0.into(), SANDBOX.1.into())]),
            registry: Registry::default(),
            max_concurrent_downloads: 3,
            image_pull_progress_timeout: "5m0s".into(),
            image_pull_with_sync_fs: false,
            disable_snapshot_annotations: true,
            discard_unpacked_layers: false,
            stats_collect_period: 10,
            use_local_image_pull: false,
            concurrent_layer_fetch_buffer: 0,
            runtime_platforms: BTreeMap::new(),
            image_decryption: ImageDecryption::default(),
        }
    }
}

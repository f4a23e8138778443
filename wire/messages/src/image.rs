//! `image`: names to content: pull, resolve, remove. CRI image calls come here.
use arc_swap::ArcSwap;
use kernel::Protocol;
use proto::cri;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The image actor's protocol.
pub struct Images;
impl Protocol for Images {
    const ACTOR: &'static str = "image";
}

/// An image as CRI sees it: one for each config digest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// Config digest, `sha256:…`: CRI's image id.
    pub id: String,
    /// Tags, `docker.io/library/busybox:latest`.
    pub repo_tags: Vec<String>,
    /// `name@sha256:…`.
    pub repo_digests: Vec<String>,
    /// Bytes of manifest, config and compressed layers.
    pub size: u64,
    /// Digest of the manifest of this platform.
    pub manifest: String,
    /// Digest of the target (index or manifest) that the names point to.
    pub target: String,
    /// Key of the top snapshot; empty for an image without layers.
    pub chain_id: String,
    /// Snapshotter that holds it.
    pub snapshotter: String,
    /// OCI image configuration, as it came.
    pub config: serde_json::Value,
    /// Never removed by garbage collection of the kubelet.
    pub pinned: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

impl Image {
    /// User of the image configuration, such as `1000:1000` or `nobody`; empty = root.
    pub fn user(&self) -> &str {
        self.config.pointer("/config/User").and_then(|v| v.as_str()).unwrap_or_default()
    }
}

/// The published list of images: read without waiting for anybody.
#[derive(Default)]
pub struct View(pub ArcSwap<Vec<Arc<Image>>>);

impl View {
    /// Finds by id (with or without `sha256:`, or a unique prefix), tag or digest, after normalisation of familiar names (`busybox`).
    pub fn find(&self, reference: &str) -> Option<Arc<Image>> {
        let all = self.0.load();
        let familiar = normalize(reference);
        let by_name = all.iter().find(|i| i.id == reference || i.repo_tags.contains(&familiar) || i.repo_digests.contains(&familiar));
        by_name.or_else(|| by_prefix(&all, reference)).cloned()
    }
}

fn by_prefix<'a>(all: &'a [Arc<Image>], reference: &str) -> Option<&'a Arc<Image>> {
    let hex = reference.strip_prefix("sha256:").unwrap_or(reference);
    if hex.len() < 4 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut hits = all.iter().filter(|i| i.id.strip_prefix("sha256:").is_some_and(|h| h.starts_with(hex)));
    hits.next().filter(|_| hits.next().is_none())
}

/// Docker's familiar names in full: `busybox` is `docker.io/library/busybox:latest`. References that cannot be completed come back as they are.
pub fn normalize(reference: &str) -> String {
    let (head, rest) = reference.split_once('/').unwrap_or(("", reference));
    let is_host = head.contains('.') || head.contains(':') || head == "localhost";
    let full = match (is_host, head) {
        (true, "index.docker.io") => format!("docker.io/{rest}"),
        (true, _) => reference.to_owned(),
        (false, "") => format!("docker.io/library/{rest}"),
        (false, _) => format!("docker.io/{reference}"),
    };
    let full = match full.strip_prefix("docker.io/") {
        Some(rest) if !rest.contains('/') => format!("docker.io/library/{rest}"),
        _ => full,
    };
    let last = full.rsplit('/').next().unwrap_or_default();
    if full.contains('@') || last.contains(':') { full } else { format!("{full}:latest") }
}

/// Pulls and unpacks; answers the image. Pulls of the same reference in flight are joined.
#[derive(Clone, Debug)]
pub struct Pull {
    /// Reference as the client wrote it.
    pub reference: String,
    /// Credentials of the request.
    pub auth: Option<cri::AuthConfig>,
    /// Snapshotter; empty = default.
    pub snapshotter: String,
    /// Annotations of the request's image spec and labels of the pod, for logs and traces.
    pub annotations: BTreeMap<String, String>,
}
/// Finds as [`View::find`] does.
#[derive(Clone, Debug)]
pub struct Resolve {
    /// Reference, id or digest.
    pub reference: String,
}
/// Removes all names of an image; blobs and snapshots go with the next collection. Succeeds when absent.
#[derive(Clone, Debug)]
pub struct Remove {
    /// Reference, id or digest.
    pub reference: String,
}
/// Disk use of the image file systems.
#[derive(Clone, Debug)]
pub struct FsInfo;

kernel::messages! { Images = "image" => {
    Pull -> Arc<Image> as idempotent,
    Resolve -> Option<Arc<Image>> as idempotent,
    Remove -> () as idempotent,
    FsInfo -> cri::ImageFsInfoResponse as idempotent,
} }

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
    /// Compressed layers, bottom first: digest and bytes. Empty in records of older versions; then the manifest knows them.
    #[serde(default)]
    pub layers: Vec<(String, u64)>,
    /// An OCI artifact: files, not a root file system.
    #[serde(default)]
    pub artifact: bool,
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
    /// Finds by id (with or without `sha256:`, or a unique prefix), tag or digest, after normalisation of familiar names (`busybox`). A prefix that
    /// several ids begin with is an error.
    pub fn find(&self, reference: &str) -> kernel::Result<Option<Arc<Image>>> {
        find(&self.0.load(), reference)
    }
}

/// As [`View::find`], in any list.
pub fn find(all: &[Arc<Image>], reference: &str) -> kernel::Result<Option<Arc<Image>>> {
    let familiar = normalize(reference);
    let by_name = all.iter().find(|i| i.id == reference || i.repo_tags.contains(&familiar) || i.repo_digests.contains(&familiar));
    if let Some(image) = by_name {
        return Ok(Some(image.clone()));
    }
    let hex = reference.strip_prefix("sha256:").unwrap_or(reference);
    if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let mut hits = all.iter().filter(|i| i.id.strip_prefix("sha256:").is_some_and(|h| h.starts_with(hex)));
    match (hits.next(), hits.next()) {
        (Some(one), None) => Ok(Some(one.clone())),
        (Some(_), Some(_)) => Err(kernel::Fault::invalid_argument(format!("image id {reference:?} is ambiguous: give more of its digits"))),
        (None, _) => Ok(None),
    }
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
    match full.split_once('@') {
        // With both, the digest decides, and the tag is dropped.
        Some((name, digest)) => {
            let tag = name.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'));
            format!("{}@{digest}", tag.map_or(name, |(name, _)| name))
        }
        None if last.contains(':') => full,
        None => format!("{full}:latest"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn references_are_completed_as_docker_does() {
        for (short, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1", "docker.io/library/busybox:1"),
            ("a/b", "docker.io/a/b:latest"),
            ("index.docker.io/a", "docker.io/library/a:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("h:5000/a/b:1@sha256:cc", "h:5000/a/b@sha256:cc"),
            ("h:5000/a@sha256:cc", "h:5000/a@sha256:cc"),
            ("busybox:1@sha256:cc", "docker.io/library/busybox@sha256:cc"),
        ] {
            assert_eq!(normalize(short), full);
        }
    }

    #[test]
    fn ids_may_be_shortened_but_not_ambiguous() {
        let image = |id: &str| {
            let row = serde_json::json!({"id": id, "repo_tags": ["docker.io/library/a:latest"], "repo_digests": [], "size": 0, "manifest": "",
                "target": "", "chain_id": "", "snapshotter": "", "config": {}, "pinned": false, "labels": {}});
            Arc::new(serde_json::from_value::<Image>(row).unwrap())
        };
        let all = [image("sha256:abc1"), image("sha256:abc2")];
        assert_eq!(find(&all, "abc1").unwrap().unwrap().id, "sha256:abc1");
        assert_eq!(find(&all, "sha256:abc2").unwrap().unwrap().id, "sha256:abc2");
        assert!(find(&all, "abc").unwrap_err().message.contains("ambiguous"));
        assert!(find(&all, "d").unwrap().is_none());
        assert!(find(&all, "a").unwrap().is_some(), "a name comes before an id");
    }
}

/// Pulls and unpacks; answers the image. Pulls of the same reference in flight are joined.
#[derive(Clone, Debug)]
pub struct Pull {
    /// Reference as the client wrote it.
    pub reference: String,
    /// Credentials of the request.
    pub auth: Option<cri::AuthConfig>,
    /// Runtime handler whose snapshotter the image is for; empty = the default.
    pub handler: String,
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
/// Makes sure that an image's layers are unpacked in a snapshotter; fetches what is missing. `NotFound` if there is no such image.
#[derive(Clone, Debug)]
pub struct Unpack {
    /// Image id.
    pub id: String,
    /// Snapshotter; empty = default.
    pub snapshotter: String,
}
/// Disk use of the image file systems.
#[derive(Clone, Debug)]
pub struct FsInfo;

kernel::messages! { Images = "image" => {
    Pull -> Arc<Image> as idempotent,
    Resolve -> Option<Arc<Image>> as idempotent,
    Remove -> () as idempotent,
    Unpack -> () as idempotent,
    FsInfo -> cri::ImageFsInfoResponse as idempotent,
} }

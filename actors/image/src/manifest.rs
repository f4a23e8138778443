//! Manifests: indexes, platform choice, layers.
use kernel::{Class, Fault, Result, ResultExt};
use serde::Deserialize;
use std::collections::BTreeMap;

/// A reference to a blob.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type.
    #[serde(default)]
    pub media_type: String,
    /// Digest.
    pub digest: String,
    /// Bytes.
    #[serde(default)]
    pub size: u64,
    /// Annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Platform {
    os: String,
    architecture: String,
    variant: String,
}

/// A manifest or an index.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    artifact_type: String,
}

/// What a document turned out to be.
pub enum Manifest {
    /// An index: the manifest of this machine's platform.
    Index(Descriptor),
    /// Configuration and layers, bottom first.
    Image(Descriptor, Vec<Descriptor>),
    /// Files: an OCI artifact.
    Artifact(Descriptor, Vec<Descriptor>),
}

/// What this machine runs, in OCI's words for architecture and variant, best first.
fn platforms() -> &'static [(&'static str, &'static str)] {
    match std::env::consts::ARCH {
        "x86_64" => &[("amd64", ""), ("amd64", "v1"), ("386", "")],
        "aarch64" => &[("arm64", "v8"), ("arm64", ""), ("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5"), ("arm", "")],
        "arm" => &[("arm", "v7"), ("arm", ""), ("arm", "v6"), ("arm", "v5")],
        "powerpc64" => &[("ppc64le", "")],
        "s390x" => &[("s390x", "")],
        "riscv64" => &[("riscv64", "")],
        other => {
            tracing::debug!(other, "no platforms are known for this architecture");
            &[]
        }
    }
}

/// Whether a configuration of this type is a container image's. Old tools left the type out or called it plain bytes.
fn is_image(config: &Descriptor) -> bool {
    matches!(
        config.media_type.as_str(),
        "" | "application/octet-stream" | "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json"
    )
}

/// Reads a document. `what` names it in errors.
pub fn read(bytes: &[u8], what: &str) -> Result<Manifest> {
    let document: Document = serde_json::from_slice(bytes).class(Class::InvalidArgument, format!("{what} is not a manifest"))?;
    if document.schema_version == 1 {
        return Err(Fault::unimplemented(format!("{what} is a Docker schema 1 manifest, which is not supported: push the image again")));
    }
    if let Some(config) = document.config {
        let artifact = !document.artifact_type.is_empty() || !is_image(&config);
        return Ok(if artifact { Manifest::Artifact(config, document.layers) } else { Manifest::Image(config, document.layers) });
    }
    let platforms = platforms();
    let rank = |d: &Descriptor| {
        let Some(p) = &d.platform else { return Some(platforms.len()) };
        let ours = |(arch, variant): &(&str, &str)| p.os == "linux" && *arch == p.architecture && *variant == p.variant;
        platforms.iter().position(ours)
    };
    let best = document.manifests.iter().filter_map(|d| rank(d).map(|r| (r, d))).min_by_key(|(r, _)| *r);
    match best {
        Some((_, d)) => Ok(Manifest::Index(d.clone())),
        None => Err(Fault::not_found(format!("{what} has no image for linux/{}", platforms.first().map_or("?", |p| p.0)))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_platform_is_chosen_and_old_schemas_are_refused() {
        let arch = platforms()[0].0;
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"digest":"sha256:aa","platform":{{"os":"linux","architecture":"other"}}}},
            {{"digest":"sha256:bb","platform":{{"os":"linux","architecture":"{arch}"}}}}]}}"#
        );
        let Manifest::Index(d) = read(index.as_bytes(), "x").unwrap() else { panic!("an index") };
        assert_eq!(d.digest, "sha256:bb");
        let artifact =
            br#"{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:cc"},"layers":[]}"#;
        assert!(matches!(read(artifact, "x").unwrap(), Manifest::Artifact(..)));
        assert_eq!(read(br#"{"schemaVersion":1}"#, "x").err().unwrap().class, Class::Unimplemented);
        assert!(read(br#"{"schemaVersion":2,"manifests":[]}"#, "x").err().unwrap().is_not_found());
    }
}

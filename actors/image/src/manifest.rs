//! Manifests: indexes, platform choice, layers.
use kernel::{Class, Fault, Result, ResultExt};
use serde::Deserialize;

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
}

/// What a document turned out to be.
pub enum Manifest {
    /// An index: the manifest of this machine's platform.
    Index(Descriptor),
    /// Configuration and layers, bottom first.
    Image(Descriptor, Vec<Descriptor>),
}

/// This machine's architecture in OCI's words, and the variants it runs, best first.
fn architecture() -> (&'static str, &'static [&'static str]) {
    match std::env::consts::ARCH {
        "x86_64" => ("amd64", &["", "v1"]),
        "aarch64" => ("arm64", &["v8", ""]),
        "arm" => ("arm", &["v7", "v6", "v5", ""]),
        "powerpc64" => ("ppc64le", &[""]),
        other => (other, &[""]),
    }
}

/// Reads a document. `what` names it in errors.
pub fn read(bytes: &[u8], what: &str) -> Result<Manifest> {
    let document: Document = serde_json::from_slice(bytes).class(Class::InvalidArgument, format!("{what} is not a manifest"))?;
    if document.schema_version == 1 {
        return Err(Fault::unimplemented(format!("{what} is a Docker schema 1 manifest, which is not supported: push the image again")));
    }
    if let Some(config) = document.config {
        return Ok(Manifest::Image(config, document.layers));
    }
    let (arch, variants) = architecture();
    let rank = |d: &Descriptor| {
        let Some(p) = &d.platform else { return Some(variants.len()) };
        if p.os != "linux" || p.architecture != arch {
            return None;
        }
        variants.iter().position(|v| *v == p.variant)
    };
    let best = document.manifests.iter().filter_map(|d| rank(d).map(|r| (r, d))).min_by_key(|(r, _)| *r);
    match best {
        Some((_, d)) => Ok(Manifest::Index(d.clone())),
        None => Err(Fault::not_found(format!("{what} has no image for linux/{arch}"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_platform_is_chosen_and_old_schemas_are_refused() {
        let (arch, _) = architecture();
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"digest":"sha256:aa","platform":{{"os":"linux","architecture":"other"}}}},
            {{"digest":"sha256:bb","platform":{{"os":"linux","architecture":"{arch}"}}}}]}}"#
        );
        let Manifest::Index(d) = read(index.as_bytes(), "x").unwrap() else { panic!("an index") };
        assert_eq!(d.digest, "sha256:bb");
        assert_eq!(read(br#"{"schemaVersion":1}"#, "x").err().unwrap().class, Class::Unimplemented);
        assert!(read(br#"{"schemaVersion":2,"manifests":[]}"#, "x").err().unwrap().is_not_found());
    }
}

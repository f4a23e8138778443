//! One pull: resolve the reference, fetch the documents, then the layers; the image's record comes last, so that a pull that ends early leaves no name.
use crate::World;
use crate::manifest::{Descriptor, Manifest, read};
use crate::registry::{Repository, auth::Credentials};
use kernel::{Class, Cx, Fault, Result, ResultExt};
use messages::content::{self, Held};
use messages::image::{Image, Pull, normalize};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// A normalised reference in its parts.
#[derive(Debug, PartialEq, Eq)]
struct Reference<'a> {
    registry: &'a str,
    repository: &'a str,
    /// Tag or digest.
    object: &'a str,
}

/// Splits a normalised reference.
fn split(reference: &str) -> Result<Reference<'_>> {
    let (registry, rest) =
        reference.split_once('/').ok_or_else(|| Fault::invalid_argument(format!("image reference {reference:?} has no repository")))?;
    let (repository, object) = match rest.split_once('@') {
        Some(parts) => parts,
        None => rest.rsplit_once(':').unwrap_or((rest, "latest")),
    };
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
    let tag = |c: char| c.is_ascii_alphanumeric() || "._-:+".contains(c);
    let host = |c: char| c.is_ascii_alphanumeric() || ".-_:[]".contains(c);
    let whole = !repository.is_empty() && !object.is_empty() && !repository.split('/').any(|p| p.is_empty() || p == "." || p == "..");
    if !whole || !registry.chars().all(host) || !repository.chars().all(good) || !object.chars().all(tag) {
        return Err(Fault::invalid_argument(format!("{reference:?} is not an image reference")));
    }
    Ok(Reference { registry, repository, object })
}

/// Runs a pull.
pub async fn run(world: &Rc<World>, cx: &Cx, m: Pull) -> Result<Arc<Image>> {
    let reference = normalize(&m.reference);
    let r = split(&reference)?;
    let snapshotter = world.snapshotter(&m.handler)?;
    let credentials = Credentials::new(m.auth.as_ref())?;
    let repository = Repository::new(cx, &world.args.registry, r.registry, r.repository, credentials).await?;
    let pull = Puller { world, repository: &repository, cx, snapshotter, holds: Default::default() };
    let what = format!("pull {reference}");
    let image = pull.image(&r).await.inspect_err(|e| {
        if e.class == Class::ResourceExhausted {
            world.full.set(true);
            world.left.notify_one();
        }
    });
    let image = image.context(&what)?;
    let tag = (!r.object.starts_with("sha256:")).then(|| format!("{}/{}:{}", r.registry, r.repository, r.object));
    let image = world.record(cx, image, tag).await.context(&what)?;
    world.tell(cx, "/images/create", &reference).await;
    Ok(image)
}

/// Unpacks an image that is here in a snapshotter that does not have it.
pub async fn unpack_again(world: &Rc<World>, cx: &Cx, id: &str, snapshotter: String) -> Result<Arc<Image>> {
    let image = world.args.view.find(id)?.ok_or_else(|| Fault::not_found(format!("image {id} is not here: pull it first")))?;
    let name =
        image.repo_digests.first().ok_or_else(|| Fault::data_loss(format!("image {id} has no name to fetch it by: pull it again")))?;
    let r = split(name)?;
    let repository = Repository::new(cx, &world.args.registry, r.registry, r.repository, Credentials::new(None)?).await?;
    let pull = Puller { world, repository: &repository, cx, snapshotter, holds: Default::default() };
    pull.hold(vec![image.manifest.clone()]).await?;
    let document = pull.document(&image.manifest).await?;
    let (config, layers, artifact) = match read(&document, &image.manifest)? {
        Manifest::Image(config, layers) => (config, layers, false),
        Manifest::Artifact(config, layers) => (config, layers, true),
        Manifest::Index(_) => return Err(Fault::data_loss(format!("manifest {} of image {id} is an index", image.manifest))),
    };
    pull.hold(layers.iter().chain([&config]).map(|d| d.digest.clone()).collect()).await?;
    match artifact {
        true => pull.artifact(&image.manifest, &layers).await?,
        false => pull.unpack(&layers, &diff_ids(&image.config, &layers)?).await?,
    };
    Ok(image)
}

/// Digests of the uncompressed layers.
fn diff_ids(config: &serde_json::Value, layers: &[Descriptor]) -> Result<Vec<String>> {
    let ids: Vec<String> = config.pointer("/rootfs/diff_ids").and_then(|v| serde_json::from_value(v.clone()).ok()).unwrap_or_default();
    if ids.len() == layers.len() {
        return Ok(ids);
    }
    Err(Fault::invalid_argument(format!("the image's configuration names {} layers, its manifest {}", ids.len(), layers.len())))
}

/// What the steps of one pull share.
pub(crate) struct Puller<'a> {
    pub world: &'a Rc<World>,
    pub repository: &'a Repository,
    pub cx: &'a Cx,
    pub snapshotter: String,
    /// Against the collector: what this pull relies on, until the image's record says so.
    holds: RefCell<Vec<Box<dyn Held>>>,
}

impl Puller<'_> {
    async fn image(&self, r: &Reference<'_>) -> Result<Image> {
        let (target, mut document) = self.cx.run("resolve", |cx| async move { self.resolve(&cx, r).await }).await?;
        let mut manifest = target.clone();
        let (config, layers, artifact) = loop {
            match read(&document, &manifest)? {
                Manifest::Image(config, layers) => break (config, layers, false),
                Manifest::Artifact(config, layers) => break (config, layers, true),
                Manifest::Index(d) if manifest == target => {
                    self.hold(vec![d.digest.clone()]).await?;
                    document = self.document(&d.digest).await?;
                    manifest = d.digest;
                }
                Manifest::Index(_) => return Err(Fault::invalid_argument(format!("{manifest} is an index within an index"))),
            }
        };
        self.hold(layers.iter().chain([&config]).map(|d| d.digest.clone()).collect()).await?;
        let bytes = self.small(&config).await?;
        let (id, chain_id, parsed) = if artifact {
            // Configurations of artifacts are alike, often empty: only the manifest tells them apart.
            (manifest.clone(), self.artifact(&manifest, &layers).await?, serde_json::json!({}))
        } else {
            let parsed: serde_json::Value = serde_json::from_slice(&bytes)
                .map_err(|e| Fault::invalid_argument(format!("image configuration {}: {e}", config.digest)))?;
            let ids = diff_ids(&parsed, &layers)?;
            (config.digest.clone(), self.unpack(&layers, &ids).await?, parsed)
        };
        Ok(Image {
            id,
            repo_tags: vec![],
            repo_digests: vec![format!("{}/{}@{target}", r.registry, r.repository)],
            size: document.len() as u64 + config.size + layers.iter().map(|l| l.size).sum::<u64>(),
            manifest,
            target,
            chain_id,
            snapshotter: self.snapshotter.clone(),
            config: parsed,
            pinned: false,
            labels: BTreeMap::new(),
            layers: layers.into_iter().map(|l| (l.digest, l.size)).collect(),
            artifact,
        })
    }

    /// Digest and bytes of what the reference stands for. The registry is always asked, for it may have moved the tag or revoked the right to pull;
    /// but what is here already is only asked for by a HEAD, which registries do not count against their limits.
    async fn resolve(&self, cx: &Cx, r: &Reference<'_>) -> Result<(String, Vec<u8>)> {
        let here = self.world.args.view.find(&format!("{}/{}{}{}", r.registry, r.repository, separator(r.object), r.object))?;
        if let Some(image) = here {
            self.hold(vec![image.target.clone()]).await?;
            if self.repository.digest(cx, r.object).await?.as_ref() == Some(&image.target)
                && let Some(bytes) = self.present(&image.target).await?
            {
                return Ok((image.target.clone(), bytes));
            }
        }
        let (bytes, digest) = self.repository.manifest(cx, r.object).await?;
        self.hold(vec![digest.clone()]).await?;
        self.keep(&digest, bytes.clone()).await?;
        Ok((digest, bytes))
    }

    /// Holds first, looks afterwards: what is found then stays.
    pub async fn hold(&self, names: Vec<String>) -> Result<()> {
        let hold = self.world.args.content.call(self.cx, content::Hold { names }).await?;
        self.holds.borrow_mut().push(hold);
        Ok(())
    }
}

fn separator(object: &str) -> char {
    if object.starts_with("sha256:") { '@' } else { ':' }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn references_are_split_and_bad_ones_named() {
        let r = |registry, repository, object| Reference { registry, repository, object };
        assert_eq!(split("docker.io/library/busybox:latest").unwrap(), r("docker.io", "library/busybox", "latest"));
        assert_eq!(split(&normalize("127.0.0.1:5000/a/b:1@sha256:ab")).unwrap(), r("127.0.0.1:5000", "a/b", "sha256:ab"));
        for bad in ["docker.io/library/Busybox:latest", "h/a b:1", "h/../b:1", "h/a//b:1", "h /a:1", "h/a:1?x"] {
            assert!(split(bad).unwrap_err().message.contains(bad), "{bad}");
        }
    }
}

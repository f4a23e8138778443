//! One pull: resolve, fetch, verify, decompress, apply; side by side within a layer and across layers.
use crate::manifest::{Descriptor, Manifest, read};
use crate::registry::{Repository, auth::Credentials};
use crate::{Args, digest};
use futures::stream::{FuturesUnordered, StreamExt};
use kernel::{Cx, Fault, Result, ResultExt};
use messages::content::{self, Begin, Held};
use messages::image::{Image, Pull, normalize};
use messages::snapshot;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Key prefix of snapshots that are being unpacked, as containerd's.
const EXTRACT: &str = "extract-";

/// Splits a normalised reference into registry, repository and tag or digest.
fn split(reference: &str) -> Result<(&str, &str, &str)> {
    let (registry, rest) =
        reference.split_once('/').ok_or_else(|| Fault::invalid_argument(format!("image reference {reference:?} has no repository")))?;
    let (name, object) = match rest.split_once('@') {
        Some((name, digest)) => (name.rsplit_once(':').map_or(name, |(n, _)| n), digest),
        None => rest.rsplit_once(':').unwrap_or((rest, "latest")),
    };
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
    if name.is_empty() || !name.chars().all(good) || object.is_empty() || object.contains(char::is_whitespace) {
        return Err(Fault::invalid_argument(format!("{reference:?} is not an image reference")));
    }
    Ok((registry, name, object))
}

/// Runs a pull.
pub async fn run(args: Rc<Args>, cx: Cx, m: Pull) -> Result<Arc<Image>> {
    let reference = normalize(&m.reference);
    let (registry, name, object) = split(&reference)?;
    let repository = Repository::new(&args.registry, registry, name, Credentials::new(m.auth.as_ref())?)?;
    let pull = Puller {
        args: &args,
        repository: &repository,
        cx: &cx,
        snapshotter: if m.snapshotter.is_empty() { args.snapshotter.clone() } else { m.snapshotter },
        holds: Default::default(),
    };
    let what = format!("pull {reference}");
    let image = pull.image(registry, name, object).await.context(&what)?;
    let tag = (!object.starts_with("sha256:")).then(|| format!("{registry}/{name}:{object}"));
    let image = args.record(&cx, image, tag).await.context(&what)?;
    args.tell(&cx, "/images/create", &reference).await;
    Ok(image)
}

/// Removes what an earlier generation left half unpacked.
pub async fn sweep(args: &Args, cx: &Cx) -> Result<()> {
    for s in args.snapshots.call(cx, snapshot::List { snapshotter: String::new() }).await? {
        if s.key.starts_with(EXTRACT) && s.kind == snapshot::Kind::Active {
            args.snapshots.call(cx, snapshot::Remove { snapshotter: s.snapshotter, key: s.key }).await?;
        }
    }
    Ok(())
}

struct Puller<'a> {
    args: &'a Args,
    repository: &'a Repository,
    cx: &'a Cx,
    snapshotter: String,
    /// Against the collector: what this pull relies on, until the image's record says so.
    holds: RefCell<Vec<Box<dyn Held>>>,
}

/// A layer that is unpacked and waits for its parent to be committed.
struct Unpacked {
    key: String,
}

impl Puller<'_> {
    async fn image(&self, registry: &str, name: &str, object: &str) -> Result<Image> {
        let cx = self.cx;
        let (bytes, _, target) = cx.run("resolve", |cx| async move { self.repository.manifest(&cx, object).await }).await?;
        self.hold(vec![target.clone()]).await?;
        self.keep(&target, bytes.clone(), BTreeMap::new()).await?;
        let (mut manifest, mut document) = (target.clone(), bytes);
        let mut referenced = Vec::new();
        let (config, layers) = loop {
            match read(&document, &manifest)? {
                Manifest::Image(config, layers) => break (config, layers),
                Manifest::Index(d) if manifest == target => {
                    referenced.push(d.digest.clone());
                    (document, manifest, _) = {
                        let wanted = d.digest.clone();
                        self.hold(vec![wanted.clone()]).await?;
                        let (bytes, kind, digest) = match self.present(&wanted).await? {
                            Some(bytes) => (bytes, String::new(), wanted),
                            None => cx.run("manifest", |cx| async move { self.repository.manifest(&cx, &wanted).await }).await?,
                        };
                        self.keep(&digest, bytes.clone(), BTreeMap::new()).await?;
                        (bytes, digest, kind)
                    };
                }
                Manifest::Index(_) => return Err(Fault::invalid_argument(format!("{manifest} is an index within an index"))),
            }
        };
        self.hold(layers.iter().chain([&config]).map(|d| d.digest.clone()).collect()).await?;
        let config_bytes = self.small(&config).await?;
        let parsed: serde_json::Value = serde_json::from_slice(&config_bytes)
            .map_err(|e| Fault::invalid_argument(format!("image configuration {}: {e}", config.digest)))?;
        let diff_ids: Vec<String> =
            parsed.pointer("/rootfs/diff_ids").and_then(|v| serde_json::from_value(v.clone()).ok()).unwrap_or_default();
        if diff_ids.len() != layers.len() {
            return Err(Fault::invalid_argument(format!(
                "the configuration names {} layers, the manifest {}",
                diff_ids.len(),
                layers.len()
            )));
        }
        let chain_id = self.unpack(&layers, &diff_ids).await?;
        Ok(Image {
            id: config.digest.clone(),
            repo_tags: vec![],
            repo_digests: vec![format!("{registry}/{name}@{target}")],
            size: document.len() as u64 + config.size + layers.iter().map(|l| l.size).sum::<u64>(),
            manifest,
            target,
            chain_id,
            snapshotter: self.snapshotter.clone(),
            config: parsed,
            pinned: false,
            labels: BTreeMap::new(),
        })
    }

    /// Holds first, looks afterwards: what is found then stays.
    async fn hold(&self, names: Vec<String>) -> Result<()> {
        let hold = self.args.content.call(self.cx, content::Hold { names }).await?;
        self.holds.borrow_mut().push(hold);
        Ok(())
    }

    async fn present(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        match self.args.content.call(self.cx, content::ReadAll { digest: digest.into() }).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Stores a document whose digest is known to be right.
    async fn keep(&self, digest: &str, bytes: Vec<u8>, labels: BTreeMap<String, String>) -> Result<()> {
        let begin = Begin { ref_: format!("manifest-{digest}"), digest: digest.into(), size: bytes.len() as u64 };
        let mut writer = match self.args.content.call(self.cx, begin).await {
            Ok(writer) => writer,
            Err(e) if e.is_already_exists() => return Ok(()),
            Err(e) => return Err(e),
        };
        let write = move || {
            writer.reset()?;
            writer.write(&bytes)?;
            writer.commit(labels)
        };
        self.cx.blocking("write manifest", Duration::from_secs(60), write).await.map(drop)
    }

    /// A small blob: from the content store, or fetched.
    async fn small(&self, d: &Descriptor) -> Result<Vec<u8>> {
        if let Some(bytes) = self.present(&d.digest).await? {
            return Ok(bytes);
        }
        self.fetch(d, None, &|_| {}).await?;
        self.present(&d.digest).await?.ok_or_else(|| Fault::data_loss(format!("{} vanished", d.digest)))
    }

    /// Fetches a blob into the content store, and into `tee` while it comes.
    async fn fetch(&self, d: &Descriptor, tee: Option<crate::registry::Tee>, progress: &dyn Fn(u64)) -> Result<()> {
        let begin = Begin { ref_: format!("layer-{}", d.digest), digest: d.digest.clone(), size: d.size };
        let mut writer = match self.args.content.call(self.cx, begin).await {
            Ok(writer) => writer,
            Err(e) if e.is_already_exists() => return self.replay(&d.digest, tee).await,
            Err(e) => return Err(e),
        };
        if tee.is_some() && writer.offset() > 0 {
            // The unpacker needs all bytes: what an earlier pull left is fetched again only if it cannot be read back, so resume without a tee first.
            let writer = self.repository.blob(self.cx, &d.digest, d.size, writer, None, progress).await?;
            self.commit(writer).await?;
            return self.replay(&d.digest, tee).await;
        }
        writer = self.repository.blob(self.cx, &d.digest, d.size, writer, tee, progress).await?;
        self.commit(writer).await
    }

    async fn commit(&self, writer: Box<dyn content::BlobWriter>) -> Result<()> {
        let labels = BTreeMap::new();
        self.cx.blocking("commit blob", Duration::from_secs(600), move || writer.commit(labels)).await.map(drop)
    }

    /// Feeds the unpacker from a blob that is there.
    async fn replay(&self, digest: &str, tee: Option<crate::registry::Tee>) -> Result<()> {
        let Some(tee) = tee else { return Ok(()) };
        let info = self.args.content.call(self.cx, content::Info { digest: digest.into() }).await?;
        let info = info.ok_or_else(|| Fault::not_found(format!("blob {digest}")))?;
        let read = move || {
            let mut file = std::fs::File::open(&info.path).with_context(|| format!("open {}", info.path.display()))?;
            loop {
                let mut chunk = vec![0; 256 << 10];
                let n = file.read(&mut chunk)?;
                chunk.truncate(n);
                if n == 0 || tee.send(chunk.into()).is_err() {
                    return Ok(());
                }
            }
        };
        self.cx.blocking("read layer", Duration::from_secs(24 * 3600), read).await
    }

    /// Fetches and unpacks all layers; answers the chain id of the top.
    async fn unpack(&self, layers: &[Descriptor], diff_ids: &[String]) -> Result<String> {
        let mut chain: Vec<String> = Vec::new();
        for diff_id in diff_ids {
            chain.push(match chain.last() {
                Some(parent) => digest(format!("{parent} {diff_id}").as_bytes()),
                None => diff_id.clone(),
            });
        }
        self.hold(chain.clone()).await?;
        let sequential = self.snapshotter != "overlayfs";
        let width = if sequential { 1 } else { self.args.downloads.max(1) };
        let state = Progress::new(layers);
        let mut waiting: VecDeque<usize> = (0..layers.len()).collect();
        let mut running = FuturesUnordered::new();
        let mut unpacked: BTreeMap<usize, Option<Unpacked>> = BTreeMap::new();
        let mut committed = 0;
        let result: Result<()> = async {
            while committed < layers.len() {
                while running.len() < width
                    && let Some(n) = waiting.front().copied()
                    && (!sequential || committed == n)
                {
                    waiting.pop_front();
                    let parent = if sequential && n > 0 { chain[n - 1].clone() } else { String::new() };
                    let (chain, state) = (&chain, &state);
                    running.push(async move { (n, self.layer(n, &layers[n], &diff_ids[n], &chain[n], &parent, state).await) });
                }
                if let Some((n, result)) = running.next().await {
                    unpacked.insert(n, result.with_context(|| format!("layer {} of {}", n + 1, layers.len()))?);
                }
                while let Some(layer) = unpacked.remove(&committed) {
                    if let Some(layer) = layer {
                        let parent = (committed > 0).then(|| chain[committed - 1].clone());
                        self.commit_layer(layer, &chain[committed], parent).await?;
                    }
                    committed += 1;
                }
            }
            Ok(())
        }
        .await;
        if result.is_err() {
            drop(running);
            sweep_mine(self, &state).await;
        }
        result?;
        Ok(chain.last().cloned().unwrap_or_default())
    }

    /// One layer: `None` when its snapshot is there already.
    async fn layer(
        &self,
        n: usize,
        d: &Descriptor,
        diff_id: &str,
        chain_id: &str,
        parent: &str,
        state: &Progress,
    ) -> Result<Option<Unpacked>> {
        let stat = snapshot::Stat { snapshotter: self.snapshotter.clone(), key: chain_id.into() };
        if self.args.snapshots.call(self.cx, stat).await?.is_some() {
            let present = self.args.content.call(self.cx, content::Info { digest: d.digest.clone() }).await?.is_some();
            if !present {
                self.fetch(d, None, &|_| {}).await?;
            }
            return Ok(None);
        }
        let key = format!("{EXTRACT}{} {chain_id}", uuid::Uuid::new_v4().simple());
        let prepare = snapshot::Prepare {
            snapshotter: self.snapshotter.clone(),
            key: key.clone(),
            parent: parent.into(),
            view: false,
            labels: BTreeMap::new(),
        };
        self.args.snapshots.call(self.cx, prepare).await?;
        state.keys.borrow_mut().push(key.clone());
        let (tee, source) = std::sync::mpsc::sync_channel(64);
        let apply = snapshot::Apply {
            snapshotter: self.snapshotter.clone(),
            key: key.clone(),
            media_type: d.media_type.clone(),
            source: Box::new(Pipe { chunks: source, rest: bytes::Bytes::new() }),
        };
        let name = format!("unpack layer {}", n + 1);
        let (fetched, applied) = futures::join!(
            self.cx.run(format!("fetch layer {}", n + 1), |cx| async move {
                cx.attr("oci.layer.digest", &d.digest);
                cx.attr("bytes", d.size);
                self.fetch(d, Some(tee), &|bytes| state.tell(self.cx, n, bytes)).await
            }),
            self.cx.run(name, |cx| async move { self.args.snapshots.call(&cx, apply).await }),
        );
        // The fetch's error explains more: a broken download makes the unpacker fail, too.
        fetched?;
        let applied = applied?;
        if applied.diff_id != diff_id {
            return Err(Fault::data_loss(format!("the layer unpacks to {}, the image's configuration says {diff_id}", applied.diff_id)));
        }
        Ok(Some(Unpacked { key }))
    }

    async fn commit_layer(&self, layer: Unpacked, chain_id: &str, parent: Option<String>) -> Result<()> {
        let snapshotter = self.snapshotter.clone();
        let commit = snapshot::Commit {
            snapshotter: snapshotter.clone(),
            key: layer.key.clone(),
            name: chain_id.into(),
            parent,
            labels: BTreeMap::new(),
        };
        match self.args.snapshots.call(self.cx, commit).await {
            // Another pull was faster with the same layer.
            Err(e) if e.is_already_exists() => self.args.snapshots.call(self.cx, snapshot::Remove { snapshotter, key: layer.key }).await,
            other => other,
        }
    }
}

/// After a failure: removes the active snapshots of this pull.
async fn sweep_mine(pull: &Puller<'_>, state: &Progress) {
    for key in state.keys.take() {
        let remove = snapshot::Remove { snapshotter: pull.snapshotter.clone(), key };
        match pull.args.snapshots.call(pull.cx, remove).await {
            Err(e) if !e.is_not_found() => tracing::warn!(error = %e, "a half-unpacked snapshot stays until the next start"),
            _ => {}
        }
    }
}

/// What `troupe ops` shows of a pull.
struct Progress {
    sizes: Vec<u64>,
    done: RefCell<Vec<u64>>,
    keys: RefCell<Vec<String>>,
    began: Instant,
    told: Cell<Instant>,
}

impl Progress {
    fn new(layers: &[Descriptor]) -> Progress {
        let sizes: Vec<u64> = layers.iter().map(|l| l.size).collect();
        let done = RefCell::new(vec![0; sizes.len()]);
        Progress { sizes, done, keys: Default::default(), began: Instant::now(), told: Cell::new(Instant::now()) }
    }
    fn tell(&self, cx: &Cx, layer: usize, bytes: u64) {
        self.done.borrow_mut()[layer] = bytes;
        if self.told.get().elapsed() < Duration::from_millis(200) {
            return;
        }
        self.told.set(Instant::now());
        let mib = |b: u64| b as f64 / f64::from(1 << 20);
        let (done, all) = (self.done.borrow().iter().sum::<u64>(), self.sizes.iter().sum::<u64>());
        let rate = mib(done) / self.began.elapsed().as_secs_f64();
        cx.step(format!("layer {}/{} fetch, {:.1}/{:.1} MiB in all, {rate:.1} MiB/s", layer + 1, self.sizes.len(), mib(done), mib(all)));
    }
}

/// The unpacker's end of the tee.
struct Pipe {
    chunks: std::sync::mpsc::Receiver<bytes::Bytes>,
    rest: bytes::Bytes,
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if self.rest.is_empty() {
            match self.chunks.recv() {
                Ok(chunk) => self.rest = chunk,
                Err(_) => return Ok(0),
            }
        }
        let n = self.rest.len().min(into.len());
        into[..n].copy_from_slice(&self.rest.split_to(n));
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn references_are_split_and_bad_ones_named() {
        assert_eq!(split("docker.io/library/busybox:latest").unwrap(), ("docker.io", "library/busybox", "latest"));
        assert_eq!(split("127.0.0.1:5000/a/b:1@sha256:ab").unwrap(), ("127.0.0.1:5000", "a/b", "sha256:ab"));
        assert!(split("docker.io/library/Busybox:latest").unwrap_err().message.contains("Busybox"));
    }
}

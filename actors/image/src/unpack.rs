//! From layers to snapshots: fetch, verify, decompress, apply, side by side within a layer and across layers; commits in order.
use crate::manifest::Descriptor;
use crate::progress::{Phase, Progress};
use crate::pull::Puller;
use crate::registry::tee;
use crate::{World, artifact, digest};
use futures::stream::{FuturesUnordered, StreamExt};
use kernel::{Class, Cx, Fault, Result, ResultExt};
use messages::{content, snapshot};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

/// Key prefix of snapshots that are being unpacked, as containerd's.
const EXTRACT: &str = "extract-";
/// An unpacker that was given up ends as soon as it sees that nothing comes any more.
const SWEEPS: u32 = 8;

/// A snapshot that is being unpacked. Dropped before its end, it is swept.
struct Unpacking {
    world: Rc<World>,
    key: String,
    whole: bool,
}

impl Unpacking {
    fn new(world: &Rc<World>, chain_id: &str) -> Unpacking {
        let key = format!("{EXTRACT}{} {chain_id}", uuid::Uuid::new_v4().simple());
        world.unpacking.borrow_mut().insert(key.clone());
        Unpacking { world: world.clone(), key, whole: false }
    }
}

impl Drop for Unpacking {
    fn drop(&mut self) {
        self.world.unpacking.borrow_mut().remove(&self.key);
        if !self.whole {
            self.world.left.notify_one();
        }
    }
}

impl World {
    /// Removes what was left half unpacked, by this generation or an earlier one.
    pub async fn sweep(&self, cx: &Cx) {
        for attempt in 0..SWEEPS {
            match self.sweep_once(cx).await {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "half-unpacked snapshots could not be swept yet"),
            }
            tokio::time::sleep(Duration::from_millis(50 << attempt)).await;
        }
        if self.full.take() {
            // Writers that were given up let their ingests go within moments.
            tokio::time::sleep(Duration::from_millis(200)).await;
            if let Err(error) = self.args.content.call(cx, content::SweepIngests { older_than_s: 0 }).await {
                tracing::warn!(%error, "downloads that broke off for want of space could not be removed");
            }
        }
    }

    /// Whether nothing is left.
    async fn sweep_once(&self, cx: &Cx) -> Result<bool> {
        let mut clean = true;
        for s in self.args.snapshots.call(cx, snapshot::List { snapshotter: String::new() }).await? {
            if s.kind != snapshot::Kind::Active || !s.key.starts_with(EXTRACT) || self.unpacking.borrow().contains(&s.key) {
                continue;
            }
            let remove = snapshot::Remove { snapshotter: s.snapshotter, key: s.key };
            match self.args.snapshots.call(cx, remove).await {
                Err(e) if !e.is_not_found() => {
                    tracing::debug!(error = %e, "a half-unpacked snapshot is still in use");
                    clean = false;
                }
                _ => {}
            }
        }
        Ok(clean)
    }
}

/// Keys of the snapshots: each depends on all layers up to it.
fn chain(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    for diff_id in diff_ids {
        chain.push(match chain.last() {
            Some(parent) => digest(format!("{parent} {diff_id}").as_bytes()),
            None => diff_id.clone(),
        });
    }
    chain
}

impl Puller<'_> {
    /// Fetches and unpacks all layers; answers the chain id of the top.
    pub async fn unpack(&self, layers: &[Descriptor], diff_ids: &[String]) -> Result<String> {
        let chain = chain(diff_ids);
        self.hold(chain.clone()).await?;
        let progress = Progress::new(layers);
        tokio::select! {
            result = self.layers(layers, diff_ids, &chain, &progress) => result?,
            never = progress.show(self.cx) => match never {},
        }
        Ok(chain.last().cloned().unwrap_or_default())
    }

    async fn layers(&self, layers: &[Descriptor], diff_ids: &[String], chain: &[String], progress: &Progress) -> Result<()> {
        // Only overlayfs unpacks a layer without what lies below it.
        let sequential = self.snapshotter != "overlayfs";
        let width = if sequential { 1 } else { self.world.args.downloads.max(1) };
        let mut waiting: VecDeque<usize> = (0..layers.len()).collect();
        let mut running = FuturesUnordered::new();
        let mut unpacked: BTreeMap<usize, Option<Unpacking>> = BTreeMap::new();
        let mut committed = 0;
        while committed < layers.len() {
            while running.len() < width
                && let Some(n) = waiting.front().copied()
                && (!sequential || committed == n)
            {
                waiting.pop_front();
                let parent = if sequential && n > 0 { chain[n - 1].as_str() } else { "" };
                running.push(async move { (n, self.layer(n, &layers[n], &diff_ids[n], &chain[n], parent, progress).await) });
            }
            if let Some((n, result)) = running.next().await {
                unpacked.insert(n, result.with_context(|| format!("layer {} of {}", n + 1, layers.len()))?);
            }
            while let Some(layer) = unpacked.remove(&committed) {
                if let Some(layer) = layer {
                    let parent = if committed > 0 { chain[committed - 1].clone() } else { String::new() };
                    self.commit_layer(layer, &chain[committed], parent).await?;
                }
                progress.phase(committed, Phase::Done);
                committed += 1;
            }
        }
        Ok(())
    }

    async fn has(&self, key: &str) -> Result<bool> {
        let stat = snapshot::Stat { snapshotter: self.snapshotter.clone(), key: key.into() };
        Ok(self.world.args.snapshots.call(self.cx, stat).await?.is_some())
    }

    /// One layer: `None` when its snapshot is there already.
    async fn layer(
        &self,
        n: usize,
        d: &Descriptor,
        diff_id: &str,
        chain_id: &str,
        parent: &str,
        progress: &Progress,
    ) -> Result<Option<Unpacking>> {
        if self.has(chain_id).await? {
            let present = self.world.args.content.call(self.cx, content::Info { digest: d.digest.clone() }).await?.is_some();
            if !present && !self.world.args.discard_layers {
                self.fetch(d, None, &|bytes| progress.bytes(n, bytes)).await?;
            }
            progress.bytes(n, d.size);
            return Ok(None);
        }
        loop {
            match self.fetch_and_apply(n, d, chain_id, parent, progress).await {
                Ok((unpacking, found)) if found == diff_id => return Ok(Some(unpacking)),
                Ok((_, found)) => {
                    let text = format!("the layer unpacks to {found}, but the image's configuration says {diff_id}");
                    return Err(Fault::data_loss(text));
                }
                // Another host may have the right bytes; the one that had wrong ones is not asked again.
                Err((fault, true)) if fault.class == Class::DataLoss => tracing::warn!(error = %fault, "another host is asked"),
                Err((fault, _)) => return Err(fault),
            }
        }
    }

    /// One attempt; the flag of the error says that a host turned out to have wrong bytes, and others are left.
    async fn fetch_and_apply(
        &self,
        n: usize,
        d: &Descriptor,
        chain_id: &str,
        parent: &str,
        progress: &Progress,
    ) -> Result<(Unpacking, String), (Fault, bool)> {
        let unpacking = Unpacking::new(self.world, chain_id);
        let prepare = snapshot::Prepare {
            snapshotter: self.snapshotter.clone(),
            key: unpacking.key.clone(),
            parent: parent.into(),
            view: false,
            labels: BTreeMap::new(),
        };
        self.world.args.snapshots.call(self.cx, prepare).await.map_err(|e| (e, false))?;
        let (to, source) = tee();
        let apply = snapshot::Apply {
            snapshotter: self.snapshotter.clone(),
            key: unpacking.key.clone(),
            media_type: d.media_type.clone(),
            source: Box::new(source),
        };
        let distrusted = self.repository.distrusted(&d.digest);
        progress.phase(n, Phase::Fetching);
        let (fetched, applied) = futures::join!(
            self.cx.run(format!("fetch layer {}", n + 1), |cx| async move {
                cx.attr("oci.layer.digest", &d.digest);
                cx.attr("bytes", d.size);
                let fetched = self.fetch(d, Some(to), &|bytes| progress.bytes(n, bytes)).await;
                progress.phase(n, Phase::Unpacking);
                fetched
            }),
            self.cx.run(format!("unpack layer {}", n + 1), |cx| async move { self.world.args.snapshots.call(&cx, apply).await }),
        );
        // The fetch's error explains more: a broken download makes the unpacker fail, too.
        let another = |fault: Fault| (fault, self.repository.distrusted(&d.digest) > distrusted && self.repository.trusted(&d.digest));
        fetched.map_err(another)?;
        let applied = applied.map_err(|e| (e, false))?;
        Ok((unpacking, applied.diff_id))
    }

    async fn commit_layer(&self, mut layer: Unpacking, chain_id: &str, parent: String) -> Result<()> {
        let snapshotter = self.snapshotter.clone();
        let commit = snapshot::Commit {
            snapshotter: snapshotter.clone(),
            key: layer.key.clone(),
            name: chain_id.into(),
            parent: Some(parent),
            labels: BTreeMap::new(),
        };
        match self.world.args.snapshots.call(self.cx, commit).await {
            // Another pull was faster with the same layer.
            Err(e) if e.is_already_exists() => {
                self.world.args.snapshots.call(self.cx, snapshot::Remove { snapshotter, key: layer.key.clone() }).await?
            }
            other => other?,
        }
        layer.whole = true;
        Ok(())
    }

    /// An artifact's files as one snapshot; answers its key.
    pub async fn artifact(&self, manifest: &str, layers: &[Descriptor]) -> Result<String> {
        let chain_id = digest(format!("artifact {manifest}").as_bytes());
        self.hold(vec![chain_id.clone()]).await?;
        let progress = Progress::new(layers);
        let fetch = async {
            let mut files = Vec::new();
            for (n, d) in layers.iter().enumerate() {
                progress.phase(n, Phase::Fetching);
                let fetched = self.fetch(d, None, &|bytes| progress.bytes(n, bytes)).await;
                fetched.with_context(|| format!("file {} of {}", n + 1, layers.len()))?;
                progress.phase(n, Phase::Done);
                let info = self.world.args.content.call(self.cx, content::Info { digest: d.digest.clone() }).await?;
                let info = info.ok_or_else(|| Fault::data_loss(format!("{} vanished", d.digest)))?;
                files.push((artifact::title(d), info.path, info.size));
            }
            Ok::<_, Fault>(files)
        };
        let files: Vec<_> = tokio::select! {
            files = fetch => files?,
            never = progress.show(self.cx) => match never {},
        };
        if self.has(&chain_id).await? {
            return Ok(chain_id);
        }
        let unpacking = Unpacking::new(self.world, &chain_id);
        let prepare = snapshot::Prepare {
            snapshotter: self.snapshotter.clone(),
            key: unpacking.key.clone(),
            parent: String::new(),
            view: false,
            labels: BTreeMap::new(),
        };
        self.world.args.snapshots.call(self.cx, prepare).await?;
        let source = self.cx.blocking("open an artifact's files", Duration::from_secs(60), move || artifact::tar(files)).await?;
        let apply = snapshot::Apply {
            snapshotter: self.snapshotter.clone(),
            key: unpacking.key.clone(),
            media_type: "application/vnd.oci.image.layer.v1.tar".into(),
            source: Box::new(source),
        };
        self.cx.run("write the artifact's files", |cx| async move { self.world.args.snapshots.call(&cx, apply).await }).await?;
        self.commit_layer(unpacking, &chain_id, String::new()).await?;
        Ok(chain_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_id_depends_on_everything_below() {
        let ids = chain(&["sha256:a".into(), "sha256:b".into()]);
        assert_eq!(ids[0], "sha256:a");
        assert_eq!(ids[1], digest(b"sha256:a sha256:b"));
    }
}

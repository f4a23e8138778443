//! The catalogue: which names point to which image. Every change is in the store before it is published, and changes never overlap.
use crate::World;
use kernel::{Cx, Result};
use messages::content;
use messages::image::{Image, find, normalize};
use messages::snapshot;
use messages::store::{self, Op, table};
use std::collections::BTreeMap;
use std::sync::Arc;

impl World {
    /// Reads the catalogue at start. What cannot be used any more is not shown.
    pub async fn load(&self, cx: &Cx) -> Result<()> {
        let rows = self.args.store.call(cx, store::Scan { table: table::IMAGES, prefix: String::new() }).await?;
        let mut images = rows.iter().map(|(_, row)| store::decode(row)).collect::<Result<Vec<Image>>>()?;
        for image in &mut images {
            // The configuration may have changed since.
            image.pinned = self.pinned(image);
            image.repo_tags.sort();
            image.repo_digests.sort();
        }
        let images: Vec<Arc<Image>> = images.into_iter().map(Arc::new).collect();
        let (whole, broken) = match self.check(cx, images.clone()).await {
            Ok(checked) => checked,
            Err(error) => {
                tracing::warn!(%error, "images could not be checked");
                (images, vec![])
            }
        };
        for image in &broken {
            tracing::warn!(id = image.id, names = ?image.repo_tags, "an image is neither unpacked nor are all its layers here: pull it again");
        }
        *self.hidden.borrow_mut() = broken;
        self.publish(whole);
        Ok(())
    }

    /// Parts images into those that can be run and those that cannot: an image must be unpacked, or everything must be there to unpack it.
    async fn check(&self, cx: &Cx, images: Vec<Arc<Image>>) -> Result<(Vec<Arc<Image>>, Vec<Arc<Image>>)> {
        let snapshots = self.args.snapshots.call(cx, snapshot::List { snapshotter: String::new() }).await?;
        let parents: BTreeMap<(&str, &str), &str> =
            snapshots.iter().map(|s| ((s.snapshotter.as_str(), s.key.as_str()), s.parent.as_str())).collect();
        let unpacked = |snapshotter: &str, chain: &str| {
            let mut key = chain;
            while !key.is_empty() {
                match parents.get(&(snapshotter, key)) {
                    Some(parent) => key = parent,
                    None => return false,
                }
            }
            true
        };
        let (whole, doubtful): (Vec<_>, Vec<_>) = images.into_iter().partition(|i| unpacked(&i.snapshotter, &i.chain_id));
        if doubtful.is_empty() {
            return Ok((whole, vec![]));
        }
        let blobs: BTreeMap<String, u64> =
            self.args.content.call(cx, content::List).await?.into_iter().map(|b| (b.digest, b.size)).collect();
        let complete = |i: &Image| {
            blobs.contains_key(&i.manifest) && !i.layers.is_empty() && i.layers.iter().all(|(d, size)| blobs.get(d) == Some(size))
        };
        let (later, broken): (Vec<_>, Vec<_>) = doubtful.into_iter().partition(|i| complete(i));
        Ok((whole.into_iter().chain(later).collect(), broken))
    }

    fn pinned(&self, image: &Image) -> bool {
        self.args.pinned.iter().map(|p| normalize(p)).any(|p| image.repo_tags.contains(&p) || image.repo_digests.contains(&p))
    }

    fn publish(&self, mut all: Vec<Arc<Image>>) {
        all.sort_by(|a, b| a.id.cmp(&b.id));
        self.args.view.0.store(Arc::new(all));
        self.forget_usage();
    }

    /// Records an image under a name: other images lose that name.
    pub async fn record(&self, cx: &Cx, mut image: Image, tag: Option<String>) -> Result<Arc<Image>> {
        let _one = self.changing.lock().await;
        let mut ops = Vec::new();
        let mut rename = |others: &[Arc<Image>]| -> Result<Vec<Arc<Image>>> {
            let mut left = Vec::new();
            for other in others {
                if other.id == image.id {
                    image.repo_tags.extend(other.repo_tags.iter().cloned());
                    image.repo_digests.extend(other.repo_digests.iter().cloned());
                } else if let Some(tag) = tag.as_ref().filter(|t| other.repo_tags.contains(t)) {
                    let mut changed = Image::clone(other);
                    changed.repo_tags.retain(|t| t != tag);
                    changed.pinned = self.pinned(&changed);
                    ops.push(Op::put(table::IMAGES, &changed.id, &changed)?);
                    left.push(Arc::new(changed));
                } else {
                    left.push(other.clone());
                }
            }
            Ok(left)
        };
        let mut shown = rename(&self.args.view.0.load())?;
        let hidden = rename(&self.hidden.borrow())?;
        image.repo_tags.extend(tag);
        for names in [&mut image.repo_tags, &mut image.repo_digests] {
            names.sort();
            names.dedup();
        }
        image.pinned = self.pinned(&image);
        ops.push(Op::put(table::IMAGES, &image.id, &image)?);
        self.args.store.call(cx, store::Commit { ops }).await?;
        let image = Arc::new(image);
        shown.push(image.clone());
        *self.hidden.borrow_mut() = hidden;
        self.publish(shown);
        Ok(image)
    }

    /// Removes an image with all its names. The collector takes the rest.
    pub async fn remove(&self, cx: &Cx, reference: &str) -> Result<()> {
        let _one = self.changing.lock().await;
        let shown = self.args.view.find(reference)?;
        let Some(image) = shown.or(find(&self.hidden.borrow(), reference)?) else { return Ok(()) };
        self.args.store.call(cx, store::Commit { ops: vec![Op::delete(table::IMAGES, &image.id)] }).await?;
        self.hidden.borrow_mut().retain(|i| i.id != image.id);
        self.publish(self.args.view.0.load().iter().filter(|i| i.id != image.id).cloned().collect());
        self.tell(cx, "/images/delete", reference).await;
        Ok(())
    }
}

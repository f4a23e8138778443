//! `image`: names to content: pull, resolve, remove.
//!
//! Owns: rows of the store's table `images` (one for each image, by config digest) and the published [`View`]. Talks to: `content`, `snapshot`,
//! `store`, `events`, registries. States: pulls in flight, joined by reference. On a crash: pulls in flight end with their generation; what they
//! had downloaded is resumed by the next; half-unpacked snapshots are removed on start. Spans: resolve, each registry request, each layer's fetch
//! and unpacking. Limits: `max_concurrent_downloads` layers of a pull at once; a fetch without a byte for the progress time-out is tried again.
mod manifest;
mod pull;
pub mod registry;

use arc_swap::ArcSwap;
use futures::future::{FutureExt, LocalBoxFuture, Shared};
use kernel::{Actor, Addr, Cx, Handle, Reply, Result, Routes};
use messages::content::Content;
use messages::events::{Events, Publish};
use messages::image::{FsInfo, Image, Images, Pull, Remove, Resolve, View};
use messages::snapshot::{self, Snapshots};
use messages::store::{self, Op, Store, table};
use proto::cri;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

pub(crate) fn digest(bytes: &[u8]) -> String {
    use sha2::Digest;
    let hex: String = sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// How to reach registries.
    pub registry: registry::Config,
    /// Layers of one pull that are fetched at once.
    pub downloads: usize,
    /// Snapshotter of images.
    pub snapshotter: String,
    /// References that are pinned.
    pub pinned: Vec<String>,
    /// Root directory of the daemon: its file system is the image file system.
    pub root: PathBuf,
    /// Where the list of images is published.
    pub view: Arc<View>,
    /// The store.
    pub store: Addr<Store>,
    /// The bus.
    pub events: Addr<Events>,
    /// Blobs.
    pub content: Addr<Content>,
    /// Snapshots.
    pub snapshots: Addr<Snapshots>,
}

type InFlight = Shared<LocalBoxFuture<'static, Result<Arc<Image>>>>;

/// The actor.
pub struct ImageActor {
    shared: Rc<Args>,
    pulls: Rc<RefCell<BTreeMap<String, InFlight>>>,
}

impl Actor for ImageActor {
    type Proto = Images;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        let rows = args.store.call(&cx, store::Scan { table: table::IMAGES, prefix: String::new() }).await?;
        let images = rows.iter().map(|(_, row)| store::decode(row).map(Arc::new)).collect::<Result<Vec<Arc<Image>>>>()?;
        args.view.0.store(Arc::new(images));
        let shared = Rc::new(args);
        let sweeper = shared.clone();
        cx.spawn("sweep unfinished unpacking", move |cx| async move {
            if let Err(error) = pull::sweep(&sweeper, &cx).await {
                tracing::warn!(%error, "unfinished unpacking could not be swept");
            }
        });
        Ok(ImageActor { shared, pulls: Rc::default() })
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Pull>().on::<Resolve>().on::<Remove>().on::<FsInfo>()
    }
}

impl Args {
    /// Records an image under a name: other images lose that name.
    pub(crate) async fn record(&self, cx: &Cx, mut image: Image, tag: Option<String>) -> Result<Arc<Image>> {
        let mut all: Vec<Arc<Image>> = self.view.0.load().iter().cloned().collect();
        let mut ops = Vec::new();
        for other in &mut all {
            if other.id == image.id {
                for name in &other.repo_tags {
                    push(&mut image.repo_tags, name);
                }
                for name in &other.repo_digests {
                    push(&mut image.repo_digests, name);
                }
            } else if let Some(tag) = &tag
                && other.repo_tags.contains(tag)
            {
                let mut changed = Image::clone(other);
                changed.repo_tags.retain(|t| t != tag);
                ops.push(Op::put(table::IMAGES, &changed.id, &changed)?);
                *other = Arc::new(changed);
            }
        }
        if let Some(tag) = &tag {
            push(&mut image.repo_tags, tag);
        }
        image.pinned = image.repo_tags.iter().any(|t| self.pinned.contains(t));
        ops.push(Op::put(table::IMAGES, &image.id, &image)?);
        self.store.call(cx, store::Commit { ops }).await?;
        let image = Arc::new(image);
        all.retain(|i| i.id != image.id);
        all.push(image.clone());
        self.publish(all);
        Ok(image)
    }
    fn publish(&self, all: Vec<Arc<Image>>) {
        self.view.0.store(Arc::new(all));
    }
    /// Tells the bus; the collector listens there, since nothing may call it from below.
    async fn tell(&self, cx: &Cx, topic: &str, name: &str) {
        let payload = match topic {
            "/images/delete" => proto::any(&proto::events::ImageDelete { name: name.into() }),
            _ => proto::any(&proto::events::ImageCreate { name: name.into(), ..Default::default() }),
        };
        let event = Publish { namespace: "k8s.io".into(), topic: topic.into(), payload, at: None };
        if let Err(error) = self.events.call(cx, event).await {
            tracing::warn!(%error, topic, "event lost");
        }
    }
}

fn push(list: &mut Vec<String>, name: &str) {
    if !list.iter().any(|n| n == name) {
        list.push(name.to_owned());
    }
}

impl Handle<Pull> for ImageActor {
    fn handle(&mut self, m: Pull, cx: Cx) -> Reply<Arc<Image>> {
        let auth = m.auth.as_ref().map(|a| digest(&proto::prost::Message::encode_to_vec(a))).unwrap_or_default();
        let key = format!("{} {} {auth}", messages::image::normalize(&m.reference), m.snapshotter);
        let (pulls, shared) = (self.pulls.clone(), self.shared.clone());
        let present = pulls.borrow().get(&key).cloned();
        let pull = present.unwrap_or_else(|| {
            let cx = cx.without_deadline();
            let fresh = async move { pull::run(shared, cx, m).await }.boxed_local().shared();
            pulls.borrow_mut().insert(key.clone(), fresh.clone());
            fresh
        });
        Reply::op(async move {
            let result = pull.clone().await;
            let mut pulls = pulls.borrow_mut();
            if pulls.get(&key).is_some_and(|p| p.ptr_eq(&pull)) {
                pulls.remove(&key);
            }
            result
        })
    }
}

impl Handle<Resolve> for ImageActor {
    fn handle(&mut self, m: Resolve, _: Cx) -> Reply<Option<Arc<Image>>> {
        Reply::ok(self.shared.view.find(&m.reference))
    }
}

impl Handle<Remove> for ImageActor {
    fn handle(&mut self, m: Remove, cx: Cx) -> Reply<()> {
        let shared = self.shared.clone();
        Reply::op(async move {
            let Some(image) = shared.view.find(&m.reference) else { return Ok(()) };
            shared.store.call(&cx, store::Commit { ops: vec![Op::delete(table::IMAGES, &image.id)] }).await?;
            let left = shared.view.0.load().iter().filter(|i| i.id != image.id).cloned().collect();
            shared.publish(left);
            shared.tell(&cx, "/images/delete", &m.reference).await;
            Ok(())
        })
    }
}

impl Handle<FsInfo> for ImageActor {
    fn handle(&mut self, _: FsInfo, cx: Cx) -> Reply<cri::ImageFsInfoResponse> {
        let shared = self.shared.clone();
        Reply::op(async move {
            let (mut bytes, mut inodes) = (0, 0);
            for s in shared.snapshots.call(&cx, snapshot::List { snapshotter: shared.snapshotter.clone() }).await? {
                let get = snapshot::GetUsage { snapshotter: s.snapshotter, key: s.key };
                let Ok(usage) = shared.snapshots.call(&cx, get).await else { continue };
                bytes += usage.bytes;
                inodes += usage.inodes;
            }
            let mountpoint = shared.root.join(format!("io.containerd.snapshotter.v1.{}", shared.snapshotter)).display().to_string();
            let usage = cri::FilesystemUsage {
                timestamp: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64),
                fs_id: Some(cri::FilesystemIdentifier { mountpoint }),
                used_bytes: Some(cri::UInt64Value { value: bytes }),
                inodes_used: Some(cri::UInt64Value { value: inodes }),
            };
            Ok(cri::ImageFsInfoResponse { image_filesystems: vec![usage.clone()], container_filesystems: vec![usage] })
        })
    }
}

/// An empty view, for tests and for the composition root.
pub fn empty_view() -> Arc<View> {
    Arc::new(View(ArcSwap::default()))
}

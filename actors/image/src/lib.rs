//! `image`: names to content: pull, resolve, unpack, remove.
//!
//! Owns: rows of the store's table `images` (one for each image, by id) and the published [`View`]. Talks to: `content`, `snapshot`, `store`,
//! `events`, registries. States: pulls in flight, joined by reference; a pull whose callers have all gone away ends. On a crash: pulls in flight end
//! with their generation; what they had downloaded is resumed by the next; half-unpacked snapshots are swept ([`World::sweep`]); images whose content
//! is not whole any more are hidden until they are pulled again. Spans: resolve, each registry request, each layer's fetch and unpacking. Limits:
//! `max_concurrent_downloads` layers of a pull at once; a fetch without a byte for the progress time-out is tried again.
mod artifact;
mod catalogue;
mod fetch;
mod manifest;
mod progress;
mod pull;
pub mod registry;
mod unpack;
mod usage;

use futures::future::{FutureExt, LocalBoxFuture, Shared};
use kernel::{Actor, Addr, Cx, Fault, Handle, Reply, Result, Routes};
use messages::content::Content;
use messages::events::{Events, Publish};
use messages::image::{FsInfo, Image, Images, Pull, Remove, Resolve, Unpack, View};
use messages::snapshot::Snapshots;
use messages::store::Store;
use proto::cri;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

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
    /// Snapshotters of all runtime handlers.
    pub handlers: BTreeMap<String, String>,
    /// References that are pinned.
    pub pinned: Vec<String>,
    /// Layers' blobs are given back once they are unpacked.
    pub discard_layers: bool,
    /// How old the disk usage that is told may be.
    pub usage_period: Duration,
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

/// What the operations of one generation share.
pub(crate) struct World {
    pub args: Args,
    /// The catalogue changes one step at a time.
    changing: tokio::sync::Mutex<()>,
    /// Images whose content is not whole: in the store, but shown to nobody.
    hidden: RefCell<Vec<Arc<Image>>>,
    /// Keys of snapshots that this generation unpacks at the moment.
    unpacking: RefCell<BTreeSet<String>>,
    /// Something was left half unpacked.
    left: tokio::sync::Notify,
    /// A pull found the disk full: what was kept for resuming is given back.
    full: std::cell::Cell<bool>,
    usage: RefCell<Option<usage::Known>>,
}

type InFlight = Shared<LocalBoxFuture<'static, Result<Arc<Image>>>>;

/// Work in flight by its key, and how many wait for it.
type Table = Rc<RefCell<BTreeMap<String, (InFlight, usize)>>>;

/// The actor.
pub struct ImageActor {
    world: Rc<World>,
    pulls: Table,
}

impl Actor for ImageActor {
    type Proto = Images;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        let world = Rc::new(World {
            args,
            changing: Default::default(),
            hidden: Default::default(),
            unpacking: Default::default(),
            left: Default::default(),
            full: Default::default(),
            usage: Default::default(),
        });
        world.load(&cx).await?;
        let sweeper = world.clone();
        cx.spawn("sweep unfinished unpacking", move |cx| async move {
            loop {
                sweeper.sweep(&cx).await;
                sweeper.left.notified().await;
            }
        });
        Ok(ImageActor { world, pulls: Rc::default() })
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Pull>().on::<Resolve>().on::<Unpack>().on::<Remove>().on::<FsInfo>()
    }
}

impl World {
    /// Tells the bus; the collector listens there, since nothing may call it from below.
    async fn tell(&self, cx: &Cx, topic: &str, name: &str) {
        let payload = match topic {
            "/images/delete" => proto::any(&proto::events::ImageDelete { name: name.into() }),
            _ => proto::any(&proto::events::ImageCreate { name: name.into(), ..Default::default() }),
        };
        let event = Publish { namespace: "k8s.io".into(), topic: topic.into(), payload, at: None };
        if let Err(error) = self.args.events.call(cx, event).await {
            tracing::warn!(%error, topic, "event lost");
        }
    }
    /// The snapshotter of a runtime handler.
    fn snapshotter(&self, handler: &str) -> Result<String> {
        if handler.is_empty() {
            return Ok(self.args.snapshotter.clone());
        }
        let known = self.args.handlers.get(handler).cloned();
        known.ok_or_else(|| Fault::invalid_argument(format!("image.runtime_handler: no runtime handler {handler:?} is configured")))
    }
}

/// One of those who wait for work in flight; when the last of them goes away, the work is dropped.
struct Waiter(Table, String, InFlight);

impl Waiter {
    fn join(table: &Table, key: String, work: impl FnOnce() -> LocalBoxFuture<'static, Result<Arc<Image>>>) -> Waiter {
        let mut all = table.borrow_mut();
        let entry = all.entry(key.clone()).or_insert_with(|| (work().shared(), 0));
        entry.1 += 1;
        Waiter(table.clone(), key, entry.0.clone())
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut all = self.0.borrow_mut();
        let Some(entry) = all.get_mut(&self.1).filter(|e| e.0.ptr_eq(&self.2)) else { return };
        entry.1 -= 1;
        // Whoever asks after the end asks anew: the registry may know better by then.
        let over = if entry.1 == 0 || self.2.peek().is_some() { all.remove(&self.1) } else { None };
        drop(all);
        drop(over);
    }
}

impl Handle<Pull> for ImageActor {
    fn handle(&mut self, m: Pull, cx: Cx) -> Reply<Arc<Image>> {
        let auth = m.auth.as_ref().map(|a| digest(&proto::prost::Message::encode_to_vec(a))).unwrap_or_default();
        let key = format!("{} {} {auth}", messages::image::normalize(&m.reference), m.handler);
        let world = self.world.clone();
        let waiter = Waiter::join(&self.pulls, key, || {
            // Those who join may have more time than the first.
            let cx = cx.without_deadline();
            async move { pull::run(&world, &cx, m).await }.boxed_local()
        });
        Reply::while_wanted(async move { waiter.2.clone().await })
    }
}

impl Handle<Unpack> for ImageActor {
    fn handle(&mut self, m: Unpack, cx: Cx) -> Reply<()> {
        let snapshotter = if m.snapshotter.is_empty() { self.world.args.snapshotter.clone() } else { m.snapshotter };
        let world = self.world.clone();
        let waiter = Waiter::join(&self.pulls, format!("unpack {} {snapshotter}", m.id), || {
            let cx = cx.without_deadline();
            async move { pull::unpack_again(&world, &cx, &m.id, snapshotter).await }.boxed_local()
        });
        Reply::while_wanted(async move { waiter.2.clone().await.map(drop) })
    }
}

impl Handle<Resolve> for ImageActor {
    fn handle(&mut self, m: Resolve, _: Cx) -> Reply<Option<Arc<Image>>> {
        Reply::from(self.world.args.view.find(&m.reference))
    }
}

impl Handle<Remove> for ImageActor {
    fn handle(&mut self, m: Remove, cx: Cx) -> Reply<()> {
        let world = self.world.clone();
        Reply::op(async move { world.remove(&cx, &m.reference).await })
    }
}

impl Handle<FsInfo> for ImageActor {
    fn handle(&mut self, _: FsInfo, cx: Cx) -> Reply<cri::ImageFsInfoResponse> {
        let world = self.world.clone();
        Reply::op(async move { world.fs_info(&cx).await })
    }
}

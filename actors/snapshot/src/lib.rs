//! `snapshot`: snapshotters (overlayfs, native), their mounts, and the unpacking of layers.
//!
//! Owns: `<root>/io.containerd.snapshotter.v1.<name>/snapshots/<id>/{fs,work}` and rows of the store's table `snapshots`. Talks to: `store`.
//! States: an index in memory that mirrors the rows. On a crash: directories are made before their row and removed after it, so a crash leaves only
//! directories without a row, which the next start removes. A commit is answered after the file system is synced. Spans: hops; each disk operation
//! is a blocking call by name. Limits: overlay options must fit a page (about 120 layers with the default root).
mod apply {
    pub mod stream;
    pub use kernel::Result;
    /// Errors of the stream.
    pub struct Fail;
    impl Fail {
        /// The layer is not what it should be.
        pub fn refused(text: impl Into<String>) -> kernel::Fault {
            kernel::Fault::data_loss(text)
        }
        /// Its kind is not known.
        pub fn unsupported(text: impl Into<String>) -> kernel::Fault {
            kernel::Fault::unimplemented(text)
        }
        /// The system refused.
        pub fn io(what: &str, e: std::io::Error) -> kernel::Fault {
            kernel::Fault::from(e).context(what)
        }
    }
}
mod disk;
mod sys;
mod unpack;

use kernel::{Actor, Addr, Cx, Fault, Handle, Reply, Result, Routes};
use messages::snapshot::*;
use messages::store::{self, Op, Store, table};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// Disk work on one snapshot.
const IO: Duration = Duration::from_secs(600);
/// Unpacking ends with its source, whose owner has time-outs of its own.
const UNPACK: Duration = Duration::from_secs(24 * 3600);
/// Before a directory is removed: what else its pod's end writes down does not share the disk's journal with it.
const REST: Duration = Duration::from_secs(1);
/// Directories that are removed side by side.
const REMOVALS: usize = 2;
/// Snapshotters that exist.
const KNOWN: &[&str] = &["overlayfs", "native"];

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// Root directory of the daemon.
    pub root: PathBuf,
    /// This kernel has overlays that are not synced when they are unmounted.
    pub volatile: bool,
    /// Snapshotter for requests that name none.
    pub default: String,
    /// The store.
    pub store: Addr<Store>,
}

#[derive(Default)]
struct Index {
    all: BTreeMap<(String, String), SnapshotInfo>,
    /// Keys that are being made or removed.
    busy: BTreeSet<(String, String)>,
    last: u64,
    /// Usage of committed snapshots, by number: it never changes.
    usage: BTreeMap<u64, Usage>,
}

struct World {
    args: Args,
    index: RefCell<Index>,
    /// Removals at a time: a node that ends its pods needs its disk for others.
    removals: tokio::sync::Semaphore,
}

/// The actor.
pub struct SnapshotActor(Rc<World>);

/// A key that is being worked on; freed on drop.
struct Busy(Rc<World>, (String, String));
impl Drop for Busy {
    fn drop(&mut self) {
        self.0.index.borrow_mut().busy.remove(&self.1);
    }
}

impl World {
    fn name(&self, snapshotter: &str) -> Result<String> {
        let name = if snapshotter.is_empty() { &self.args.default } else { snapshotter };
        if KNOWN.contains(&name) {
            Ok(name.to_owned())
        } else {
            Err(Fault::not_found(format!("snapshotter {name:?} does not exist; there are {KNOWN:?}")))
        }
    }
    fn dir(&self, s: &SnapshotInfo) -> PathBuf {
        disk::root(&self.args.root, &s.snapshotter).join(s.id.to_string())
    }
    fn find(&self, snapshotter: &str, key: &str) -> Result<SnapshotInfo> {
        let name = self.name(snapshotter)?;
        let found = self.index.borrow().all.get(&(name, key.to_owned())).cloned();
        found.ok_or_else(|| Fault::not_found(format!("snapshot {key:?}")))
    }
    /// The directories of the parents, the nearest first.
    fn parents(&self, s: &SnapshotInfo) -> Result<Vec<PathBuf>> {
        let (mut all, mut parent) = (Vec::new(), s.parent.clone());
        while !parent.is_empty() {
            let p = self.find(&s.snapshotter, &parent)?;
            all.push(self.dir(&p).join("fs"));
            parent = p.parent;
        }
        Ok(all)
    }
    fn mounts(&self, s: &SnapshotInfo) -> Result<Vec<Mount>> {
        Ok(disk::mounts(s, &self.dir(s), &self.parents(s)?))
    }
    async fn mounts_of(&self, cx: &Cx, m: messages::snapshot::Mounts) -> Result<Vec<Mount>> {
        let s = self.find(&m.snapshotter, &m.key)?;
        let mut mounts = self.mounts(&s)?;
        if m.ephemeral && s.kind == Kind::Active && self.args.volatile {
            let overlays = mounts.iter_mut().filter(|m| m.fs_type == "overlay");
            if overlays.map(|m| m.options.insert(0, "volatile".into())).count() > 0 {
                let dir = self.dir(&s);
                cx.blocking("forget an earlier mount", IO, move || disk::forget_mount(&dir)).await?;
            }
        }
        Ok(mounts)
    }
    fn busy(self: &Rc<Self>, snapshotter: &str, key: &str) -> Result<Busy> {
        let key = (self.name(snapshotter)?, key.to_owned());
        if !self.index.borrow_mut().busy.insert(key.clone()) {
            return Err(Fault::unavailable(format!("snapshot {:?} is being worked on", key.1)));
        }
        Ok(Busy(self.clone(), key))
    }
    async fn commit(&self, cx: &Cx, ops: Vec<Op>) -> Result<()> {
        self.args.store.call(cx, store::Commit { ops }).await
    }
    fn row(s: &SnapshotInfo) -> String {
        format!("{}/{}", s.snapshotter, s.key)
    }

    async fn prepare(self: &Rc<Self>, cx: &Cx, m: Prepare) -> Result<Vec<Mount>> {
        let snapshotter = self.name(&m.snapshotter)?;
        let _busy = self.busy(&snapshotter, &m.key)?;
        if self.index.borrow().all.contains_key(&(snapshotter.clone(), m.key.clone())) {
            return Err(Fault::already_exists(format!("snapshot {:?}", m.key)));
        }
        if !m.parent.is_empty() && self.find(&snapshotter, &m.parent)?.kind != Kind::Committed {
            return Err(Fault::invalid_argument(format!("parent {:?} is not committed", m.parent)));
        }
        let id = {
            let mut index = self.index.borrow_mut();
            index.last += 1;
            index.last
        };
        let created_ns = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let kind = if m.view { Kind::View } else { Kind::Active };
        let s = SnapshotInfo { snapshotter, key: m.key, parent: m.parent, kind, labels: m.labels, created_ns, id };
        let (dir, parents, native) = (self.dir(&s), self.parents(&s)?, s.snapshotter == "native");
        let root = disk::mapped_root(&s.labels)?;
        cx.blocking("make a snapshot", IO, move || disk::make(&dir, parents.first().map(PathBuf::as_path), native, root)).await?;
        self.commit(cx, vec![Op::insert(table::SNAPSHOTS, Self::row(&s), &s)?]).await?;
        self.index.borrow_mut().all.insert((s.snapshotter.clone(), s.key.clone()), s.clone());
        self.mounts(&s)
    }

    async fn apply(self: &Rc<Self>, cx: &Cx, m: Apply) -> Result<Applied> {
        // Nobody removes it under the unpacker's hands.
        let _busy = self.busy(&m.snapshotter, &m.key)?;
        let s = self.find(&m.snapshotter, &m.key)?;
        if s.kind != Kind::Active {
            return Err(Fault::failed_precondition(format!("snapshot {:?} is not active", m.key)));
        }
        let (fs, native) = (self.dir(&s).join("fs"), s.snapshotter == "native");
        cx.blocking("unpack a layer", UNPACK, move || {
            let (plain, digesting) = apply::stream::start(m.source, &m.media_type)?;
            let mut unpacker = unpack::Unpacker::new(&fs, native)?;
            let mut plain = plain;
            unpacker.run(&mut plain)?;
            // What follows the end of the archive belongs to the digest, too.
            std::io::copy(&mut plain, &mut std::io::sink())?;
            drop(plain);
            disk::note_implied(&fs, &unpacker.implied)?;
            let (diff_id, size) = digesting.finish()?;
            Ok(Applied { diff_id, size })
        })
        .await
    }

    async fn commit_snapshot(self: &Rc<Self>, cx: &Cx, m: Commit) -> Result<()> {
        let _busy = self.busy(&m.snapshotter, &m.key)?;
        let old = self.find(&m.snapshotter, &m.key)?;
        if old.kind != Kind::Active {
            return Err(Fault::failed_precondition(format!("snapshot {:?} is not active", m.key)));
        }
        if self.index.borrow().all.contains_key(&(old.snapshotter.clone(), m.name.clone())) {
            return Err(Fault::already_exists(format!("snapshot {:?}", m.name)));
        }
        let parent = m.parent.unwrap_or_else(|| old.parent.clone());
        if !parent.is_empty() && self.find(&old.snapshotter, &parent)?.kind != Kind::Committed {
            return Err(Fault::failed_precondition(format!("parent {parent:?} is not committed")));
        }
        let new = SnapshotInfo { key: m.name, parent, kind: Kind::Committed, labels: m.labels, ..old.clone() };
        let (dir, parents) = (self.dir(&new), self.parents(&new)?);
        cx.blocking("sync a snapshot", IO, move || disk::seal(&dir, &parents)).await?;
        self.commit(cx, vec![Op::insert(table::SNAPSHOTS, Self::row(&new), &new)?, Op::delete(table::SNAPSHOTS, Self::row(&old))]).await?;
        let mut index = self.index.borrow_mut();
        index.all.remove(&(old.snapshotter, old.key));
        index.all.insert((new.snapshotter.clone(), new.key.clone()), new);
        Ok(())
    }

    async fn remove(self: &Rc<Self>, cx: &Cx, m: Remove) -> Result<()> {
        let s = self.find(&m.snapshotter, &m.key)?;
        let _busy = self.busy(&m.snapshotter, &m.key)?;
        if let Some(child) = self.index.borrow().all.values().find(|c| c.snapshotter == s.snapshotter && c.parent == s.key) {
            return Err(Fault::failed_precondition(format!("snapshot {:?} is the parent of {:?}", s.key, child.key)));
        }
        self.commit(cx, vec![Op::delete(table::SNAPSHOTS, Self::row(&s))]).await?;
        let (dir, kind) = (self.dir(&s), s.kind);
        self.forget(s);
        if kind == Kind::Committed {
            // Whoever removes layers wants their space.
            return cx.blocking("remove a snapshot", IO, move || disk::remove(&dir)).await;
        }
        // Without its row nobody finds it any more, so nobody needs to wait for the disk; after a crash it is swept.
        let world = self.clone();
        cx.spawn("remove a snapshot", move |cx| async move {
            tokio::time::sleep(REST).await;
            let _turn = world.removals.acquire().await;
            if let Err(error) = cx.blocking("remove a snapshot", IO, move || disk::remove(&dir)).await {
                tracing::warn!(%error, "the directory of a removed snapshot could not be removed yet; the next start does");
            }
        });
        Ok(())
    }

    fn forget(&self, s: SnapshotInfo) {
        let mut index = self.index.borrow_mut();
        index.usage.remove(&s.id);
        index.all.remove(&(s.snapshotter, s.key));
    }

    async fn usage(&self, cx: &Cx, s: &SnapshotInfo) -> Result<Usage> {
        if let Some(known) = self.index.borrow().usage.get(&s.id) {
            return Ok(*known);
        }
        let dir = self.dir(s);
        let usage = cx.blocking("measure a snapshot", IO, move || disk::usage(&dir.join("fs"))).await?;
        if s.kind == Kind::Committed {
            self.index.borrow_mut().usage.insert(s.id, usage);
        }
        Ok(usage)
    }

    async fn cleanup(&self, cx: &Cx) -> Result<u64> {
        let mut removed = 0;
        for name in KNOWN {
            let (root, first) = (disk::root(&self.args.root, name), self.index.borrow().last);
            let known: BTreeSet<u64> = self.index.borrow().all.values().filter(|s| s.snapshotter == **name).map(|s| s.id).collect();
            removed += cx.blocking("sweep snapshots", IO, move || disk::sweep(&root, &known, first)).await?;
        }
        Ok(removed)
    }
}

impl Actor for SnapshotActor {
    type Proto = Snapshots;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        let rows = args.store.call(&cx, store::Scan { table: table::SNAPSHOTS, prefix: String::new() }).await?;
        let (mut index, mut gone) = (Index::default(), Vec::new());
        for name in KNOWN {
            index.last = index.last.max(disk::last_id(&disk::root(&args.root, name))?);
        }
        for (_, row) in rows {
            let s: SnapshotInfo = store::decode(&row)?;
            if s.kind == Kind::Committed && !disk::root(&args.root, &s.snapshotter).join(s.id.to_string()).join("fs").is_dir() {
                tracing::warn!(
                    key = s.key,
                    id = s.id,
                    "the directory of a snapshot is gone, and so is the snapshot; its image is unpacked again when it is needed"
                );
                gone.push(Op::delete(table::SNAPSHOTS, World::row(&s)));
                continue;
            }
            index.all.insert((s.snapshotter.clone(), s.key.clone()), s);
        }
        if !gone.is_empty() {
            args.store.call(&cx, store::Commit { ops: gone }).await?;
        }
        let world = Rc::new(World { args, index: RefCell::new(index), removals: tokio::sync::Semaphore::new(REMOVALS) });
        let sweeper = world.clone();
        cx.spawn("sweep snapshots", move |cx| async move {
            if let Err(error) = sweeper.cleanup(&cx).await {
                tracing::warn!(%error, "directories without a snapshot could not be swept");
            }
        });
        Ok(SnapshotActor(world))
    }
    fn routes() -> Routes<Self> {
        Routes::new()
            .on::<Prepare>()
            .on::<Mounts>()
            .on::<Apply>()
            .on::<Commit>()
            .on::<Remove>()
            .on::<Stat>()
            .on::<List>()
            .on::<GetUsage>()
            .on::<Cleanup>()
    }
}

macro_rules! operations { ($($message:ident($world:ident, $m:ident, $cx:ident) -> $reply:ty = $run:expr;)*) => { $(
    impl Handle<$message> for SnapshotActor {
        fn handle(&mut self, $m: $message, $cx: Cx) -> Reply<$reply> {
            let $world = self.0.clone();
            Reply::op(async move { $run })
        }
    }
)* } }

operations! {
    Prepare(world, m, cx) -> Vec<Mount> = world.prepare(&cx, m).await;
    Mounts(world, m, cx) -> Vec<Mount> = world.mounts_of(&cx, m).await;
    Apply(world, m, cx) -> Applied = world.apply(&cx, m).await;
    Commit(world, m, cx) -> () = world.commit_snapshot(&cx, m).await;
    Remove(world, m, cx) -> () = world.remove(&cx, m).await;
    Cleanup(world, _m, cx) -> u64 = world.cleanup(&cx).await;
    Stat(world, m, _cx) -> Option<SnapshotInfo> = match world.find(&m.snapshotter, &m.key) {
        Ok(s) => Ok(Some(s)),
        Err(e) if e.is_not_found() && world.name(&m.snapshotter).is_ok() => Ok(None),
        Err(e) => Err(e),
    };
    List(world, m, _cx) -> Vec<SnapshotInfo> = {
        let index = world.index.borrow();
        Ok(index.all.values().filter(|s| m.snapshotter.is_empty() || s.snapshotter == m.snapshotter).cloned().collect())
    };
    GetUsage(world, m, cx) -> Usage = world.usage(&cx, &world.find(&m.snapshotter, &m.key)?).await;
}

/// Where a snapshotter keeps its snapshots.
pub fn directory(root: &Path, snapshotter: &str) -> PathBuf {
    disk::root(root, snapshotter)
}

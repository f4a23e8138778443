//! `content`: blobs by digest, in containerd's layout on disk (`contracts/core.md` §2.1).
//!
//! Owns: `<root>/io.containerd.content.v1.content` and the labels in the store's table `content`. Talks to: `store`. States: which ingests are
//! being written and which names are held against the collector, both outside of generations ([`Args`]). On a crash: partial ingests stay on disk and are resumed by the next `Begin` of their `ref`;
//! a blob is visible only after its bytes, its file and its directory are synced. Spans: hops; reads and deletions are blocking calls by name.
//! Limits: [`READ_ALL`] bytes for a blob read whole.
mod holds;
mod sys;
mod writer;

use kernel::{Actor, Addr, Cx, Fault, Handle, Reply, Result, ResultExt, Routes};
use messages::content::{
    Begin, BeginRound, BlobInfo, BlobWriter, Condemn, Content, Delete, Held, Hold, Info, Label, List, ReadAll, SweepIngests,
};
use messages::store::{self, Op, Store, table};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Manifests and configurations are smaller (containerd's limit for manifests is 8 MiB).
const READ_ALL: u64 = 16 << 20;
/// A disk that takes longer for a small file is stuck.
const IO: Duration = Duration::from_secs(30);
/// A resumed ingest is hashed from its start: 100 GiB on a slow disk.
const REHASH: Duration = Duration::from_secs(1800);

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// Directory of the content store.
    pub root: PathBuf,
    /// The store.
    pub store: Addr<Store>,
    writing: writer::Locks,
    holds: holds::Holds,
}

impl Args {
    /// `root` is the daemon's root directory.
    pub fn new(root: &Path, store: Addr<Store>) -> Args {
        Args { root: root.join("io.containerd.content.v1.content"), store, writing: Default::default(), holds: Default::default() }
    }
}

/// The actor.
pub struct ContentActor(Arc<Args>);

/// `sha256:<64 hex>` or an error that names it.
pub(crate) fn hex(digest: &str) -> Result<&str> {
    let hex = digest.strip_prefix("sha256:").filter(|h| h.len() == 64 && h.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
    hex.ok_or_else(|| Fault::invalid_argument(format!("digest {digest:?} is not sha256:<64 lower-case hex digits>")))
}

impl Args {
    pub(crate) fn blob(&self, digest: &str) -> Result<PathBuf> {
        Ok(self.root.join("blobs/sha256").join(hex(digest)?))
    }
    fn stat(&self, digest: &str, labels: BTreeMap<String, String>) -> Result<Option<BlobInfo>> {
        let path = self.blob(digest)?;
        match std::fs::metadata(&path) {
            Ok(m) => {
                let created = m.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                Ok(Some(BlobInfo { digest: digest.into(), size: m.len(), labels, created, path }))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Fault::from(e).context(path.display())),
        }
    }
    async fn labels(&self, cx: &Cx, digest: &str) -> Result<BTreeMap<String, String>> {
        let row = self.store.call(cx, store::Get { table: table::CONTENT, key: digest.into() }).await?;
        row.map(|r| store::decode(&r)).transpose().map(Option::unwrap_or_default)
    }
    async fn info(self: &Arc<Self>, cx: &Cx, digest: &str) -> Result<Option<BlobInfo>> {
        let labels = self.labels(cx, digest).await?;
        let (me, digest) = (self.clone(), digest.to_owned());
        cx.blocking("stat blob", IO, move || me.stat(&digest, labels)).await
    }
}

impl Actor for ContentActor {
    type Proto = Content;
    type Args = Args;
    async fn start(args: Args, _: Cx) -> Result<Self> {
        for dir in ["blobs/sha256", "ingest"] {
            std::fs::create_dir_all(args.root.join(dir)).with_context(|| format!("create {}", args.root.display()))?;
        }
        Ok(ContentActor(Arc::new(args)))
    }
    fn routes() -> Routes<Self> {
        Routes::new()
            .on::<Info>()
            .on::<List>()
            .on::<ReadAll>()
            .on::<Begin>()
            .on::<Label>()
            .on::<Delete>()
            .on::<SweepIngests>()
            .on::<Hold>()
            .on::<BeginRound>()
            .on::<Condemn>()
    }
}

impl Handle<Info> for ContentActor {
    fn handle(&mut self, m: Info, cx: Cx) -> Reply<Option<BlobInfo>> {
        let me = self.0.clone();
        Reply::op(async move { me.info(&cx, &m.digest).await })
    }
}

impl Handle<List> for ContentActor {
    fn handle(&mut self, _: List, cx: Cx) -> Reply<Vec<BlobInfo>> {
        let me = self.0.clone();
        Reply::op(async move {
            let rows = me.store.call(&cx, store::Scan { table: table::CONTENT, prefix: String::new() }).await?;
            let mut labels = BTreeMap::new();
            for (digest, row) in rows {
                labels.insert(digest, store::decode::<BTreeMap<String, String>>(&row)?);
            }
            cx.blocking("list blobs", IO, move || {
                let mut all = Vec::new();
                for entry in std::fs::read_dir(me.root.join("blobs/sha256")).context("list blobs")? {
                    let digest = format!("sha256:{}", entry?.file_name().to_string_lossy());
                    if hex(&digest).is_err() {
                        continue;
                    }
                    all.extend(me.stat(&digest, labels.remove(&digest).unwrap_or_default())?);
                }
                Ok(all)
            })
            .await
        })
    }
}

impl Handle<ReadAll> for ContentActor {
    fn handle(&mut self, m: ReadAll, cx: Cx) -> Reply<Vec<u8>> {
        let me = self.0.clone();
        let read = move || {
            let info = me.stat(&m.digest, BTreeMap::new())?.ok_or_else(|| Fault::not_found(format!("blob {}", m.digest)))?;
            if info.size > READ_ALL {
                return Err(Fault::out_of_range(format!("blob {} has {} bytes, more than {READ_ALL}", m.digest, info.size)));
            }
            std::fs::read(&info.path).with_context(|| format!("read {}", info.path.display()))
        };
        Reply::op(async move { cx.blocking("read blob", IO, read).await })
    }
}

impl Handle<Begin> for ContentActor {
    fn handle(&mut self, m: Begin, cx: Cx) -> Reply<Box<dyn BlobWriter>> {
        let me = self.0.clone();
        Reply::op(async move {
            let _ = hex(&m.digest)?;
            let guard = me.writing.lock(&writer::directory(&me, &m.ref_)).await;
            let labels = writer::Labels { store: me.store.clone(), cx: cx.without_deadline(), runtime: tokio::runtime::Handle::current() };
            let open = move || {
                if me.stat(&m.digest, BTreeMap::new())?.is_some() {
                    return Err(Fault::already_exists(format!("blob {}", m.digest)));
                }
                writer::open(&me, &m, guard, labels)
            };
            Ok(Box::new(cx.blocking("open ingest", REHASH, open).await?) as Box<dyn BlobWriter>)
        })
    }
}

impl Handle<Label> for ContentActor {
    fn handle(&mut self, m: Label, cx: Cx) -> Reply<BlobInfo> {
        let me = self.0.clone();
        Reply::op(async move {
            let mut info = me.info(&cx, &m.digest).await?.ok_or_else(|| Fault::not_found(format!("blob {}", m.digest)))?;
            for (key, value) in m.labels {
                if value.is_empty() {
                    info.labels.remove(&key)
                } else {
                    info.labels.insert(key, value)
                };
            }
            me.store.call(&cx, store::Commit { ops: vec![Op::put(table::CONTENT, m.digest, &info.labels)?] }).await?;
            Ok(info)
        })
    }
}

impl Handle<Delete> for ContentActor {
    fn handle(&mut self, m: Delete, cx: Cx) -> Reply<()> {
        let me = self.0.clone();
        Reply::op(async move {
            let path = me.blob(&m.digest)?;
            me.store.call(&cx, store::Commit { ops: vec![Op::delete(table::CONTENT, m.digest)] }).await?;
            cx.blocking("delete blob", IO, move || std::fs::remove_file(&path).with_context(|| format!("delete {}", path.display()))).await
        })
    }
}

impl Handle<SweepIngests> for ContentActor {
    fn handle(&mut self, m: SweepIngests, cx: Cx) -> Reply<u64> {
        let me = self.0.clone();
        Reply::op(async move { cx.blocking("sweep ingests", IO, move || writer::sweep(&me, Duration::from_secs(m.older_than_s))).await })
    }
}

impl Handle<Hold> for ContentActor {
    fn handle(&mut self, m: Hold, _: Cx) -> Reply<Box<dyn Held>> {
        let me = self.0.clone();
        Reply::op(async move { Ok(me.holds.hold(m.names).await) })
    }
}

impl Handle<BeginRound> for ContentActor {
    fn handle(&mut self, _: BeginRound, _: Cx) -> Reply<u64> {
        Reply::ok(self.0.holds.begin())
    }
}

impl Handle<Condemn> for ContentActor {
    fn handle(&mut self, m: Condemn, _: Cx) -> Reply<Option<Box<dyn Held>>> {
        Reply::ok(self.0.holds.condemn(m.round, m.name))
    }
}

#[cfg(test)]
mod tests;

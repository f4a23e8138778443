//! `gc`: gives back content and snapshots that nothing refers to.
//!
//! Owns: nothing. Talks to: `content`, `snapshot`, `store`, `events`. States: idle, collecting (one collection at a time). On a crash: nothing is
//! lost, the next collection starts anew. Spans: each collection is an operation of its own. Limits: what a pull holds stays
//! ([`messages::content::Hold`]), and so does what is younger than [`YOUNG`], for a pull that failed and is tried again; removals go one by one, so
//! that foreground work passes in between.
use kernel::{Actor, Addr, Cx, Handle, Reply, Result, Routes};
use messages::content::{self, Content};
use messages::events::{Delivery, Events, Subscribe};
use messages::gc::{Collect, Collected, Gc, Hint};
use messages::image::Image;
use messages::snapshot::{self, Kind, Snapshots};
use messages::store::{self, Store, table};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

/// What a failed pull has brought waits this long for the next attempt; a removed image's own blobs are not held back by it (see [`Tracked`]).
const YOUNG: Duration = Duration::from_secs(3600);
/// Removals come in bursts; one collection serves a burst.
const PAUSE: Duration = Duration::from_millis(200);
/// Failed pulls leave things behind without telling anybody.
const PERIOD: Duration = Duration::from_secs(600);
/// A download that broke off can be resumed for so long.
const RESUMABLE: Duration = Duration::from_secs(3600);

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// The store.
    pub store: Addr<Store>,
    /// The bus.
    pub events: Addr<Events>,
    /// Blobs.
    pub content: Addr<Content>,
    /// Snapshots.
    pub snapshots: Addr<Snapshots>,
    /// Layers' blobs go once they are unpacked.
    pub discard_layers: bool,
    /// What images have referred to.
    pub tracked: Tracked,
}

/// Blobs and snapshots that images were seen to refer to: once no image does, they go at once, however young.
#[derive(Clone, Default)]
pub struct Tracked(std::sync::Arc<std::sync::Mutex<(BTreeSet<String>, BTreeSet<String>)>>);

/// The actor.
pub struct GcActor {
    args: Rc<Args>,
    running: Rc<tokio::sync::Mutex<()>>,
}

impl Actor for GcActor {
    type Proto = Gc;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        let (args, running) = (Rc::new(args), Rc::new(tokio::sync::Mutex::new(())));
        let (listening, lock) = (args.clone(), running.clone());
        cx.spawn("collect after removals", move |cx| async move { listen(&listening, &lock, &cx).await });
        Ok(GcActor { args, running })
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Collect>().on::<Hint>()
    }
}

impl Handle<Collect> for GcActor {
    fn handle(&mut self, _: Collect, cx: Cx) -> Reply<Collected> {
        let (args, running) = (self.args.clone(), self.running.clone());
        Reply::op(async move {
            let _one = running.lock().await;
            collect(&args, &cx).await
        })
    }
}

impl Handle<Hint> for GcActor {
    fn handle(&mut self, _: Hint, cx: Cx) -> Reply<()> {
        let (args, running) = (self.args.clone(), self.running.clone());
        cx.spawn("collect", move |cx| async move { quietly(&args, &running, &cx).await });
        Reply::ok(())
    }
}

async fn quietly(args: &Args, running: &tokio::sync::Mutex<()>, cx: &Cx) {
    let _one = running.lock().await;
    if let Err(error) = collect(args, cx).await {
        tracing::warn!(%error, "a collection failed; the next removal starts another");
    }
}

async fn listen(args: &Args, running: &tokio::sync::Mutex<()>, cx: &Cx) {
    let topics = vec!["/images/".to_owned(), "/containers/delete".to_owned()];
    let mut reader = loop {
        match args.events.call(cx, Subscribe { topics: topics.clone() }).await {
            Ok(reader) => break reader,
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    };
    quietly(args, running, cx).await;
    loop {
        let delivery = match tokio::time::timeout(PERIOD, reader.next()).await {
            Ok(Some(delivery)) => Some(delivery),
            Ok(None) => return,
            Err(_) => None,
        };
        if let Some(Delivery::Event(event)) = &delivery
            && event.topic == "/images/create"
            && !args.discard_layers
        {
            // Learn what the new image refers to.
            let _ = marked(args, cx).await;
            continue;
        }
        tokio::time::sleep(PAUSE).await;
        quietly(args, running, cx).await;
    }
}

/// Digests and snapshot keys that images refer to.
async fn marked(args: &Args, cx: &Cx) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let (mut blobs, mut chains, mut spent) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (_, row) in args.store.call(cx, store::Scan { table: table::IMAGES, prefix: String::new() }).await? {
        let image: Image = store::decode(&row)?;
        blobs.extend([image.id.clone(), image.manifest.clone(), image.target.clone()]);
        let layers = if args.discard_layers { &mut spent } else { &mut blobs };
        layers.extend(image.layers.iter().map(|(digest, _)| digest.clone()));
        if (image.layers.is_empty() || image.artifact)
            && let Ok(bytes) = args.content.call(cx, content::ReadAll { digest: image.manifest.clone() }).await
        {
            let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
            let listed = manifest.get("layers").and_then(|l| l.as_array()).cloned().unwrap_or_default();
            layers.extend(listed.iter().filter_map(|l| l["digest"].as_str().map(str::to_owned)));
            // An artifact's own configuration is not its id.
            blobs.extend(manifest.pointer("/config/digest").and_then(|d| d.as_str()).map(str::to_owned));
        }
        if !image.chain_id.is_empty() {
            chains.insert(image.chain_id);
        }
    }
    if let Ok(mut seen) = args.tracked.0.lock() {
        seen.0.extend(blobs.iter().chain(&spent).cloned());
        seen.1.extend(chains.iter().cloned());
    }
    Ok((blobs, chains))
}

async fn collect(args: &Args, cx: &Cx) -> Result<Collected> {
    let round = args.content.call(cx, content::BeginRound).await?;
    let (blobs, mut kept) = cx.run("mark", |cx| async move { marked(args, &cx).await }).await?;
    let seen = args.tracked.0.lock().map(|s| s.clone()).unwrap_or_default();
    let old = |created: SystemTime| created.elapsed().is_ok_and(|age| age > YOUNG);
    let mut done = Collected::default();
    // Snapshots: containers' own and their parents stay; so do the chains of images.
    let all = args.snapshots.call(cx, snapshot::List { snapshotter: String::new() }).await?;
    let parents: BTreeMap<&str, &str> = all.iter().map(|s| (s.key.as_str(), s.parent.as_str())).collect();
    kept.extend(all.iter().filter(|s| s.kind != Kind::Committed).map(|s| s.key.clone()));
    let lineage = |key: &str| {
        std::iter::successors(Some(key.to_owned()), |k| parents.get(k.as_str()).filter(|p| !p.is_empty()).map(|p| (*p).to_owned()))
            .collect::<Vec<_>>()
    };
    let kept: BTreeSet<String> = kept.iter().flat_map(|k| lineage(k)).collect();
    let ours: BTreeSet<String> = seen.1.iter().flat_map(|k| lineage(k)).collect();
    let mut garbage: Vec<&snapshot::SnapshotInfo> = all.iter().filter(|s| s.kind == Kind::Committed && !kept.contains(&s.key)).collect();
    garbage.retain(|s| ours.contains(&s.key) || old(SystemTime::UNIX_EPOCH + Duration::from_nanos(s.created_ns)));
    garbage.sort_by_key(|s| std::cmp::Reverse(lineage(&s.key).len()));
    let condemn = |name: &str| args.content.call(cx, content::Condemn { round, name: name.to_owned() });
    for s in garbage {
        let Some(_doomed) = condemn(&s.key).await? else { continue };
        let remove = snapshot::Remove { snapshotter: s.snapshotter.clone(), key: s.key.clone() };
        match args.snapshots.call(cx, remove).await {
            Ok(()) => done.snapshots += 1,
            Err(error) => tracing::debug!(%error, key = s.key, "a snapshot stays"),
        }
    }
    for blob in args.content.call(cx, content::List).await? {
        if !blobs.contains(&blob.digest) && (seen.0.contains(&blob.digest) || old(blob.created)) {
            let Some(_doomed) = condemn(&blob.digest).await? else { continue };
            args.content.call(cx, content::Delete { digest: blob.digest.clone() }).await?;
            done.blobs += 1;
            done.bytes += blob.size;
        }
    }
    args.content.call(cx, content::SweepIngests { older_than_s: RESUMABLE.as_secs() }).await?;
    Ok(done)
}

//! What the operations of one generation share.
use crate::plugin::Cancel;
use crate::sets::Set;
use crate::{Args, cache, chain, netns, pods::Row};
use kernel::{Cx, Fault, Result};
use messages::store::{self, table};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, RwLock, Semaphore, watch};

/// Releases that are tried again side by side: after a reboot there may be hundreds, and new pods come first.
const TURNS: usize = 4;
/// The longest wait between two attempts to release one pod.
const LONGEST: Duration = Duration::from_secs(60);
/// How often garbage collection looks for a moment without ADD and DEL before it is left out.
const MOMENTS: u32 = 60;

/// A pod, while something is done with it.
#[derive(Default)]
pub(crate) struct Pod {
    /// One operation at a time.
    pub lock: Arc<Mutex<()>>,
    cancel: RefCell<Option<watch::Sender<bool>>>,
    /// Release is tried again in the background; why the last attempt failed.
    failure: RefCell<Option<Fault>>,
    retried: Cell<bool>,
    /// There is something to release in the background. Not any more once ADD has begun anew: what was there before is given back by then, and what the
    /// background would find is the network of a pod that runs.
    owed: Cell<bool>,
}

impl Pod {
    /// ADD begins.
    pub fn begin(&self) -> Cancel {
        let (end, cancel) = watch::channel(false);
        self.owed.set(false);
        *self.cancel.borrow_mut() = Some(end);
        cancel
    }
    /// An ADD under way is not wanted any more.
    pub fn end(&self) {
        if let Some(end) = &*self.cancel.borrow() {
            end.send_replace(true);
        }
    }
    pub fn owes(&self) -> bool {
        self.owed.get()
    }
    pub fn retried(&self) -> bool {
        self.retried.get()
    }
    pub fn failure(&self) -> Option<Fault> {
        self.failure.borrow().clone()
    }
}

/// State of one generation.
pub(crate) struct State {
    pub args: Args,
    /// By runtime handler; the default has no name.
    pub sets: BTreeMap<String, Rc<Set>>,
    /// Garbage collection must not run beside ADD and DEL, says the specification. It never waits for them, and they wait for it for seconds at most.
    pub gate: RwLock<()>,
    pub turns: Semaphore,
    pods: RefCell<HashMap<String, Rc<Pod>>>,
}

impl State {
    pub fn new(args: Args) -> State {
        let set = |(handler, (dir, most)): (&String, &(PathBuf, usize))| (handler.clone(), Rc::new(Set::new(dir.clone(), *most)));
        let sets = args.conf.iter().map(set).collect();
        args.meter.pending.set(0);
        State { args, sets, gate: RwLock::default(), turns: Semaphore::new(TURNS), pods: RefCell::default() }
    }

    /// The networks of a handler.
    pub fn set(&self, handler: &str) -> Rc<Set> {
        let set = self.sets.get(handler).or_else(|| self.sets.get(""));
        set.cloned().unwrap_or_else(|| Rc::new(Set::new(PathBuf::new(), 1)))
    }

    pub fn pod(&self, id: &str) -> Rc<Pod> {
        let mut pods = self.pods.borrow_mut();
        if pods.len() > 512 {
            pods.retain(|_, pod| Rc::strong_count(pod) > 1);
        }
        pods.entry(id.to_owned()).or_default().clone()
    }

    /// All rows that can be read.
    async fn rows(&self, cx: &Cx) -> Result<Vec<Row>> {
        let rows = self.args.store.call(cx, store::Scan { table: table::NETWORKS, prefix: String::new() }).await?;
        rows.iter().map(|(_, row)| store::decode(row)).collect()
    }

    /// Namespaces of ours that nobody knows. Looked for before the first message is served, so that none of a new pod is among them.
    pub async fn strays(&self, cx: &Cx) -> Result<Vec<PathBuf>> {
        let known: BTreeSet<String> = self.rows(cx).await?.into_iter().map(|r| r.attachment.netns).collect();
        let dir = self.args.netns_dir.clone();
        cx.blocking("look for stray namespaces", Duration::from_secs(10), move || Ok(netns::strays(&dir, &known))).await
    }

    /// What a start has to finish: stray namespaces, releases that were not acknowledged, garbage that plugins hold.
    pub async fn settle(self: Rc<Self>, cx: Cx, strays: Vec<PathBuf>) {
        for path in strays {
            tracing::warn!(path = %path.display(), "a network namespace without an owner is removed");
            if let Err(error) = cx.blocking("remove a network namespace", Duration::from_secs(10), move || netns::remove(&path)).await {
                tracing::warn!(%error, "a network namespace could not be removed");
            }
        }
        match self.rows(&cx).await {
            Ok(rows) => {
                for row in rows.into_iter().filter(|r| r.releasing) {
                    let fault = Fault::unavailable("the daemon was started again before its plugins acknowledged DEL");
                    self.clone().retry(&cx, self.pod(&row.pod.id), row.pod.id, fault);
                }
            }
            Err(error) => tracing::error!(%error, "rows of networks cannot be read; networks of pods that are gone are not given back"),
        }
        for set in self.sets.values() {
            for network in set.networks().unwrap_or_default().iter().filter(|n| n.since(1, 1) && !n.disable_gc) {
                if let Err(error) = self.collect(&cx, network).await {
                    tracing::warn!(%error, network = network.name, "CNI's garbage could not be collected");
                }
            }
        }
    }

    /// Garbage collection of one network. Attachments that other runtimes of this node have recorded are valid, too.
    async fn collect(&self, cx: &Cx, network: &crate::conf::Network) -> Result<()> {
        for _ in 0..MOMENTS {
            let Ok(_shut) = self.gate.try_write() else {
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            };
            let mut valid = vec![];
            for row in self.rows(cx).await? {
                let ours = row.networks.iter().enumerate().filter(|(_, n)| n.name == network.name);
                valid.extend(ours.map(|(number, _)| (row.pod.id.clone(), crate::pods::interface(number))));
            }
            let (args, name) = (self.args.clone(), network.name.clone());
            let others = move || Ok(cache::attachments(&args, &name));
            valid.extend(cx.blocking("read the CNI cache", Duration::from_secs(10), others).await?);
            valid.sort();
            valid.dedup();
            return chain::gc(cx, &self.args, network, &valid).await;
        }
        Err(Fault::unavailable("ADD or DEL was running all the time"))
    }

    /// Releases a pod's network in the background, with growing pauses, until every plugin has acknowledged it.
    pub fn retry(self: Rc<Self>, cx: &Cx, pod: Rc<Pod>, id: String, why: Fault) {
        *pod.failure.borrow_mut() = Some(why);
        pod.owed.set(true);
        if pod.retried.replace(true) {
            return;
        }
        self.args.meter.pending.inc();
        cx.spawn("release a pod's network", move |cx| async move {
            let mut pause = self.args.retry_after;
            for attempt in 2.. {
                cx.step(format!("{}: pause before attempt {attempt}", &id[..id.len().min(13)]));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST);
                cx.step(format!("{}: attempt {attempt}", &id[..id.len().min(13)]));
                let Err(error) = self.release_again(&cx, &pod, &id, attempt).await else { break };
                tracing::warn!(%error, id, attempt, "a pod's network is not given back yet");
                *pod.failure.borrow_mut() = Some(error);
            }
            tracing::info!(id, "a pod's network is given back at last");
            pod.retried.set(false);
            self.args.meter.pending.dec();
        });
    }
}

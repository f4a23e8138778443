//! Attaching pods to their networks, and detaching them.
//!
//! A pod's row says what ADD ran with. It is on its way to the disk while the first plugin runs: if both the row and the daemon are lost in that moment,
//! the pod's own row is there, and whoever takes that pod down tells us what was asked ([`Detach::pod`]). DEL runs with what the row says, whatever
//! the directory of configurations says by then, until every plugin has acknowledged it; then the row goes.
use crate::chain::Call;
use crate::conf::Network;
use crate::plugin::Cancel;
use crate::state::{Pod, State};
use crate::{cache, capability, netns, outcome};
use kernel::{Cx, Fault, Result, ResultExt};
use messages::network::{Attachment, Detach, PodNetwork};
use messages::store::{self, Op, table};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// Work on mounts and small files.
const IO: Duration = Duration::from_secs(10);
/// A pod that never had its network does not wait longer than this for it to be given back; the actor goes on by itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// A pod's row: what has to be given back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    pub pod: PodNetwork,
    /// Without addresses until ADD has succeeded.
    pub attachment: Attachment,
    /// Configurations that ADD ran with.
    pub networks: Vec<Network>,
    /// Results by network, in the order of `networks`.
    #[serde(default)]
    pub results: Vec<Value>,
    /// DEL was asked for.
    #[serde(default)]
    pub releasing: bool,
}

impl Row {
    pub fn attached(&self) -> bool {
        !self.attachment.ips.is_empty()
    }
}

/// The interface of a pod's n-th network.
pub(crate) fn interface(number: usize) -> String {
    format!("eth{number}")
}

impl State {
    pub async fn row(&self, cx: &Cx, id: &str) -> Result<Option<Row>> {
        let row = self.args.store.call(cx, store::Get { table: table::NETWORKS, key: id.into() }).await?;
        row.map(|r| store::decode(&r)).transpose()
    }
    async fn put(&self, cx: &Cx, row: &Row) -> Result<()> {
        self.args.store.call(cx, store::Commit { ops: vec![Op::put(table::NETWORKS, &row.pod.id, row)?] }).await
    }

    /// Makes the namespace, unless it is there.
    pub async fn prepare(&self, cx: &Cx, pod: PodNetwork) -> Result<String> {
        let entry = self.pod(&pod.id);
        let _guard = entry.lock.clone().lock_owned().await;
        let path = self.args.netns(&pod.id)?;
        let answer = path.to_string_lossy().into_owned();
        let make = move || {
            if netns::alive(&path) {
                return Ok(());
            }
            // A file without a namespace, of an attempt that was cut off.
            netns::remove(&path)?;
            netns::make(&path, pod.userns.as_ref())
        };
        cx.blocking("make a network namespace", IO, make).await?;
        Ok(answer)
    }

    /// Runs ADD.
    pub async fn attach(self: Rc<Self>, cx: Cx, pod: PodNetwork) -> Result<Attachment> {
        let entry = self.pod(&pod.id);
        let guard = entry.lock.clone().lock_owned().await;
        if let Some(row) = self.row(&cx, &pod.id).await?.filter(|r| r.attached() && !r.releasing) {
            return Ok(row.attachment);
        }
        let networks = self.set(&pod.handler).networks_now(&cx).await?.to_vec();
        let attachment = Attachment { netns: self.args.netns(&pod.id)?.to_string_lossy().into_owned(), ..Default::default() };
        let mut row = Row { pod, attachment, networks, results: vec![], releasing: false };
        let wishes = Wishes::of(&row.pod)?;
        let cancel = entry.begin();
        let (written, added) = {
            let _open = self.gate.read().await;
            futures::join!(self.put(&cx, &row), self.add_all(&cx, &row, &wishes, cancel))
        };
        let outcome = added.and_then(|results| Ok((outcome::pod_ips(&numbered(&results), &self.args.ip_pref)?, results)));
        written?;
        (row.attachment.ips, row.results) = outcome?;
        row.attachment.result = outcome::summary(&numbered(&row.results));
        self.remember(&cx, &row, &wishes).await;
        let answer = row.attachment.clone();
        // Nobody waits for the disk to have the result: without it DEL goes by the cache, as libcni's does.
        cx.spawn("record a pod's network", move |cx| async move {
            if let Err(error) = self.put(&cx, &row).await {
                tracing::warn!(%error, id = row.pod.id, "the result of CNI could not be recorded");
            }
            drop(guard);
        });
        Ok(answer)
    }

    async fn add_all(&self, cx: &Cx, row: &Row, wishes: &Wishes, cancel: Cancel) -> Result<Vec<Value>> {
        let add = async |(number, network): (usize, &Network)| -> Result<Value> {
            let call = self.call(row, wishes, &row.attachment.netns, number, Some(cancel.clone()));
            call.add(cx, network).await
        };
        let mut results = vec![];
        if self.args.serially {
            for each in row.networks.iter().enumerate() {
                results.push(add(each).await?);
            }
            return Ok(results);
        }
        // All of them end before the first failure is told, so that no ADD runs beside a DEL.
        let all = futures::future::join_all(row.networks.iter().enumerate().map(add)).await;
        all.into_iter().collect()
    }

    fn call<'a>(&'a self, row: &'a Row, wishes: &'a Wishes, netns: &'a str, number: usize, cancel: Option<Cancel>) -> Call<'a> {
        let (arguments, offered) = (&wishes.arguments, &wishes.offered);
        let lenient = !row.attached();
        Call { args: &self.args, id: &row.pod.id, arguments, offered, netns, ifname: interface(number), cancel, lenient }
    }

    /// Writes the cache. It is for others, so a failure is told and no more.
    async fn remember(&self, cx: &Cx, row: &Row, wishes: &Wishes) {
        let documents = row.networks.iter().zip(&row.results).enumerate().map(|(number, (network, result))| {
            let ifname = interface(number);
            let (netns, arguments, offered) = (row.attachment.netns.as_str(), &wishes.arguments[..], &wishes.offered);
            let entry = cache::Entry { id: &row.pod.id, ifname: &ifname, network, netns, arguments, offered, result };
            (cache::path_of(&self.args, &entry), entry.document())
        });
        let documents: Vec<(PathBuf, Value)> = documents.collect();
        if let Err(error) = cx.blocking("write the CNI cache", IO, move || cache::write(&documents)).await {
            tracing::warn!(%error, id = row.pod.id, "the CNI cache could not be written");
        }
    }

    /// Runs DEL and removes the namespace. What is not acknowledged is tried again in the background, also when this answers an error.
    pub async fn detach(self: Rc<Self>, cx: Cx, m: Detach) -> Result<()> {
        let entry = self.pod(&m.id);
        entry.end();
        let joins = entry.retried() && entry.lock.try_lock().is_err();
        let guard = entry.lock.clone().lock_owned().await;
        let Some(row) = self.to_release(&cx, &m).await? else { return Ok(()) };
        let attached = row.attached();
        let done = match entry.failure().filter(|_| joins) {
            // The attempt that was under way has just failed; another one at once would only double the wait.
            Some(fault) => Err(fault),
            None if attached => self.release(&cx, row, 1).await,
            None => self.release(&cx.without_deadline().with_timeout(PATIENCE), row, 1).await,
        };
        drop(guard);
        let Err(fault) = done else { return Ok(()) };
        self.retry(&cx, entry, m.id.clone(), fault.clone());
        if attached {
            return Err(fault.context("the network of the pod is not given back yet, which is tried again without end"));
        }
        // Nobody has an address to lose: the pod may go, and the rest is our own business.
        tracing::warn!(error = %fault, id = m.id, "what a failed ADD may have left is not given back yet; it is tried again");
        Ok(())
    }

    /// The row to release, if there is one.
    async fn to_release(&self, cx: &Cx, m: &Detach) -> Result<Option<Row>> {
        if let Some(row) = self.row(cx, &m.id).await? {
            return Ok(Some(row));
        }
        let netns = self.args.netns(&m.id)?;
        let networks = match &m.pod {
            Some(pod) => self.set(&pod.handler).networks_now(cx).await.map(|n| n.to_vec()).unwrap_or_default(),
            None => vec![],
        };
        let Some(pod) = m.pod.as_deref().filter(|_| !networks.is_empty()) else {
            cx.blocking("remove a network namespace", IO, move || netns::remove(&netns)).await?;
            return Ok(None);
        };
        let attachment = Attachment { netns: netns.to_string_lossy().into_owned(), ..Default::default() };
        Ok(Some(Row { pod: pod.clone(), attachment, networks, results: vec![], releasing: false }))
    }

    /// Tries again what could not be given back; waits for its turn, since a broken network leaves many.
    pub async fn release_again(&self, cx: &Cx, entry: &Rc<Pod>, id: &str, attempt: u32) -> Result<()> {
        let _turn = self.turns.acquire().await.map_err(|_| Fault::unavailable("the actor ends"))?;
        let _guard = entry.lock.clone().lock_owned().await;
        match self.row(cx, id).await? {
            Some(row) if entry.owes() => self.release(cx, row, attempt).await,
            _ => Ok(()),
        }
    }

    /// One attempt at giving everything back; the row goes last.
    async fn release(&self, cx: &Cx, mut row: Row, attempt: u32) -> Result<()> {
        let marked = async {
            if row.releasing {
                return Ok(());
            }
            self.put(cx, &Row { releasing: true, ..row.clone() }).await
        };
        let (marked, done) = {
            let _open = self.gate.read().await;
            futures::join!(marked, self.del_all(cx, &row))
        };
        row.releasing = true;
        // A pod that never had its network keeps its namespace for the first attempts only; DEL works without one.
        if done.is_ok() || (!row.attached() && attempt >= 3) {
            let path = PathBuf::from(&row.attachment.netns);
            cx.blocking("remove a network namespace", IO, move || netns::remove(&path)).await?;
        }
        done?;
        marked?;
        self.args.store.call(cx, store::Commit { ops: vec![Op::delete(table::NETWORKS, &row.pod.id)] }).await
    }

    async fn del_all(&self, cx: &Cx, row: &Row) -> Result<()> {
        let wishes = Wishes::of(&row.pod).unwrap_or_default();
        let path = PathBuf::from(&row.attachment.netns);
        let alive = cx.blocking("look at a network namespace", IO, move || Ok(netns::alive(&path))).await?;
        let netns = if alive { row.attachment.netns.as_str() } else { "" };
        let current = self.set(&row.pod.handler).networks().unwrap_or_default();
        let mut failed: Option<Fault> = None;
        for (number, network) in row.networks.iter().enumerate().rev() {
            let result = match row.results.get(number) {
                Some(result) => Some(result.clone()),
                None => self.cached(cx, network, row, number).await,
            };
            let call = self.call(row, &wishes, netns, number, None);
            let mut done = call.del(cx, network, result.as_ref()).await;
            // A configuration that was wrong when the pod was made may have been mended.
            if done.is_err()
                && let Some(mended) = current.iter().find(|n| n.name == network.name && *n != network)
            {
                done = done.or(call.del(cx, mended, result.as_ref()).await);
            }
            match done {
                Ok(()) => self.forget(cx, network, row, number).await?,
                Err(fault) => failed = failed.or(Some(fault)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn cached(&self, cx: &Cx, network: &Network, row: &Row, number: usize) -> Option<Value> {
        let (args, network, id) = (self.args.clone(), network.name.clone(), row.pod.id.clone());
        let read = move || Ok(cache::result(&args, &network, &id, &interface(number)));
        cx.blocking("read the CNI cache", IO, read).await.ok().flatten()
    }

    async fn forget(&self, cx: &Cx, network: &Network, row: &Row, number: usize) -> Result<()> {
        let (args, network, id) = (self.args.clone(), network.name.clone(), row.pod.id.clone());
        let remove = move || cache::remove(&args, &network, &id, &interface(number));
        cx.blocking("clean the CNI cache", IO, remove).await
    }

    /// Runs CHECK.
    pub async fn check(&self, cx: &Cx, id: &str) -> Result<()> {
        let row = self.row(cx, id).await?.filter(Row::attached).ok_or_else(|| Fault::not_found(format!("network of {id}")))?;
        let wishes = Wishes::of(&row.pod)?;
        for (number, network) in row.networks.iter().enumerate() {
            let call = self.call(&row, &wishes, &row.attachment.netns, number, None);
            call.check(cx, network, row.results.get(number)).await.with_context(|| format!("network of {id}"))?;
        }
        Ok(())
    }
}

fn numbered(results: &[Value]) -> Vec<(String, Value)> {
    results.iter().enumerate().map(|(number, result)| (interface(number), result.clone())).collect()
}

/// What plugins are told of a pod.
#[derive(Default)]
struct Wishes {
    arguments: Vec<(&'static str, String)>,
    offered: serde_json::Map<String, Value>,
}

impl Wishes {
    fn of(pod: &PodNetwork) -> Result<Wishes> {
        Ok(Wishes { arguments: capability::arguments(pod)?, offered: capability::offered(pod)? })
    }
}

impl crate::Args {
    /// Where a pod's namespace is pinned: it follows from the id, so whoever knows the pod finds its namespace.
    pub(crate) fn netns(&self, id: &str) -> Result<PathBuf> {
        if !crate::conf::is_name(id) {
            return Err(Fault::invalid_argument(format!("sandbox id {id:?} cannot be handed to CNI plugins")));
        }
        let name = match id.get(..32).filter(|head| head.chars().all(|c| c.is_ascii_hexdigit())) {
            Some(hex) => format!("cni-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]),
            None => format!("cni-{id}"),
        };
        Ok(Path::new(&self.netns_dir).join(name))
    }
}

//! `network`: pod network namespaces and CNI chains.
//!
//! Owns: pinned namespaces below its directory, rows of the store's table `networks`. Talks to: `store`; executes CNI plugins. States: none beside
//! the rows. On a crash: a row is written before a namespace is made and before a plugin runs, so that the next `Detach` (or the sweep at the next
//! start) gives everything back; DEL is repeated until it is acknowledged. Spans: `netns`, one for each plugin with its pid and exit code. Limits:
//! each plugin has a deadline and its process group is killed past it, so a hung plugin costs its own pod only.
mod cni;
mod conf;
mod netns;
mod sys;

use kernel::{Actor, Addr, Cx, Fault, Handle, Reply, Result, Routes};
use messages::network::{Attach, Attachment, Check, Detach, Dial, Lookup, Network, NetworkStatus, PodNetwork, Status};
use messages::store::{self, Op, Store, table};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Patience of a connection to a pod's port, for each address family.
const DIAL: Duration = Duration::from_secs(10);

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// Directories of plugins, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// Directory of configurations.
    pub conf_dir: PathBuf,
    /// Networks at most, 0 = all.
    pub max_conf_num: usize,
    /// Directory of pinned namespaces.
    pub netns_dir: PathBuf,
    /// `ipv4`, `ipv6`, `cni`; empty = ipv4.
    pub ip_pref: String,
    /// A plugin's deadline.
    pub plugin_timeout: Duration,
    /// The store.
    pub store: Addr<Store>,
}

/// A pod's row: what has to be given back.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    pub pod: PodNetwork,
    pub attachment: Attachment,
    /// Configurations that ADD ran with, by which DEL runs, whatever the directory says by then.
    pub networks: Vec<conf::Network>,
}

/// The actor.
pub struct NetworkActor(Arc<Args>);

impl Actor for NetworkActor {
    type Proto = Network;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        let me = Arc::new(args);
        let sweeper = me.clone();
        cx.spawn("sweep namespaces", move |cx| async move {
            if let Err(error) = sweeper.sweep(&cx).await {
                tracing::warn!(%error, "namespaces could not be swept");
            }
        });
        Ok(NetworkActor(me))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Attach>().on::<Detach>().on::<Lookup>().on::<Check>().on::<Dial>().on::<Status>()
    }
}

impl Args {
    async fn row(&self, cx: &Cx, id: &str) -> Result<Option<Row>> {
        let row = self.store.call(cx, store::Get { table: table::NETWORKS, key: id.into() }).await?;
        row.map(|r| store::decode(&r)).transpose()
    }
    async fn put(&self, cx: &Cx, row: &Row) -> Result<()> {
        self.store.call(cx, store::Commit { ops: vec![Op::put(table::NETWORKS, &row.pod.id, row)?] }).await
    }

    async fn attach(&self, cx: &Cx, pod: PodNetwork) -> Result<Attachment> {
        let id = pod.id.clone();
        if let Some(row) = self.row(cx, &id).await? {
            if !row.attachment.ips.is_empty() {
                return Ok(row.attachment);
            }
            // Left half done by an earlier generation.
            self.detach(cx, &id).await?;
        }
        let networks = conf::load(&self.conf_dir, self.max_conf_num)?;
        if networks.is_empty() {
            return Err(Fault::unavailable(format!("cni plugin not initialized: no network configuration in {}", self.conf_dir.display())));
        }
        let path = self.netns_dir.join(format!("cni-{}", uuid::Uuid::new_v4()));
        let attachment = Attachment { netns: path.to_string_lossy().into_owned(), ips: vec![], result: serde_json::Value::Null };
        let mut row = Row { pod, attachment, networks };
        self.put(cx, &row).await?;
        let result = self.add_all(cx, &mut row, path).await;
        let result = match result {
            Ok(()) => self.put(cx, &row).await,
            Err(e) => Err(e),
        };
        if let Err(fault) = result {
            let cx = cx.without_deadline();
            if let Err(undo) = self.detach(&cx, &id).await {
                return Err(fault.context(format!("undoing it failed, too ({undo}); it is tried again")));
            }
            return Err(fault);
        }
        Ok(row.attachment)
    }

    async fn add_all(&self, cx: &Cx, row: &mut Row, path: PathBuf) -> Result<()> {
        let userns = row.pod.userns;
        cx.run("netns", |cx| async move {
            cx.blocking("make a network namespace", Duration::from_secs(10), move || netns::make(&path, userns.as_ref())).await
        })
        .await?;
        let mut results = serde_json::Map::new();
        for (number, network) in row.networks.iter().enumerate() {
            let call = cni::Call { args: self, pod: &row.pod, netns: &row.attachment.netns, ifname: format!("eth{number}") };
            let result = call.add(cx, network).await?;
            results.insert(network.name.clone(), result);
        }
        let first = row.networks.first().and_then(|n| results.get(&n.name)).cloned().unwrap_or_default();
        row.attachment.ips = cni::addresses(&first, &self.ip_pref);
        row.attachment.result = results.into();
        if row.attachment.ips.is_empty() {
            return Err(Fault::internal("failed to find network info for sandbox: the result of CNI has no address"));
        }
        Ok(())
    }

    /// Gives everything back; the row goes last.
    async fn detach(&self, cx: &Cx, id: &str) -> Result<()> {
        let Some(row) = self.row(cx, id).await? else { return Ok(()) };
        for (number, network) in row.networks.iter().enumerate().rev() {
            let call = cni::Call { args: self, pod: &row.pod, netns: &row.attachment.netns, ifname: format!("eth{number}") };
            call.del(cx, network, row.attachment.result.get(&network.name)).await?;
        }
        let path = PathBuf::from(&row.attachment.netns);
        cx.blocking("remove a network namespace", Duration::from_secs(10), move || netns::remove(&path)).await?;
        self.store.call(cx, store::Commit { ops: vec![Op::delete(table::NETWORKS, id)] }).await
    }

    /// Removes namespaces in our directory that no row names.
    async fn sweep(&self, cx: &Cx) -> Result<()> {
        let rows = self.store.call(cx, store::Scan { table: table::NETWORKS, prefix: String::new() }).await?;
        let rows = rows.iter().map(|(_, r)| store::decode::<Row>(r)).collect::<Result<Vec<_>>>()?;
        let known: BTreeSet<String> = rows.into_iter().map(|r| r.attachment.netns).collect();
        let dir = self.netns_dir.clone();
        cx.blocking("sweep namespaces", Duration::from_secs(30), move || netns::sweep(&dir, &known)).await
    }
}

impl Handle<Attach> for NetworkActor {
    fn handle(&mut self, m: Attach, cx: Cx) -> Reply<Attachment> {
        let me = self.0.clone();
        Reply::op(async move { me.attach(&cx, m.0).await })
    }
}

impl Handle<Detach> for NetworkActor {
    fn handle(&mut self, m: Detach, cx: Cx) -> Reply<()> {
        let me = self.0.clone();
        Reply::op(async move { me.detach(&cx, &m.id).await })
    }
}

impl Handle<Lookup> for NetworkActor {
    fn handle(&mut self, m: Lookup, cx: Cx) -> Reply<Option<Attachment>> {
        let me = self.0.clone();
        Reply::op(async move { Ok(me.row(&cx, &m.id).await?.map(|r| r.attachment)) })
    }
}

impl Handle<Check> for NetworkActor {
    fn handle(&mut self, m: Check, cx: Cx) -> Reply<()> {
        let me = self.0.clone();
        Reply::op(async move {
            let row = me.row(&cx, &m.id).await?.ok_or_else(|| Fault::not_found(format!("network of {}", m.id)))?;
            for (number, network) in row.networks.iter().enumerate() {
                let call = cni::Call { args: &me, pod: &row.pod, netns: &row.attachment.netns, ifname: format!("eth{number}") };
                call.check(&cx, network, row.attachment.result.get(&network.name)).await?;
            }
            Ok(())
        })
    }
}

impl Handle<Dial> for NetworkActor {
    fn handle(&mut self, m: Dial, cx: Cx) -> Reply<std::net::TcpStream> {
        Reply::op(
            async move { cx.blocking("dial a pod", DIAL + Duration::from_secs(5), move || netns::dial(&m.netns, m.port, DIAL)).await },
        )
    }
}

impl Handle<Status> for NetworkActor {
    fn handle(&mut self, _: Status, _: Cx) -> Reply<NetworkStatus> {
        let not_ready = |message: String| NetworkStatus {
            ready: false,
            reason: "NetworkPluginNotReady".into(),
            message,
            config: serde_json::Value::Null,
        };
        Reply::ok(match conf::load(&self.0.conf_dir, self.0.max_conf_num) {
            Ok(networks) if networks.is_empty() => not_ready("Network plugin returns error: cni plugin not initialized".into()),
            Ok(networks) => {
                let config = serde_json::to_value(networks).unwrap_or_default();
                NetworkStatus { ready: true, reason: String::new(), message: String::new(), config }
            }
            Err(e) => not_ready(format!("Network plugin returns error: {e}")),
        })
    }
}

#[cfg(test)]
mod tests;

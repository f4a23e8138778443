//! `network`: pod network namespaces and CNI chains.
//!
//! Owns: pinned namespaces, rows of the store's table `networks`, the configuration directories' contents as last read, our documents in CNI's cache.
//! Talks to: `store`; executes CNI plugins. States: a pod is prepared (a namespace), attached (ADD answered), releasing (DEL asked for, not yet
//! acknowledged by all plugins). On a crash: a row outlives us, DEL is repeated until it is acknowledged, by the next generation, too; a plugin under way
//! is killed with its process group. Spans: one for each plugin's execution, with verb, network, interface, pid and exit code; plugins get `TRACEPARENT`.
//! Metrics: [`Meter`]. Limits: a deadline for each plugin, so a hung one costs its own pod only; output, arguments and configurations are bounded; few
//! repetitions run side by side. Status never waits: it is answered from what was last read and heard.
mod cache;
mod capability;
mod chain;
mod conf;
mod metrics;
mod netns;
mod outcome;
mod plugin;
mod pods;
mod sets;
mod state;
mod sys;
mod template;
mod watch;

pub use metrics::Meter;

use kernel::{Actor, Addr, Cx, Handle, Reply, Result, Routes};
use messages::network::{Attach, Attachment, Check, Configure, Detach, Dial, Network, NetworkStatus, Prepare, Status};
use messages::store::Store;
use state::State;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// Patience of a connection to a pod's port, for each address family.
const DIAL: Duration = Duration::from_secs(10);

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// Directories of plugins, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// Directory of configurations and number of networks at most (0 = all), by runtime handler; the default has no name.
    pub conf: BTreeMap<String, (PathBuf, usize)>,
    /// Networks one after another.
    pub serially: bool,
    /// Template of a configuration, for `UpdateRuntimeConfig`.
    pub template: Option<PathBuf>,
    /// Directory of pinned namespaces.
    pub netns_dir: PathBuf,
    /// CNI's cache.
    pub cache_dir: PathBuf,
    /// `ipv4`, `ipv6`, `cni`; empty = ipv4.
    pub ip_pref: String,
    /// A plugin's deadline.
    pub plugin_timeout: Duration,
    /// First pause before DEL is tried again; the following ones are longer.
    pub retry_after: Duration,
    /// Meters.
    pub meter: Meter,
    /// The store.
    pub store: Addr<Store>,
}

/// The actor.
pub struct NetworkActor(Rc<State>);

impl Actor for NetworkActor {
    type Proto = Network;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        let me = Rc::new(State::new(args));
        for set in me.sets.values() {
            set.load(&cx).await;
            let (watched, asked, args) = (set.clone(), set.clone(), me.args.clone());
            cx.spawn("watch CNI configurations", move |cx| watched.watch(cx));
            cx.spawn("ask CNI plugins", move |cx| asked.ask(args, cx));
        }
        // Pods that an earlier generation has prepared have no rows yet, so only the first one may look for strays.
        let strays = if cx.generation() > 1 { vec![] } else { me.strays(&cx).await.unwrap_or_default() };
        let settled = me.clone();
        cx.spawn("settle networks", move |cx| settled.settle(cx, strays));
        Ok(NetworkActor(me))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Prepare>().on::<Attach>().on::<Detach>().on::<Check>().on::<Dial>().on::<Status>().on::<Configure>()
    }
}

macro_rules! operations { ($($message:ident($me:ident, $m:ident, $cx:ident) -> $reply:ty = $run:expr;)*) => { $(
    impl Handle<$message> for NetworkActor {
        fn handle(&mut self, $m: $message, $cx: Cx) -> Reply<$reply> {
            let $me = self.0.clone();
            Reply::op(async move { $run })
        }
    }
)* } }

operations! {
    Prepare(me, m, cx) -> String = me.prepare(&cx, m.0).await;
    Attach(me, m, cx) -> Attachment = me.attach(cx, m.0).await;
    Detach(me, m, cx) -> () = me.detach(cx, m).await;
    Check(me, m, cx) -> () = me.check(&cx, &m.id).await;
    Configure(me, m, cx) -> () = me.configure(&cx, &m.pod_cidr).await;
    Dial(_me, m, cx) -> std::net::TcpStream = cx.blocking("dial a pod", DIAL + Duration::from_secs(5), move || netns::dial(&m.netns, m.port, DIAL)).await;
}

impl Handle<Status> for NetworkActor {
    fn handle(&mut self, _: Status, _: Cx) -> Reply<NetworkStatus> {
        Reply::ok(sets::status(&self.0.args, &self.0.sets))
    }
}

#[cfg(test)]
mod tests;

//! Sets of networks: one for each configuration directory (a runtime handler may have its own). Each is read when its files change, and its plugins are
//! asked for their STATUS now and then; CRI's Status is answered from what is known, so it never waits for a disk or a plugin.
use crate::conf::{self, Network};
use crate::watch::{Notice, Watch};
use crate::{Args, chain};
use kernel::{Cx, Fault, Result};
use messages::network::NetworkStatus;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Reading a few small files.
const IO: Duration = Duration::from_secs(5);
/// Between questions to plugins that are well.
const WELL: Duration = Duration::from_secs(10);
/// Between questions to plugins that are not: a node waits for them.
const ILL: Duration = Duration::from_secs(1);
/// Before a directory that is gone is looked for again.
const AGAIN: Duration = Duration::from_millis(200);

/// A set.
pub(crate) struct Set {
    pub dir: PathBuf,
    pub most: usize,
    now: RefCell<Condition>,
    changed: tokio::sync::Notify,
}

struct Condition {
    loaded: Result<Rc<Vec<Network>>>,
    /// What the plugins answered to STATUS; `None` = not asked yet, though they have it.
    status: Option<Result<()>>,
    since: Instant,
    /// What plugins say of themselves, for people.
    plugins: BTreeMap<String, String>,
}

impl Set {
    pub fn new(dir: PathBuf, most: usize) -> Set {
        let condition = Condition { loaded: Ok(Rc::default()), status: Some(Ok(())), since: Instant::now(), plugins: BTreeMap::new() };
        Set { dir, most, now: RefCell::new(condition), changed: tokio::sync::Notify::new() }
    }

    /// Reads the files.
    pub async fn load(&self, cx: &Cx) {
        let (dir, most) = (self.dir.clone(), self.most);
        let loaded = cx.blocking("read CNI configurations", IO, move || conf::load(&dir, most)).await;
        let mut now = self.now.borrow_mut();
        let same = match (&loaded, &now.loaded) {
            (Ok(new), Ok(old)) => *new == **old,
            (Err(new), Err(old)) => new.message == old.message,
            _ => false,
        };
        if same {
            return;
        }
        match &loaded {
            Ok(networks) => {
                let names: Vec<&str> = networks.iter().map(|n| n.name.as_str()).collect();
                tracing::info!(dir = %self.dir.display(), networks = ?names, "CNI configurations loaded");
            }
            Err(error) => {
                tracing::error!(%error, "a CNI configuration cannot be used; pods with a network of their own cannot be started until it is mended")
            }
        }
        let asks = loaded.as_ref().is_ok_and(|networks| networks.iter().any(|n| n.since(1, 1)));
        *now =
            Condition { loaded: loaded.map(Rc::new), status: (!asks).then_some(Ok(())), since: Instant::now(), plugins: BTreeMap::new() };
        self.changed.notify_one();
    }

    /// The networks, or why there are none.
    pub fn networks(&self) -> Result<Rc<Vec<Network>>> {
        let none = |why: String| Fault::unavailable(format!("cni plugin not initialized: {why}"));
        match &self.now.borrow().loaded {
            Ok(networks) if networks.is_empty() => Err(none(format!("no network configuration in {}", self.dir.display()))),
            Ok(networks) => Ok(networks.clone()),
            Err(fault) => Err(none(fault.message.clone())),
        }
    }

    /// The same, after a look at the directory if there are none: files may have come just now.
    pub async fn networks_now(&self, cx: &Cx) -> Result<Rc<Vec<Network>>> {
        if self.networks().is_err() {
            self.load(cx).await;
        }
        self.networks()
    }

    /// Can pods be given a network?
    fn ready(&self) -> Result<()> {
        self.networks()?;
        let now = self.now.borrow();
        match &now.status {
            Some(status) => status.clone(),
            None => Err(Fault::unavailable(format!("the plugins have not answered STATUS yet, for {:?}", now.since.elapsed()))),
        }
    }

    /// Watches the directory for ever.
    pub async fn watch(self: Rc<Self>, cx: Cx) {
        loop {
            let watch = match Watch::open(&cx, &self.dir).await {
                Ok(watch) => watch,
                Err(error) => {
                    tracing::warn!(%error, dir = %self.dir.display(), "CNI configurations cannot be watched; they are looked at now and then");
                    self.load(&cx).await;
                    tokio::time::sleep(5 * ILL).await;
                    continue;
                }
            };
            // What changed before the watch began.
            self.load(&cx).await;
            while let Ok(Notice::Changed) = watch.next().await {
                self.load(&cx).await;
            }
            self.load(&cx).await;
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Asks the plugins for ever.
    pub async fn ask(self: Rc<Self>, args: Args, cx: Cx) {
        loop {
            let networks = self.networks().unwrap_or_default();
            self.describe(&cx, &args, &networks).await;
            let mut answer = Ok(());
            for network in networks.iter() {
                answer = answer.and(chain::status(&cx, &args, network).await);
            }
            let asks = networks.iter().any(|n| n.since(1, 1));
            let wait = match (&answer, asks) {
                (_, false) => Duration::MAX,
                (Ok(()), true) => WELL,
                (Err(_), true) => ILL,
            };
            if self.networks().is_ok_and(|now| Rc::ptr_eq(&now, &networks)) {
                let mut now = self.now.borrow_mut();
                if let (Err(error), Some(Ok(())) | None) = (&answer, &now.status) {
                    tracing::warn!(%error, "the network is not ready");
                }
                (now.status, now.since) = (Some(answer), Instant::now());
            }
            let _ = tokio::time::timeout(wait.min(Duration::from_secs(86_400)), self.changed.notified()).await;
        }
    }

    /// Asks each plugin of new configurations once which versions it speaks: a missing binary or a version that it does not know is found before a pod is.
    async fn describe(&self, cx: &Cx, args: &Args, networks: &Rc<Vec<Network>>) {
        if networks.is_empty() || !self.now.borrow().plugins.is_empty() {
            return;
        }
        let mut all = BTreeMap::new();
        for network in networks.iter() {
            for plugin in &network.plugins {
                let kind = conf::kind(plugin).to_owned();
                let said = match chain::versions(cx, args, network, plugin).await {
                    Ok(spoken) if network.cni_version.is_empty() || spoken.contains(&network.cni_version) => spoken.join(", "),
                    Ok(spoken) => {
                        format!("does not speak version {} of network {}, but {}", network.cni_version, network.name, spoken.join(", "))
                    }
                    Err(fault) => fault.message,
                };
                if !said.starts_with(|c: char| c.is_ascii_digit()) {
                    tracing::warn!(plugin = kind, said, "a CNI plugin may not work");
                }
                all.insert(kind, said);
            }
        }
        self.now.borrow_mut().plugins = all;
    }

    fn describe_config(&self, args: &Args) -> Value {
        let networks = self.networks().unwrap_or_default();
        let networks = networks.iter().enumerate().map(|(number, n)| {
            let plugins: Vec<Value> = n.plugins.iter().map(|p| json!({"Network": p, "Source": p.to_string()})).collect();
            json!({"Config": {"Name": n.name, "CNIVersion": n.cni_version, "Plugins": plugins}, "IFName": format!("eth{number}")})
        });
        json!({"PluginDirs": args.bin_dirs, "PluginConfDir": self.dir, "PluginMaxConfNum": self.most, "Prefix": "eth",
            "Networks": networks.collect::<Vec<_>>(), "Plugins": self.now.borrow().plugins})
    }
}

/// CRI's condition: the default set decides; the others are told in the verbose answer.
pub(crate) fn status(args: &Args, sets: &BTreeMap<String, Rc<Set>>) -> NetworkStatus {
    let mut info = BTreeMap::new();
    let mut ready = Ok(());
    for (handler, set) in sets {
        let state = set.ready();
        let text = state.as_ref().map_or_else(|e| e.message.clone(), |()| "OK".into());
        if handler.is_empty() {
            info.insert("cniconfig".to_owned(), set.describe_config(args).to_string());
            info.insert("lastCNILoadStatus".to_owned(), text);
            ready = state;
        } else {
            info.insert(format!("lastCNILoadStatus.{handler}"), text);
        }
    }
    match ready {
        Ok(()) => NetworkStatus { ready: true, reason: String::new(), message: String::new(), info },
        Err(fault) => {
            let message = format!("Network plugin returns error: {}", fault.message);
            NetworkStatus { ready: false, reason: "NetworkPluginNotReady".into(), message, info }
        }
    }
}

//! `sandbox`: pods and their containers.
//!
//! Owns: rows of pods, containers and names; the pods' files and shm mounts; the published [`View`]. Talks to: `network`, `task`, `image`,
//! `snapshot`, `store`, `events`. States: see [`record::PodPhase`] and [`record::Phase`]; the tables in memory mirror the store's rows and are
//! read again on each start. On a crash: rows in `Creating` are taken down by the next generation, running containers are watched again. Spans:
//! each step of a pod's and a container's making. Limits: operations on one pod's sandbox, and on one container, run one after another (a lock
//! for each); two pods never wait for each other.
mod container;
mod pod;
mod publish;
mod record;
mod recover;
mod settings;
pub mod spec;
mod status;
mod volumes;

use kernel::{Actor, Addr, Cx, Handle, Reply, Result, Routes};
use messages::events::Events;
use messages::image::Images;
use messages::network::{self, Network};
use messages::sandbox::*;
use messages::snapshot::Snapshots;
use messages::store::{self, Op, Store, table};
use messages::task::Tasks;
use proto::cri;
use record::{ContainerRow, PodRow};
pub use settings::{Handler, Settings};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// Directory of the pods' files.
    pub root: PathBuf,
    /// Directory of what a reboot may lose.
    pub state: PathBuf,
    /// Settings.
    pub settings: Arc<Settings>,
    /// Where pods and containers are published.
    pub view: Arc<View>,
    /// The store.
    pub store: Addr<Store>,
    /// The bus.
    pub events: Addr<Events>,
    /// Networks.
    pub network: Addr<Network>,
    /// Images.
    pub images: Addr<Images>,
    /// Snapshots.
    pub snapshots: Addr<Snapshots>,
    /// Tasks.
    pub tasks: Addr<Tasks>,
}

type Lock = Arc<tokio::sync::Mutex<()>>;

#[derive(Default)]
pub(crate) struct Tables {
    pub pods: BTreeMap<String, PodRow>,
    pub containers: BTreeMap<String, ContainerRow>,
    pub recovered: bool,
    locks: BTreeMap<String, Lock>,
}

/// State that the operations of one generation share.
pub(crate) struct World {
    pub args: Args,
    pub tables: RefCell<Tables>,
    /// Handlers of which it is known whether their pods can have user namespaces, and why not.
    pub userns: RefCell<BTreeMap<String, std::result::Result<(), String>>>,
    pub boot: String,
    pub selinux: spec::selinux::SeLinux,
}

impl World {
    /// The handler of a pod, as the configuration has it now. A pod outlives the removal of its handler.
    pub fn handler(&self, name: &str) -> Handler {
        self.args.settings.handlers.get(name).cloned().unwrap_or_default()
    }
    /// One operation at a time for each key.
    pub async fn lock(&self, key: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut tables = self.tables.borrow_mut();
            if tables.locks.len() > 4096 {
                tables.locks.retain(|_, l| Arc::strong_count(l) > 1);
            }
            tables.locks.entry(key.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }
    pub async fn commit(&self, cx: &Cx, ops: Vec<Op>) -> Result<()> {
        self.args.store.call(cx, store::Commit { ops }).await
    }
    pub fn pod(&self, id: &str) -> Option<PodRow> {
        self.tables.borrow().pods.get(id).cloned()
    }
    pub fn container(&self, id: &str) -> Option<ContainerRow> {
        self.tables.borrow().containers.get(id).cloned()
    }
    pub async fn save_pod(&self, cx: &Cx, row: &PodRow) -> Result<()> {
        self.commit(cx, vec![Op::put(table::SANDBOXES, &row.id, row)?]).await?;
        self.tables.borrow_mut().pods.insert(row.id.clone(), row.clone());
        self.publish_pod(&row.id);
        Ok(())
    }
    pub async fn save_container(&self, cx: &Cx, row: &ContainerRow) -> Result<()> {
        self.commit(cx, vec![Op::put(table::CONTAINERS, &row.id, row)?]).await?;
        self.tables.borrow_mut().containers.insert(row.id.clone(), row.clone());
        self.publish_container(&row.id);
        Ok(())
    }
    /// Where the root file systems of a handler's containers live.
    pub fn snapshotter(&self, handler: &str) -> String {
        let settings = &self.args.settings;
        settings.snapshotters.get(handler).unwrap_or(&settings.snapshotter).clone()
    }
    pub fn snapshotter_of_pod(&self, pod: &str) -> String {
        let tables = self.tables.borrow();
        self.snapshotter(tables.pods.get(pod).map_or("", |p| p.handler.as_str()))
    }
    pub fn files(&self, pod: &str) -> PathBuf {
        self.args.root.join("sandboxes").join(pod)
    }
    pub fn volatile(&self, pod: &str) -> PathBuf {
        self.args.state.join("sandboxes").join(pod)
    }
}

/// The actor.
pub struct SandboxActor(Rc<World>);

impl Actor for SandboxActor {
    type Proto = Sandboxes;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        let selinux = spec::selinux::SeLinux::new(args.settings.selinux, args.settings.selinux_range);
        let world = Rc::new(World { args, tables: RefCell::default(), userns: RefCell::default(), boot: record::boot_id(), selinux });
        recover::load(&world, &cx).await?;
        world.publish();
        let recovering = world.clone();
        cx.spawn("recover pods", move |cx| async move { recover::run(recovering, cx).await });
        let probing = world.clone();
        cx.spawn("probe user namespaces", move |cx| async move { status::probe(&probing, &cx).await });
        Ok(SandboxActor(world))
    }
    fn routes() -> Routes<Self> {
        Routes::new()
            .on::<RunPod>()
            .on::<StopPod>()
            .on::<RemovePod>()
            .on::<CreateContainer>()
            .on::<StartContainer>()
            .on::<StopContainer>()
            .on::<RemoveContainer>()
            .on::<UpdateContainer>()
            .on::<ReopenLog>()
            .on::<ExecSync>()
            .on::<ExecProcess>()
            .on::<UpdatePod>()
            .on::<Status>()
            .on::<UpdateRuntimeConfig>()
    }
}

macro_rules! operations { ($($message:ident($world:ident, $m:ident, $cx:ident) -> $reply:ty = $run:expr;)*) => { $(
    impl Handle<$message> for SandboxActor {
        fn handle(&mut self, $m: $message, $cx: Cx) -> Reply<$reply> {
            let $world = self.0.clone();
            Reply::op(async move { $run })
        }
    }
)* } }

operations! {
    RunPod(world, m, cx) -> String = pod::run(&world, &cx, m).await;
    StopPod(world, m, cx) -> () = pod::stop(&world, &cx, &m.id).await;
    RemovePod(world, m, cx) -> () = pod::remove(&world, &cx, &m.id).await;
    CreateContainer(world, m, cx) -> String = container::create(&world, &cx, m).await;
    StartContainer(world, m, cx) -> () = container::start(&world, &cx, &m.id).await;
    StopContainer(world, m, cx) -> () = container::stop(&world, &cx, &m.id, m.grace_s).await;
    RemoveContainer(world, m, cx) -> () = container::remove(&world, &cx, &m.id).await;
    UpdateContainer(world, m, cx) -> () = container::update(&world, &cx, m.request).await;
    ReopenLog(world, m, cx) -> () = container::reopen_log(&world, &cx, m.id).await;
    ExecSync(world, m, cx) -> cri::ExecSyncResponse = container::exec(&world, &cx, m).await;
    ExecProcess(world, m, _cx) -> (String, Vec<u8>) = container::exec_process(&world, &m.id, &m.cmd, m.terminal);
    UpdatePod(world, m, cx) -> () = pod::update(&world, &cx, m.request).await;
    Status(world, m, cx) -> cri::StatusResponse = status::status(&world, &cx, m.verbose).await;
    UpdateRuntimeConfig(world, m, cx) -> () = world.args.network.call(&cx, network::Configure { pod_cidr: m.pod_cidr }).await;
}

//! The parent actor `task`: knows which pod owns which container, and passes every message on to that pod's child. It waits for no shim.
use crate::child::{Child, ChildArgs, Exited, For, Oom, TaskShim};
use crate::row::Row;
use crate::{Args, NAMESPACE, bundle, container, launch};
use futures::future::join_all;
use kernel::{Actor, Addr, Class, Cx, Fault, Handle, Message, Reply, Result, Routes};
use messages::events::{Delivery, Event, Events, Subscribe};
use messages::store::{Scan, Store, decode, table};
use messages::task::{
    Adopted, Checkpoint, CloseInput, CloseSession, Create, Delete, ExecSync, Exit, JoinStreams, Kill, OpenSession, ProbeUserns,
    RemoveSandbox, ReopenLog, Resize, RunExec, SandboxHandle, Start, StartSandbox, State, Stats, StopSandbox, Tasks, Update, UpdateSandbox,
    Wait, WaitExec, WaitSandbox,
};
use proto::events::{TaskExit, TaskOom};
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Longest work on what old bundles left.
const SWEEP: Duration = Duration::from_secs(60);

/// The actor.
pub struct Parent {
    args: Arc<Args>,
    index: Rc<Index>,
}

/// Who owns what.
#[derive(Default)]
struct Index {
    pods: RefCell<BTreeSet<String>>,
    /// Sandbox id by container id.
    containers: RefCell<HashMap<String, String>>,
}

impl Index {
    fn owner(&self, container: &str) -> Option<String> {
        self.containers.borrow().get(container).cloned()
    }
    fn forget_pod(&self, id: &str) {
        self.pods.borrow_mut().remove(id);
        self.containers.borrow_mut().retain(|_, pod| pod != id);
    }
}

fn child(cx: &Cx, id: &str) -> Addr<TaskShim> {
    cx.system().child(id)
}

impl Actor for Parent {
    type Proto = Tasks;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        args.logs.show(cx.system(), bundle::tasks(&args));
        let args = Arc::new(args);
        let index = Rc::new(Index::default());
        let rows = cx.system().addr::<Store>().call(&cx, Scan { table: table::TASKS, prefix: String::new() }).await?;
        let mut born = Vec::new();
        for (id, bytes) in rows {
            let row: Row = decode(&bytes)?;
            index.containers.borrow_mut().extend(row.containers.into_keys().map(|c| (c, id.clone())));
            index.pods.borrow_mut().insert(id.clone());
            born.push(id);
        }
        // What a crash left before its row was durable.
        born.extend(strays(&args, &index));
        born.iter().for_each(|id| adopt(&args, &cx, &index, id));
        let heard = index.clone();
        cx.spawn("task.events", move |cx| listen(cx, heard));
        let swept = args.clone();
        let known = index.clone();
        cx.spawn("task.sweep", move |cx| sweep(cx, swept, known));
        Ok(Parent { args, index })
    }
    fn routes() -> Routes<Self> {
        let r = Routes::new()
            .on::<ProbeUserns>()
            .on::<StartSandbox>()
            .on::<UpdateSandbox>()
            .on::<StopSandbox>()
            .on::<RemoveSandbox>()
            .on::<Create>()
            .on::<Start>()
            .on::<Kill>()
            .on::<Wait>();
        let r = r
            .on::<OpenSession>()
            .on::<RunExec>()
            .on::<WaitExec>()
            .on::<JoinStreams>()
            .on::<Resize>()
            .on::<CloseInput>()
            .on::<CloseSession>();
        r.on::<Delete>()
            .on::<State>()
            .on::<Update>()
            .on::<Checkpoint>()
            .on::<ExecSync>()
            .on::<ReopenLog>()
            .on::<Stats>()
            .on::<Adopted>()
            .on::<WaitSandbox>()
    }
}

/// Bundles of pods without a row.
fn strays(args: &Args, index: &Index) -> Vec<String> {
    let entries = std::fs::read_dir(bundle::sandboxes(args)).into_iter().flatten().flatten();
    let names = entries.filter_map(|e| e.file_name().into_string().ok());
    names.filter(|n| !n.starts_with('.') && !index.pods.borrow().contains(n)).collect()
}

/// Gives a pod its child, which adopts the shim in the background; removes a pod whose start was cut short by the end of the daemon.
fn adopt(args: &Arc<Args>, cx: &Cx, index: &Rc<Index>, id: &str) {
    let spawned = cx.system().spawn_child_soon::<Child>(id, ChildArgs { args: args.clone(), id: id.to_owned(), fresh: false });
    index.pods.borrow_mut().insert(id.to_owned());
    let path = bundle::sandboxes(args).join(id);
    // A child that lives already has outlived the parent, and may be starting the pod right now.
    if spawned.is_ok() && path.exists() && !path.join("started").exists() {
        let (index, id) = (index.clone(), id.to_owned());
        cx.spawn("task.undo", move |cx| async move {
            if let Err(e) = remove(&cx, &index, &id).await {
                tracing::warn!(sandbox = id, error = %e, "a pod whose start was interrupted is not removed");
            }
        });
    }
}

async fn remove(cx: &Cx, index: &Index, id: &str) -> Result<()> {
    let removed = child(cx, id).call(cx, For(RemoveSandbox { id: id.to_owned() })).await;
    if removed.is_err() && index.pods.borrow().contains(id) {
        return removed;
    }
    // First, so that another removal in flight, which fails when the child stops, sees that there is nothing left to remove.
    index.forget_pod(id);
    cx.system().stop_child::<TaskShim>(id).await;
    Ok(())
}

/// Removes what half-finished removals left: hidden bundles, and containers' bundles of pods that are no more.
async fn sweep(cx: Cx, args: Arc<Args>, index: Rc<Index>) {
    let (pods, inside) = (index.pods.borrow().clone(), args.clone());
    let look = move || {
        let mut orphans = Vec::new();
        for dir in [bundle::sandboxes(&inside), bundle::tasks(&inside)] {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                let hidden = entry.file_name().as_encoded_bytes().first() == Some(&b'.');
                if hidden {
                    let _ = std::fs::remove_dir_all(&path);
                } else if std::fs::read_to_string(path.join("sandbox")).is_ok_and(|pod| !pods.contains(&pod)) {
                    orphans.push(path);
                }
            }
        }
        Ok(orphans)
    };
    let swept = async {
        for path in cx.blocking("task.sweep", SWEEP, look).await? {
            give_back(&args, &path).await;
            let inside = args.clone();
            cx.blocking("bundle.remove", SWEEP, move || bundle::remove(&inside, &path)).await?;
        }
        Ok::<(), Fault>(())
    };
    if let Err(e) = swept.await {
        tracing::warn!(error = %e, "sweep of old bundles");
    }
}

/// Has the binary give back what the container of an orphaned bundle may still have.
async fn give_back(args: &Args, path: &std::path::Path) {
    let (Some(binary), Some(id)) = (bundle::read_binary(path), path.file_name().and_then(|n| n.to_str())) else { return };
    if let Err(e) = launch::delete(args, id, &binary, path).await {
        tracing::warn!(container = id, error = %e, "clean-up of an orphaned container failed");
    }
}

/// Hands the shims' events to the children.
async fn listen(cx: Cx, index: Rc<Index>) {
    let mut pause = Duration::from_millis(50);
    loop {
        let topics = vec!["/tasks/exit".to_owned(), "/tasks/oom".to_owned()];
        match cx.system().addr::<Events>().call(&cx, Subscribe { topics }).await {
            Ok(mut reader) => {
                pause = Duration::from_millis(50);
                // A gap costs nothing: `Wait` is the other witness.
                while let Some(delivery) = reader.next().await {
                    if let Delivery::Event(event) = delivery {
                        tell(&cx, &index, &event);
                    }
                }
            }
            Err(e) => tracing::warn!(error = %e, "cannot read the events of shims; trying again"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

fn tell(cx: &Cx, index: &Index, event: &Event) {
    if event.namespace != NAMESPACE {
        return;
    }
    if let Some(e) = proto::from_any::<TaskExit>(&event.payload) {
        // The end of an exec has another id.
        let Some(pod) = index.owner(&e.container_id).filter(|_| e.id == e.container_id) else { return };
        let exit = Exit { code: e.exit_status, at_ns: container::nanos(e.exited_at), oom: false, witness: "event".into() };
        pass(cx, pod, Exited { id: e.container_id, exit });
    } else if let Some(e) = proto::from_any::<TaskOom>(&event.payload)
        && let Some(pod) = index.owner(&e.container_id)
    {
        pass(cx, pod, Oom { id: e.container_id });
    }
}

fn pass<M: Message<To = TaskShim, Reply = ()>>(cx: &Cx, pod: String, m: M) {
    cx.spawn("task.event", move |cx| async move {
        if let Err(e) = child(&cx, &pod).call(&cx.with_timeout(Duration::from_secs(10)), m).await {
            tracing::debug!(sandbox = pod, error = %e, "an event has no taker");
        }
    });
}

impl Handle<ProbeUserns> for Parent {
    fn handle(&mut self, m: ProbeUserns, _: Cx) -> Reply<()> {
        let args = self.args.clone();
        Reply::op(async move { crate::probe::userns(&args, &m).await })
    }
}

impl Handle<StartSandbox> for Parent {
    fn handle(&mut self, m: StartSandbox, cx: Cx) -> Reply<SandboxHandle> {
        let (args, index) = (self.args.clone(), self.index.clone());
        Reply::op(async move {
            if m.id.is_empty() || m.id.contains('/') || m.id.starts_with('.') {
                return Err(Fault::invalid_argument(format!("sandbox id {:?}", m.id)));
            }
            let id = m.id.clone();
            let spawned = cx.system().spawn_child_soon::<Child>(&id, ChildArgs { args, id: id.clone(), fresh: true });
            let addr =
                spawned.map_err(|f| if f.is_already_exists() { Fault::already_exists(format!("sandbox {id} has a shim")) } else { f })?;
            index.pods.borrow_mut().insert(id.clone());
            let started = addr.call(&cx, For(m)).await;
            if let Err(fault) = &started {
                // The child undoes its own failure; this is for a child that died of it, and for a deadline that passed meanwhile.
                let undone = remove(&cx.without_deadline(), &index, &id).await;
                undone
                    .err()
                    .into_iter()
                    .for_each(|e| tracing::warn!(sandbox = id, error = %e, start = %fault, "undo of a failed start is incomplete"));
            }
            started
        })
    }
}

impl Handle<StopSandbox> for Parent {
    fn handle(&mut self, m: StopSandbox, cx: Cx) -> Reply<()> {
        if !self.index.pods.borrow().contains(&m.id) {
            return Reply::ok(());
        }
        Reply::op(async move { child(&cx, &m.id).call(&cx, For(m)).await })
    }
}

/// Messages about a pod that must exist.
macro_rules! pass_on_to_pod { ($($message:ty)*) => { $(
    impl Handle<$message> for Parent {
        fn handle(&mut self, m: $message, cx: Cx) -> Reply<<$message as Message>::Reply> {
            if !self.index.pods.borrow().contains(&m.id) {
                return Reply::err(crate::sandbox::no_pod(&m.id));
            }
            Reply::op(async move { child(&cx, &m.id).call(&cx, For(m)).await })
        }
    }
)* } }
pass_on_to_pod! { WaitSandbox UpdateSandbox }

impl Handle<RemoveSandbox> for Parent {
    fn handle(&mut self, m: RemoveSandbox, cx: Cx) -> Reply<()> {
        let index = self.index.clone();
        if !index.pods.borrow().contains(&m.id) {
            return Reply::ok(());
        }
        Reply::op(async move { remove(&cx, &index, &m.id).await })
    }
}

impl Handle<Create> for Parent {
    fn handle(&mut self, m: Create, cx: Cx) -> Reply<u32> {
        let index = self.index.clone();
        let (id, pod) = (m.id.clone(), m.sandbox_id.clone());
        if id.is_empty() || id.contains('/') || id.starts_with('.') {
            return Reply::err(Fault::invalid_argument(format!("container id {id:?}")));
        }
        if !index.pods.borrow().contains(&pod) {
            return Reply::err(crate::sandbox::no_pod(&pod));
        }
        if index.owner(&id).is_some() {
            return Reply::err(Fault::already_exists(format!("container {id} has a task")));
        }
        // Before the task exists: its exit may come at once.
        index.containers.borrow_mut().insert(id.clone(), pod.clone());
        Reply::op(async move {
            let created = child(&cx, &pod).call(&cx, For(m)).await;
            match &created {
                // Unavailable: the child died of it. Its next generation undoes the rest, and `Delete` stays possible.
                Err(f) if f.class != Class::Unavailable && f.class != Class::DeadlineExceeded => {
                    drop(index.containers.borrow_mut().remove(&id))
                }
                _ => {}
            }
            created
        })
    }
}

impl Handle<Delete> for Parent {
    fn handle(&mut self, m: Delete, cx: Cx) -> Reply<Option<Exit>> {
        let index = self.index.clone();
        let Some(pod) = index.owner(&m.id) else { return Reply::ok(None) };
        Reply::op(async move {
            let deleted = child(&cx, &pod).call(&cx, For(m.clone())).await?;
            index.containers.borrow_mut().remove(&m.id);
            Ok(deleted)
        })
    }
}

impl Handle<State> for Parent {
    fn handle(&mut self, m: State, cx: Cx) -> Reply<Option<messages::task::TaskState>> {
        let Some(pod) = self.index.owner(&m.id) else { return Reply::ok(None) };
        Reply::op(async move { child(&cx, &pod).call(&cx, For(m)).await })
    }
}

/// Messages about a container that must exist.
macro_rules! pass_on { ($($message:ty)*) => { $(
    impl Handle<$message> for Parent {
        fn handle(&mut self, m: $message, cx: Cx) -> Reply<<$message as Message>::Reply> {
            match self.index.owner(&m.id) {
                Some(pod) => Reply::op(async move { child(&cx, &pod).call(&cx, For(m)).await }),
                None => Reply::err(Fault::not_found(format!("container {} has no task", m.id))),
            }
        }
    }
)* } }
pass_on! { Start Kill Wait Update Checkpoint ExecSync OpenSession RunExec WaitExec JoinStreams Resize CloseInput CloseSession ReopenLog Stats }

impl Handle<Adopted> for Parent {
    fn handle(&mut self, m: Adopted, cx: Cx) -> Reply<Vec<String>> {
        let pods = self.index.pods.borrow().clone();
        Reply::op(async move {
            let cx = cx.with_timeout(Duration::from_secs(5));
            let all = join_all(pods.iter().map(|id| async { child(&cx, id).call(&cx, For(m.clone())).await.unwrap_or_default() })).await;
            Ok(all.into_iter().flatten().collect())
        })
    }
}

//! A bed for the task actor: in-memory stand-ins of `store` and `events`, and shims that do as they are told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, dead_code)]

pub mod fake;

use kernel::{Actor, Cx, Handle, Operation, Reply, Result, Routes, System, testing};
use messages::events::{Delivery, Event, Events, Publish, Reader, Subscribe};
use messages::store::{Commit, Count, Get, Op, Scan, Store};
use messages::task::{Create, PodNamespaces, Runtime, SandboxHandle, StartSandbox, Stdio, Tasks};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use troupe_task::{Args, Parent, Timeouts};

type Rows = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

pub struct Memory(Rows);
impl Actor for Memory {
    type Proto = Store;
    type Args = Rows;
    async fn start(rows: Rows, _: Cx) -> Result<Self> {
        Ok(Memory(rows))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Get>().on::<Scan>().on::<Commit>().on::<Count>()
    }
}
impl Handle<Get> for Memory {
    fn handle(&mut self, m: Get, _: Cx) -> Reply<Option<Vec<u8>>> {
        Reply::ok(self.0.lock().get(&m.key).cloned())
    }
}
impl Handle<Scan> for Memory {
    fn handle(&mut self, _: Scan, _: Cx) -> Reply<Vec<(String, Vec<u8>)>> {
        Reply::ok(self.0.lock().iter().map(|(k, v)| (k.clone(), v.clone())).collect())
    }
}
impl Handle<Count> for Memory {
    fn handle(&mut self, _: Count, _: Cx) -> Reply<Vec<(&'static str, u64)>> {
        Reply::ok(vec![])
    }
}
impl Handle<Commit> for Memory {
    fn handle(&mut self, m: Commit, _: Cx) -> Reply<()> {
        for op in m.ops {
            match op {
                Op::Put { key, value, .. } | Op::Insert { key, value, .. } => drop(self.0.lock().insert(key, value)),
                Op::Delete { key, .. } => drop(self.0.lock().remove(&key)),
            }
        }
        Reply::ok(())
    }
}

#[derive(Clone, Default)]
pub struct Bus {
    pub seen: Arc<Mutex<Vec<Publish>>>,
    readers: Arc<Mutex<Vec<tokio::sync::mpsc::UnboundedSender<Delivery>>>>,
}
struct BusReader(tokio::sync::mpsc::UnboundedReceiver<Delivery>);
impl Reader for BusReader {
    fn next(&mut self) -> futures::future::BoxFuture<'_, Option<Delivery>> {
        Box::pin(self.0.recv())
    }
}
impl Actor for Bus {
    type Proto = Events;
    type Args = Bus;
    async fn start(bus: Bus, _: Cx) -> Result<Self> {
        Ok(bus)
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Publish>().on::<Subscribe>()
    }
}
impl Handle<Publish> for Bus {
    fn handle(&mut self, m: Publish, _: Cx) -> Reply<u64> {
        let mut seen = self.seen.lock();
        seen.push(m.clone());
        let event = Event {
            seq: seen.len() as u64,
            at: std::time::SystemTime::now(),
            namespace: m.namespace,
            topic: m.topic,
            payload: m.payload,
            traceparent: String::new(),
        };
        let event = Arc::new(event);
        self.readers.lock().retain(|r| r.send(Delivery::Event(event.clone())).is_ok());
        Reply::ok(event.seq)
    }
}
impl Handle<Subscribe> for Bus {
    fn handle(&mut self, _: Subscribe, _: Cx) -> Reply<Box<dyn Reader>> {
        let (tx, rx) = tokio::sync::mpsc::unbounded_channel();
        self.readers.lock().push(tx);
        Reply::ok(Box::new(BusReader(rx)))
    }
}

/// One daemon: may be ended and started again over the same rows and directories.
pub struct Bed {
    pub system: System,
    pub rows: Rows,
    pub bus: Bus,
    pub dir: tempfile::TempDir,
    pub args: Args,
}

pub fn timeouts() -> Timeouts {
    let ms = Duration::from_millis;
    let mut t = Timeouts::default();
    (t.call, t.probe, t.load, t.state, t.exit_grace, t.shutdown) = (ms(400), ms(200), ms(400), ms(300), ms(300), ms(1000));
    t
}

impl Bed {
    pub async fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let path = |p: &str| dir.path().join(p);
        let args = Args {
            root: path("root"),
            state: path("state"),
            exe: path("bin/troupe"),
            grpc_address: path("grpc.sock").display().to_string(),
            ttrpc_address: path("ttrpc.sock").display().to_string(),
            socket_dir: None,
            env: vec![],
            debug: false,
            timeouts: timeouts(),
            drain: Default::default(),
            logs: Default::default(),
        };
        Bed::boot(dir, args, Rows::default()).await
    }
    async fn boot(dir: tempfile::TempDir, args: Args, rows: Rows) -> Bed {
        let mut child = testing::spec("task.shim", 1);
        child.child_of = Some("task");
        let system = testing::system(&[testing::spec("store", 0), testing::spec("events", 0), child, testing::spec("task", 2)]).unwrap();
        let bus = Bus::default();
        system.start::<Memory>(rows.clone()).await.unwrap();
        system.start::<Bus>(bus.clone()).await.unwrap();
        system.start::<Parent>(args.clone()).await.unwrap();
        Bed { system, rows, bus, dir, args }
    }
    /// The daemon ends and another one starts; what lies between is lost to it.
    pub async fn restart(self, between: impl AsyncFnOnce()) -> Bed {
        self.system.shutdown(Duration::from_secs(5)).await;
        between().await;
        Bed::boot(self.dir, self.args, self.rows).await
    }
    pub fn path(&self, p: &str) -> PathBuf {
        self.dir.path().join(p)
    }
    pub fn op(&self) -> Operation {
        self.system.root("test", None, Some(Duration::from_secs(20)))
    }
    pub async fn call<M: kernel::Message<To = Tasks>>(&self, m: M) -> Result<M::Reply> {
        let op = self.op();
        self.system.addr::<Tasks>().call(&op.cx, m).await
    }
    pub fn runtime(&self) -> Runtime {
        Runtime { name: self.path("containerd-shim-fake-v2").display().to_string(), ..Default::default() }
    }
    pub async fn start_sandbox(&self, id: &str) -> Result<SandboxHandle> {
        let namespaces = PodNamespaces { ipc: "pod".into(), uts: "pod".into(), pid: "container".into(), ..Default::default() };
        self.call(StartSandbox { id: id.into(), runtime: self.runtime(), namespaces }).await
    }
    pub async fn create(&self, id: &str, sandbox: &str) -> Result<u32> {
        let spec = br#"{"ociVersion":"1.2.0"}"#.to_vec();
        self.call(Create { id: id.into(), sandbox_id: sandbox.into(), spec, rootfs: vec![], stdio: Stdio::default() }).await
    }
    /// Exits on the bus: id and code.
    pub fn exits(&self) -> Vec<(String, u32)> {
        let seen = self.bus.seen.lock();
        let exits = seen.iter().filter_map(|p| proto::from_any::<proto::events::TaskExit>(&p.payload));
        exits.map(|e| (e.container_id, e.exit_status)).collect()
    }
    /// Step of the supervisor of a pod's shim, as `troupe ops` shows it.
    pub fn shim_step(&self, id: &str) -> String {
        let ops = self.system.ops();
        let mine = ops.into_iter().find(|o| o.name == "shim.watch" && o.actor == format!("task.shim/{id}"));
        mine.map(|o| o.step).unwrap_or_default()
    }
    /// Files and rows that are left.
    pub fn census(&self) -> Vec<String> {
        let mut left: Vec<String> = self.rows.lock().keys().map(|k| format!("row {k}")).collect();
        let dirs = [
            "state/io.containerd.runtime.v2.task/k8s.io",
            "state/io.containerd.sandbox.controller.v1.shim/k8s.io",
            "state/fifo",
            "root/io.containerd.runtime.v2.task/k8s.io",
        ];
        for d in dirs {
            left.extend(names(&self.path(d)).into_iter().map(|n| format!("{d}/{n}")));
        }
        left
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

pub async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !check() {
        assert!(Instant::now() < end, "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

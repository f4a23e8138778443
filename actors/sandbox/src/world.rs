//! What the operations of one pod share: its rows, its locks, and the ways to change them. Rows in the store come first; the tables here mirror them.
use crate::record::{ContainerRow, PodRow};
use crate::slots::{Rows, Slot};
use crate::{Args, Handler};
use kernel::{Cx, Fault, Result};
use messages::store::{self, Op, table};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::{Mutex, OwnedMutexGuard, RwLock, watch};

#[derive(Default)]
pub(crate) struct Tables {
    pub pod: Option<PodRow>,
    pub containers: BTreeMap<String, ContainerRow>,
    /// Containers that had their stop signal from this generation: a second stop waits, it does not signal again.
    pub signalled: BTreeSet<String>,
    locks: BTreeMap<String, Arc<Mutex<()>>>,
}

/// State that the operations of one generation of a pod's actor share.
pub(crate) struct World {
    pub args: Args,
    pub slot: Arc<Slot>,
    pub boot: String,
    pub tables: RefCell<Tables>,
    /// Held shared by whoever adds to the pod (creates or starts a container), alone by whoever makes, stops or removes it.
    pub whole: RwLock<()>,
    /// Calls that wait to end the pod: what adds to it should not keep them waiting.
    pub ending: watch::Sender<u32>,
    /// Changes whenever a row does.
    pub changed: watch::Sender<()>,
}

/// As long as it lives, the pod is being ended.
pub(crate) struct Ending<'a>(&'a watch::Sender<u32>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

impl World {
    pub fn new(args: Args, slot: Arc<Slot>, boot: String, rows: Rows) -> World {
        let (pod, containers) = rows;
        slot.empty.store(pod.is_none() && containers.is_empty(), Ordering::Release);
        let tables = Tables { pod, containers: containers.into_iter().map(|c| (c.id.clone(), c)).collect(), ..Default::default() };
        World {
            args,
            slot,
            boot,
            tables: RefCell::new(tables),
            whole: RwLock::new(()),
            ending: watch::channel(0).0,
            changed: watch::channel(()).0,
        }
    }
    /// Id of the pod.
    pub fn id(&self) -> &str {
        &self.slot.id
    }
    /// Tells that the pod is to end.
    pub fn ending(&self) -> Ending<'_> {
        self.ending.send_modify(|n| *n += 1);
        Ending(&self.ending)
    }
    /// One operation at a time for each key.
    pub async fn lock(&self, key: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut tables = self.tables.borrow_mut();
            if tables.locks.len() > 64 {
                tables.locks.retain(|_, l| Arc::strong_count(l) > 1);
            }
            tables.locks.entry(key.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }
    pub async fn commit(&self, cx: &Cx, ops: Vec<Op>) -> Result<()> {
        self.args.store.call(cx, store::Commit { ops }).await
    }
    pub fn pod(&self) -> Option<PodRow> {
        self.tables.borrow().pod.clone()
    }
    pub fn known_pod(&self) -> Result<PodRow> {
        self.pod().ok_or_else(|| Fault::not_found(format!("sandbox {} not found", self.id())))
    }
    pub fn container(&self, id: &str) -> Option<ContainerRow> {
        self.tables.borrow().containers.get(id).cloned()
    }
    pub fn container_ids(&self) -> Vec<String> {
        self.tables.borrow().containers.keys().cloned().collect()
    }
    pub async fn save_pod(&self, cx: &Cx, row: &PodRow) -> Result<()> {
        self.commit(cx, vec![Op::put(table::SANDBOXES, &row.id, row)?]).await?;
        self.set_pod(Some(row.clone()));
        Ok(())
    }
    pub async fn save_container(&self, cx: &Cx, row: &ContainerRow) -> Result<()> {
        self.commit(cx, vec![Op::put(table::CONTAINERS, &row.id, row)?]).await?;
        self.set_container(row.clone());
        Ok(())
    }
    fn note_empty(&self) {
        let tables = self.tables.borrow();
        self.slot.empty.store(tables.pod.is_none() && tables.containers.is_empty(), Ordering::Release);
    }
    /// Changes the table and the picture, not the store.
    pub fn set_pod(&self, row: Option<PodRow>) {
        self.tables.borrow_mut().pod = row;
        self.note_empty();
        self.publish_pod();
        self.changed.send_replace(());
    }
    /// Changes the table and the picture, not the store.
    pub fn set_container(&self, row: ContainerRow) {
        let id = row.id.clone();
        self.tables.borrow_mut().containers.insert(id.clone(), row);
        self.publish_container(&id);
        self.changed.send_replace(());
    }
    pub fn forget_container(&self, id: &str) {
        let mut tables = self.tables.borrow_mut();
        tables.containers.remove(id);
        tables.signalled.remove(id);
        drop(tables);
        self.note_empty();
        self.publish_container(id);
        self.changed.send_replace(());
    }
    /// The handler of the pod, as the configuration has it now. A pod outlives the removal of its handler.
    pub fn handler(&self, name: &str) -> Handler {
        self.args.settings.handlers.get(name).cloned().unwrap_or_default()
    }
    /// Where the root file systems of a handler's containers live.
    pub fn snapshotter(&self, handler: &str) -> String {
        let settings = &self.args.settings;
        settings.snapshotters.get(handler).unwrap_or(&settings.snapshotter).clone()
    }
    pub fn files(&self) -> PathBuf {
        self.args.root.join("sandboxes").join(self.id())
    }
    pub fn volatile(&self) -> PathBuf {
        self.args.state.join("sandboxes").join(self.id())
    }
}

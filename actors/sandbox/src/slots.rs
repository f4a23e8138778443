//! Who has which pod: a slot for each pod, from its first `RunPod` to its removal. Kept outside of all generations, so that the parent and the pods' own
//! actors can die independently: whoever comes next finds the same slots.
use crate::record::{ContainerRow, PodRow};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// The rows of one pod.
pub type Rows = (Option<PodRow>, Vec<ContainerRow>);

/// One pod.
pub struct Slot {
    /// Id of the pod, and of its actor.
    pub id: String,
    /// Name that it reserves.
    pub name: String,
    /// Rows for the first generation of its actor, as read at the start of the daemon; later ones read the store.
    pub seed: Mutex<Option<Rows>>,
    /// There is nothing of the pod any more, not even a row.
    pub empty: AtomicBool,
    calls: AtomicU32,
    idle: Arc<Notify>,
}

/// A call under way; the slot stays as long as there is one.
pub struct Call(pub Arc<Slot>);

impl Slot {
    /// Counts a call.
    pub fn enter(self: &Arc<Slot>) -> Call {
        self.calls.fetch_add(1, Ordering::AcqRel);
        Call(self.clone())
    }
    /// Takes the rows that were read for it.
    pub fn take_seed(&self) -> Option<Rows> {
        self.seed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
    fn unused(&self) -> bool {
        self.calls.load(Ordering::Acquire) == 0 && self.empty.load(Ordering::Acquire)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
        if self.0.unused() {
            self.0.idle.notify_one();
        }
    }
}

#[derive(Default)]
struct Tables {
    by_id: HashMap<String, Arc<Slot>>,
    by_name: HashMap<String, Arc<Slot>>,
}

/// All pods.
#[derive(Default)]
pub struct Slots {
    tables: Mutex<Tables>,
    idle: Arc<Notify>,
}

impl Slots {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// A slot for a pod whose rows are `seed`.
    pub fn add(&self, id: &str, name: &str, seed: Rows) {
        let slot = self.make(id, name, seed);
        let mut tables = self.tables();
        tables.by_name.entry(slot.name.clone()).or_insert_with(|| slot.clone());
        tables.by_id.insert(slot.id.clone(), slot);
    }
    fn make(&self, id: &str, name: &str, seed: Rows) -> Arc<Slot> {
        Arc::new(Slot {
            id: id.to_owned(),
            name: name.to_owned(),
            empty: AtomicBool::new(seed.0.is_none() && seed.1.is_empty()),
            seed: Mutex::new(Some(seed)),
            calls: AtomicU32::new(0),
            idle: self.idle.clone(),
        })
    }
    /// The pod of this id.
    pub fn of_id(&self, id: &str) -> Option<Call> {
        self.tables().by_id.get(id).map(Slot::enter)
    }
    /// The pod of this name, or a new one with an id from `id`.
    pub fn of_name(&self, name: &str, id: impl FnOnce() -> String) -> Call {
        let mut tables = self.tables();
        if let Some(slot) = tables.by_name.get(name) {
            return slot.enter();
        }
        let slot = self.make(&id(), name, (None, Vec::new()));
        tables.by_name.insert(name.to_owned(), slot.clone());
        tables.by_id.insert(slot.id.clone(), slot.clone());
        slot.enter()
    }
    /// All of them.
    pub fn all(&self) -> Vec<Arc<Slot>> {
        self.tables().by_id.values().cloned().collect()
    }
    /// Waits until a slot may have become unused.
    pub async fn idle(&self) {
        self.idle.notified().await;
    }
    /// Takes out the slots that nobody uses and that hold nothing; answers their ids.
    pub fn take_unused(&self) -> Vec<String> {
        let mut tables = self.tables();
        let unused: Vec<Arc<Slot>> = tables.by_id.values().filter(|s| s.unused()).cloned().collect();
        for slot in &unused {
            tables.by_id.remove(&slot.id);
            if tables.by_name.get(&slot.name).is_some_and(|s| s.id == slot.id) {
                tables.by_name.remove(&slot.name);
            }
        }
        unused.iter().map(|s| s.id.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_slot_stays_while_it_is_used_or_holds_something() {
        let slots = Slots::default();
        let call = slots.of_name("pod/a", || "1".into());
        assert_eq!(slots.of_name("pod/a", || "2".into()).0.id, "1", "a retry finds the same pod");
        assert!(slots.take_unused().is_empty(), "in use");
        call.0.empty.store(false, Ordering::Release);
        drop(call);
        assert!(slots.take_unused().is_empty(), "holds a row");
        slots.of_id("1").unwrap().0.empty.store(true, Ordering::Release);
        assert_eq!(slots.take_unused(), ["1"]);
        assert!(slots.of_id("1").is_none());
        assert_eq!(slots.of_name("pod/a", || "3".into()).0.id, "3", "a new pod of the same name");
    }
}

//! Containers that are being made.
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::{Notify, watch};

/// Creates under way by id, and how each is told to give up.
#[derive(Default)]
pub struct Births(watch::Sender<BTreeMap<String, Arc<Notify>>>);

/// One create; it is over when this is dropped.
pub struct Birth<'a> {
    all: &'a Births,
    id: String,
    unwanted: Arc<Notify>,
}

impl Births {
    /// Begins one; `None`: another one of this id is under way.
    pub fn begin(&self, id: &str) -> Option<Birth<'_>> {
        let unwanted = Arc::new(Notify::new());
        let first = self.0.send_if_modified(|all| {
            let first = !all.contains_key(id);
            if first {
                all.insert(id.to_owned(), unwanted.clone());
            }
            first
        });
        first.then(|| Birth { all: self, id: id.to_owned(), unwanted })
    }
    /// Has one under way given up, and waits until none of this id is.
    pub async fn over(&self, id: &str) {
        if let Some(unwanted) = self.0.borrow().get(id) {
            unwanted.notify_one();
        }
        // The sender lives as long as this.
        let _ = self.0.subscribe().wait_for(|all| !all.contains_key(id)).await;
    }
}

impl Birth<'_> {
    /// Somebody wants the container deleted.
    pub async fn unwanted(&self) -> &'static str {
        self.unwanted.notified().await;
        "it is being deleted"
    }
}

impl Drop for Birth<'_> {
    fn drop(&mut self) {
        self.all.0.send_if_modified(|all| all.remove(&self.id).is_some());
    }
}

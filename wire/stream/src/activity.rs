//! When a connection last had traffic, and the tasks that end with it.
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// A task that ends with its owner.
pub(crate) struct Owned(JoinHandle<()>);

impl Owned {
    pub(crate) fn spawn(work: impl Future<Output = ()> + Send + 'static) -> Owned {
        Owned(tokio::spawn(work))
    }
    /// Waits for its end, then ends it.
    pub(crate) async fn within(mut self, limit: Duration) {
        let _ = tokio::time::timeout(limit, &mut self.0).await;
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Shared by all that read and write a connection.
#[derive(Clone)]
pub(crate) struct Activity(Arc<Mutex<Instant>>);

impl Activity {
    pub(crate) fn new() -> Activity {
        Activity(Arc::new(Mutex::new(Instant::now())))
    }
    pub(crate) fn touch(&self) {
        *self.0.lock() = Instant::now();
    }
    /// Done when there was none for `limit`.
    pub(crate) async fn idle(&self, limit: Duration) {
        loop {
            let quiet = self.0.lock().elapsed();
            if quiet >= limit {
                return;
            }
            tokio::time::sleep(limit - quiet).await;
        }
    }
}

//! When a connection last had traffic.
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

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

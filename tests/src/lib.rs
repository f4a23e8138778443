//! What end-to-end tests, the demonstration and the bench share: a private daemon, a CRI client, a small registry and a census of the machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test harness fails by panicking")]
pub mod census;
pub mod cri;
pub mod daemon;
pub mod exposition;
pub mod fuse;
pub mod registry;
pub mod socket;

use std::time::{Duration, Instant};

/// Waits until it is so, up to half a minute: the machine may be busy.
pub async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < end, "{what}: not within 30 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

//! What end-to-end tests, the demonstration and the bench share: a private daemon, a CRI client, a small registry and a census of the machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test harness fails by panicking")]
pub mod census;
pub mod cri;
pub mod daemon;
pub mod exposition;
pub mod fuse;
pub mod registry;
pub mod socket;

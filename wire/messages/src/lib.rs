//! What actors say to each other: a module of typed requests for each actor.
//!
//! An actor crate knows the other actors by these messages alone. Payloads that the outside defines (CRI configurations, OCI documents) travel
//! in the outside's own types from `proto`, because copying hundreds of fields into twins would only add places to forget one.
//! The error type of every reply is [`Fault`], whose classes are containerd's (`contracts/core.md` §1.8).
pub use kernel::{Class, Fault, Result, ResultExt};

pub mod content;
pub mod events;
pub mod feed;
pub mod gc;
pub mod image;
pub mod network;
pub mod sandbox;
pub mod snapshot;
pub mod stats;
pub mod store;
pub mod task;
pub mod userns;

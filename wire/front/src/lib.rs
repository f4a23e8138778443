//! The servers: CRI over gRPC, the events service over ttrpc, and HTTP for metrics, health and the `troupe` command.
//!
//! They only translate. A request becomes an operation of the kernel ([`call`]) and a message to an actor; the answer, or the [`kernel::Fault`]
//! ([`status`]), goes back. Nothing is decided or stored here. Lists and statuses are read from the views that the actors publish: they wait for
//! nobody.
//!
//! | socket | protocol | function |
//! |---|---|---|
//! | `<address>` | CRI, gRPC | [`cri::serve`] |
//! | `<address>.ttrpc` | events from shims, ttrpc | [`events::serve`] |
//! | `troupe-control.sock` | JSON over HTTP/1, for the CLI | [`control::serve`] |
//! | metrics address | `/metrics`, `/healthz` | [`metrics::serve`] |
//!
//! Every server takes a listener that is bound already ([`socket::bind`]), so that a daemon that cannot have its address says so before it starts
//! anything, and a future that asks it to stop: requests in flight are then
//! finished, within a grace of a few seconds.

pub mod call;
pub mod control;
pub mod cri;
pub mod events;
pub mod meter;
pub mod metrics;
pub mod socket;
pub mod status;
mod stop;

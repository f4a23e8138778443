//! `gc`: mark and sweep of content and snapshots by images, containers, leases and references.
use kernel::Protocol;

/// The collector's protocol.
pub struct Gc;
impl Protocol for Gc {
    const ACTOR: &'static str = "gc";
}

/// What a collection did.
#[derive(Clone, Debug, Default)]
pub struct Collected {
    /// Blobs removed.
    pub blobs: u64,
    /// Snapshots removed.
    pub snapshots: u64,
    /// Bytes of blobs given back.
    pub bytes: u64,
}

/// Runs a collection now (joins one in flight). Collections also run by themselves shortly after removals.
#[derive(Clone, Debug)]
pub struct Collect;
/// Schedules a collection soon; answers at once.
#[derive(Clone, Debug)]
pub struct Hint;

kernel::messages! { Gc = "gc" => {
    Collect -> Collected as idempotent,
    Hint -> () as idempotent,
} }

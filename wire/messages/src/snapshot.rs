//! `snapshot`: snapshotters (overlayfs, native), mounts and layer application (`contracts/core.md` §3).
use kernel::Protocol;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Read;

/// The snapshot actor's protocol.
pub struct Snapshots;
impl Protocol for Snapshots {
    const ACTOR: &'static str = "snapshot";
}

/// A mount as containerd's API has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// `overlay`, `bind`, `erofs`, …
    pub fs_type: String,
    /// Source.
    pub source: String,
    /// Target below the root, usually empty.
    pub target: String,
    /// Options.
    pub options: Vec<String>,
}

/// Kind of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Being written.
    Active,
    /// Read-only view.
    View,
    /// Immutable, may be a parent.
    Committed,
}

/// A snapshot's record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Snapshotter.
    pub snapshotter: String,
    /// Key, unique within the snapshotter.
    pub key: String,
    /// Parent's key, empty at the bottom.
    pub parent: String,
    /// Kind.
    pub kind: Kind,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Creation, Unix nanoseconds.
    pub created_ns: u64,
    /// Directory number below the snapshotter's root.
    pub id: u64,
}

/// Disk use of one snapshot.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// Result of applying a layer.
#[derive(Clone, Debug)]
pub struct Applied {
    /// Digest of the uncompressed tar (`diff_id`).
    pub diff_id: String,
    /// Uncompressed bytes.
    pub size: u64,
}

/// Makes an active snapshot (or a view); answers its mounts. `AlreadyExists` if the key is taken, `NotFound` if the parent is missing.
#[derive(Clone, Debug)]
pub struct Prepare {
    /// Snapshotter; empty = default.
    pub snapshotter: String,
    /// Key.
    pub key: String,
    /// Parent's key or empty.
    pub parent: String,
    /// Read-only view.
    pub view: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}
/// Mounts of an active snapshot or view.
#[derive(Clone, Debug)]
pub struct Mounts {
    /// Snapshotter.
    pub snapshotter: String,
    /// Key.
    pub key: String,
    /// What is written need not outlive the machine: unmounting then does not wait until the whole disk is written out.
    pub ephemeral: bool,
}
/// Unpacks a compressed layer stream into the active snapshot `key`, without its parent being needed yet, so that layers unpack side by side.
/// Never escapes the root; answers when all is written (not yet synced).
pub struct Apply {
    /// Snapshotter.
    pub snapshotter: String,
    /// Key.
    pub key: String,
    /// OCI or Docker layer media type; decides the decompression (falls back to magic bytes).
    pub media_type: String,
    /// The bytes as they come from the registry or the content store. Blocking reads.
    pub source: Box<dyn Read + Send>,
}
/// Syncs and commits the active snapshot `key` as `name` upon `parent` (which must be committed by now).
#[derive(Clone, Debug)]
pub struct Commit {
    /// Snapshotter.
    pub snapshotter: String,
    /// Active key.
    pub key: String,
    /// Name of the committed snapshot, usually the chain id.
    pub name: String,
    /// Parent's name; `None` keeps the one given at `Prepare`.
    pub parent: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}
/// Removes a snapshot. `NotFound`; `FailedPrecondition` while it has children.
#[derive(Clone, Debug)]
pub struct Remove {
    /// Snapshotter.
    pub snapshotter: String,
    /// Key.
    pub key: String,
}
/// One record.
#[derive(Clone, Debug)]
pub struct Stat {
    /// Snapshotter.
    pub snapshotter: String,
    /// Key.
    pub key: String,
}
/// All records of a snapshotter (empty = all snapshotters).
#[derive(Clone, Debug)]
pub struct List {
    /// Snapshotter.
    pub snapshotter: String,
}
/// Disk use of one snapshot, without its parents.
#[derive(Clone, Debug)]
pub struct GetUsage {
    /// Snapshotter.
    pub snapshotter: String,
    /// Key.
    pub key: String,
}
/// Removes directories that no record owns (left by a crash). Answers how many.
#[derive(Clone, Debug)]
pub struct Cleanup;

kernel::messages! { Snapshots = "snapshot" => {
    Prepare -> Vec<Mount>,
    Mounts -> Vec<Mount> as idempotent,
    Apply -> Applied,
    Commit -> (),
    Remove -> (),
    Stat -> Option<SnapshotInfo> as idempotent,
    List -> Vec<SnapshotInfo> as idempotent,
    GetUsage -> Usage as idempotent,
    Cleanup -> u64 as idempotent,
} }

//! `content`: blobs by digest and their ingests, in containerd's layout on disk (`contracts/core.md` §2.1).
use kernel::{Protocol, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

/// The content actor's protocol.
pub struct Content;
impl Protocol for Content {
    const ACTOR: &'static str = "content";
}

/// A committed blob.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlobInfo {
    /// `sha256:…`.
    pub digest: String,
    /// Bytes.
    pub size: u64,
    /// Labels, containerd's GC references among them.
    pub labels: BTreeMap<String, String>,
    /// Creation time.
    pub created: SystemTime,
    /// File that holds the bytes; read it, never write it.
    pub path: PathBuf,
}

/// Writes one ingest. Blocking calls: use it inside `cx.blocking`. Dropping it keeps what is written, so that a later `Begin` of the same `ref` resumes.
pub trait BlobWriter: Send {
    /// Bytes already there (a resumed ingest starts above 0).
    fn offset(&self) -> u64;
    /// Appends; hashes on the way. On an error (`ResourceExhausted` when the disk is full) nothing of `bytes` counts; what was written before stays.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// Starts again from nothing (the server did not honour a range).
    fn reset(&mut self) -> Result<()>;
    /// Verifies digest and size, syncs file and directory, makes the blob visible with `labels`. `DataLoss` on mismatch: the ingest is removed.
    fn commit(self: Box<Self>, labels: BTreeMap<String, String>) -> Result<BlobInfo>;
}

/// Looks a blob up.
#[derive(Clone, Debug)]
pub struct Info {
    /// Digest.
    pub digest: String,
}
/// All blobs.
#[derive(Clone, Debug)]
pub struct List;
/// Reads a whole small blob (manifest, config; at most 16 MiB).
#[derive(Clone, Debug)]
pub struct ReadAll {
    /// Digest.
    pub digest: String,
}
/// Opens an ingest. `AlreadyExists` when the blob is there already; a second `Begin` of a `ref` that is being written waits for the first (single flight).
#[derive(Clone, Debug)]
pub struct Begin {
    /// Key of the ingest, such as `layer-sha256:…`.
    pub ref_: String,
    /// Expected digest.
    pub digest: String,
    /// Expected size; 0 = unknown.
    pub size: u64,
}
/// Sets labels (empty value removes one).
#[derive(Clone, Debug)]
pub struct Label {
    /// Digest.
    pub digest: String,
    /// Labels to set.
    pub labels: BTreeMap<String, String>,
}
/// Deletes a blob. `NotFound` if absent.
#[derive(Clone, Debug)]
pub struct Delete {
    /// Digest.
    pub digest: String,
}
/// Something that lasts until it is dropped.
pub trait Held: Send {}
/// Keeps names (digests of blobs, chain ids of snapshots) from the collector until the answer is dropped. A name that is being removed at this moment
/// is waited for: whoever holds first and looks afterwards can rely on what it sees.
#[derive(Clone, Debug)]
pub struct Hold {
    /// Digests or chain ids.
    pub names: Vec<String>,
}
/// Begins a round of collection, before anything is read that says what is in use. Ends the round before it.
#[derive(Clone, Debug)]
pub struct BeginRound;
/// Asks for a name's removal in a round: `None` if anybody holds it, or held it since the round began. While the answer lives nobody gets hold of it.
#[derive(Clone, Debug)]
pub struct Condemn {
    /// Answer of [`BeginRound`].
    pub round: u64,
    /// Digest or chain id.
    pub name: String,
}
/// Removes ingests not touched for `older_than_s` seconds. Those that are being written stay.
#[derive(Clone, Debug)]
pub struct SweepIngests {
    /// Age in seconds.
    pub older_than_s: u64,
}

kernel::messages! { Content = "content" => {
    Info -> Option<BlobInfo> as idempotent,
    List -> Vec<BlobInfo> as idempotent,
    ReadAll -> Vec<u8> as idempotent,
    Begin -> Box<dyn BlobWriter>,
    Label -> BlobInfo as idempotent,
    Delete -> (),
    Hold -> Box<dyn Held> as idempotent,
    BeginRound -> u64 as idempotent,
    Condemn -> Option<Box<dyn Held>> as idempotent,
    SweepIngests -> u64 as idempotent,
} }

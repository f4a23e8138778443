//! One ingest: append and hash, verify, sync, make visible.
//!
//! On disk: `ingest/<sha256 of the ref>/{data,ref,startedat,updatedat,total}`. `data` may stop anywhere; the next writer of the same ref hashes what is
//! there and goes on behind it. What a crash left wrong in it shows at the commit, whose digest covers every byte.
use crate::{Args, hex};
use kernel::{Class, Cx, Fault, Result, ResultExt};
use messages::content::{Begin, BlobInfo, BlobWriter};
use messages::store::{self, Op, table};
use parking_lot::Mutex;
use proto::prost_types::Timestamp;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};
use tokio::sync::OwnedMutexGuard;

type Lock = tokio::sync::Mutex<()>;

/// Single flight: one writer for each `ref`.
#[derive(Clone, Default)]
pub(crate) struct Locks(Arc<Mutex<BTreeMap<PathBuf, Weak<Lock>>>>);

impl Locks {
    fn of(&self, ingest: &Path) -> Arc<Lock> {
        let mut all = self.0.lock();
        all.retain(|_, l| l.strong_count() > 0);
        let present = all.get(ingest).and_then(Weak::upgrade);
        present.unwrap_or_else(|| {
            let fresh = Arc::new(Lock::new(()));
            all.insert(ingest.to_owned(), Arc::downgrade(&fresh));
            fresh
        })
    }
    /// Waits until no one else writes this ingest.
    pub async fn lock(&self, ingest: &Path) -> OwnedMutexGuard<()> {
        self.of(ingest).lock_owned().await
    }
    fn try_lock(&self, ingest: &Path) -> Option<OwnedMutexGuard<()>> {
        self.of(ingest).try_lock_owned().ok()
    }
}

/// After so many bytes the disk begins with them, so that little is left for the sync at the end.
const EARLY: u64 = 8 << 20;

/// Directory of an ingest.
pub(crate) fn directory(args: &Args, ref_: &str) -> PathBuf {
    args.root.join("ingest").join(text(&Sha256::digest(ref_.as_bytes())))
}

pub(crate) fn text(hash: &[u8]) -> String {
    hash.iter().map(|b| format!("{b:02x}")).collect()
}

fn now() -> String {
    Timestamp::from(SystemTime::now()).to_string()
}

/// Opens an ingest, hashing what an earlier writer left. `guard` is its lock; `labels` stores the labels of the blob.
pub(crate) fn open(args: &Args, m: &Begin, guard: OwnedMutexGuard<()>, labels: Labels) -> Result<Writer> {
    let dir = directory(args, &m.ref_);
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let note =
        |name: &str, value: &str| std::fs::write(dir.join(name), value).with_context(|| format!("write {name} of the ingest {}", m.ref_));
    if !dir.join("startedat").exists() {
        note("startedat", &now())?;
    }
    note("ref", &m.ref_)?;
    note("updatedat", &now())?;
    if m.size > 0 {
        note("total", &m.size.to_string())?;
    }
    let path = dir.join("data");
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path);
    let mut file = file.with_context(|| format!("open {}", path.display()))?;
    let (mut hash, mut offset, mut buffer) = (Sha256::new(), 0, vec![0; 256 << 10]);
    loop {
        let n = file.read(&mut buffer).with_context(|| format!("read {}", path.display()))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        offset += n as u64;
    }
    let ingest = Ingest { dir, _guard: guard };
    Ok(Writer {
        blob: args.blob(&m.digest)?,
        ingest,
        file,
        hash,
        offset,
        begun: offset,
        digest: m.digest.clone(),
        size: m.size,
        labels,
        broken: false,
    })
}

/// Removes ingests that nobody writes or touched for `age`.
pub(crate) fn sweep(args: &Args, age: Duration) -> Result<u64> {
    let mut removed = 0;
    for entry in std::fs::read_dir(args.root.join("ingest"))? {
        let path = entry?.path();
        let Some(_guard) = args.writing.try_lock(&path) else { continue };
        let touched = |name: &str| path.join(name).metadata().and_then(|m| m.modified()).ok();
        let last = touched("data").into_iter().chain(touched("updatedat")).max().unwrap_or(SystemTime::UNIX_EPOCH);
        if last.elapsed().unwrap_or_default() >= age {
            std::fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Stores labels from a blocking thread.
pub(crate) struct Labels {
    pub store: kernel::Addr<store::Store>,
    pub cx: Cx,
    pub runtime: tokio::runtime::Handle,
}

impl Labels {
    fn set(&self, digest: &str, labels: &BTreeMap<String, String>) -> Result<()> {
        if labels.is_empty() {
            return Ok(());
        }
        let ops = vec![Op::put(table::CONTENT, digest, labels)?];
        self.runtime.block_on(self.store.call(&self.cx, store::Commit { ops })).with_context(|| format!("labels of {digest}"))
    }
}

/// The directory and its lock. Notes the time when the writer lets it go.
struct Ingest {
    dir: PathBuf,
    _guard: OwnedMutexGuard<()>,
}

impl Drop for Ingest {
    fn drop(&mut self) {
        // After a commit there is nothing left to note it in.
        let _ = std::fs::write(self.dir.join("updatedat"), now());
    }
}

/// The writer.
pub(crate) struct Writer {
    ingest: Ingest,
    blob: PathBuf,
    file: File,
    hash: Sha256,
    offset: u64,
    /// How far the disk was told to begin.
    begun: u64,
    digest: String,
    size: u64,
    labels: Labels,
    /// A failed write could not be taken back: hash and file no longer agree.
    broken: bool,
}

fn sync(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).with_context(|| format!("sync {}", dir.display()))
}

fn explain(fault: Fault) -> Fault {
    if fault.class == Class::ResourceExhausted { fault.context("free some space and try again") } else { fault }
}

impl BlobWriter for Writer {
    fn offset(&self) -> u64 {
        self.offset
    }
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.broken {
            return Err(Fault::failed_precondition(format!("the ingest of {} is broken: open it again", self.digest)));
        }
        if let Err(e) = self.file.write_all(bytes) {
            // Part of it may be there; the position must be that of the hash again.
            let back = self.file.set_len(self.offset).and_then(|()| self.file.seek(SeekFrom::Start(self.offset)));
            self.broken = back.is_err();
            return Err(explain(Fault::from(e)).context(format!("write the ingest of {}", self.digest)));
        }
        self.hash.update(bytes);
        self.offset += bytes.len() as u64;
        if self.offset - self.begun >= EARLY {
            crate::sys::begin_writing(self.file.as_fd(), self.begun, self.offset - self.begun);
            self.begun = self.offset;
        }
        Ok(())
    }
    fn reset(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .with_context(|| format!("empty the ingest of {}", self.digest))?;
        (self.hash, self.offset, self.begun, self.broken) = (Sha256::new(), 0, 0, false);
        Ok(())
    }
    fn commit(self: Box<Self>, labels: BTreeMap<String, String>) -> Result<BlobInfo> {
        let Writer { ingest, blob, file, hash, offset, digest, size, labels: keep, .. } = *self;
        let found = text(&hash.finalize());
        if found != hex(&digest)? || (size > 0 && size != offset) {
            std::fs::remove_dir_all(&ingest.dir).context("remove a bad ingest")?;
            return Err(Fault::data_loss(format!("blob {digest}: got {offset} of {size} bytes with digest sha256:{found}")));
        }
        if let Err(e) = file.set_permissions(Permissions::from_mode(0o444)).and_then(|()| file.sync_all()) {
            let fault = Fault::from(e);
            if fault.class != Class::ResourceExhausted {
                // What the disk refused to take may still be read back from memory: nothing of this file can be trusted.
                std::fs::remove_dir_all(&ingest.dir).context("remove an ingest that the disk refused")?;
            }
            return Err(explain(fault).context(format!("sync {digest}")));
        }
        std::fs::rename(ingest.dir.join("data"), &blob).with_context(|| format!("make {} visible", blob.display()))?;
        if let Some(parent) = blob.parent() {
            sync(parent)?;
        }
        // The blob is there; what follows is tidying up, and a left-over directory is swept later.
        let _ = std::fs::remove_dir_all(&ingest.dir);
        keep.set(&digest, &labels)?;
        Ok(BlobInfo { digest, size: offset, labels, created: SystemTime::now(), path: blob })
    }
}

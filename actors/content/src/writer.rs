//! One ingest: append and hash, verify, sync, make visible.
use crate::{Args, hex};
use kernel::{Fault, Result, ResultExt};
use messages::content::{Begin, BlobInfo, BlobWriter};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};
use tokio::sync::OwnedMutexGuard;

/// Single flight: one writer for each `ref`.
#[derive(Clone, Default)]
pub(crate) struct Locks(Arc<Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>>);

impl Locks {
    pub async fn lock(self, ref_: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut all = self.0.lock();
            all.retain(|_, l| l.strong_count() > 0);
            let present = all.get(ref_).and_then(Weak::upgrade);
            present.unwrap_or_else(|| {
                let fresh = Arc::new(tokio::sync::Mutex::new(()));
                all.insert(ref_.to_owned(), Arc::downgrade(&fresh));
                fresh
            })
        };
        lock.lock_owned().await
    }
}

fn ingest_dir(args: &Args, ref_: &str) -> PathBuf {
    args.root.join("ingest").join(text(&Sha256::digest(ref_.as_bytes())))
}

fn text(hash: &[u8]) -> String {
    hash.iter().map(|b| format!("{b:02x}")).collect()
}

/// Opens an ingest, hashing what an earlier one left.
pub(crate) fn open(args: &Args, m: &Begin, guard: OwnedMutexGuard<()>) -> Result<Writer> {
    let dir = ingest_dir(args, &m.ref_);
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    std::fs::write(dir.join("ref"), &m.ref_).context("write the ingest's ref")?;
    if m.size > 0 {
        std::fs::write(dir.join("total"), m.size.to_string()).context("write the ingest's size")?;
    }
    let mut file =
        OpenOptions::new().create(true).truncate(false).read(true).write(true).open(dir.join("data")).context("open the ingest")?;
    let (mut hash, mut offset, mut buffer) = (Sha256::new(), 0, vec![0; 256 << 10]);
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        offset += n as u64;
    }
    Ok(Writer { blob: args.blob(&m.digest)?, dir, file, hash, offset, digest: m.digest.clone(), size: m.size, _guard: guard })
}

/// Removes ingests that nobody touched for `age`.
pub(crate) fn sweep(args: &Args, age: Duration) -> Result<u64> {
    let mut removed = 0;
    for entry in std::fs::read_dir(args.root.join("ingest"))? {
        let path = entry?.path();
        let touched = path.join("data").metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        if touched.elapsed().unwrap_or_default() >= age {
            std::fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// The writer.
pub(crate) struct Writer {
    dir: PathBuf,
    blob: PathBuf,
    file: File,
    hash: Sha256,
    offset: u64,
    digest: String,
    size: u64,
    _guard: OwnedMutexGuard<()>,
}

fn sync(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).with_context(|| format!("sync {}", dir.display()))
}

impl BlobWriter for Writer {
    fn offset(&self) -> u64 {
        self.offset
    }
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).with_context(|| format!("write the ingest of {}", self.digest))?;
        self.hash.update(bytes);
        self.offset += bytes.len() as u64;
        Ok(())
    }
    fn reset(&mut self) -> Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        (self.hash, self.offset) = (Sha256::new(), 0);
        Ok(())
    }
    fn commit(self: Box<Self>, labels: BTreeMap<String, String>) -> Result<BlobInfo> {
        let Writer { dir, blob, file, hash, offset, digest, size, _guard } = *self;
        let found = text(&hash.finalize());
        if found != hex(&digest)? || (size > 0 && size != offset) {
            std::fs::remove_dir_all(&dir).context("remove a bad ingest")?;
            let what = format!("blob {digest}: got {offset} of {size} bytes with digest sha256:{found}");
            return Err(Fault::data_loss(what));
        }
        file.sync_all().with_context(|| format!("sync {digest}"))?;
        std::fs::rename(dir.join("data"), &blob).with_context(|| format!("make {} visible", blob.display()))?;
        if let Some(parent) = blob.parent() {
            sync(parent)?;
        }
        std::fs::remove_dir_all(&dir).context("remove the ingest")?;
        Ok(BlobInfo { digest, size: offset, labels, created: SystemTime::now(), path: blob })
    }
}

//! Bringing blobs into the content store: documents whole, layers while they are unpacked.
use crate::manifest::Descriptor;
use crate::pull::Puller;
use crate::registry::Tee;
use kernel::{Class, Fault, Result, ResultExt};
use messages::content::{self, Begin, BlobWriter};
use std::collections::BTreeMap;
use std::io::Read;
use std::time::Duration;

/// A blob's last bytes may still have to reach the disk.
const COMMIT: Duration = Duration::from_secs(600);
/// The unpacker takes what it is fed; its owner has time-outs of its own.
const REPLAY: Duration = Duration::from_secs(24 * 3600);
/// What one read of a stored layer hands on.
const CHUNK: usize = 256 << 10;

impl Puller<'_> {
    pub async fn present(&self, digest: &str) -> Result<Option<Vec<u8>>> {
        match self.world.args.content.call(self.cx, content::ReadAll { digest: digest.into() }).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// A manifest by digest: from the content store, or fetched.
    pub async fn document(&self, digest: &str) -> Result<Vec<u8>> {
        if let Some(bytes) = self.present(digest).await? {
            return Ok(bytes);
        }
        let (bytes, _) = self.cx.run("manifest", |cx| async move { self.repository.manifest(&cx, digest).await }).await?;
        self.keep(digest, bytes.clone()).await?;
        Ok(bytes)
    }

    /// Stores a document whose digest is known to be right.
    pub async fn keep(&self, digest: &str, bytes: Vec<u8>) -> Result<()> {
        let begin = Begin { ref_: format!("manifest-{digest}"), digest: digest.into(), size: bytes.len() as u64 };
        let mut writer = match self.world.args.content.call(self.cx, begin).await {
            Ok(writer) => writer,
            Err(e) if e.is_already_exists() => return Ok(()),
            Err(e) => return Err(e),
        };
        let write = move || {
            writer.reset()?;
            writer.write(&bytes)?;
            writer.commit(BTreeMap::new())
        };
        self.cx.blocking("write manifest", COMMIT, write).await.map(drop)
    }

    /// A small blob: from the content store, or fetched.
    pub async fn small(&self, d: &Descriptor) -> Result<Vec<u8>> {
        if let Some(bytes) = self.present(&d.digest).await? {
            return Ok(bytes);
        }
        self.fetch(d, None, &|_| {}).await?;
        self.present(&d.digest).await?.ok_or_else(|| Fault::data_loss(format!("{} vanished", d.digest)))
    }

    /// Fetches a blob into the content store, and into a tee while it comes. A host whose bytes turn out to be others is not asked for this blob
    /// again; without a tee (nobody has used the bytes yet) the next host is tried at once.
    pub async fn fetch(&self, d: &Descriptor, mut to: Option<Tee>, progress: &dyn Fn(u64)) -> Result<()> {
        loop {
            let begin = Begin { ref_: format!("layer-{}", d.digest), digest: d.digest.clone(), size: d.size };
            let writer = match self.world.args.content.call(self.cx, begin).await {
                Ok(writer) => writer,
                Err(e) if e.is_already_exists() => {
                    progress(d.size);
                    return self.replay(&d.digest, to).await;
                }
                Err(e) => return Err(e),
            };
            // What an earlier pull left behind cannot be fed to the unpacker: fetch the rest, then read all of it back.
            let resumed = writer.offset() > 0;
            let later = if resumed { to.take() } else { None };
            let teed = to.is_some();
            let writer = self.repository.blob(self.cx, &d.digest, d.size, writer, to.take(), progress).await?;
            match self.commit(writer).await {
                Ok(()) => return self.replay(&d.digest, later).await,
                // What was left behind may have been bad; it is gone now.
                Err(e) if e.class == Class::DataLoss && resumed => to = later,
                Err(e) if e.class == Class::DataLoss && self.repository.distrust(&d.digest) && !teed => {}
                Err(e) => return Err(e),
            }
        }
    }

    async fn commit(&self, writer: Box<dyn BlobWriter>) -> Result<()> {
        self.cx.blocking("commit blob", COMMIT, move || writer.commit(BTreeMap::new())).await.map(drop)
    }

    /// Feeds the unpacker from a blob that is there.
    async fn replay(&self, digest: &str, tee: Option<Tee>) -> Result<()> {
        let Some(tee) = tee else { return Ok(()) };
        let info = self.world.args.content.call(self.cx, content::Info { digest: digest.into() }).await?;
        let info = info.ok_or_else(|| Fault::not_found(format!("blob {digest}")))?;
        let read = move || {
            let mut file = std::fs::File::open(&info.path).with_context(|| format!("open {}", info.path.display()))?;
            loop {
                let mut chunk = Vec::with_capacity(CHUNK);
                let n = (&mut file).take(CHUNK as u64).read_to_end(&mut chunk)?;
                if n == 0 {
                    tee.end();
                    return Ok(());
                }
                if !tee.send(chunk.into()) {
                    return Ok(());
                }
            }
        };
        self.cx.blocking("read layer", REPLAY, read).await
    }
}

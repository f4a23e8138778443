//! From the layer as it is stored to the bytes of its tar: one thread reads and decompresses, another hashes, the caller consumes.
//!
//! Buffers of 1 MiB go round in a bounded ring, so a slow disk holds the download back instead of filling memory: at most [`RING`] buffers
//! wait for each of the two readers. Channels close when either side gives up, and both threads then end by themselves.
use super::{Fail, Result};
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};
use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

const BUFFER_BYTES: usize = 1 << 20;
const INPUT_BYTES: usize = 256 << 10;
/// 8 MiB in flight for each reader: enough to ride over a burst of small files, small beside a page cache.
const RING: usize = 8;

/// Compression of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

type Pool = Arc<Mutex<Vec<Vec<u8>>>>;

struct Chunk {
    data: Vec<u8>,
    pool: Pool,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.data));
    }
}

/// The uncompressed bytes.
pub(crate) struct Plain {
    chunks: Receiver<io::Result<Arc<Chunk>>>,
    now: Option<Arc<Chunk>>,
    at: usize,
}

/// What the hashing thread will answer.
pub(crate) struct Digesting(JoinHandle<(String, u64)>);

impl Digesting {
    /// Digest (`sha256:…`) and size of the whole uncompressed stream. Call it after [`Plain`] gave its last byte.
    pub fn finish(self) -> Result<(String, u64)> {
        self.0.join().map_err(|_| Fail::refused("the hashing thread died"))
    }
}

/// Starts both threads.
pub(crate) fn start(source: Box<dyn Read + Send>, media_type: &str) -> Result<(Plain, Digesting)> {
    let mut input = BufReader::with_capacity(INPUT_BYTES, source);
    let declared = declared(media_type)?;
    let (to_reader, chunks) = sync_channel(RING);
    let (to_hash, hashing) = sync_channel::<Arc<Chunk>>(RING);
    let spawned = |e: io::Error| Fail::io("start a thread", e);
    let digest = Builder::new().name("layer-hash".into()).spawn(move || hash(&hashing)).map_err(spawned)?;
    Builder::new()
        .name("layer-inflate".into())
        .spawn(move || {
            let decoded = detect(&mut input, declared).and_then(|compression| match compression {
                Compression::None => pump(input, &to_reader, &to_hash),
                Compression::Gzip => pump(MultiGzDecoder::new(input), &to_reader, &to_hash),
                Compression::Zstd => pump(zstd::stream::read::Decoder::with_buffer(input)?, &to_reader, &to_hash),
            });
            if let Err(e) = decoded {
                let _ = to_reader.send(Err(e));
            }
        })
        .map_err(spawned)?;
    Ok((Plain { chunks, now: None, at: 0 }, Digesting(digest)))
}

fn declared(media_type: &str) -> Result<Option<Compression>> {
    let base = media_type.split(';').next().unwrap_or_default().trim();
    if base.ends_with("+encrypted") {
        return Err(Fail::unsupported(format!("layer media type {media_type:?}: decryption is not supported")));
    }
    if base.is_empty() {
        return Ok(None);
    }
    match base {
        "application/vnd.oci.image.layer.v1.tar" | "application/vnd.oci.image.layer.nondistributable.v1.tar" => Ok(Some(Compression::None)),
        _ if base.ends_with("gzip") || base.ends_with("tgz") => Ok(Some(Compression::Gzip)),
        _ if base.ends_with("zstd") => Ok(Some(Compression::Zstd)),
        _ if base.ends_with("tar") => Ok(None),
        _ => Err(Fail::unsupported(format!("layer media type {media_type:?} is not a tar"))),
    }
}

/// The first bytes overrule a media type that names the other compression: registries hold images whose manifest is wrong about it.
fn detect(input: &mut impl BufRead, declared: Option<Compression>) -> io::Result<Compression> {
    if declared == Some(Compression::None) {
        return Ok(Compression::None);
    }
    let start = input.fill_buf()?;
    Ok(match start {
        [0x1f, 0x8b, 0x08, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        // A first read shorter than a magic number (a socket's dribble) leaves the manifest's word.
        [] | [_] | [_, _] | [_, _, _] if !start.is_empty() => declared.unwrap_or(Compression::None),
        _ => Compression::None,
    })
}

fn pump(mut from: impl Read, to_reader: &SyncSender<io::Result<Arc<Chunk>>>, to_hash: &SyncSender<Arc<Chunk>>) -> io::Result<()> {
    let pool = Pool::default();
    loop {
        let mut data = pool.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        data.resize(BUFFER_BYTES, 0);
        let mut filled = 0;
        while filled < data.len() {
            match from.read(&mut data[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if filled == 0 {
            return Ok(());
        }
        data.truncate(filled);
        let chunk = Arc::new(Chunk { data, pool: pool.clone() });
        if to_hash.send(chunk.clone()).is_err() || to_reader.send(Ok(chunk)).is_err() {
            return Ok(());
        }
    }
}

fn hash(chunks: &Receiver<Arc<Chunk>>) -> (String, u64) {
    let (mut hasher, mut size) = (Sha256::new(), 0);
    for chunk in chunks {
        hasher.update(&chunk.data);
        size += chunk.data.len() as u64;
    }
    let hex: String = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
    (format!("sha256:{hex}"), size)
}

impl Read for Plain {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let n = available.len().min(out.len());
        out[..n].copy_from_slice(&available[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Plain {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.now.as_ref().is_none_or(|c| self.at >= c.data.len()) {
            self.at = 0;
            self.now = self.chunks.recv().ok().transpose()?;
        }
        Ok(self.now.as_ref().map_or(&[], |c| &c.data[self.at..]))
    }
    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}

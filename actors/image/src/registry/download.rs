//! Downloading a blob: resumed where it broke off, in pieces side by side where that is configured, written and handed to the unpacker as it comes.
use super::{Attempt, Repository, Tee, Way, client, header, text};
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use kernel::{Cx, Fault, Result};
use messages::content::BlobWriter;
use parking_lot::Mutex;
use reqwest::{Method, Response, StatusCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

/// Chunks between network and disk.
const CHUNKS: usize = 32;
/// An attempt that brought less than this is one without progress.
const PROGRESS: u64 = 64 << 10;
/// How often the number of bytes is told.
const TICK: Duration = Duration::from_millis(100);
/// A layer's writer ends with its source, which has time-outs of its own.
const WRITE: Duration = Duration::from_secs(24 * 3600);

/// What a download fills.
struct Sink {
    writer: Box<dyn BlobWriter>,
    tee: Option<Tee>,
}

/// Chunks as they come from the network, with time-outs.
type Chunks = BoxStream<'static, Result<Bytes, Fault>>;

impl Repository {
    /// Downloads a blob into `writer` from where it stands, and into `tee`. Answers the writer, complete.
    pub async fn blob(
        &self,
        cx: &Cx,
        digest: &str,
        size: u64,
        writer: Box<dyn BlobWriter>,
        tee: Option<Tee>,
        progress: &dyn Fn(u64),
    ) -> Result<Box<dyn BlobWriter>> {
        let path = format!("{}/blobs/{digest}", self.name);
        let slot = Mutex::new(Some(Sink { writer, tee }));
        let lost = || Attempt::last(Fault::internal("the ingest was lost with an abandoned write"));
        let wrong = self.origins.lock().wrong.get(digest).cloned().unwrap_or_default();
        let may = |way: &Way, number: usize| way.host.pull && !wrong.contains(&number);
        self.each_way(cx, may, &path, async |way, number, cx| {
            let mut sink = slot.lock().take().ok_or_else(lost)?;
            if size > 0 && sink.writer.offset() > size {
                sink.writer.reset().map_err(Attempt::last)?;
            }
            let from = sink.writer.offset();
            if size > 0 && from == size {
                *slot.lock() = Some(sink);
                return Ok(());
            }
            let (result, sink) = self.attempt(&cx, way, &path, size, sink, progress).await;
            let at = sink.as_ref().map_or(from, |s| s.writer.offset());
            *slot.lock() = sink;
            if at > from {
                self.origins.lock().gave.entry(digest.to_owned()).or_default().insert(number);
            }
            let short = || Attempt::retry(Fault::unavailable(format!("the connection ended after {at} of {size} bytes")));
            let result = result.and_then(|()| if size > 0 && at < size { Err(short()) } else { Ok(()) });
            result.map_err(|a| Attempt { progress: at >= from + PROGRESS, ..a })
        })
        .await?;
        let sink = slot.into_inner().ok_or_else(|| Fault::internal("the ingest was lost"))?;
        progress(sink.writer.offset());
        if let Some(tee) = sink.tee {
            // The pipe may be full, and its reader slow.
            let end = move || {
                tee.end();
                Ok(())
            };
            cx.blocking("end a layer", WRITE, end).await?;
        }
        Ok(sink.writer)
    }

    /// One attempt: from where the writer stands to the end, or as far as it gets.
    async fn attempt(
        &self,
        cx: &Cx,
        way: &Way,
        path: &str,
        size: u64,
        sink: Sink,
        progress: &dyn Fn(u64),
    ) -> (Result<(), Attempt>, Option<Sink>) {
        let from = sink.writer.offset();
        let pieces = self.config.piece > 0 && self.config.pieces > 1 && size.saturating_sub(from) > self.config.piece;
        let range = match (pieces, from) {
            (true, _) => Some(format!("bytes={from}-{}", from + self.config.piece - 1)),
            (false, 0) => None,
            (false, _) => Some(format!("bytes={from}-")),
        };
        let response = match self.request(cx, way, Method::GET, path, "*/*", range).await {
            Ok(response) => response,
            Err(attempt) => return (Err(attempt), Some(sink)),
        };
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        if partial && header(&response, "content-range").is_some_and(|r| !r.trim_start_matches("bytes ").starts_with(&format!("{from}-"))) {
            return (Err(Attempt::last(Fault::unavailable("the host answers with another range than was asked for"))), Some(sink));
        }
        // A host that knows no ranges sends all from the start: what is there already is skipped.
        let skip = if partial { 0 } else { from };
        let limit = self.config.progress_timeout;
        let chunks: Chunks = if pieces && partial {
            let first = whole(response, self.config.piece, limit);
            let starts = (from + self.config.piece..size).step_by(self.config.piece as usize);
            let rest = starts.map(|start| self.piece(cx, way, path, start, (start + self.config.piece).min(size)));
            return self.pieces(cx, first, rest, sink, progress).await;
        } else {
            body(response, limit)
        };
        self.pour(cx, chunks, skip, sink, progress).await
    }

    /// One piece of a large blob, in memory.
    async fn piece(&self, cx: &Cx, way: &Way, path: &str, start: u64, end: u64) -> Result<Bytes, Fault> {
        let range = format!("bytes={start}-{}", end - 1);
        let response = self.request(cx, way, Method::GET, path, "*/*", Some(range)).await.map_err(|a| a.fault)?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(Fault::unavailable("the host stopped answering ranges"));
        }
        let bytes = whole(response, end - start, self.config.progress_timeout).await?;
        if bytes.len() as u64 == end - start { Ok(bytes) } else { Err(Fault::unavailable("a piece came short")) }
    }

    /// Pieces side by side, written in their order. Only what is in order counts, so a later attempt goes on from there.
    async fn pieces<'a>(
        &self,
        cx: &Cx,
        first: impl Future<Output = Result<Bytes, Fault>> + 'a,
        rest: impl Iterator<Item = impl Future<Output = Result<Bytes, Fault>> + 'a> + 'a,
        sink: Sink,
        progress: &dyn Fn(u64),
    ) -> (Result<(), Attempt>, Option<Sink>) {
        use futures::future::Either;
        let all = std::iter::once(Either::Left(first)).chain(rest.map(Either::Right));
        let mut ordered = std::pin::pin!(futures::stream::iter(all).buffered(self.config.pieces));
        let (send, receive) = mpsc::channel(1);
        let feed = async move {
            while let Some(piece) = ordered.next().await {
                let failed = piece.is_err();
                if send.send(piece).await.is_err() || failed {
                    return;
                }
            }
        };
        let chunks = futures::stream::unfold(receive, |mut r| async move { r.recv().await.map(|piece| (piece, r)) }).boxed();
        let (_, poured) = futures::join!(feed, self.pour(cx, chunks, 0, sink, progress));
        poured
    }

    /// Chunks to writer and tee. One thread writes, hashes and feeds the unpacker, while the network thread goes on reading.
    async fn pour(
        &self,
        cx: &Cx,
        mut chunks: Chunks,
        mut skip: u64,
        sink: Sink,
        progress: &dyn Fn(u64),
    ) -> (Result<(), Attempt>, Option<Sink>) {
        let at = Arc::new(AtomicU64::new(sink.writer.offset()));
        let (sender, mut receiver) = mpsc::channel::<Bytes>(CHUNKS);
        let (done, finished) = tokio::sync::oneshot::channel();
        let counted = at.clone();
        let written = cx.blocking("write layer", WRITE, move || {
            let mut sink = sink;
            let mut result = Ok(());
            while let Some(chunk) = receiver.blocking_recv() {
                if let Err(e) = sink.writer.write(&chunk) {
                    result = Err(e);
                    break;
                }
                counted.store(sink.writer.offset(), Ordering::Relaxed);
                // An unpacker that gave up does not end the download: its own error is told.
                if sink.tee.as_ref().is_some_and(|tee| !tee.send(chunk)) {
                    sink.tee = None;
                }
            }
            let _ = done.send((result, sink));
            Ok(())
        });
        // The sender moves in and is dropped with it: that is how the writer learns of the end.
        let read = client::run(async move {
            while let Some(mut chunk) = chunks.try_next().await? {
                let cut = skip.min(chunk.len() as u64);
                skip -= cut;
                let chunk = chunk.split_off(cut as usize);
                if !chunk.is_empty() && sender.send(chunk).await.is_err() {
                    break;
                }
            }
            Ok::<(), Fault>(())
        });
        let work = async { tokio::join!(written, read) };
        let tell = async {
            loop {
                tokio::time::sleep(TICK).await;
                progress(at.load(Ordering::Relaxed));
            }
        };
        let (written, read): (Result<()>, Result<Result<(), Fault>>) = tokio::select! {
            both = work => both,
            never = tell => never,
        };
        match finished.await {
            Ok((Ok(()), sink)) => (read.unwrap_or_else(Err).map_err(Attempt::retry), Some(sink)),
            Ok((Err(e), sink)) => (Err(Attempt::last(e)), Some(sink)),
            Err(_) => (Err(Attempt::last(written.err().unwrap_or_else(|| Fault::internal("the writer ended")))), None),
        }
    }
}

/// A body as chunks; each must come within `limit`. The time in which nobody asks for one does not count.
fn body(response: Response, limit: Duration) -> Chunks {
    let next = move |mut response: Response| async move {
        match tokio::time::timeout(limit, response.chunk()).await {
            Ok(Ok(Some(chunk))) => Ok(Some((chunk, response))),
            Ok(Ok(None)) => Ok(None),
            Ok(Err(e)) => Err(Fault::unavailable(text(e))),
            Err(_) => Err(Fault::deadline_exceeded(format!("no byte within {limit:?}"))),
        }
    };
    futures::stream::try_unfold(response, next).boxed()
}

/// A whole body of at most `size` bytes.
async fn whole(response: Response, size: u64, limit: Duration) -> Result<Bytes, Fault> {
    let read = async move {
        let mut all = Vec::with_capacity(size as usize);
        let mut chunks = body(response, limit);
        while let Some(chunk) = chunks.try_next().await? {
            all.extend_from_slice(&chunk);
            if all.len() as u64 > size {
                return Err(Fault::data_loss("the host sends more than was asked for"));
            }
        }
        Ok(Bytes::from(all))
    };
    client::run(read).await?
}

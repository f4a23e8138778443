//! A log in CRI's format that this process writes itself, so that it goes on while the daemon is away.
//!
//! Owns: the file and its counters. What one read of a stream gives is one write, so lines of two streams never mix. The file is touched in threads made
//! for waiting: a file system that does not answer costs the streams that go there, and nothing else of the pod. Limits: a line in memory is no longer
//! than the limit and one read; a file system that takes nothing costs lines (counted), never the container.
use crate::io::Targets;
use crate::sys;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Content bytes of an entry where nobody says otherwise.
const LINE: usize = 16384;
/// Content bytes of an entry where the limit is lifted: a stream without line ends must not grow this process.
const LIFTED: usize = 1 << 20;

/// What was read and written: containerd's counters of its log reader, in the order of the file that tells them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Lines that were read.
    pub input_entries: u64,
    /// Entries that were written.
    pub output_entries: u64,
    /// Bytes that were read.
    pub input_bytes: u64,
    /// Bytes that were written.
    pub output_bytes: u64,
    /// Entries that are no line's end.
    pub split_entries: u64,
    /// Their content.
    pub split_bytes: u64,
    /// Entries that no room was found for.
    pub lost_entries: u64,
    /// And their bytes.
    pub lost_bytes: u64,
}

impl Counters {
    fn bytes(&self) -> [u8; 64] {
        let all = [
            self.input_entries,
            self.output_entries,
            self.input_bytes,
            self.output_bytes,
            self.split_entries,
            self.split_bytes,
            self.lost_entries,
            self.lost_bytes,
        ];
        let mut bytes = [0; 64];
        bytes.chunks_exact_mut(8).zip(all).for_each(|(place, n)| place.copy_from_slice(&n.to_le_bytes()));
        bytes
    }
}

struct Inner {
    file: File,
    counters: Counters,
    /// Where the counters are told: the daemon reads them when somebody asks it.
    told: Option<File>,
}

/// A log that can be reopened.
pub struct Log {
    path: PathBuf,
    max_line: usize,
    inner: Mutex<Inner>,
}

impl Log {
    /// Opens the log that a stream goes to, if one does, and tells its counters in `told`.
    pub async fn of(targets: &Targets, told: PathBuf) -> io::Result<Option<Arc<Log>>> {
        let uris = [&targets.stdout, &targets.stderr].into_iter().filter_map(|t| t.strip_prefix("cri-log://"));
        let Some(uri) = uris.into_iter().find(|uri| !uri.is_empty() && !uri.starts_with('?')).map(str::to_owned) else { return Ok(None) };
        let open = move || {
            let log = Log::open(&uri)?;
            log.count_in(&told)?;
            Ok(Some(Arc::new(log)))
        };
        apart(open).await?
    }
    /// Opens `<path>?max_line=<bytes>`; 0 and less lift the limit.
    fn open(uri: &str) -> io::Result<Log> {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let asked: Option<i64> = query.split('&').find_map(|q| q.strip_prefix("max_line=")?.parse().ok());
        let max_line = asked.map_or(LINE, |n| usize::try_from(n).ok().filter(|n| *n > 0).unwrap_or(LIFTED));
        let path = PathBuf::from(path);
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let inner = Mutex::new(Inner { file: append(&path)?, counters: Counters::default(), told: None });
        Ok(Log { path, max_line, inner })
    }
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Tells the counters in a file from now on.
    fn count_in(&self, path: &Path) -> io::Result<()> {
        let file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
        self.inner().told = Some(file);
        Ok(())
    }
    /// After rotation. The new file is there when this returns, and both streams go to it.
    pub async fn reopen(self: Arc<Log>) -> io::Result<()> {
        let reopen = move || {
            let fresh = append(&self.path)?;
            self.inner().file = fresh;
            Ok(())
        };
        apart(reopen).await?
    }
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Writes what a stream has gathered; answers when it is written.
    pub async fn take(self: &Arc<Log>, lines: &mut Lines) {
        let Some((mut entries, read)) = lines.gathered() else { return };
        let me = self.clone();
        let write = move || {
            me.write(&entries, read);
            entries.clear();
            entries.shrink_to(64 << 10);
            entries
        };
        if let Ok(space) = apart(write).await {
            lines.out = space;
        }
    }
    /// Writes entries as a whole. A full disk loses them, never the container; half an entry is taken back, so that the next begins on a line of its own.
    fn write(&self, entries: &[u8], read: Counters) {
        let mut inner = self.inner();
        let mut rest = entries;
        while !rest.is_empty() {
            match inner.file.write(rest) {
                Ok(n) if n > 0 => rest = &rest[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        let mut written = entries.len() - rest.len();
        if !rest.is_empty() {
            let whole = entries[..written].iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            let half = (written - whole) as u64;
            if half > 0
                && let Ok(meta) = inner.file.metadata()
            {
                let _ = inner.file.set_len(meta.len().saturating_sub(half));
            }
            written = whole;
        }
        let entries_written = if rest.is_empty() { read.output_entries } else { lines_in(&entries[..written]) };
        let lost = entries.len() - written;
        let c = &mut inner.counters;
        c.input_entries += read.input_entries;
        c.output_entries += entries_written;
        c.input_bytes += read.input_bytes;
        c.output_bytes += written as u64;
        c.split_entries += read.split_entries;
        c.split_bytes += read.split_bytes;
        c.lost_entries += read.output_entries - entries_written;
        c.lost_bytes += lost as u64;
        let bytes = c.bytes();
        if let Some(told) = &inner.told {
            // Counters that cannot be told are no reason to stop a log.
            let _ = told.write_all_at(&bytes, 0);
        }
    }
}

fn lines_in(entries: &[u8]) -> u64 {
    entries.iter().filter(|b| **b == b'\n').count() as u64
}

/// Opens a file at its end.
pub fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

/// Writes timestamps: RFC 3339 in local time, nanoseconds without trailing zeros.
#[derive(Default)]
struct Clock {
    /// The second that `text` is about, and the offset's text.
    second: Option<u64>,
    text: String,
    zone: String,
}

impl Clock {
    fn stamp(&mut self, at: SystemTime, out: &mut Vec<u8>) {
        let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.second != Some(since.as_secs()) {
            let offset = sys::local_offset(since.as_secs() as i64);
            (self.text, self.zone) = (civil(since.as_secs() as i64 + offset), zone(offset));
            self.second = Some(since.as_secs());
        }
        out.extend_from_slice(self.text.as_bytes());
        let nanos = format!(".{:09}", since.subsec_nanos());
        out.extend_from_slice(nanos.trim_end_matches('0').trim_end_matches('.').as_bytes());
        out.extend_from_slice(self.zone.as_bytes());
    }
}

fn zone(offset: i64) -> String {
    if offset == 0 {
        return "Z".into();
    }
    let (sign, minutes) = (if offset < 0 { '-' } else { '+' }, offset.abs() / 60);
    format!("{sign}{:02}:{:02}", minutes / 60, minutes % 60)
}

fn civil(second: i64) -> String {
    let (days, second) = (second.div_euclid(86400), second.rem_euclid(86400));
    // Civil date from days since 1970, by the era arithmetic of the proleptic Gregorian calendar.
    let z = days + 719_468;
    let (era, doe) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}")
}

/// Cuts a stream into lines.
pub struct Lines {
    name: &'static str,
    /// The line that has no end yet.
    line: Vec<u8>,
    clock: Clock,
    out: Vec<u8>,
    read: Counters,
}

impl Lines {
    /// Of `stdout` or `stderr`.
    pub fn new(name: &'static str) -> Lines {
        Lines { name, line: vec![], clock: Clock::default(), out: vec![], read: Counters::default() }
    }
    fn entry(&mut self, content: &[u8], tag: char) {
        self.clock.stamp(SystemTime::now(), &mut self.out);
        // Writing to memory does not fail.
        let _ = write!(self.out, " {} {tag} ", self.name);
        self.out.extend_from_slice(content);
        self.out.push(b'\n');
        self.read.output_entries += 1;
        if tag == 'P' {
            self.read.split_entries += 1;
            self.read.split_bytes += content.len() as u64;
        }
    }
    /// Cuts what is longer than the limit. A CR behind a line of just the limit may be half of its end, so it waits for what follows.
    fn cut(&mut self, limit: usize, more: bool) {
        while self.line.len() > limit {
            if more && self.line.len() == limit + 1 && self.line.last() == Some(&b'\r') {
                return;
            }
            let rest = self.line.split_off(limit);
            let full = std::mem::replace(&mut self.line, rest);
            self.entry(&full, 'P');
        }
    }
    /// Gathers the whole lines of `bytes`, and keeps the rest.
    pub fn push(&mut self, log: &Log, bytes: &[u8]) {
        self.read.input_bytes += bytes.len() as u64;
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            let Some(body) = piece.strip_suffix(b"\n") else {
                self.line.extend_from_slice(piece);
                self.cut(log.max_line, true);
                continue;
            };
            self.read.input_entries += 1;
            if self.line.is_empty() {
                let content = body.strip_suffix(b"\r").unwrap_or(body);
                if content.len() <= log.max_line {
                    self.entry(content, 'F');
                    continue;
                }
            }
            self.line.extend_from_slice(body);
            if self.line.last() == Some(&b'\r') {
                self.line.pop();
            }
            self.cut(log.max_line, false);
            let line = std::mem::take(&mut self.line);
            self.entry(&line, 'F');
        }
    }
    /// Gathers what is left at the end of the stream.
    pub fn finish(&mut self, log: &Log) {
        self.cut(log.max_line, false);
        if !self.line.is_empty() {
            let line = std::mem::take(&mut self.line);
            self.read.input_entries += 1;
            self.entry(&line, 'P');
        }
    }
    /// What is to be written.
    fn gathered(&mut self) -> Option<(Vec<u8>, Counters)> {
        let any = !self.out.is_empty() || self.read != Counters::default();
        any.then(|| (std::mem::take(&mut self.out), std::mem::take(&mut self.read)))
    }
}

/// Does what may have to wait for a file system in a thread of its own.
async fn apart<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;

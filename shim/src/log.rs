//! A log in CRI's format that this process writes itself, so that it goes on while the daemon is away.
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// A log that can be reopened.
pub struct Log {
    path: PathBuf,
    max_line: usize,
    file: Mutex<File>,
}

impl Log {
    /// Opens `<path>?max_line=<bytes>`.
    pub fn open(uri: &str) -> io::Result<Log> {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let max_line = query.split('&').find_map(|q| q.strip_prefix("max_line=")?.parse().ok()).filter(|n| *n > 0).unwrap_or(16384);
        let path = PathBuf::from(path);
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let file = Mutex::new(append(&path)?);
        Ok(Log { path, max_line, file })
    }
    /// After rotation.
    pub fn reopen(&self) -> io::Result<()> {
        let fresh = append(&self.path)?;
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }
    fn line(&self, stream: &str, line: &[u8], whole: bool) {
        let mut out = Vec::with_capacity(line.len() + 64);
        let _ = write!(out, "{} {stream} {} ", timestamp(SystemTime::now()), if whole { 'F' } else { 'P' });
        out.extend_from_slice(line);
        out.push(b'\n');
        // A full disk loses log lines, never the container.
        let _ = self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&out);
    }
}

/// Opens a file at its end.
pub fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

/// RFC 3339 with nanoseconds, in UTC.
fn timestamp(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86400, since.as_secs() % 86400);
    // Civil date from days since 1970, by the era arithmetic of the proleptic Gregorian calendar.
    let z = days as i64 + 719_468;
    let (era, doe) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:09}Z", since.subsec_nanos())
}

/// Cuts a stream into lines.
pub struct Lines {
    name: &'static str,
    line: Vec<u8>,
}

impl Lines {
    /// Of `stdout` or `stderr`.
    pub fn new(name: &'static str) -> Lines {
        Lines { name, line: Vec::new() }
    }
    /// Writes the whole lines of `bytes`, and keeps the rest.
    pub fn push(&mut self, log: &Log, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            let (body, whole) = piece.strip_suffix(b"\n").map_or((piece, false), |b| (b, true));
            self.line.extend_from_slice(body);
            while self.line.len() > log.max_line {
                let rest = self.line.split_off(log.max_line);
                log.line(self.name, &self.line, false);
                self.line = rest;
            }
            if whole {
                log.line(self.name, &self.line, true);
                self.line.clear();
            }
        }
    }
    /// Writes what is left at the end of the stream.
    pub fn finish(&mut self, log: &Log) {
        if !self.line.is_empty() {
            log.line(self.name, &self.line, false);
            self.line.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn timestamps_are_rfc3339() {
        let at = UNIX_EPOCH + std::time::Duration::new(1_709_210_096, 7);
        assert_eq!(timestamp(at), "2024-02-29T12:34:56.000000007Z");
    }
}

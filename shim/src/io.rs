//! Where a process' streams go: FIFOs, files, nowhere, or a log in CRI's format that this process writes itself, so that it goes on while the
//! daemon is away.
use crate::runtime::{Streams, stream};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

/// A log that can be reopened.
pub struct Log {
    path: PathBuf,
    max_line: usize,
    file: Mutex<File>,
}

impl Log {
    fn open(uri: &str) -> io::Result<Log> {
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

fn append(path: &std::path::Path) -> io::Result<File> {
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

/// The streams of one process, and the tasks that copy them.
pub struct Wiring {
    /// For the child.
    pub streams: Option<Streams>,
    /// The log, if there is one.
    pub log: Option<Arc<Log>>,
    copies: Vec<JoinHandle<()>>,
}

impl Wiring {
    /// Opens what the request names.
    pub fn open(stdin: &str, stdout: &str, stderr: &str) -> io::Result<Wiring> {
        let (mut log, mut copies) = (None, Vec::new());
        let mut output = |target: &str, name: &'static str| -> io::Result<Stdio> {
            if target.is_empty() {
                return Ok(Stdio::null());
            }
            if let Some(uri) = target.strip_prefix("cri-log://") {
                let log = match &log {
                    Some(log) => Arc::clone(log),
                    None => {
                        let fresh = Arc::new(Log::open(uri)?);
                        log = Some(fresh.clone());
                        fresh
                    }
                };
                let (ours, theirs) = pair()?;
                copies.push(tokio::spawn(pump(ours, name, log)));
                return Ok(stream(theirs));
            }
            if let Some(path) = target.strip_prefix("file://") {
                return Ok(append(path.as_ref())?.into());
            }
            // A FIFO, opened for reading too, so that neither side ever waits for the other.
            let path = target.strip_prefix("fifo://").unwrap_or(target);
            Ok(OpenOptions::new().read(true).write(true).open(path)?.into())
        };
        let (out, err) = (output(stdout, "stdout")?, output(stderr, "stderr")?);
        let input = if stdin.is_empty() { Stdio::null() } else { OpenOptions::new().read(true).write(true).open(stdin)?.into() };
        Ok(Wiring { streams: Some(Streams { stdin: input, stdout: out, stderr: err }), log, copies })
    }

    /// Waits until all output is written; a process that keeps a pipe open holds this up for two seconds only.
    pub async fn drain(&mut self) {
        for mut copy in self.copies.drain(..) {
            if tokio::time::timeout(std::time::Duration::from_secs(2), &mut copy).await.is_err() {
                copy.abort();
            }
        }
    }
}

fn pair() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(flags))?;
    Ok((pipe::Receiver::from_owned_fd(ours)?, theirs))
}

async fn pump(mut from: pipe::Receiver, name: &'static str, log: Arc<Log>) {
    let (mut buffer, mut line) = (vec![0; 16 << 10], Vec::new());
    loop {
        let n = from.read(&mut buffer).await.unwrap_or(0);
        if n == 0 {
            break;
        }
        for piece in buffer[..n].split_inclusive(|b| *b == b'\n') {
            let (body, whole) = piece.strip_suffix(b"\n").map_or((piece, false), |b| (b, true));
            line.extend_from_slice(body);
            while line.len() > log.max_line {
                let rest = line.split_off(log.max_line);
                log.line(name, &line, false);
                line = rest;
            }
            if whole {
                log.line(name, &line, true);
                line.clear();
            }
        }
    }
    if !line.is_empty() {
        log.line(name, &line, false);
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

//! Processes by pidfd: waiting for ends and killing, without ever hitting another process that got the same pid.
use kernel::{Cx, Fault, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::unix::AsyncFd;

/// A process.
pub struct Process {
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Takes hold of it; `NotFound` when it is gone.
    pub fn open(pid: u32) -> Result<Process> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| Fault::not_found(format!("there is no process {pid}")))?;
        let fd = pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(|e| match e {
            rustix::io::Errno::SRCH | rustix::io::Errno::INVAL => Fault::not_found(format!("process {} is gone", pid.as_raw_nonzero())),
            e => Fault::from(std::io::Error::from(e)).context("pidfd_open"),
        })?;
        Ok(Process { fd: crate::sys::watch(fd)? })
    }
    /// Waits for its end (a zombie has ended).
    pub async fn ended(&self) {
        if self.fd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
    /// Waits for its end, no longer than `limit`; has it ended?
    pub async fn ended_within(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.ended()).await.is_ok()
    }
    /// SIGKILL; nothing when it has ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.fd.get_ref(), Signal::KILL);
    }
}

/// A process as written down: the start time tells it from a later one with the same pid.
pub fn stamp(pid: u32) -> Option<String> {
    Some(format!("{pid} {}", start_time(pid)?))
}

/// The process that [`stamp`] wrote down, if it lives.
pub fn from_stamp(text: &str) -> Option<(u32, Process)> {
    let (pid, started) = text.trim().split_once(' ')?;
    let pid = pid.parse().ok()?;
    let process = Process::open(pid).ok()?;
    (start_time(pid)? == started).then_some((pid, process))
}

fn start_time(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Fields after the parenthesised name: state is the 3rd, start time the 22nd.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19).map(str::to_owned)
}

/// Shims that were started for `id` with our address, found by their command line. For what no file tells: a daemon killed between running the binary and its reply.
pub async fn shims_of(cx: &Cx, id: &str, address: &str) -> Vec<u32> {
    let (id, address) = (id.to_owned(), address.to_owned());
    let scan = cx.blocking("scan /proc", Duration::from_secs(5), move || {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
            let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
            let has = |flag: &str, value: &str| words.windows(2).any(|w| w[0] == flag.as_bytes() && w[1] == value.as_bytes());
            if has("-id", &id) && has("-address", &address) && words.first().is_some_and(|w| contains(w, b"shim")) {
                found.push(pid);
            }
        }
        Ok(found)
    });
    scan.await.unwrap_or_default()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|w| w == part)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_end_is_seen_and_a_stamp_does_not_fit_another() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        let text = stamp(child.id()).unwrap();
        assert!(from_stamp(&text).is_some());
        assert!(from_stamp(&format!("{} 1", child.id())).is_none(), "another start time");
        assert!(!process.ended_within(Duration::from_millis(20)).await);
        process.kill();
        assert!(process.ended_within(Duration::from_secs(5)).await);
        child.wait().unwrap();
        assert!(from_stamp(&text).is_none());
        assert!(Process::open(0).is_err_and(|f| f.is_not_found()));
    }
}

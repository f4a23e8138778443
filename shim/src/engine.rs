//! The embedded engine's process: libcontainer, in a process of one thread.
//!
//! libcontainer runs ordinary code after `clone3`, which dead-locks now and then in a process with more threads (`contracts/crates.md` §4). So the
//! server forks this process before its own runtime exists; each request forks a worker from it, which does one step and ends. A container's init
//! thereby loses its parent and becomes a child of the server, the nearest subreaper, who reaps it. A worker that hangs holds up nobody else.
//!
//! Owns: nothing; state is in the engine's files. Talks to: the server by a socket pair; each request brings the socket for its answer, and the
//! streams. On a crash of a worker: its answer is an end of file, an error for that request. Of this process: steps fail until the pod is gone; what
//! runs goes on. Limits: requests of [`LARGEST`] bytes.
#![allow(unsafe_code)]
mod bus;
mod delegate;
mod devices;
mod diary;
mod guard;
mod hierarchies;
mod kernel;
mod launch;
mod place;
mod scope;
mod stage;
mod steps;
mod systemd;

use crate::group::Group;
pub use launch::delete;
use nix::sys::socket::{AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::AsyncBufReadExt;

/// Largest request: paths and ids only.
const LARGEST: usize = 16 << 10;

/// One step.
#[derive(Default)]
pub struct Request {
    /// `create`, `start`, `exec`, `delete`, `give back` (delete without hooks), `pause`, `resume`, `checkpoint`, `update`.
    pub step: String,
    /// Container.
    pub id: String,
    /// State directory.
    pub root: PathBuf,
    /// Cgroups through systemd.
    pub systemd: bool,
    /// Bundle.
    pub bundle: PathBuf,
    /// Process (exec) or resources (update).
    pub file: Option<PathBuf>,
    /// Where a terminal is sent.
    pub console: Option<PathBuf>,
}

impl Request {
    fn encode(&self) -> Vec<u8> {
        let all = json!({"step": self.step, "id": self.id, "root": self.root, "systemd": self.systemd, "bundle": self.bundle,
            "file": self.file, "console": self.console});
        all.to_string().into_bytes()
    }
    fn decode(bytes: &[u8]) -> io::Result<Request> {
        let all: Value = serde_json::from_slice(bytes)?;
        let text = |key: &str| all[key].as_str().map(str::to_owned);
        Ok(Request {
            step: text("step").unwrap_or_default(),
            id: text("id").unwrap_or_default(),
            root: text("root").unwrap_or_default().into(),
            systemd: all["systemd"] == true,
            bundle: text("bundle").unwrap_or_default().into(),
            file: text("file").map(Into::into),
            console: text("console").map(Into::into),
        })
    }
}

/// The server's end.
#[derive(Clone)]
pub struct Engine(Arc<OwnedFd>);

impl Engine {
    /// Forks the engine's process. The caller must have one thread.
    pub fn fork() -> io::Result<Engine> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: this process has one thread, so the child's memory is whole.
        if unsafe { nix::unistd::fork() }?.is_child() {
            drop(ours);
            // The server's listener is not this process' business.
            let _ = nix::unistd::close(3);
            serve(&theirs);
            std::process::exit(0);
        }
        Ok(Engine(Arc::new(ours)))
    }

    /// One step; answers a pid where the step makes a process. Whoever does not wait for its end ends it.
    pub async fn ask(&self, request: &Request, fds: Vec<OwnedFd>) -> io::Result<u32> {
        let (answer, theirs) = UnixStream::pair()?;
        answer.set_nonblocking(true)?;
        let body = request.encode();
        let mut all = vec![theirs.as_raw_fd()];
        all.extend(fds.iter().map(AsRawFd::as_raw_fd));
        let send = || {
            sendmsg::<()>(self.0.as_raw_fd(), &[io::IoSlice::new(&body)], &[ControlMessage::ScmRights(&all)], MsgFlags::MSG_NOSIGNAL, None)
        };
        send().map_err(|e| io::Error::other(format!("the engine is gone: {e}")))?;
        drop((theirs, fds));
        // Lines: the container's init holds the worker's descriptors until it runs its program, so an end of file would come too late.
        let mut lines = tokio::io::BufReader::new(tokio::net::UnixStream::from_std(answer)?).lines();
        let died = || io::Error::other(format!("the engine died in {}", request.step));
        let worker: u32 = lines.next_line().await?.and_then(|pid| pid.parse().ok()).ok_or_else(died)?;
        let mut worker = if request.bundle.as_os_str().is_empty() { Group::of(worker) } else { Group::noted(worker, &request.bundle) };
        let text = lines.next_line().await?.ok_or_else(died)?;
        worker.ended();
        let told: Value = serde_json::from_str(&text).map_err(|_| died())?;
        match told["error"].as_str() {
            Some(error) => Err(io::Error::other(error.to_owned())),
            None => Ok(told["pid"].as_u64().unwrap_or_default() as u32),
        }
    }
}

/// Takes requests until the server is gone.
fn serve(from: &OwnedFd) {
    // Workers leave no zombies; what they run starts with the default again.
    set_child_flags(libc::SA_NOCLDWAIT);
    let mut body = vec![0; LARGEST];
    loop {
        let mut space = nix::cmsg_space!([i32; 4]);
        let mut parts = [io::IoSliceMut::new(&mut body)];
        let (length, fds) = match recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(nix::Error::EINTR) => continue,
            Err(_) => return,
            Ok(m) if m.bytes == 0 => return,
            Ok(m) => (m.bytes, rights(&m)),
        };
        // SAFETY: this process has one thread.
        if let Ok(nix::unistd::ForkResult::Child) = unsafe { nix::unistd::fork() } {
            set_child_flags(0);
            let mut fds = fds.into_iter();
            if let Some(answer) = fds.next() {
                let mut answer = UnixStream::from(answer);
                // A group of its own: whoever gives the step up ends all of it, a hook that hangs included.
                let _ = nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0));
                let _ = answer.write_all(format!("{}\n", std::process::id()).as_bytes());
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| steps::work(&body[..length], fds)));
                let done = done.unwrap_or_else(|_| Err(io::Error::other("the engine panicked")));
                let told = match done {
                    Ok(pid) => json!({"pid": pid}),
                    Err(e) => json!({"error": e.to_string()}),
                };
                let _ = answer.write_all(format!("{told}\n").as_bytes());
            }
            // SAFETY: ends this worker without running what the server registered at exit.
            unsafe { libc::_exit(0) };
        }
    }
}

fn rights(message: &nix::sys::socket::RecvMsg<'_, '_, ()>) -> Vec<OwnedFd> {
    let mut all = Vec::new();
    for part in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(fds) = part {
            // SAFETY: the kernel has just made these descriptors for us.
            all.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    all
}

fn set_child_flags(flags: i32) {
    // SAFETY: a zeroed sigaction is the default action; the structure lives through the call.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_flags = flags;
        libc::sigaction(libc::SIGCHLD, &action, std::ptr::null_mut());
    }
}

//! System calls without a safe wrapper, and the pod's tiny init.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Descriptor of the listener in the server.
const LISTENER: i32 = 3;

/// Hands a listener to a child as descriptor 3.
pub fn pass_listener(command: &mut Command, listener: UnixListener) -> io::Result<()> {
    let act = move || {
        // SAFETY: dup2 and fcntl are async-signal-safe; `listener` is open, it lives in this closure.
        let done = unsafe {
            if listener.as_raw_fd() == LISTENER {
                libc::fcntl(LISTENER, libc::F_SETFD, 0)
            } else {
                libc::dup2(listener.as_raw_fd(), LISTENER)
            }
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes only async-signal-safe calls; this process has one thread.
    unsafe { command.pre_exec(act) };
    Ok(())
}

/// Takes the listener in the server.
pub fn take_listener() -> UnixListener {
    // SAFETY: `start` passed an open listener as this descriptor, and nobody else owns it.
    unsafe {
        libc::fcntl(LISTENER, libc::F_SETFD, libc::FD_CLOEXEC);
        UnixListener::from_raw_fd(LISTENER)
    }
}

/// Orphans become children of this process; small arenas.
pub fn prepare() {
    // SAFETY: prctl and mallopt with plain numbers touch no memory of ours.
    unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Any child.
pub const ANY: i32 = -1;

/// Reaps one child that has ended, of those that `which` names as waitpid(2) has it: pid and exit code (128 + signal).
pub fn reap(which: i32) -> Option<(u32, u32)> {
    let mut status = 0;
    // SAFETY: `status` is valid for writing.
    let pid = unsafe { libc::waitpid(which, &mut status, libc::WNOHANG) };
    if pid <= 0 {
        return None;
    }
    let code = if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    Some((pid as u32, code as u32))
}

/// Sends a signal.
pub fn kill(pid: u32, signal: u32) -> io::Result<()> {
    if pid < 2 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: kill(2) touches no memory.
    if unsafe { libc::kill(pid as i32, signal as i32) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How far above a process an ancestor is looked for.
const GENERATIONS: usize = 8;

/// Does a living process descend from this one? `None`: there is no such process.
pub fn is_ours(pid: u32) -> Option<bool> {
    let parent = |pid: u32| -> Option<u32> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Behind the parenthesised name: state, parent.
        text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let first = parent(pid)?;
    Some(std::iter::successors(Some(first), |p| parent(*p)).take(GENERATIONS).any(|p| p == std::process::id()))
}

/// Kills a process group.
pub fn kill_group(leader: u32) {
    if leader > 1 {
        // SAFETY: kill(2) touches no memory.
        unsafe { libc::kill(-(leader as i32), libc::SIGKILL) };
    }
}

/// Seconds that local time is ahead of UTC at a moment.
pub fn local_offset(unix: i64) -> i64 {
    // SAFETY: all zeros is a valid `tm`, and localtime_r writes only it.
    unsafe {
        let mut local: libc::tm = std::mem::zeroed();
        let at: libc::time_t = unix;
        if libc::localtime_r(&at, &mut local).is_null() { 0 } else { local.tm_gmtoff }
    }
}

/// Init of a shared PID namespace: reaps, and ends on SIGTERM, or when the shim has gone and with it the other end of the pipe that is our input.
pub fn pod_init() -> io::Result<()> {
    let _ = nix::sys::prctl::set_name(c"pod-init");
    // SAFETY: the set is initialised by sigemptyset before use, and lives until sigwait returns; fcntl and read get an open descriptor, and a buffer of one byte.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGIO] {
            libc::sigaddset(&mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        // SIGIO tells of a change to the pipe.
        if libc::fcntl(0, libc::F_SETOWN, libc::getpid()) < 0 || libc::fcntl(0, libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK) < 0 {
            return Err(io::Error::last_os_error());
        }
        // The shim may have gone before.
        let (mut signal, mut byte) = (libc::SIGIO, 0_u8);
        loop {
            match signal {
                libc::SIGCHLD => while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {},
                // End of file; as long as the shim lives there is nothing to read.
                libc::SIGIO if libc::read(0, (&raw mut byte).cast(), 1) == 0 => return Ok(()),
                libc::SIGIO => {}
                _ => return Ok(()),
            }
            libc::sigwait(&set, &mut signal);
        }
    }
}

//! System calls without a safe wrapper.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Waits on a descriptor for reading.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and gives the same descriptor for as long as it lives; the `AsyncFd` owns it, and nothing here takes it out.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}

/// Brings `lo` up in the network namespace of this thread.
pub(crate) fn loopback_up() -> std::io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: `ifreq` is plain data for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the socket is open and `request` is a valid ifreq that lives until the call returns.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Kills a process group that is led by `pid`.
pub(crate) fn kill_group(pid: u32) {
    if pid > 1 {
        // SAFETY: kill(2) touches no memory; the group is our child's own.
        unsafe { libc::kill(-(pid as i32), libc::SIGKILL) };
    }
}

/// Bytes of the owner's stack; it makes two system calls.
const STACK: usize = 16 << 10;

/// A process that was born in a new user namespace, with a network namespace owned by that. It does nothing but hold them; it is killed on drop, and
/// dies with the thread that made it. It shares our memory instead of copying it (as `vfork` does), so it costs no page tables of the daemon's.
pub(crate) struct Owner {
    pid: libc::pid_t,
    _stack: Vec<u8>,
}

impl Owner {
    /// Makes it. For a thread that ends soon: its signals stay blocked.
    pub(crate) fn spawn() -> std::io::Result<Owner> {
        let mut stack = vec![0u8; STACK];
        // SAFETY: `all` is initialised by sigfillset before use. With all signals blocked no handler of ours can run in the child.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        }
        let top = stack.as_mut_ptr_range().end;
        let top = top.wrapping_sub(top as usize % 16);
        let flags = libc::CLONE_VM | libc::CLONE_NEWUSER | libc::CLONE_NEWNET;
        // SAFETY: `top` is the aligned end of a stack that outlives the child (see `drop`), and `hold` keeps to what its comment says.
        let pid = unsafe { libc::clone(hold, top.cast(), flags, std::ptr::null_mut()) };
        if pid < 0 { Err(std::io::Error::last_os_error()) } else { Ok(Owner { pid, _stack: stack }) }
    }
    /// Its pid.
    pub(crate) fn pid(&self) -> libc::pid_t {
        self.pid
    }
}

/// Runs in the child, which shares memory and thread-local storage with its maker: no allocation, no lock, and only system calls that do not fail,
/// because a failure would write the maker's `errno`.
extern "C" fn hold(_: *mut libc::c_void) -> libc::c_int {
    // SAFETY: both calls touch no memory; with all signals blocked the second returns never.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        loop {
            libc::syscall(libc::SYS_ppoll, 0usize, 0usize, 0usize, 0usize, 0usize);
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // SAFETY: the pid is our own child's, not yet waited for. __WALL because it sends no signal at its end.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            while libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL) < 0 && *libc::__errno_location() == libc::EINTR {}
        }
    }
}

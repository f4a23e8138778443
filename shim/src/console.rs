//! Terminals: a runtime makes the pair inside the container and sends us its master over a socket (the OCI runtimes' `--console-socket`).
#![allow(unsafe_code)]
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A socket that waits for one terminal. Its path is short, because socket paths are limited to 107 bytes.
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    /// Makes the socket.
    pub fn listen() -> io::Result<Console> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("troupe-tty-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        Ok(Console { listener, path })
    }
    /// Where the runtime connects.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// The terminal; the runtime has sent it already.
    pub fn receive(&self) -> io::Result<OwnedFd> {
        self.listener.set_nonblocking(true)?;
        let (socket, _) = self.listener.accept()?;
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(std::time::Duration::from_secs(1)))?;
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut name = [0u8; 4096];
        let mut parts = [io::IoSliceMut::new(&mut name)];
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = part
                && let Some(fd) = fds.first()
            {
                // SAFETY: the kernel has just made this descriptor for us.
                return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
            }
        }
        Err(io::Error::other("the runtime sent no terminal"))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Sets a terminal's size.
pub fn resize(terminal: BorrowedFd<'_>, width: u32, height: u32) -> io::Result<()> {
    let size = libc::winsize { ws_col: width as u16, ws_row: height as u16, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` lives through the call, and this ioctl only reads it.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

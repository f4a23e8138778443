//! A thread that holds none of the process's files. The one module of the kernel with unsafe code: a system call that std does not offer.
//!
//! A path may lie on a file system whose server never answers, and then not even SIGKILL ends the thread that asked: it keeps the process, and with it
//! every open file, from going away. Locks stay locked and sockets stay bound, and the next daemon cannot start. A thread without files keeps nothing.
#![allow(unsafe_code)]
use std::io;

/// Gives this thread a file table of its own, with nothing but standard input, output and error in it. Cannot be undone.
pub fn let_go_of_files() -> io::Result<()> {
    // SAFETY: unshare(2) with CLONE_FILES copies this thread's file table; it touches no memory of ours.
    if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: close_range(2) on a table that only this thread has. Nothing on this thread owns a descriptor: it has just begun, and is handed none.
    if unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

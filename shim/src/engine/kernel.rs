//! System calls of the engine's workers, each a process of one thread.
use std::io;

/// linux/sched.h; libc's own constant is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn done(result: i64) -> io::Result<u32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as u32) }
}

/// Like fork, into a cgroup of version 2 where there is one; a `sibling` is a child of this process' parent. Answers 0 in the child.
pub fn clone(cgroup: Option<i32>, sibling: bool) -> io::Result<u32> {
    // SAFETY: a zeroed clone_args asks for a plain fork, with a copy of this memory and stack; this process has one thread, so the copy is whole.
    unsafe {
        let mut args: libc::clone_args = std::mem::zeroed();
        // The kernel refuses a signal for a child of somebody else.
        if sibling {
            args.flags |= libc::CLONE_PARENT as u64
        } else {
            args.exit_signal = libc::SIGCHLD as u64
        }
        if let Some(fd) = cgroup {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = fd as u64;
        }
        done(libc::syscall(libc::SYS_clone3, std::ptr::from_ref(&args), size_of::<libc::clone_args>()))
    }
}

/// Takes the identity of root in the user namespace that was just entered.
pub fn become_root() -> io::Result<()> {
    // SAFETY: plain numbers. The raw calls, as glibc's act on all threads and there is one.
    unsafe {
        done(libc::syscall(libc::SYS_setresgid, 0, 0, 0))?;
        done(libc::syscall(libc::SYS_setresuid, 0, 0, 0))?;
    }
    Ok(())
}

/// Makes this process undumpable: it cannot be traced, and its /proc files are root's.
pub fn hide() {
    // SAFETY: prctl with plain numbers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

/// Kills a process.
pub fn kill(pid: u32) {
    // SAFETY: kill touches no memory.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
}

/// Kills a process that was made here and failed, and reaps it where it is our child.
pub fn end(pid: u32) {
    kill(pid);
    reap(pid);
}

/// Waits for the end of a child; a process that is not our child is left to its parent.
pub fn reap(pid: u32) {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(pid as i32, std::ptr::null_mut(), 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

/// Writes to a descriptor, as far as it goes.
pub fn tell(fd: i32, text: &str) {
    // SAFETY: the text is valid for its length; a bad descriptor is an error, which nobody could be told of.
    let _ = unsafe { libc::write(fd, text.as_ptr().cast(), text.len()) };
}

/// Ends this process without running what others registered at exit.
pub fn exit(code: i32) -> ! {
    // SAFETY: _exit does not come back.
    unsafe { libc::_exit(code) }
}

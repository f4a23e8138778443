//! A thread that holds none of the process's files. The one module of the kernel with unsafe code: a system call that std does not offer.
//!
//! A path may lie on a file system whose server never answers, and then not even SIGKILL ends the thread that asked: it keeps the process, and with it
//! every open file, from going away. Locks stay locked and sockets stay bound, and the next daemon cannot start. A thread without files keeps nothing.
#![allow(unsafe_code)]
use std::io;

/// How procfs names an event counter.
const COUNTER: &str = "anon_inode:[eventfd]";

/// Gives this thread a file table of its own, with nothing in it but standard input, output and error, and the event counters by which the runtime's
/// threads are woken: the result of the call must reach whoever waits for it, and a counter keeps nobody from anything. Cannot be undone.
pub fn let_go_of_files() -> io::Result<()> {
    // SAFETY: unshare(2) with CLONE_FILES copies this thread's file table; it touches no memory of ours.
    if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut first = 3;
    for kept in counters()? {
        if first < kept {
            close(first, kept - 1)?;
        }
        first = kept + 1;
    }
    close(first, u32::MAX)
}

/// This thread's event counters, in order.
fn counters() -> io::Result<Vec<u32>> {
    let mut all = Vec::new();
    for file in std::fs::read_dir("/proc/thread-self/fd")? {
        let file = file?;
        let counter = std::fs::read_link(file.path()).is_ok_and(|to| to.as_os_str() == COUNTER);
        all.extend(file.file_name().to_str().filter(|_| counter).and_then(|n| n.parse::<u32>().ok()).filter(|n| *n > 2));
    }
    all.sort_unstable();
    Ok(all)
}

fn close(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: close_range(2) on a table that only this thread has. Nothing on this thread owns a descriptor: it has just begun, and is handed none.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    #[test]
    fn a_thread_without_files_still_wakes_a_sleeping_runtime() {
        // The waiting thread sleeps in its I/O driver, where only the driver's counter wakes it.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let held = std::fs::File::open("/proc/self/status").unwrap();
        let (tx, rx) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            super::let_go_of_files().unwrap();
            let left: Vec<_> =
                std::fs::read_dir("/proc/thread-self/fd").unwrap().flatten().filter_map(|f| std::fs::read_link(f.path()).ok()).collect();
            std::thread::sleep(std::time::Duration::from_millis(100));
            tx.send(left).unwrap();
        });
        let left = runtime.block_on(async { tokio::time::timeout(std::time::Duration::from_secs(10), rx).await }).unwrap().unwrap();
        assert!(!left.iter().any(|l| l.ends_with("status")), "{left:?}");
        drop(held);
        thread.join().unwrap();
    }
}

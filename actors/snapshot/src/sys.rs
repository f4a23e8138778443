//! System calls without a safe wrapper.
use std::os::fd::{AsRawFd, BorrowedFd};

/// Lets the disk begin with a file's pages, without waiting for it. Only a hint: whoever needs them on disk syncs.
pub fn begin_writing(file: BorrowedFd<'_>) {
    // SAFETY: a call on an open descriptor, with numbers only; it touches no memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

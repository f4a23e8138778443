//! System calls without a safe wrapper.
use std::os::fd::{AsRawFd, BorrowedFd};

/// Lets the disk begin with these bytes of a file, without waiting for it. Only a hint: whoever needs them on disk syncs.
pub fn begin_writing(file: BorrowedFd<'_>, from: u64, bytes: u64) {
    // SAFETY: a call on an open descriptor, with numbers only; it touches no memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), from as i64, bytes as i64, libc::SYNC_FILE_RANGE_WRITE) };
}

//! The one unsafe call.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has tokio watch a descriptor for readability.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor must stay open and the same while it is registered. An `OwnedFd` never changes its number and is closed only by its drop, and
    // `AsyncFd` owns it and deregisters before it drops it; nothing here takes it out.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}

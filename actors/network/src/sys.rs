//! System calls without a safe wrapper.
#![allow(unsafe_code)]
use std::os::fd::AsRawFd;

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

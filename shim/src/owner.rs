//! Who owns what a container's process is given, where the container has users of its own.
use crate::idmap::Maps;
use crate::runtime::ChildIo;
use serde_json::Value;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Lets root of the container's user namespace pass through the bundle to its root file system; it sees nothing else there.
pub fn open_bundle(bundle: &Path, maps: &Maps) -> io::Result<()> {
    if let Some(gid) = maps.gid.outside(0) {
        std::os::unix::fs::chown(bundle, None, Some(gid))?;
        std::fs::set_permissions(bundle, std::fs::Permissions::from_mode(0o710))?;
    }
    Ok(())
}

/// Gives pipes and FIFOs to the process' user, who may open them again by `/dev/stdout` and the like. A stream that cannot be given works all the
/// same, except for that.
pub fn give(io: &ChildIo, process: &Value, maps: &Maps) {
    let ChildIo::Streams(streams) = io else { return };
    let id = |key: &str| process.pointer(&format!("/user/{key}")).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let outside = |ranges: &crate::idmap::Ranges, id: u32| if ranges.is_empty() { Some(id) } else { ranges.outside(id) };
    let (uid, gid) = (outside(&maps.uid, id("uid")), outside(&maps.gid, id("gid")));
    for fd in [&streams.stdin, &streams.stdout, &streams.stderr] {
        let fifo = nix::sys::stat::fstat(fd.as_fd()).is_ok_and(|s| s.st_mode & libc::S_IFMT == libc::S_IFIFO);
        if fifo && let Err(error) = std::os::unix::fs::fchown(fd, uid, gid) {
            tracing::debug!(%error, "a stream keeps its owner");
        }
    }
}

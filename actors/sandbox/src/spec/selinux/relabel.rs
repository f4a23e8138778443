//! Gives a volume's files the label of the container that uses it.
use kernel::{Fault, Result};
use rustix::fs::{XattrFlags, lsetxattr};
use rustix::io::Errno;
use std::path::Path;

const NAME: &str = "security.selinux";
/// Relabelling one of these would take the node down.
const NEVER: &[&str] =
    &["/", "/usr", "/etc", "/bin", "/boot", "/dev", "/lib", "/lib64", "/opt", "/proc", "/root", "/run", "/sbin", "/sys", "/var"];

/// Labels `path` and everything below. File systems without labels are passed over.
pub fn relabel(path: &Path, label: &str) -> Result<()> {
    if label.is_empty() {
        return Ok(());
    }
    if NEVER.iter().any(|p| path == Path::new(p)) {
        return Err(Fault::invalid_argument(format!("SELinux relabeling of {} is not allowed", path.display())));
    }
    match one(path, label) {
        Err(Errno::OPNOTSUPP) => Ok(()),
        Err(e) => Err(Fault::from(std::io::Error::from(e)).context(format!("relabel {:?} with {label:?} failed", path))),
        Ok(()) => below(path, label),
    }
}

fn one(path: &Path, label: &str) -> Result<(), Errno> {
    lsetxattr(path, NAME, label.as_bytes(), XattrFlags::empty())
}

fn below(dir: &Path, label: &str) -> Result<()> {
    if !dir.symlink_metadata().is_ok_and(|m| m.is_dir()) {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir).map_err(Fault::from)? {
        let path = entry.map_err(Fault::from)?.path();
        match one(&path, label) {
            // Gone in the meantime, or on a file system without labels.
            Err(Errno::NOENT | Errno::OPNOTSUPP | Errno::ROFS) | Ok(()) => {}
            Err(e) => return Err(Fault::from(std::io::Error::from(e)).context(format!("relabel {path:?} with {label:?} failed"))),
        }
        below(&path, label)?;
    }
    Ok(())
}

//! Copies a directory as it is: owners, modes, times, extended attributes, links, device nodes. Works on descriptors below a root, so that no link of
//! the image leads the copy to files of the host. All of it blocks.
use kernel::{Class, Fault, Result, ResultExt};
use rustix::fs::{self as sys, AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// An attribute that names a place in a policy, not a property of the data.
const SELINUX: &[u8] = b"security.selinux";

fn io(e: rustix::io::Errno) -> Fault {
    Fault::from(std::io::Error::from(e))
}

/// Opens a directory below `root`, as a process whose root it is would.
pub fn open_below(root: &Path, place: &Path) -> Result<OwnedFd> {
    let base = sys::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(io)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    match sys::openat2(&base, place.strip_prefix("/").unwrap_or(place), flags, Mode::empty(), resolve) {
        Err(rustix::io::Errno::NOTDIR) => Err(Fault::new(Class::InvalidArgument, "not a directory")),
        other => other.map_err(io),
    }
}

/// Copies the directory `from` with all that is in it onto the directory `to`.
pub fn tree(from: OwnedFd, to: &Path) -> Result<()> {
    let target = sys::open(to, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).map_err(io)?;
    let root = target.try_clone()?;
    Copier { root, links: BTreeMap::new() }.directory(&from, &target, Path::new(""))
}

struct Copier {
    root: OwnedFd,
    /// Files with several names: where the first one was copied to.
    links: BTreeMap<(u64, u64), PathBuf>,
}

impl Copier {
    fn directory(&mut self, from: &OwnedFd, to: &OwnedFd, place: &Path) -> Result<()> {
        for entry in Dir::read_from(from).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                self.entry(from, to, name, &place.join(name)).with_context(|| format!("copy {:?}", place.join(name)))?;
            }
        }
        let stat = sys::fstat(from).map_err(io)?;
        attributes(from, to)?;
        sys::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid))).map_err(io)?;
        sys::fchmod(to, mode(&stat)).map_err(io)?;
        sys::futimens(to, &times(&stat)).map_err(io)
    }

    fn entry(&mut self, from: &OwnedFd, to: &OwnedFd, name: &OsStr, place: &Path) -> Result<()> {
        let stat = sys::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).map_err(io)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                return sys::linkat(&self.root, first, to, name, AtFlags::empty()).map_err(io);
            }
            self.links.insert((stat.st_dev, stat.st_ino), place.to_owned());
        }
        let open = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match kind {
            FileType::Directory => {
                let source = sys::openat(from, name, OFlags::RDONLY | OFlags::DIRECTORY | open, Mode::empty()).map_err(io)?;
                sys::mkdirat(to, name, Mode::from_raw_mode(0o700)).map_err(io)?;
                let target = sys::openat(to, name, OFlags::RDONLY | OFlags::DIRECTORY | open, Mode::empty()).map_err(io)?;
                return self.directory(&source, &target, place);
            }
            FileType::RegularFile => {
                let source = sys::openat(from, name, OFlags::RDONLY | open, Mode::empty()).map_err(io)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | open;
                let target = sys::openat(to, name, flags, Mode::from_raw_mode(0o600)).map_err(io)?;
                std::io::copy(&mut &File::from(source.try_clone()?), &mut &File::from(target.try_clone()?))?;
                attributes(&source, &target)?;
            }
            FileType::Symlink => {
                let target = sys::readlinkat(from, name, Vec::new()).map_err(io)?;
                sys::symlinkat(target.as_c_str(), to, name).map_err(io)?;
            }
            _ => sys::mknodat(to, name, kind, mode(&stat), stat.st_rdev).map_err(io)?,
        }
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        sys::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(io)?;
        if kind != FileType::Symlink {
            // After the owner, whose change clears set-id bits.
            sys::chmodat(to, name, mode(&stat), AtFlags::empty()).map_err(io)?;
        }
        sys::utimensat(to, name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW).map_err(io)
    }
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn times(stat: &Stat) -> Timestamps {
    let time = |s: i64, ns: i64| Timespec { tv_sec: s, tv_nsec: ns as _ };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec as i64),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec as i64),
    }
}

/// Extended attributes, apart from SELinux' and from overlayfs' own. What the target's file system cannot keep is left out, as `cp` does.
fn attributes(from: &OwnedFd, to: &OwnedFd) -> Result<()> {
    for name in names(from)? {
        let bytes = name.as_bytes();
        if bytes == SELINUX || bytes.starts_with(b"trusted.overlay.") {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        let read = match sys::fgetxattr(from, name.as_os_str(), &mut value) {
            Ok(n) => n,
            Err(rustix::io::Errno::NODATA) => continue,
            Err(e) => return Err(io(e).context(format!("attribute {name:?}"))),
        };
        match sys::fsetxattr(to, name.as_os_str(), &value[..read], XattrFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(e) => return Err(io(e).context(format!("attribute {name:?} of fd {}", to.as_raw_fd()))),
        }
    }
    Ok(())
}

fn names(fd: &OwnedFd) -> Result<Vec<OsString>> {
    let mut list = vec![0; 64 << 10];
    let read = match sys::flistxattr(fd, &mut list) {
        Ok(n) => n,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(io(e).context("list attributes")),
    };
    let all = list[..read].split_inclusive(|b| *b == 0).filter_map(|n| CStr::from_bytes_with_nul(n).ok());
    Ok(all.map(|n| OsStr::from_bytes(n.to_bytes()).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_tree_is_copied_as_it_is() {
        let dir = std::env::temp_dir().join(format!("troupe-copy-{}", std::process::id()));
        let (from, to) = (dir.join("from"), dir.join("to"));
        std::fs::create_dir_all(from.join("sub")).unwrap();
        std::fs::create_dir_all(&to).unwrap();
        std::fs::write(from.join("a"), "text").unwrap();
        std::fs::hard_link(from.join("a"), from.join("sub/b")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", from.join("link")).unwrap();
        std::os::unix::fs::chown(from.join("a"), Some(1234), Some(99)).unwrap();
        std::fs::set_permissions(from.join("a"), std::fs::Permissions::from_mode(0o4751)).unwrap();
        std::fs::set_permissions(&from, std::fs::Permissions::from_mode(0o1770)).unwrap();
        std::os::unix::fs::chown(&from, Some(65534), Some(65534)).unwrap();
        tree(open_below(&dir, Path::new("/from")).unwrap(), &to).unwrap();
        let a = to.join("a").metadata().unwrap();
        assert_eq!((a.uid(), a.gid(), a.mode() & 0o7777), (1234, 99, 0o4751));
        assert_eq!(a.ino(), to.join("sub/b").metadata().unwrap().ino());
        assert_eq!(std::fs::read_link(to.join("link")).unwrap(), Path::new("/etc/passwd"));
        let root = to.metadata().unwrap();
        assert_eq!((root.uid(), root.mode() & 0o7777), (65534, 0o1770));
        assert!(open_below(&dir, Path::new("nothing")).unwrap_err().is_not_found());
        assert_eq!(open_below(&dir, Path::new("from/a")).unwrap_err().class, Class::InvalidArgument);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

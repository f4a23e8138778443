//! Mounts with mapped ids: who owns a file is translated on the way through the mount, nothing is copied and nothing changes on disk.
//!
//! Needs Linux 5.12 and a file system that takes part (ext4, xfs, btrfs, tmpfs, …); for the lower layers of an overlay Linux 5.19.
#![allow(unsafe_code)]
use serde_json::{Value, json};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `struct mount_attr`, in its first size.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

fn text(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::other(format!("{}: a NUL in the path", path.display())))
}

fn checked(value: libc::c_long) -> io::Result<i32> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value as i32) }
}

/// A copy of the mount at `path` (with all below it), attached nowhere.
pub fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let name = text(path)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | if recursive { libc::AT_RECURSIVE as libc::c_uint } else { 0 };
    // SAFETY: `name` is a C string that lives through the call.
    let fd = checked(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, name.as_ptr(), flags) });
    let fd = fd.map_err(|e| io::Error::new(e.kind(), format!("copy the mount of {}: {e}", path.display())))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches it.
pub fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let (none, name) = (c"", text(target)?);
    // SAFETY: both are C strings that live through the call, and the descriptor is open.
    let done = unsafe {
        libc::syscall(libc::SYS_move_mount, tree.as_raw_fd(), none.as_ptr(), libc::AT_FDCWD, name.as_ptr(), libc::MOVE_MOUNT_F_EMPTY_PATH)
    };
    checked(done).map(drop).map_err(|e| io::Error::new(e.kind(), format!("mount on {}: {e}", target.display())))
}

fn set(tree: &OwnedFd, recursive: bool, attributes: &Attributes) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `attributes` has the kernel's layout and the size that is passed; the descriptor is open.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<Attributes>(),
        )
    };
    checked(done).map(drop)
}

/// Makes it read-only.
pub fn read_only(tree: &OwnedFd) -> io::Result<()> {
    set(tree, false, &Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() })
}

/// Maps the ids of a copy; `path` is for the error.
pub fn map(tree: &OwnedFd, userns: &OwnedFd, recursive: bool, path: &Path) -> io::Result<()> {
    let attributes = Attributes { set: libc::MOUNT_ATTR_IDMAP, userns: userns.as_raw_fd() as u64, ..Default::default() };
    set(tree, recursive, &attributes).map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => io::Error::new(
            io::ErrorKind::Unsupported,
            format!("the file system of {} ({}) does not support idmapped mounts on this kernel", path.display(), kind(path)),
        ),
        Some(libc::EPERM) => {
            io::Error::new(e.kind(), format!("map the ids of {}: {e}: the mount is mapped already, or not ours to map", path.display()))
        }
        _ => io::Error::new(e.kind(), format!("map the ids of {}: {e}", path.display())),
    })
}

/// The type of the file system that a path is on, from the mount table.
fn kind(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let row = |line: &str| {
        let place = line.split(' ').nth(4)?.replace("\\040", " ");
        let kind = line.split(" - ").nth(1)?.split(' ').next()?.to_owned();
        path.starts_with(&place).then_some((place.len(), kind))
    };
    table.lines().filter_map(row).max_by_key(|(length, _)| *length).map_or_else(|| "unknown".into(), |(_, kind)| kind)
}

/// Ranges of ids of a namespace, as OCI writes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<(u32, u32, u32)>);

impl Ranges {
    /// From an OCI list (`containerID`, `hostID`, `size`).
    pub fn of(list: Option<&Value>) -> Ranges {
        let number = |m: &Value, key: &str| m.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        let all = list.and_then(Value::as_array).into_iter().flatten();
        Ranges(all.map(|m| (number(m, "containerID"), number(m, "hostID"), number(m, "size"))).collect())
    }
    /// From a mount option: `<container>:<host>:<size>`, joined by commas.
    pub fn parse(option: &str) -> io::Result<Ranges> {
        let one = |item: &str| {
            let mut parts = item.split(':').map(str::parse::<u32>);
            match (parts.next(), parts.next(), parts.next(), parts.next()) {
                (Some(Ok(container)), Some(Ok(host)), Some(Ok(size)), None) => Ok((container, host, size)),
                _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("mapping {option:?} is not <container>:<host>:<size>"))),
            }
        };
        option.split(',').map(one).collect::<io::Result<_>>().map(Ranges)
    }
    /// Nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// The id outside for one inside.
    pub fn outside(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|(container, host, size)| id.checked_sub(*container).filter(|n| n < size)?.checked_add(*host))
    }
    /// As `/proc/<pid>/uid_map` takes it.
    pub fn lines(&self) -> String {
        self.0.iter().map(|(container, host, size)| format!("{container} {host} {size}\n")).collect()
    }
    fn json(&self) -> Value {
        self.0.iter().map(|(c, h, s)| json!({"container": c, "host": h, "size": s})).collect()
    }
}

/// Users and groups of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    /// Users.
    pub uid: Ranges,
    /// Groups.
    pub gid: Ranges,
}

impl Maps {
    /// Of an object with `uidMappings` and `gidMappings` (OCI's `linux`, or a mount).
    pub fn of(owner: &Value) -> Maps {
        Maps { uid: Ranges::of(owner.get("uidMappings")), gid: Ranges::of(owner.get("gidMappings")) }
    }
    /// Of a container's specification; empty when its users are the node's.
    pub fn of_container(config: &Value) -> Maps {
        let spaces = config.pointer("/linux/namespaces").and_then(Value::as_array);
        if spaces.is_some_and(|all| all.iter().any(|n| n["type"] == "user")) { Maps::of(&config["linux"]) } else { Maps::default() }
    }
    /// Nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.uid.is_empty() && self.gid.is_empty()
    }
}

/// A container's user namespace, by which mounts are mapped: the pod's own where the mapping is the same, one made for it otherwise.
#[derive(Default)]
pub struct Mapper {
    own: Option<(Maps, OwnedFd)>,
}

impl Mapper {
    /// For a specification.
    pub fn of(config: &Value) -> io::Result<Mapper> {
        let spaces = config.pointer("/linux/namespaces").and_then(Value::as_array).into_iter().flatten();
        let path = spaces.filter(|n| n["type"] == "user").find_map(|n| n["path"].as_str()).filter(|p| !p.is_empty());
        let own = match path {
            Some(path) => Some((Maps::of(&config["linux"]), std::fs::File::open(path)?.into())),
            None => None,
        };
        Ok(Mapper { own })
    }
    /// A namespace with this mapping.
    pub fn namespace(&self, maps: &Maps) -> io::Result<OwnedFd> {
        match &self.own {
            Some((own, fd)) if own == maps => fd.try_clone(),
            _ => crate::userns::alone(&json!({"uid": maps.uid.json(), "gid": maps.gid.json()})),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ranges_are_read_from_options_and_from_oci() {
        let parsed = Ranges::parse("0:1000:10,20:5000:1").unwrap();
        let oci = json!([{"containerID": 0, "hostID": 1000, "size": 10}, {"containerID": 20, "hostID": 5000, "size": 1}]);
        assert_eq!(parsed, Ranges::of(Some(&oci)));
        assert_eq!((parsed.outside(9), parsed.outside(10), parsed.outside(20)), (Some(1009), None, Some(5000)));
        assert_eq!(parsed.lines(), "0 1000 10\n20 5000 1\n");
        for bad in ["", "1:2", "a:b:c", "1:2:3:4"] {
            assert!(Ranges::parse(bad).is_err(), "{bad:?}");
        }
    }
}

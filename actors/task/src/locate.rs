//! From a runtime's name to its shim binary (`contracts/core.md` §5.1).
//!
//! Not cached, unlike containerd: a few `stat` calls cost less than a daemon that goes on using a path that an upgrade has moved.
use kernel::{Fault, Result};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The binary's name for a runtime type such as `io.containerd.troupe.v2`.
fn binary_name(runtime: &str) -> Result<String> {
    let parts: Vec<&str> = runtime.split('.').collect();
    match parts.as_slice() {
        [first, .., name, version] if !first.is_empty() => Ok(format!("containerd-shim-{name}-{version}")),
        [name, version] if !name.is_empty() => Ok(format!("containerd-shim-{name}-{version}")),
        _ => Err(Fault::invalid_argument(format!(
            "runtime {runtime:?} is neither an absolute path nor a name such as io.containerd.troupe.v2"
        ))),
    }
}

/// Finds it. `exe` is our own executable.
pub fn locate(runtime: &str, exe: &Path) -> Result<PathBuf> {
    if runtime.starts_with('/') {
        let path = PathBuf::from(runtime);
        return if path.exists() { Ok(path) } else { Err(Fault::not_found(format!("shim {runtime} does not exist"))) };
    }
    if runtime.contains('/') {
        return Err(Fault::invalid_argument(format!("runtime {runtime:?}: a path must be absolute")));
    }
    let name = binary_name(runtime)?;
    let own = exe.parent().map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Ours is built and shipped beside the daemon: the one there fits it best.
    let first = if name.contains("-troupe-") { own.clone() } else { None };
    let dirs = first.into_iter().chain(std::env::current_dir()).chain(std::env::split_paths(&path)).chain(own);
    let found = dirs.map(|d| d.join(&name)).find(|p| executable(p));
    found.ok_or_else(|| Fault::not_found(format!("runtime {runtime}: {name} is neither beside {} nor in PATH", exe.display())))
}

fn executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kernel::Class;

    #[test]
    fn names_become_binaries() {
        assert_eq!(binary_name("io.containerd.runc.v2").unwrap(), "containerd-shim-runc-v2");
        assert_eq!(binary_name("troupe.v2").unwrap(), "containerd-shim-troupe-v2");
        for bad in ["runc", "", ".v2", ".a.b"] {
            assert_eq!(binary_name(bad).unwrap_err().class, Class::InvalidArgument, "{bad:?}");
        }
    }

    #[test]
    fn ours_is_found_beside_the_daemon_and_paths_are_taken_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let shim = dir.path().join("containerd-shim-troupe-v2");
        std::fs::write(&shim, "").unwrap();
        let exe = dir.path().join("troupe");
        assert!(locate("io.containerd.troupe.v2", &exe).map_or(true, |p| p != shim), "not executable");
        std::fs::set_permissions(&shim, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(locate("io.containerd.troupe.v2", &exe).unwrap(), shim);
        assert_eq!(locate(shim.to_str().unwrap(), Path::new("/none")).unwrap(), shim);
        assert_eq!(locate("/no/such/shim", &exe).unwrap_err().class, Class::NotFound);
        assert_eq!(locate("a/b", &exe).unwrap_err().class, Class::InvalidArgument);
    }
}

//! Unix sockets: parent directory made, a stale socket removed, mode 0660.

use kernel::{Fault, Result, ResultExt as _};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use tokio::net::UnixListener;

/// Owner and group may connect, as with containerd's sockets.
const MODE: u32 = 0o660;

/// Binds a listener. A socket on which nobody listens any more is replaced; one that is in use, or a file of another kind, is not.
pub fn bind(path: &Path) -> Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    remove_stale(path)?;
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(MODE)).with_context(|| format!("set the mode of {}", path.display()))?;
    Ok(listener)
}

fn remove_stale(path: &Path) -> Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Ok(meta) => meta.file_type(),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("look at {}", path.display())),
    };
    if !kind.is_socket() {
        return Err(Fault::failed_precondition(format!(
            "{} exists and is not a socket: move it away or configure another address",
            path.display()
        )));
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(Fault::failed_precondition(format!(
            "{} is in use by another process: stop it or configure another address",
            path.display()
        )));
    }
    fs::remove_file(path).with_context(|| format!("remove the stale socket {}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/s.sock");
        let first = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        let refused = bind(&path).unwrap_err();
        assert!(refused.message.contains("in use"), "{refused}");
        drop(first);
        bind(&path).unwrap();
    }

    #[tokio::test]
    async fn a_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(bind(&path).unwrap_err().message.contains("not a socket"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }
}

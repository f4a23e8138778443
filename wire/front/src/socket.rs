//! Unix sockets: parent directory made, a stale socket removed, mode 0660.

use kernel::{Fault, Result, ResultExt as _};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

/// Owner and group may connect, as with containerd's sockets.
const MODE: u32 = 0o660;
/// A process that was killed lets go within milliseconds, unless a thread of it is stuck in the kernel with its files.
const DYING: Duration = Duration::from_secs(2);
/// Until a holder is believed to be alive: one that is about to end may look so for a moment.
const LIVING: Duration = Duration::from_millis(300);

/// Binds a listener. A socket on which nobody listens any more is replaced; one that is in use, or a file of another kind, is not.
pub async fn bind(path: &Path) -> Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    remove_stale(path).await?;
    let listener = UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(MODE)).with_context(|| format!("set the mode of {}", path.display()))?;
    Ok(listener)
}

async fn remove_stale(path: &Path) -> Result<()> {
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
    wait_for_holder(path).await?;
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).with_context(|| format!("remove the stale socket {}", path.display())),
        _ => Ok(()),
    }
}

/// Who listens on the socket.
enum Holder {
    Nobody,
    /// A process; `None` where the kernel does not say which, or it takes no more connections.
    Somebody(Option<u32>),
}

async fn holder(path: &Path) -> Holder {
    match UnixStream::connect(path).await {
        Ok(stream) => Holder::Somebody(stream.peer_cred().ok().and_then(|c| c.pid()).and_then(|p| u32::try_from(p).ok())),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Holder::Somebody(None),
        Err(_) => Holder::Nobody,
    }
}

/// Waits until nobody holds the socket, or only a process that will never serve it again: it was killed, and a thread of it is stuck in the kernel.
async fn wait_for_holder(path: &Path) -> Result<()> {
    let (began, mut seen_living) = (Instant::now(), None);
    loop {
        match holder(path).await {
            Holder::Nobody => return Ok(()),
            Holder::Somebody(Some(pid)) if kernel::dying(pid) => {
                seen_living = None;
                if began.elapsed() > DYING {
                    tracing::warn!(pid, socket = %path.display(), "a killed process is stuck in the kernel; its socket is taken over");
                    return Ok(());
                }
            }
            Holder::Somebody(pid) => {
                if seen_living.get_or_insert_with(Instant::now).elapsed() > LIVING {
                    let who = pid.map_or_else(|| "another process".to_owned(), |p| format!("process {p}"));
                    let text = format!("{} is in use by {who}: stop it or configure another address", path.display());
                    return Err(Fault::failed_precondition(text));
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/s.sock");
        let first = bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        let refused = bind(&path).await.unwrap_err();
        assert!(refused.message.contains("in use"), "{refused}");
        drop(first);
        bind(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(bind(&path).await.unwrap_err().message.contains("not a socket"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }
}

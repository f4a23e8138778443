//! Notices changes of a directory: inotify, and a look now and then for what inotify does not tell (network file systems, targets of links).
use kernel::{Cx, Result, ResultExt};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::unix::AsyncFd;

/// Directories answer in microseconds.
const IO: Duration = Duration::from_secs(5);
/// Between looks without a notice.
const LOOK: Duration = Duration::from_secs(10);
/// Installers write several files; so long without a further notice means that they are done.
const QUIET: Duration = Duration::from_millis(50);
/// Somebody who never stops writing is read nevertheless.
const BURST: u32 = 10;

/// A directory that is watched.
pub(crate) struct Watch(AsyncFd<OwnedFd>);

/// What was noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// Files may have changed.
    Changed,
    /// The directory is gone, or is another one now.
    Gone,
}

impl Watch {
    /// Watches a directory, which is made if it is missing, and those below it.
    pub async fn open(cx: &Cx, dir: &Path) -> Result<Watch> {
        let dir = dir.to_owned();
        let fd = cx.blocking("watch CNI configurations", IO, move || open(&dir)).await?;
        Ok(Watch(crate::sys::watch(fd)?))
    }

    /// Waits for the next change, to its end.
    pub async fn next(&self) -> Result<Notice> {
        let mut notice = match tokio::time::timeout(LOOK, self.read()).await {
            Ok(notice) => notice?,
            Err(_) => return Ok(Notice::Changed),
        };
        for _ in 0..BURST {
            match tokio::time::timeout(QUIET, self.read()).await {
                Ok(Ok(Notice::Gone)) => notice = Notice::Gone,
                Ok(more) => drop(more?),
                Err(_) => break,
            }
        }
        Ok(notice)
    }

    async fn read(&self) -> Result<Notice> {
        loop {
            let mut ready = self.0.readable().await?;
            let (mut seen, mut gone) = (false, false);
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(self.0.get_ref(), &mut buffer);
            while let Ok(event) = reader.next() {
                seen = true;
                gone |= event.events().intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED | ReadFlags::UNMOUNT);
                // A directory of further plugins has to be watched, too, and is found by opening anew.
                gone |= event.events().contains(ReadFlags::ISDIR);
            }
            ready.clear_ready();
            if seen {
                return Ok(if gone { Notice::Gone } else { Notice::Changed });
            }
        }
    }
}

fn open(dir: &Path) -> Result<OwnedFd> {
    if !dir.is_dir() {
        if let Some(parent) = dir.parent() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .with_context(|| format!("create {}", parent.display()))?;
        }
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(std::io::Error::from).context("inotify")?;
    let below = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir());
    let all: Vec<PathBuf> = std::iter::once(dir.to_owned()).chain(below).collect();
    for path in all {
        let flags = WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&fd, &path, flags).map_err(std::io::Error::from).with_context(|| format!("watch {}", path.display()))?;
    }
    Ok(fd)
}

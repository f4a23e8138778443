//! FIFOs of execs and of clients' sessions: `<state>/fifo/<sandbox>/<container>.<exec>-<stream>`.
//!
//! A FIFO is made before the shim hears of its exec and removed after the shim has forgotten it, so the directory is the record of what is under way: whoever
//! takes a shim over finds there what a killed daemon or a crashed actor has left, kills it and removes it. Otherwise a probe that was running at that moment
//! would run on in the container with nobody to end it.
//!
//! An [`ExecSync`](messages::task::ExecSync) lives and dies with its generation of the pod's actor. A session belongs to the streaming server, which outlives
//! the actor but not the daemon; its name has this run of the daemon in it. One that was closed while its shim was silent is swept like those of others.
use crate::link::{Link, rpc};
use crate::{bundle, pod::Pod};
use kernel::{Class, Cx, Result, ResultExt};
use proto::task::DeleteRequest;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;

/// Pause before an exec that was just being started is killed again.
const AGAIN: Duration = Duration::from_millis(50);

/// Names this run of the daemon.
static RUN: LazyLock<String> = LazyLock::new(|| format!("s{}", Uuid::new_v4().simple()));

/// An exec that its caller waits for; under way as long as this lives.
pub struct Live {
    pod: Rc<Pod>,
    /// Id of the exec.
    pub id: String,
}

impl Pod {
    /// Names a new exec.
    pub fn new_exec(self: &Rc<Self>) -> Live {
        let id = format!("x{}", Uuid::new_v4().simple());
        self.execs.borrow_mut().insert(id.clone());
        Live { pod: self.clone(), id }
    }

    /// Kills the execs that nobody waits for any more, and removes the FIFOs of those and of sessions that have lost their server.
    pub fn sweep_execs(self: &Rc<Self>, cx: &Cx, link: &Link) {
        let (pod, link) = (self.clone(), link.clone());
        cx.spawn("exec.sweep", move |cx| async move {
            let left = abandoned(&bundle::fifos(&pod.args, &pod.id), |id| pod.is_live(id));
            let all = left.into_iter().map(|((container, exec), paths)| pod.sweep(&cx, &link, container, exec, paths));
            futures::future::join_all(all).await;
        });
    }

    async fn sweep(&self, cx: &Cx, link: &Link, container: String, exec_id: String, paths: Vec<PathBuf>) {
        tracing::info!(sandbox = self.id, container, exec_id, "an exec has lost its caller and is ended");
        match self.end_exec(cx, link, &container, &exec_id).await {
            Ok(()) => {
                paths.iter().for_each(|p| drop(std::fs::remove_file(p)));
                self.closed.borrow_mut().remove(&exec_id);
            }
            // Its FIFOs stay, so the next sweep finds it.
            Err(error) => tracing::warn!(sandbox = self.id, container, exec_id, %error, "an exec is not deleted"),
        }
    }

    /// Ends an exec, whatever it is at: kills it if it runs, and has the shim forget it.
    pub async fn end_exec(&self, cx: &Cx, link: &Link, id: &str, exec_id: &str) -> Result<()> {
        let until = Instant::now() + self.args.timeouts.cleanup;
        loop {
            self.kill_exec(cx, link, id, exec_id).await;
            match self.delete_exec(cx, link, id, exec_id).await {
                // It was still being started when it was to be killed.
                Err(f) if f.class == Class::FailedPrecondition && Instant::now() < until => tokio::time::sleep(AGAIN).await,
                other => return other,
            }
        }
    }

    /// Has the shim forget an exec that has ended or was never started. Succeeds when it does not know it.
    pub async fn delete_exec(&self, cx: &Cx, link: &Link, id: &str, exec_id: &str) -> Result<()> {
        let delete = DeleteRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
        match rpc(cx, "Task/Delete", self.args.timeouts.cleanup, |c| link.task.delete(c, &delete)).await {
            Err(f) if !f.is_not_found() => Err(f),
            _ => Ok(()),
        }
    }

    fn is_live(&self, exec_id: &str) -> bool {
        let session = exec_id.starts_with(RUN.as_str()) && !self.closed.borrow().contains(exec_id);
        session || self.execs.borrow().contains(exec_id)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.pod.execs.borrow_mut().remove(&self.id);
    }
}

/// Names a new session.
pub fn new_session() -> String {
    format!("{}{}", *RUN, Uuid::new_v4().simple())
}

/// Makes one stream's FIFO.
pub fn make(dir: &Path, container: &str, exec_id: &str, stream: &str) -> Result<PathBuf> {
    std::fs::create_dir_all(dir).context("make the directory of FIFOs")?;
    let path = dir.join(format!("{container}.{exec_id}-{stream}"));
    bundle::fifo(&path, 0o600)?;
    Ok(path)
}

/// FIFOs by container and exec, without those that are `live`.
fn abandoned(dir: &Path, live: impl Fn(&str) -> bool) -> BTreeMap<(String, String), Vec<PathBuf>> {
    let mut found: BTreeMap<(String, String), Vec<PathBuf>> = BTreeMap::new();
    // No directory: no exec yet.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some((container, exec)) = name.to_str().and_then(|n| n.rsplit_once('-')?.0.rsplit_once('.')) else { continue };
        if !live(exec) {
            found.entry((container.to_owned(), exec.to_owned())).or_default().push(entry.path());
        }
    }
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_live_is_found_by_container_and_exec() {
        let dir = tempfile::tempdir().unwrap();
        let session = new_session();
        for (exec, stream) in [("x1", "out"), ("x1", "err"), ("x2", "out"), (session.as_str(), "in")] {
            make(dir.path(), "web-1.a", exec, stream).unwrap();
        }
        let left = abandoned(dir.path(), |id| id == "x2" || id.starts_with(RUN.as_str()));
        assert_eq!(left.len(), 1);
        assert_eq!(left[&("web-1.a".to_owned(), "x1".to_owned())].len(), 2);
        assert_eq!(abandoned(dir.path(), |_| false).len(), 3);
        assert!(abandoned(&dir.path().join("none"), |_| false).is_empty());
    }
}

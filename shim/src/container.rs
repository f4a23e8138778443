//! Processes of a container: its init and execs.
use crate::cgroup::Cgroup;
use crate::idmap::Maps;
use crate::io::{Streamed, Targets, Wiring};
use crate::reaper::Exit;
use crate::runtime::Runtime;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{Notify, watch};

/// One process.
#[derive(Clone)]
pub struct Process {
    /// 0 until it runs.
    pub pid: u32,
    /// Has it been started?
    pub started: bool,
    /// Streams.
    pub targets: Targets,
    /// Its streams while it runs.
    pub streamed: Streamed,
    /// OCI process of an exec.
    pub spec: Vec<u8>,
    /// Its end.
    pub exit: watch::Sender<Option<Exit>>,
    /// Tells whoever is starting it.
    pub unwanted: Arc<Notify>,
}

impl Process {
    /// Not started yet.
    pub fn new(targets: Targets, spec: Vec<u8>) -> Process {
        Process {
            pid: 0,
            started: false,
            targets,
            streamed: Streamed::default(),
            spec,
            exit: watch::channel(None).0,
            unwanted: Arc::default(),
        }
    }
    /// Whoever is starting it need not go on.
    pub fn give_up(&self) {
        self.unwanted.notify_waiters();
    }
    /// Somebody wants it deleted.
    pub async fn unwanted(&self) -> &'static str {
        self.unwanted.notified().await;
        "it is being deleted"
    }
    /// How it ended, if it has.
    pub fn ended(&self) -> Option<Exit> {
        *self.exit.borrow()
    }
}

/// One container.
#[derive(Clone)]
pub struct Container {
    /// Bundle.
    pub bundle: PathBuf,
    /// How it is run.
    pub runtime: Runtime,
    /// Its init.
    pub init: Process,
    /// Its execs.
    pub execs: BTreeMap<String, Process>,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its users; empty = the node's.
    pub maps: Maps,
    /// Paused.
    pub paused: bool,
    /// Its PID namespace is its own: its processes end with its init.
    pub own_pids: bool,
    /// Held by the one who deletes it; a second caller finds it gone.
    pub deleting: Arc<tokio::sync::Mutex<()>>,
}

/// Waits for a process' end: `at_once` is done, its output drained, then it is told.
pub async fn follow(
    ended: tokio::sync::oneshot::Receiver<Exit>,
    mut wiring: Wiring,
    tell: watch::Sender<Option<Exit>>,
    at_once: impl FnOnce(),
) -> Option<Exit> {
    let exit = ended.await.ok()?;
    at_once();
    wiring.drain().await;
    tell.send_replace(Some(exit));
    Some(exit)
}

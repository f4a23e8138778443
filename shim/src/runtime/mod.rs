//! The runtime: what makes and steers containers. Nothing outside of this folder knows which one it is.
//!
//! Two: the embedded engine ([`embedded`], no binary needed), and a runc-compatible binary ([`external`]) chosen by `BinaryName`. A third is a variant
//! and a file more.
mod embedded;
mod external;
mod run;

use crate::engine::Engine;
use crate::reaper::Reaper;
use serde_json::Value;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A process' three streams, as descriptors for the child.
pub struct Streams {
    /// Standard input.
    pub stdin: OwnedFd,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
}

/// What a new process talks to.
pub enum ChildIo {
    /// Descriptors.
    Streams(Streams),
    /// A terminal, sent to this socket.
    Terminal(PathBuf),
}

/// What a caller asks for (containerd's `runc.v1.Options`).
#[derive(Default)]
pub struct Wish<'a> {
    /// `BinaryName`; empty = the embedded engine.
    pub binary: &'a str,
    /// `Root`; empty = Troupe's.
    pub root: &'a str,
    /// `SystemdCgroup`.
    pub systemd: bool,
    /// `NoNewKeyring`: the embedded engine never makes one.
    pub no_new_keyring: bool,
    /// The caller's namespace.
    pub namespace: &'a str,
}

/// What a checkpoint shall hold, and where it goes.
#[derive(Default)]
pub struct Checkpoint {
    /// Directory of CRIU's images.
    pub image_path: PathBuf,
    /// Directory of its logs; empty = the same.
    pub work_path: PathBuf,
    /// The processes end.
    pub exit: bool,
    /// Open TCP connections.
    pub open_tcp: bool,
    /// Unix sockets whose other end is outside.
    pub external_unix_sockets: bool,
    /// A terminal.
    pub terminal: bool,
    /// Locks of files.
    pub file_locks: bool,
}

impl Checkpoint {
    /// For the engine's process.
    fn json(&self) -> Value {
        serde_json::json!({"image_path": self.image_path, "work_path": self.work_path, "exit": self.exit, "open_tcp": self.open_tcp,
            "external_unix_sockets": self.external_unix_sockets, "terminal": self.terminal, "file_locks": self.file_locks})
    }
}

/// Where state is kept if the caller does not say.
const ROOT: &str = "/run/troupe/runc";
/// Longest deletion with all that belongs to it, hooks included; it takes milliseconds. Past it, processes, cgroup and state are given back without.
/// Shorter than the daemon's patience with a clean-up, which the rest has to fit in.
const DELETION: Duration = Duration::from_secs(3);
/// Name of the embedded engine in a bundle's note.
const EMBEDDED: &str = "embedded";

/// One of the runtimes.
#[derive(Clone)]
pub enum Runtime {
    /// libcontainer in a helper process.
    Embedded(embedded::Embedded),
    /// A binary.
    External(external::External),
}

impl Runtime {
    /// The one that is wished for.
    pub fn choose(wish: &Wish<'_>, engine: &Engine, reaper: Reaper) -> Runtime {
        let root = Path::new(if wish.root.is_empty() { ROOT } else { wish.root }).join(wish.namespace);
        match wish.binary {
            "" => Runtime::Embedded(embedded::Embedded::new(engine.clone(), &root, wish.systemd)),
            binary => Runtime::External(external::External::new(binary, &root, wish, engine.clone(), reaper)),
        }
    }
    /// Which one it is, and what it last said about a container, for errors.
    pub fn last_words(&self, bundle: &Path) -> String {
        match self {
            Runtime::Embedded(_) => "the engine".into(),
            Runtime::External(r) => r.last_words(&bundle.join("log.json")),
        }
    }
    /// Creates a container; answers the pid of its init.
    pub async fn create(&self, id: &str, bundle: &Path, io: ChildIo) -> io::Result<u32> {
        match self {
            Runtime::Embedded(r) => r.create(id, bundle, io).await,
            Runtime::External(r) => r.create(id, bundle, io).await,
        }
    }
    /// Starts what was created.
    pub async fn start(&self, id: &str, bundle: &Path) -> io::Result<()> {
        match self {
            Runtime::Embedded(r) => r.start(id, bundle).await,
            Runtime::External(r) => r.start(id, bundle).await,
        }
    }
    /// Starts a further process (OCI `Process`); answers its pid.
    pub async fn exec(&self, id: &str, exec_id: &str, bundle: &Path, process: &[u8], io: ChildIo) -> io::Result<u32> {
        match self {
            Runtime::Embedded(r) => r.exec(id, exec_id, bundle, process, io).await,
            Runtime::External(r) => r.exec(id, exec_id, bundle, process, io).await,
        }
    }
    /// Deletes a container, killing what is left of it. Succeeds when it is gone.
    pub async fn delete(&self, id: &str, bundle: &Path) -> io::Result<()> {
        match self {
            Runtime::Embedded(r) => r.delete(id, bundle).await,
            Runtime::External(r) => r.delete(id, bundle).await,
        }
    }
    /// Pauses or resumes.
    pub async fn freeze(&self, id: &str, bundle: &Path, pause: bool) -> io::Result<()> {
        match self {
            Runtime::Embedded(r) => r.freeze(id, pause).await,
            Runtime::External(r) => r.freeze(id, bundle, pause).await,
        }
    }
    /// Writes the processes down with CRIU.
    pub async fn checkpoint(&self, id: &str, bundle: &Path, wish: &Checkpoint) -> io::Result<()> {
        match self {
            Runtime::Embedded(r) => r.checkpoint(id, bundle, wish).await,
            Runtime::External(r) => r.checkpoint(id, bundle, wish).await,
        }
    }
    /// Updates resources (OCI `LinuxResources`).
    pub async fn update(&self, id: &str, bundle: &Path, resources: &[u8]) -> io::Result<()> {
        match self {
            Runtime::Embedded(r) => r.update(id, bundle, resources).await,
            Runtime::External(r) => r.update(id, bundle, resources).await,
        }
    }
}

/// Notes in the bundle who runs it, for [`delete_orphan`].
fn note(bundle: &Path, binary: &str, root: &Path, systemd: bool) -> io::Result<()> {
    std::fs::write(bundle.join("runtime"), format!("{binary}\n{}\n{systemd}\n", root.display()))
}

/// Deletes the container of a bundle whose server is gone. For a process of one thread.
pub fn delete_orphan(bundle: &Path, id: &str) -> io::Result<()> {
    crate::group::end_noted(bundle);
    let Ok(text) = std::fs::read_to_string(bundle.join("runtime")) else { return Ok(()) };
    let mut lines = text.lines();
    let (binary, root) = (lines.next().unwrap_or("runc"), lines.next().unwrap_or(ROOT));
    if binary == EMBEDDED {
        return crate::engine::delete(Path::new(root), id, bundle, true);
    }
    let mut command = std::process::Command::new(binary);
    command.arg("--root").arg(root).args(["delete", "--force", id]);
    if run::alone(command, DELETION) {
        return Ok(());
    }
    crate::engine::delete(Path::new(root), id, bundle, false)
}

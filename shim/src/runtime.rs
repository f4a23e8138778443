//! The runtime: what makes and steers containers. Nothing outside this file knows which one it is.
//!
//! Now: a runc-compatible binary. The embedded engine on libcontainer comes beside it behind the same functions (it needs a single-threaded
//! process of its own: `contracts/crates.md` §4).
use crate::reaper::{Exit, Reaper};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tokio::sync::oneshot;

/// A process' three streams, as descriptors for the child.
pub struct Streams {
    /// Standard input.
    pub stdin: Stdio,
    /// Standard output.
    pub stdout: Stdio,
    /// Standard error.
    pub stderr: Stdio,
}

/// A runc-compatible binary.
#[derive(Clone)]
pub struct Runtime {
    binary: String,
    root: PathBuf,
    systemd: bool,
    reaper: Reaper,
}

/// Binary and state directory noted in a bundle, for its `delete`.
pub fn of_bundle(bundle: &Path) -> (String, PathBuf) {
    let text = std::fs::read_to_string(bundle.join("runtime")).unwrap_or_default();
    let (binary, root) = text.split_once('\n').unwrap_or(("runc", "/run/troupe/runc"));
    (binary.to_owned(), root.trim().into())
}

impl Runtime {
    /// `binary` empty = `runc`; `root` empty = a directory of the namespace.
    pub fn new(binary: &str, root: &str, systemd: bool, namespace: &str, reaper: Reaper) -> Runtime {
        let binary = if binary.is_empty() { "runc" } else { binary }.to_owned();
        let root = if root.is_empty() { "/run/troupe/runc" } else { root };
        Runtime { binary, root: Path::new(root).join(namespace), systemd, reaper }
    }

    fn command(&self, log: &Path) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root).arg("--log").arg(log).args(["--log-format", "json"]);
        if self.systemd {
            command.arg("--systemd-cgroup");
        }
        command
    }

    /// Runs a command to its end. Its error text is the last error of its log, or what it printed.
    async fn run(&self, mut command: Command, log: &Path, streams: Option<Streams>) -> io::Result<()> {
        let what = format!("{command:?}");
        let mut reader = None;
        match streams {
            Some(s) => {
                command.stdin(s.stdin).stdout(s.stdout).stderr(s.stderr);
            }
            None => {
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            }
        }
        let mut child = command.spawn().map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", self.binary)))?;
        if let Some(stderr) = child.stderr.take() {
            reader = Some(stderr);
        }
        let ended: oneshot::Receiver<Exit> = self.reaper.wait(child.id());
        drop(command);
        let exit = ended.await.map_err(|_| io::Error::other("the reaper ended"))?;
        if exit.code == 0 {
            let _ = std::fs::remove_file(log);
            return Ok(());
        }
        let mut printed = String::new();
        if let Some(reader) = reader {
            let _ = reader.take(4096).read_to_string(&mut printed);
        }
        let logged = std::fs::read_to_string(log).unwrap_or_default();
        let last = logged.lines().rev().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok()).find(|l| l["level"] == "error");
        let text = last.and_then(|l| l["msg"].as_str().map(str::to_owned)).unwrap_or(printed);
        Err(io::Error::other(if text.trim().is_empty() { format!("{what} ended with {}", exit.code) } else { text.trim().to_owned() }))
    }

    /// Creates a container; answers the pid of its init.
    pub async fn create(&self, id: &str, bundle: &Path, streams: Streams) -> io::Result<u32> {
        std::fs::create_dir_all(&self.root)?;
        std::fs::write(bundle.join("runtime"), format!("{}\n{}\n", self.binary, self.root.display()))?;
        let (log, pid_file) = (bundle.join("log.json"), bundle.join("init.pid"));
        let mut command = self.command(&log);
        command.arg("create").arg("--bundle").arg(bundle).arg("--pid-file").arg(&pid_file).arg(id);
        self.run(command, &log, Some(streams)).await?;
        read_pid(&pid_file)
    }

    /// Starts what was created.
    pub async fn start(&self, id: &str, bundle: &Path) -> io::Result<()> {
        let log = bundle.join("log.json");
        let mut command = self.command(&log);
        command.args(["start", id]);
        self.run(command, &log, None).await
    }

    /// Starts a further process; answers its pid.
    pub async fn exec(&self, id: &str, exec_id: &str, bundle: &Path, process: &[u8], streams: Streams) -> io::Result<u32> {
        let (file, pid_file, log) =
            (bundle.join(format!("{exec_id}.json")), bundle.join(format!("{exec_id}.pid")), bundle.join(format!("{exec_id}.log")));
        std::fs::write(&file, process)?;
        let mut command = self.command(&log);
        command.args(["exec", "--detach", "--process"]).arg(&file).arg("--pid-file").arg(&pid_file).arg(id);
        let done = self.run(command, &log, Some(streams)).await;
        let pid = done.and_then(|()| read_pid(&pid_file));
        for path in [file, pid_file, log] {
            let _ = std::fs::remove_file(path);
        }
        pid
    }

    /// Deletes a container, killing what is left of it. Succeeds when it is gone.
    pub async fn delete(&self, id: &str, bundle: &Path) -> io::Result<()> {
        let log = bundle.join("delete.json");
        let mut command = self.command(&log);
        command.args(["delete", "--force", id]);
        self.run(command, &log, None).await
    }

    /// Pauses or resumes.
    pub async fn freeze(&self, id: &str, bundle: &Path, pause: bool) -> io::Result<()> {
        let log = bundle.join("freeze.json");
        let mut command = self.command(&log);
        command.args([if pause { "pause" } else { "resume" }, id]);
        self.run(command, &log, None).await
    }

    /// Updates resources (OCI `LinuxResources`).
    pub async fn update(&self, id: &str, bundle: &Path, resources: &[u8]) -> io::Result<()> {
        let (log, file) = (bundle.join("update.json"), bundle.join("resources.json"));
        std::fs::write(&file, resources)?;
        let mut command = self.command(&log);
        command.args(["update", "--resources"]).arg(&file).arg(id);
        let done = self.run(command, &log, None).await;
        let _ = std::fs::remove_file(file);
        done
    }
}

fn read_pid(path: &Path) -> io::Result<u32> {
    std::fs::read_to_string(path)?.trim().parse().map_err(|e| io::Error::other(format!("{}: {e}", path.display())))
}

/// A stream from an owned descriptor.
pub fn stream(fd: OwnedFd) -> Stdio {
    Stdio::from(fd)
}

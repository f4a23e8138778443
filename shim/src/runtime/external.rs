//! A runc-compatible binary, run for each step.
use super::{Checkpoint, ChildIo, Wish, note};
use crate::reaper::{Exit, Reaper};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tokio::sync::oneshot;

/// A runc-compatible binary.
#[derive(Clone)]
pub struct External {
    binary: String,
    root: PathBuf,
    systemd: bool,
    no_new_keyring: bool,
    reaper: Reaper,
}

impl External {
    /// As is wished; `root` is the directory of its state.
    pub fn new(binary: &str, root: &Path, wish: &Wish<'_>, reaper: Reaper) -> External {
        External { binary: binary.into(), root: root.into(), systemd: wish.systemd, no_new_keyring: wish.no_new_keyring, reaper }
    }

    fn command(&self, log: &Path) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root).arg("--log").arg(log).args(["--log-format", "json"]);
        // With it, `runc start` waits for the container to say that it is ready. The caller may be a unit that does not know this.
        command.env_remove("NOTIFY_SOCKET");
        if self.systemd {
            command.arg("--systemd-cgroup");
        }
        command
    }

    /// Runs a command to its end. Its error text is the last error of its log, or what it printed.
    async fn run(&self, mut command: Command, log: &Path, io: Option<ChildIo>) -> io::Result<()> {
        let what = format!("{command:?}");
        let mut reader = None;
        match io {
            Some(ChildIo::Streams(s)) => {
                command.stdin(s.stdin).stdout(s.stdout).stderr(s.stderr);
            }
            Some(ChildIo::Terminal(_)) | None => {
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
    pub async fn create(&self, id: &str, bundle: &Path, io: ChildIo) -> io::Result<u32> {
        std::fs::create_dir_all(&self.root)?;
        note(bundle, &self.binary, &self.root, self.systemd)?;
        let (log, pid_file) = (bundle.join("log.json"), bundle.join("init.pid"));
        let mut command = self.command(&log);
        command.arg("create").arg("--bundle").arg(bundle).arg("--pid-file").arg(&pid_file);
        if self.no_new_keyring {
            command.arg("--no-new-keyring");
        }
        console(&mut command, &io);
        command.arg(id);
        self.run(command, &log, Some(io)).await?;
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
    pub async fn exec(&self, id: &str, exec_id: &str, bundle: &Path, process: &[u8], io: ChildIo) -> io::Result<u32> {
        let (file, pid_file, log) =
            (bundle.join(format!("{exec_id}.json")), bundle.join(format!("{exec_id}.pid")), bundle.join(format!("{exec_id}.log")));
        std::fs::write(&file, process)?;
        let mut command = self.command(&log);
        command.args(["exec", "--detach", "--process"]).arg(&file).arg("--pid-file").arg(&pid_file);
        console(&mut command, &io);
        command.arg(id);
        let done = self.run(command, &log, Some(io)).await;
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

    /// Writes the processes down with CRIU.
    pub async fn checkpoint(&self, id: &str, bundle: &Path, wish: &Checkpoint) -> io::Result<()> {
        let log = bundle.join("checkpoint-log.json");
        let mut command = self.command(&log);
        command.arg("checkpoint").arg("--image-path").arg(&wish.image_path);
        if !wish.work_path.as_os_str().is_empty() {
            command.arg("--work-path").arg(&wish.work_path);
        }
        for (wanted, flag) in [
            (!wish.exit, "--leave-running"),
            (wish.open_tcp, "--tcp-established"),
            (wish.external_unix_sockets, "--ext-unix-sk"),
            (wish.terminal, "--shell-job"),
            (wish.file_locks, "--file-locks"),
        ] {
            if wanted {
                command.arg(flag);
            }
        }
        command.arg(id);
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

fn console(command: &mut Command, io: &ChildIo) {
    if let ChildIo::Terminal(socket) = io {
        command.arg("--console-socket").arg(socket);
    }
}

//! A runc-compatible binary, run for each step. A step that is given up ends its run ([`run`]); what the binary will not give back, the embedded
//! engine does, which needs the bundle alone for it.
use super::{Checkpoint, ChildIo, DELETION, Wish, note, run};
use crate::engine::{Engine, Request};
use crate::reaper::Reaper;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A runc-compatible binary.
#[derive(Clone)]
pub struct External {
    binary: String,
    root: PathBuf,
    systemd: bool,
    no_new_keyring: bool,
    reaper: Reaper,
    engine: Engine,
}

/// Files of a step, removed however it ends. What a step began that was given up is ended: nobody knows of it.
struct Traces {
    files: [PathBuf; 3],
    done: bool,
}

impl Drop for Traces {
    fn drop(&mut self) {
        let [pid_file, ..] = &self.files;
        // What it wrote may be wrong: only what comes from us is ours to end.
        if let (false, Ok(pid)) = (self.done, read_pid(pid_file))
            && crate::sys::is_ours(pid) == Some(true)
        {
            let _ = crate::sys::kill(pid, libc::SIGKILL as u32);
        }
        for path in &self.files {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl External {
    /// As is wished; `root` is the directory of its state.
    pub fn new(binary: &str, root: &Path, wish: &Wish<'_>, engine: Engine, reaper: Reaper) -> External {
        External { binary: binary.into(), root: root.into(), systemd: wish.systemd, no_new_keyring: wish.no_new_keyring, reaper, engine }
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

    async fn run(&self, command: Command, step: &str, log: &Path, io: Option<ChildIo>) -> io::Result<()> {
        run::run(command, step, log, io, &self.reaper).await
    }

    /// What it is and what it said last, for the error about a step that did not end.
    pub fn last_words(&self, log: &Path) -> String {
        let said = run::last_words(log).map(|said| format!(" (its log ends with: {said})"));
        format!("{}{}", self.binary, said.unwrap_or_default())
    }

    /// The pid that a step that went well has written down.
    fn told_pid(&self, step: &str, file: &Path) -> io::Result<u32> {
        let told = read_pid(file).and_then(|pid| match crate::sys::is_ours(pid) {
            // Whatever it left behind came to us; one that ended at once is not there any more.
            Some(false) => Err(io::Error::other(format!("{pid} is another's process"))),
            _ => Ok(pid),
        });
        told.map_err(|e| io::Error::other(format!("{} {step} succeeded, but its pid file is of no use: {e}", self.binary)))
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
        // A bundle may be used again, after a start that failed.
        let _ = std::fs::remove_file(&pid_file);
        self.run(command, "create", &log, Some(io)).await?;
        self.told_pid("create", &pid_file)
    }

    /// Starts what was created.
    pub async fn start(&self, id: &str, bundle: &Path) -> io::Result<()> {
        let log = bundle.join("log.json");
        let mut command = self.command(&log);
        command.args(["start", id]);
        self.run(command, "start", &log, None).await
    }

    /// Starts a further process; answers its pid.
    pub async fn exec(&self, id: &str, exec_id: &str, bundle: &Path, process: &[u8], io: ChildIo) -> io::Result<u32> {
        let [file, pid_file, log] = ["json", "pid", "log"].map(|kind| bundle.join(format!("{exec_id}.{kind}")));
        let mut traces = Traces { files: [pid_file.clone(), file.clone(), log.clone()], done: false };
        std::fs::write(&file, process)?;
        let mut command = self.command(&log);
        command.args(["exec", "--detach", "--process"]).arg(&file).arg("--pid-file").arg(&pid_file);
        console(&mut command, &io);
        command.arg(id);
        self.run(command, "exec", &log, Some(io)).await?;
        let pid = self.told_pid("exec", &pid_file)?;
        traces.done = true;
        Ok(pid)
    }

    /// Deletes a container, killing what is left of it. Succeeds when it is gone. A binary that hangs or fails keeps nobody from that.
    pub async fn delete(&self, id: &str, bundle: &Path) -> io::Result<()> {
        let log = bundle.join("delete.json");
        let mut command = self.command(&log);
        command.args(["delete", "--force", id]);
        let by_binary = tokio::time::timeout(DELETION, self.run(command, "delete", &log, None)).await;
        let why = match by_binary {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(e)) => e.to_string(),
            Err(_) => format!("{} delete did not end within {DELETION:?} and was killed", self.last_words(&log)),
        };
        let request =
            Request { step: "delete".into(), id: id.into(), root: self.root.clone(), bundle: bundle.into(), ..Default::default() };
        self.engine.ask(&request, vec![]).await.map(drop).map_err(|e| io::Error::other(format!("{why}; and without it: {e}")))
    }

    /// Pauses or resumes.
    pub async fn freeze(&self, id: &str, bundle: &Path, pause: bool) -> io::Result<()> {
        let log = bundle.join("freeze.json");
        let mut command = self.command(&log);
        let step = if pause { "pause" } else { "resume" };
        command.args([step, id]);
        self.run(command, step, &log, None).await
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
        self.run(command, "checkpoint", &log, None).await
    }

    /// Updates resources (OCI `LinuxResources`).
    pub async fn update(&self, id: &str, bundle: &Path, resources: &[u8]) -> io::Result<()> {
        let (log, file) = (bundle.join("update.json"), bundle.join("resources.json"));
        std::fs::write(&file, resources)?;
        let mut command = self.command(&log);
        command.args(["update", "--resources"]).arg(&file).arg(id);
        let done = self.run(command, "update", &log, None).await;
        let _ = std::fs::remove_file(file);
        done
    }
}

fn read_pid(path: &Path) -> io::Result<u32> {
    let text = String::from_utf8_lossy(&std::fs::read(path)?).trim().to_owned();
    text.parse().ok().filter(|pid| *pid > 1).ok_or_else(|| {
        let shown: String = text.chars().take(40).collect();
        io::Error::new(io::ErrorKind::InvalidData, format!("{shown:?} is no process"))
    })
}

fn console(command: &mut Command, io: &ChildIo) {
    if let ChildIo::Terminal(socket) = io {
        command.arg("--console-socket").arg(socket);
    }
}

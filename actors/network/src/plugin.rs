//! One run of a plugin's binary. It is started on a thread that may hang, led by a process group of its own, and given up with all its children: when
//! its time is over, when nobody wants it any more, when the actor ends. Its output is read to the end, and kept up to a limit.
use crate::sys;
use kernel::{Cx, Fault, Result, ResultExt};
use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::sync::watch;

/// A result larger than this is none.
const RESULT: usize = 1 << 20;
/// As much of the error output is kept, from its end.
const ERRORS: usize = 4 << 10;
/// Finding the binary and `posix_spawn` take a millisecond; on a dead network file system, for ever.
const START: Duration = Duration::from_secs(10);
/// Output is complete when the plugin ends; a child that keeps the pipe open (a DHCP daemon) must not hold us.
const AFTER_EXIT: Duration = Duration::from_millis(100);
/// A killed process ends at once, unless the kernel holds it.
const DEATH: Duration = Duration::from_secs(2);

/// Says when the run is not wanted any more.
pub(crate) type Cancel = watch::Receiver<bool>;

/// What to run.
pub(crate) struct Run<'a> {
    /// Directories of binaries, in order.
    pub dirs: &'a [PathBuf],
    /// The binary.
    pub kind: &'a str,
    /// Environment beside the daemon's own.
    pub env: Vec<(&'static str, String)>,
    /// Standard input.
    pub input: String,
    /// Patience.
    pub limit: Duration,
    /// When to give up earlier.
    pub cancel: Option<Cancel>,
}

/// How it ended.
pub(crate) struct Output {
    /// Exit code or signal.
    pub status: ExitStatus,
    /// Standard output.
    pub out: Vec<u8>,
    /// End of the error output.
    pub err: String,
}

struct Running {
    leader: Leader,
    input: OwnedFd,
    out: OwnedFd,
    err: OwnedFd,
}

/// The plugin's process; its group dies with this value, unless it has ended.
struct Leader(Option<Child>);

impl Leader {
    fn pid(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }
    fn kill(&self) {
        if let Some(child) = &self.0 {
            sys::kill_group(child.id());
        }
    }
    async fn ended(&mut self, pidfd: &AsyncFd<OwnedFd>) -> Result<ExitStatus> {
        loop {
            let mut ready = pidfd.readable().await?;
            if let Some(child) = &mut self.0
                && let Some(status) = child.try_wait()?
            {
                self.0 = None;
                return Ok(status);
            }
            ready.clear_ready();
        }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.kill();
        if let Some(mut child) = self.0.take()
            && !matches!(child.try_wait(), Ok(Some(_)))
        {
            // It is dying; somebody has to take its exit code, or it stays a zombie.
            let _ = std::thread::Builder::new().name("troupe-reap".into()).stack_size(64 << 10).spawn(move || child.wait());
        }
    }
}

/// Runs it.
pub(crate) async fn run(cx: &Cx, what: Run<'_>) -> Result<Output> {
    let (dirs, kind, env) = (what.dirs.to_vec(), what.kind.to_owned(), what.env);
    let mut running = cx.blocking("start a CNI plugin", START, move || spawn(&dirs, &kind, env)).await?;
    let pid = running.leader.pid();
    cx.attr("process.pid", pid);
    let pidfd = rustix::process::Pid::from_raw(pid as i32).ok_or_else(|| Fault::internal("the plugin has no pid"))?;
    let pidfd = rustix::process::pidfd_open(pidfd, rustix::process::PidfdFlags::NONBLOCK).map_err(std::io::Error::from)?;
    let pidfd = sys::watch(pidfd)?;
    let (out, err) = (RefCell::new(vec![]), RefCell::new(vec![]));
    let (mut feed, readers) =
        (Sender::from_owned_fd(running.input)?, (Receiver::from_owned_fd(running.out)?, Receiver::from_owned_fd(running.err)?));
    let talk = async {
        let feed = async move {
            // A plugin that does not read its input says so by its exit code.
            let _ = feed.write_all(what.input.as_bytes()).await;
        };
        tokio::join!(feed, head(readers.0, &out), tail(readers.1, &err));
    };
    let ended = {
        let (ended, talk) = (running.leader.ended(&pidfd), std::pin::pin!(talk));
        let all = async move {
            match futures::future::select(std::pin::pin!(ended), talk).await {
                futures::future::Either::Left((status, talk)) => {
                    let _ = tokio::time::timeout(AFTER_EXIT, talk).await;
                    status
                }
                futures::future::Either::Right((_, ended)) => ended.await,
            }
        };
        tokio::select! {
            ended = tokio::time::timeout(what.limit, all) => ended.map_err(|_| format!("did not end within {:?}", what.limit)),
            () = cancelled(what.cancel) => Err("is not wanted any more".to_owned()),
        }
    };
    let told = |e: &RefCell<Vec<u8>>| String::from_utf8_lossy(&e.borrow()).trim().to_owned();
    match ended {
        Ok(status) => {
            let status = status.context("wait for the plugin")?;
            cx.attr("process.exit.code", status.code().unwrap_or(-1));
            Ok(Output { status, err: told(&err), out: out.into_inner() })
        }
        Err(why) => {
            running.leader.kill();
            let dead = tokio::time::timeout(DEATH, running.leader.ended(&pidfd)).await.is_ok();
            let fate = if dead { "was killed" } else { "was killed, but the kernel does not let it end" };
            let said = told(&err);
            let said = if said.is_empty() { said } else { format!("; it said: {said}") };
            Err(Fault::deadline_exceeded(format!("{why}; its process group {pid} {fate}{said}")))
        }
    }
}

async fn cancelled(cancel: Option<Cancel>) {
    if let Some(mut cancel) = cancel
        && cancel.wait_for(|c| *c).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// The path of a plugin's binary.
pub(crate) fn find(dirs: &[PathBuf], kind: &str) -> Result<PathBuf> {
    let binary = dirs.iter().map(|d| d.join(kind)).find(|p| p.is_file());
    binary.ok_or_else(|| {
        let dirs: Vec<String> = dirs.iter().map(|d| d.display().to_string()).collect();
        Fault::not_found(format!("there is no CNI plugin {kind:?} in {}: install it, or correct cni.bin_dirs", dirs.join(", ")))
    })
}

fn spawn(dirs: &[PathBuf], kind: &str, env: Vec<(&'static str, String)>) -> Result<Running> {
    let binary = find(dirs, kind)?;
    let ((stdin, input), (out, stdout), (err, stderr)) = (std::io::pipe()?, std::io::pipe()?, std::io::pipe()?);
    let mut command = Command::new(&binary);
    command.envs(env.iter().map(|(k, v)| (k, v))).process_group(0).stdin(stdin).stdout(stdout).stderr(stderr);
    let child = command.spawn().map_err(|e| explain(e, &binary, &env))?;
    Ok(Running { leader: Leader(Some(child)), input: input.into(), out: out.into(), err: err.into() })
}

fn explain(error: std::io::Error, binary: &Path, env: &[(&'static str, String)]) -> Fault {
    if error.raw_os_error() != Some(libc::E2BIG) {
        return Fault::from(error).context(format!("start {}", binary.display()));
    }
    let ours: usize = env.iter().map(|(k, v)| k.len() + v.len() + 2).sum();
    let inherited: usize = std::env::vars_os().map(|(k, v)| k.len() + v.len() + 2).sum();
    Fault::resource_exhausted(format!(
        "start {}: the kernel takes no such long environment: {ours} bytes for CNI and {inherited} bytes of the daemon's own; shorten the daemon's",
        binary.display()
    ))
}

/// Reads all; keeps the beginning, one byte more than a result may have.
async fn head(mut from: Receiver, kept: &RefCell<Vec<u8>>) {
    let mut chunk = vec![0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut chunk).await {
        let room = (RESULT + 1).saturating_sub(kept.borrow().len());
        kept.borrow_mut().extend_from_slice(&chunk[..n.min(room)]);
    }
}

/// Reads all; keeps the end.
async fn tail(mut from: Receiver, kept: &RefCell<Vec<u8>>) {
    let mut chunk = vec![0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut chunk).await {
        let mut kept = kept.borrow_mut();
        kept.extend_from_slice(&chunk[..n]);
        let excess = kept.len().saturating_sub(ERRORS);
        kept.drain(..excess);
    }
}

/// Is this all of a result?
pub(crate) fn complete(out: &[u8]) -> Result<()> {
    if out.len() > RESULT { Err(Fault::internal(format!("its result is longer than {RESULT} bytes"))) } else { Ok(()) }
}

//! Where a process' streams go: FIFOs, files, nowhere, a log ([`crate::log`]), and whoever is attached.
//!
//! Owns: our ends of pipes and terminals, and the tasks that copy. A stream that ends in one FIFO or file is given to the process as it is; only a log,
//! a terminal and attached clients ([`crate::clients`]) need a copy by this process. Limits: output never grows memory here; after a process' end a
//! grandchild that keeps its stream open holds up the report for [`DRAIN`], however much it writes for [`DRAIN_ALL`].
use crate::clients::Clients;
use crate::console::{self, Console};
use crate::log::{Lines, Log, append};
use crate::runtime::{ChildIo, Streams};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// After a process' end, how long a stream that is still open may be silent.
const DRAIN: Duration = Duration::from_secs(2);
/// And how long it may go on.
const DRAIN_ALL: Duration = Duration::from_secs(15);
/// Bytes copied at once.
const PIECE: usize = 16 << 10;
/// Pieces that are written to a log at once: what a pipe holds.
const TOGETHER: usize = 4;
/// Pieces that are read without waiting when a stream that is still open is left: a pipe holds four.
const LEFT: usize = 64;

/// Where its streams go.
#[derive(Clone, Default)]
pub struct Targets {
    /// FIFO, `hold://` (a pipe for attached clients; `?once` closes it behind the first), or empty.
    pub stdin: String,
    /// FIFO, file or log.
    pub stdout: String,
    /// The same.
    pub stderr: String,
    /// A terminal.
    pub terminal: bool,
}

/// A copy under way.
struct Pumping {
    task: JoinHandle<()>,
    state: Arc<PumpState>,
}

#[derive(Default)]
struct PumpState {
    /// Take what is there, and end.
    stop: Notify,
    stopping: AtomicBool,
    /// Counts pieces.
    moved: AtomicU64,
}

impl Pumping {
    fn start(from: pipe::Receiver, name: &'static str, log: Option<Arc<Log>>, clients: Clients) -> Pumping {
        let state = Arc::new(PumpState::default());
        Pumping { task: tokio::spawn(pump(from, name, log, clients, state.clone())), state }
    }
    /// Waits for the end of the stream; if that does not come, ends the copy behind what is there.
    async fn finish(mut self) {
        let began = Instant::now();
        let mut seen = self.state.moved.load(Ordering::Relaxed);
        loop {
            if timeout(DRAIN, &mut self.task).await.is_ok() {
                return;
            }
            let now = self.state.moved.load(Ordering::Relaxed);
            if now == seen || began.elapsed() >= DRAIN_ALL {
                break;
            }
            seen = now;
        }
        self.state.stopping.store(true, Ordering::Relaxed);
        self.state.stop.notify_one();
        if timeout(DRAIN, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

/// What others reach a living process' streams by.
#[derive(Clone, Default)]
pub struct Streamed {
    /// The log, if there is one.
    pub log: Option<Arc<Log>>,
    /// The terminal, if there is one.
    pub terminal: Option<Arc<OwnedFd>>,
    out: Option<Clients>,
    err: Option<Clients>,
    input: Arc<Mutex<Option<pipe::Sender>>>,
    /// Keeps a FIFO that is the process' input from ending before `CloseIO`.
    held: Arc<std::sync::Mutex<Option<File>>>,
    once: bool,
}

/// The streams of one process, and the tasks that copy them.
pub struct Wiring {
    /// For the child, once.
    pub child: Option<ChildIo>,
    /// For others.
    pub streamed: Streamed,
    targets: Targets,
    console: Option<Console>,
    copies: Vec<Pumping>,
    inputs: Vec<JoinHandle<()>>,
}

impl Wiring {
    /// Opens what the request names; `log` is open already, if there is one.
    pub fn open(targets: &Targets, log: Option<Arc<Log>>) -> io::Result<Wiring> {
        let streamed = Streamed { log, ..Default::default() };
        let mut wiring = Wiring { child: None, streamed, targets: targets.clone(), console: None, copies: vec![], inputs: vec![] };
        if targets.terminal {
            let console = Console::listen()?;
            wiring.child = Some(ChildIo::Terminal(console.path().to_owned()));
            wiring.console = Some(console);
            return Ok(wiring);
        }
        let stdout = wiring.output(&targets.stdout, "stdout")?;
        let stderr = wiring.output(&targets.stderr, "stderr")?;
        let stdin = wiring.input()?;
        wiring.child = Some(ChildIo::Streams(Streams { stdin, stdout, stderr }));
        Ok(wiring)
    }

    fn output(&mut self, target: &str, name: &'static str) -> io::Result<OwnedFd> {
        if target.is_empty() {
            return null();
        }
        if target.starts_with("cri-log://") {
            let log = self.streamed.log.clone();
            let (ours, theirs) = pipe_in()?;
            let clients = Clients::default();
            *(if name == "stdout" { &mut self.streamed.out } else { &mut self.streamed.err }) = Some(clients.clone());
            self.copies.push(Pumping::start(ours, name, log, clients));
            return Ok(theirs);
        }
        if let Some(path) = target.strip_prefix("file://") {
            return Ok(append(path.as_ref())?.into());
        }
        if let Some((scheme, _)) = target.split_once("://").filter(|(s, _)| *s != "fifo") {
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("{name}: {scheme}:// is not supported; use a FIFO or file://")));
        }
        write_end(target)
    }

    fn input(&mut self) -> io::Result<OwnedFd> {
        let target = self.targets.stdin.clone();
        if target.is_empty() {
            return null();
        }
        if let Some(query) = target.strip_prefix("hold://") {
            let (theirs, ours) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
            nonblocking(&ours)?;
            self.streamed.input = Arc::new(Mutex::new(Some(pipe::Sender::from_owned_fd(ours)?)));
            self.streamed.once = query.contains("once");
            return Ok(theirs);
        }
        let held = fifo(&target)?;
        // Without a writer this would wait; there is one, ours.
        let theirs = OpenOptions::new().read(true).open(target.trim_start_matches("fifo://"))?;
        *self.streamed.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(held);
        Ok(theirs.into())
    }

    /// After the process was made: takes its terminal over.
    pub fn connect(&mut self) -> io::Result<()> {
        let Some(console) = self.console.take() else { return Ok(()) };
        let terminal = Arc::new(console.receive()?);
        nonblocking(&terminal)?;
        let (reads, writes) = (terminal.try_clone()?, terminal.try_clone()?);
        self.streamed.terminal = Some(terminal);
        let target = self.targets.stdout.clone();
        let clients = Clients::default();
        let log = match target.as_str() {
            log if log.starts_with("cri-log://") => self.streamed.log.clone(),
            "" => None,
            _ => {
                let file = fifo(&target)?;
                nonblocking(&file)?;
                clients.own(pipe::Sender::from_file_unchecked(file)?);
                None
            }
        };
        self.streamed.out = Some(clients.clone());
        let ours = pipe::Receiver::from_owned_fd_unchecked(reads)?;
        self.copies.push(Pumping::start(ours, "stdout", log, clients));
        let writes = pipe::Sender::from_owned_fd_unchecked(writes)?;
        self.streamed.input = Arc::new(Mutex::new(Some(writes)));
        if !self.targets.stdin.is_empty() && !self.targets.stdin.starts_with("hold://") {
            let held = fifo(&self.targets.stdin)?;
            nonblocking(&held)?;
            let from = pipe::Receiver::from_file_unchecked(held)?;
            self.inputs.push(tokio::spawn(copy_in(from, self.streamed.input.clone(), false)));
        }
        Ok(())
    }

    /// Waits until all output is written.
    pub async fn drain(&mut self) {
        together(self.copies.drain(..).map(Pumping::finish)).await;
        self.inputs.drain(..).for_each(|i| i.abort());
        // Whoever holds it writes to a pipe that nobody reads, and will see that.
        if let Ok(mut input) = timeout(DRAIN, self.streamed.input.lock()).await {
            input.take();
        }
    }
}

/// All of them, side by side.
pub async fn together(all: impl Iterator<Item = impl Future<Output = ()> + Send + 'static>) {
    let mut set = tokio::task::JoinSet::new();
    for one in all {
        set.spawn(one);
    }
    while set.join_next().await.is_some() {}
}

impl Streamed {
    /// Copies the live output into more FIFOs, and their input to the process.
    pub async fn attach(&self, stdin: &str, stdout: &str, stderr: &str) -> io::Result<()> {
        for (path, clients, name) in [(stdout, &self.out, "stdout"), (stderr, &self.err, "stderr")] {
            if path.is_empty() {
                continue;
            }
            let refused =
                || io::Error::new(io::ErrorKind::Unsupported, format!("{name} goes to a file or FIFO of its own: nobody can attach to it"));
            let clients = clients.as_ref().ok_or_else(refused)?;
            clients.attach(path)?;
        }
        if !stdin.is_empty() {
            let from = pipe::OpenOptions::new().open_receiver(stdin)?;
            tokio::spawn(copy_in(from, self.input.clone(), self.once && self.terminal.is_none()));
        }
        Ok(())
    }
    /// Ends the process' input, once its writers are gone.
    pub async fn close_input(&self) {
        self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if self.terminal.is_none()
            && let Ok(mut input) = timeout(DRAIN, self.input.lock()).await
        {
            input.take();
        }
    }
    /// Sets the terminal's size.
    pub fn resize(&self, width: u32, height: u32) -> io::Result<()> {
        self.terminal.as_ref().map_or(Ok(()), |t| console::resize(t.as_fd(), width, height))
    }
}

fn null() -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/null")?.into())
}

/// A FIFO, opened for both directions, so that neither side ever waits for the other.
fn fifo(target: &str) -> io::Result<File> {
    let path = target.trim_start_matches("fifo://");
    let open = |path: &str| OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = open(path).map_err(|e| io::Error::new(e.kind(), format!("open {path}: {e}")))?;
    // Only the open must not wait; the process expects blocking streams.
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
    Ok(file)
}

/// A FIFO's write end for a process. It has no reading end of its own: when the last reader is gone the process is told, instead of waiting for ever.
fn write_end(target: &str) -> io::Result<OwnedFd> {
    let held = fifo(target)?;
    let path = target.trim_start_matches("fifo://");
    let file = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
    drop(held);
    Ok(file.into())
}

fn nonblocking(fd: impl AsFd) -> io::Result<()> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    Ok(())
}

fn pipe_in() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    nonblocking(&ours)?;
    Ok((pipe::Receiver::from_owned_fd(ours)?, theirs))
}

/// Copies output to log and clients until its end (a terminal's end is an error, EIO).
async fn pump(mut from: pipe::Receiver, name: &'static str, log: Option<Arc<Log>>, clients: Clients, state: Arc<PumpState>) {
    let (mut buffer, mut lines, mut left) = (vec![0; PIECE], Lines::new(name), LEFT);
    while left > 0 {
        let n = if state.stopping.load(Ordering::Relaxed) {
            left -= 1;
            from.try_read(&mut buffer).unwrap_or(0)
        } else {
            tokio::select! {
                n = from.read(&mut buffer) => n.unwrap_or(0),
                () = state.stop.notified() => continue,
            }
        };
        if n == 0 {
            break;
        }
        if let Some(log) = &log {
            lines.push(log, &buffer[..n]);
        }
        clients.give(&buffer[..n]).await;
        if let Some(log) = &log {
            // What has come meanwhile is written along with it: the way to the file is longer than the writing.
            for _ in 1..TOGETHER {
                let Ok(more) = from.try_read(&mut buffer) else { break };
                lines.push(log, &buffer[..more]);
                clients.give(&buffer[..more]).await;
                if more == 0 {
                    break;
                }
            }
            log.take(&mut lines).await;
        }
        state.moved.fetch_add(1, Ordering::Relaxed);
    }
    if let Some(log) = &log {
        lines.finish(log);
        log.take(&mut lines).await;
    }
    clients.end();
}

/// Copies a client's input to the process until the client closes it.
async fn copy_in(mut from: pipe::Receiver, to: Arc<Mutex<Option<pipe::Sender>>>, once: bool) {
    let mut buffer = vec![0; PIECE];
    loop {
        let n = from.read(&mut buffer).await.unwrap_or(0);
        let mut to = to.lock().await;
        if n == 0 {
            if once {
                to.take();
            }
            return;
        }
        let Some(sender) = to.as_mut() else { return };
        if sender.write_all(&buffer[..n]).await.is_err() {
            to.take();
            return;
        }
    }
}

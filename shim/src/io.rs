//! Where a process' streams go: FIFOs, files, nowhere, a log ([`crate::log`]), and whoever is attached.
//!
//! Owns: our ends of pipes and terminals, and the tasks that copy. A stream that ends in one FIFO or file is given to the process as it is; only a log,
//! a terminal and attached clients need a copy by this process. Limits: a client that takes nothing for [`PATIENCE`] is cut off; output never grows
//! memory here.
use crate::console::{self, Console};
use crate::log::{Lines, Log, append};
use crate::runtime::{ChildIo, Streams};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

/// How long a reader may take nothing before it is cut off: the container's own output waits for no longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// After a process' end, how long a grandchild that keeps a pipe open may hold up the report.
const DRAIN: Duration = Duration::from_secs(2);

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

/// Clients of one output stream.
type Clients = Arc<Mutex<Vec<pipe::Sender>>>;

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
    copies: Vec<JoinHandle<()>>,
    inputs: Vec<JoinHandle<()>>,
}

impl Wiring {
    /// Opens what the request names.
    pub fn open(targets: &Targets) -> io::Result<Wiring> {
        let mut wiring =
            Wiring { child: None, streamed: Streamed::default(), targets: targets.clone(), console: None, copies: vec![], inputs: vec![] };
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

    fn log(&mut self, uri: &str) -> io::Result<Option<Arc<Log>>> {
        if self.streamed.log.is_none() && !uri.is_empty() && !uri.starts_with('?') {
            self.streamed.log = Some(Arc::new(Log::open(uri)?));
        }
        Ok(self.streamed.log.clone())
    }

    fn output(&mut self, target: &str, name: &'static str) -> io::Result<OwnedFd> {
        if target.is_empty() {
            return null();
        }
        if let Some(uri) = target.strip_prefix("cri-log://") {
            let log = self.log(uri)?;
            let (ours, theirs) = pipe_in()?;
            let clients = Clients::default();
            *(if name == "stdout" { &mut self.streamed.out } else { &mut self.streamed.err }) = Some(clients.clone());
            self.copies.push(tokio::spawn(pump(ours, name, log, clients)));
            return Ok(theirs);
        }
        if let Some(path) = target.strip_prefix("file://") {
            return Ok(append(path.as_ref())?.into());
        }
        if let Some((scheme, _)) = target.split_once("://").filter(|(s, _)| *s != "fifo") {
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("{name}: {scheme}:// is not supported; use a FIFO or file://")));
        }
        Ok(fifo(target)?.into())
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
        let log = match target.strip_prefix("cri-log://") {
            Some(uri) => self.log(uri)?,
            None if target.is_empty() => None,
            None => {
                let file = fifo(&target)?;
                nonblocking(&file)?;
                let sender = pipe::Sender::from_file_unchecked(file)?;
                clients.try_lock().map_err(io::Error::other)?.push(sender);
                None
            }
        };
        self.streamed.out = Some(clients.clone());
        let ours = pipe::Receiver::from_owned_fd_unchecked(reads)?;
        self.copies.push(tokio::spawn(pump(ours, "stdout", log, clients)));
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

    /// Waits until all output is written; a process that keeps a pipe open holds this up for [`DRAIN`] only.
    pub async fn drain(&mut self) {
        for mut copy in self.copies.drain(..) {
            if tokio::time::timeout(DRAIN, &mut copy).await.is_err() {
                copy.abort();
            }
        }
        self.inputs.drain(..).for_each(|i| i.abort());
        self.streamed.input.lock().await.take();
    }
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
            clients.lock().await.push(pipe::OpenOptions::new().open_sender(path)?);
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
        if self.terminal.is_none() {
            self.input.lock().await.take();
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
async fn pump(mut from: pipe::Receiver, name: &'static str, log: Option<Arc<Log>>, clients: Clients) {
    let (mut buffer, mut lines) = (vec![0; 16 << 10], Lines::new(name));
    loop {
        let n = from.read(&mut buffer).await.unwrap_or(0);
        if n == 0 {
            break;
        }
        if let Some(log) = &log {
            lines.push(log, &buffer[..n]);
        }
        let mut clients = clients.lock().await;
        let mut kept = Vec::with_capacity(clients.len());
        for mut client in clients.drain(..) {
            if matches!(tokio::time::timeout(PATIENCE, client.write_all(&buffer[..n])).await, Ok(Ok(()))) {
                kept.push(client);
            }
        }
        *clients = kept;
    }
    if let Some(log) = &log {
        lines.finish(log);
    }
    clients.lock().await.clear();
}

/// Copies a client's input to the process until the client closes it.
async fn copy_in(mut from: pipe::Receiver, to: Arc<Mutex<Option<pipe::Sender>>>, once: bool) {
    let mut buffer = vec![0; 16 << 10];
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

//! Exec, Attach and PortForward: the calls that answer a URL, and the backend of the server behind it.
//!
//! Owns: the FIFOs' ends of a client's session; each session is an operation of the kernel. Talks to: `sandbox` for a command's specification, `task` for
//! everything about the process, `network` for connections. On a crash of an actor: bytes go on flowing, they pass through none; a wait is delivered
//! again. Whatever ends a session, its process and FIFOs are given back. Limits: one buffer for each stream.
use super::{Cri, lists};
use futures::future::BoxFuture;
use kernel::{Class, Cx, Fault, Result, ResultExt, System};
use messages::network::{Dial, Network};
use messages::sandbox::{ExecProcess, Sandboxes, View};
use messages::task::{CloseInput, CloseSession, JoinStreams, OpenSession, Resize, RunExec, Session, Tasks, WaitExec};
use proto::cri::*;
use std::sync::Arc;
use std::time::Duration;
use stream::{Backend, Io, Reader, Request, Wanted, Writer};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::unix::pipe::{OpenOptions, Receiver, Sender};
use tokio::sync::mpsc;

/// After a process' end, how long a grandchild that keeps a pipe open may hold up the client.
const DRAIN: Duration = Duration::from_secs(2);
/// One wait for a process; then another.
const LONG: Duration = Duration::from_secs(24 * 3600);
/// Bytes copied at once.
const BUFFER: usize = 32 << 10;

impl Cri {
    fn running(&self, id: &str) -> Result<(String, bool)> {
        let picture = self.glance();
        let found = lists::find(&picture.containers, id, "container")?;
        let state = found.status.state();
        if state != ContainerState::ContainerRunning {
            return Err(Fault::failed_precondition(format!(
                "container {} is in state {}, not running",
                found.status.id,
                state.as_str_name()
            )));
        }
        Ok((found.status.id.clone(), found.tty))
    }

    pub(super) async fn open_exec(&self, cx: Cx, q: ExecRequest) -> Result<ExecResponse> {
        let (container, _) = self.running(&q.container_id)?;
        cx.attr("container.id", &container);
        if q.cmd.is_empty() {
            return Err(Fault::invalid_argument("cmd is empty"));
        }
        let wanted = Wanted { stdin: q.stdin, stdout: q.stdout, stderr: q.stderr, tty: q.tty };
        Ok(ExecResponse { url: self.streams.url(Request::Exec { container, command: q.cmd, wanted })? })
    }

    pub(super) async fn open_attach(&self, cx: Cx, q: AttachRequest) -> Result<AttachResponse> {
        let (container, tty) = self.running(&q.container_id)?;
        cx.attr("container.id", &container);
        // A terminal's errors come with its output.
        let wanted = Wanted { stdin: q.stdin, stdout: q.stdout || (tty && q.stderr), stderr: q.stderr && !tty, tty: q.tty };
        if q.tty && q.stderr {
            return Err(Fault::invalid_argument("tty and stderr cannot both be true: a terminal has one output"));
        }
        Ok(AttachResponse { url: self.streams.url(Request::Attach { container, wanted })? })
    }

    pub(super) async fn open_port_forward(&self, cx: Cx, q: PortForwardRequest) -> Result<PortForwardResponse> {
        let picture = self.picture(&cx).await?;
        let pod = lists::find(&picture.pods, &q.pod_sandbox_id, "pod sandbox")?;
        if pod.status.state() != PodSandboxState::SandboxReady {
            return Err(Fault::failed_precondition(format!("pod sandbox {} is not ready", pod.status.id)));
        }
        let port = |p: i32| u16::try_from(p).ok().filter(|p| *p > 0).ok_or_else(|| Fault::invalid_argument(format!("port {p} is none")));
        let ports = q.port.into_iter().map(port).collect::<Result<_>>()?;
        Ok(PortForwardResponse { url: self.streams.url(Request::PortForward { pod: pod.status.id.clone(), ports })? })
    }
}

/// Does what URLs promise.
pub struct Streams {
    system: System,
    pods: Arc<View>,
}

impl Streams {
    /// Over the actors of a system.
    pub fn new(system: System, pods: Arc<View>) -> Streams {
        Streams { system, pods }
    }

    /// Runs a session as an operation.
    async fn operation<T, F, Fut>(&self, name: &'static str, work: F) -> Result<T>
    where
        F: FnOnce(Cx) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let operation = self.system.root(name, None, None);
        let result = work(operation.cx.clone()).await;
        operation.finish(&result);
        result
    }
}

impl Backend for Streams {
    fn exec(&self, container: String, command: Vec<String>, tty: bool, io: Io) -> BoxFuture<'_, Result<i32>> {
        Box::pin(self.operation("stream/exec", move |cx| async move { exec(&self.system, cx, container, command, tty, io).await }))
    }
    fn attach(&self, container: String, io: Io) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.operation("stream/attach", move |cx| async move { attach(&self.system, cx, container, io).await }))
    }
    fn forward(&self, pod: String, port: u16, mut connection: DuplexStream) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.operation("stream/portforward", move |cx| async move {
            cx.attr("k8s.pod.sandbox.id", &pod);
            let picture = self.pods.0.load_full();
            let found = picture.pods.get(&pod).ok_or_else(|| Fault::not_found(format!("pod sandbox {pod} does not exist")))?;
            let dial = Dial { netns: found.netns.clone(), port };
            let socket = self.system.addr::<Network>().call(&cx, dial).await?;
            let mut socket = tokio::net::TcpStream::from_std(socket).context("take the connection over")?;
            cx.step("connected");
            // Either side may break off; that is the connection's end and no fault of ours.
            let _ = tokio::io::copy_bidirectional(&mut connection, &mut socket).await;
            Ok(())
        }))
    }
}

/// Gives a session back, whatever ended it.
struct Guard {
    system: System,
    cx: Cx,
    close: Option<CloseSession>,
}

impl Guard {
    async fn close(mut self) {
        if let Some(close) = self.close.take() {
            done(self.system.addr::<Tasks>().call(&self.cx.without_deadline(), close).await);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(close) = self.close.take() {
            let (system, cx) = (self.system.clone(), self.cx.without_deadline());
            tokio::spawn(async move { done(system.addr::<Tasks>().call(&cx, close).await) });
        }
    }
}

fn done(closed: Result<()>) {
    if let Err(error) = closed.or_else(|e| if e.is_not_found() { Ok(()) } else { Err(e) }) {
        tracing::warn!(%error, "a streaming session could not be given back");
    }
}

/// Our ends of a session's FIFOs. Until the shim has opened them we are their writers too, so that no reader sees an early end.
struct Ends {
    stdin: Option<Sender>,
    stdout: Option<Receiver>,
    stderr: Option<Receiver>,
    held: Vec<Sender>,
}

impl Ends {
    fn open(session: &Session) -> Result<Ends> {
        let mut held = Vec::new();
        let mut output = |path: &str| -> Result<Option<Receiver>> {
            if path.is_empty() {
                return Ok(None);
            }
            let reader = OpenOptions::new().open_receiver(path).with_context(|| format!("open {path}"))?;
            held.push(OpenOptions::new().open_sender(path).with_context(|| format!("open {path}"))?);
            Ok(Some(reader))
        };
        let (stdout, stderr) = (output(&session.stdout)?, output(&session.stderr)?);
        let stdin = match session.stdin.as_str() {
            "" => None,
            path => Some(OpenOptions::new().read_write(true).open_sender(path).with_context(|| format!("open {path}"))?),
        };
        Ok(Ends { stdin, stdout, stderr, held })
    }
}

async fn exec(system: &System, cx: Cx, container: String, command: Vec<String>, tty: bool, io: Io) -> Result<i32> {
    cx.attr("container.id", &container);
    let tasks = system.addr::<Tasks>();
    let ask = ExecProcess { id: container, cmd: command, terminal: tty };
    let (id, process) = system.addr::<Sandboxes>().call(&cx, ask).await?;
    // A terminal's output is always taken, wanted or not: it has to go somewhere.
    let (stdin, stdout, stderr) = (io.stdin.is_some(), io.stdout.is_some() || tty, io.stderr.is_some());
    let open = OpenSession { id: id.clone(), stdin, stdout, stderr };
    let session = tasks.call(&cx, open).await?;
    let exec_id = session.exec_id.clone();
    let close = CloseSession { id: id.clone(), session: session.clone(), exec: true };
    let guard = Guard { system: system.clone(), cx: cx.clone(), close: Some(close) };
    let ends = Ends::open(&session)?;
    let started = tasks.call(&cx, RunExec { id: id.clone(), session, process, terminal: tty }).await;
    let Ends { stdin, stdout, stderr, held } = ends;
    drop(held);
    started?;
    cx.step("the command runs");
    let inputs = tokio::spawn(feed(system.clone(), cx.clone(), id.clone(), exec_id.clone(), io.stdin, stdin, io.resize));
    let _inputs = Abort(inputs.abort_handle());
    let mut outputs = Box::pin(async { tokio::join!(copy_out(stdout, io.stdout), copy_out(stderr, io.stderr)) });
    let mut ending = Box::pin(wait(system, &cx, &id, &exec_id));
    let mut drained = false;
    let code = loop {
        tokio::select! {
            code = &mut ending => break code?,
            _ = &mut outputs, if !drained => drained = true,
        }
    };
    if !drained {
        cx.step("draining output");
        let _ = tokio::time::timeout(DRAIN, &mut outputs).await;
    }
    drop(outputs);
    guard.close().await;
    Ok(code)
}

/// Stops a task with the session.
struct Abort(tokio::task::AbortHandle);
impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn wait(system: &System, cx: &Cx, id: &str, exec_id: &str) -> Result<i32> {
    loop {
        let wait = WaitExec { id: id.to_owned(), exec_id: exec_id.to_owned() };
        match system.addr::<Tasks>().call(&cx.with_timeout(LONG), wait).await {
            Err(e) if e.class == Class::DeadlineExceeded => {}
            other => return other,
        }
    }
}

async fn attach(system: &System, cx: Cx, id: String, io: Io) -> Result<()> {
    cx.attr("container.id", &id);
    let tasks = system.addr::<Tasks>();
    let (stdin, stdout, stderr) = (io.stdin.is_some(), io.stdout.is_some(), io.stderr.is_some());
    let open = OpenSession { id: id.clone(), stdin, stdout, stderr };
    let session = tasks.call(&cx, open).await?;
    let marks = [&session.stdout, &session.stderr].map(|s| format!("{s}.cut"));
    let close = CloseSession { id: id.clone(), session: session.clone(), exec: false };
    let guard = Guard { system: system.clone(), cx: cx.clone(), close: Some(close) };
    let ends = Ends::open(&session)?;
    let joined = tasks.call(&cx, JoinStreams { id: id.clone(), session }).await;
    let Ends { stdin, stdout, stderr, held } = ends;
    drop(held);
    joined?;
    cx.step("attached");
    let outputs = stdout.is_some() || stderr.is_some();
    let inputs = tokio::spawn(feed(system.clone(), cx.clone(), id, String::new(), io.stdin, stdin, io.resize));
    let abort = Abort(inputs.abort_handle());
    if outputs {
        tokio::join!(copy_out(stdout, io.stdout), copy_out(stderr, io.stderr));
    } else {
        let _ = inputs.await;
    }
    drop(abort);
    // The shim leaves a mark where it had to leave a client behind.
    let cut = marks.iter().any(|m| std::path::Path::new(m).exists());
    guard.close().await;
    if cut {
        return Err(Fault::resource_exhausted(
            "this client took nothing while a MiB of output waited for it, and was cut off: the container's log has everything",
        ));
    }
    Ok(())
}

/// The client's input, and the sizes of its terminal.
async fn feed(
    system: System,
    cx: Cx,
    id: String,
    exec_id: String,
    from: Option<Reader>,
    to: Option<Sender>,
    mut sizes: mpsc::Receiver<(u16, u16)>,
) {
    let tasks = system.addr::<Tasks>();
    let resizing = async {
        while let Some((width, height)) = sizes.recv().await {
            // A size that comes too late is of no use to anyone.
            let _ = tasks.call(&cx, Resize { id: id.clone(), exec_id: exec_id.clone(), width, height }).await;
        }
    };
    let copying = async {
        let (Some(mut from), Some(mut to)) = (from, to) else { return };
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = from.read(&mut buffer).await.unwrap_or(0);
            if n == 0 || to.write_all(&buffer[..n]).await.is_err() {
                break;
            }
        }
        drop(to);
        if !exec_id.is_empty() {
            // The process may be gone.
            let _ = tasks.call(&cx, CloseInput { id: id.clone(), exec_id: exec_id.clone() }).await;
        }
    };
    tokio::join!(resizing, copying);
}

/// Copies a FIFO to the client until its end; when the client is gone the rest is dropped, so that the process can go on.
async fn copy_out(from: Option<Receiver>, mut to: Option<Writer>) {
    let Some(mut from) = from else { return };
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = from.read(&mut buffer).await.unwrap_or(0);
        if n == 0 {
            break;
        }
        if let Some(writer) = &mut to
            && writer.write_all(&buffer[..n]).await.is_err()
        {
            to = None;
        }
    }
    if let Some(mut writer) = to {
        let _ = writer.shutdown().await;
    }
}

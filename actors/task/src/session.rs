//! Sessions of clients: execs with streams of their own, and clients attached to a container's streams. This actor makes the FIFOs and drives the shim;
//! whoever serves the client opens them and copies, so no byte of a stream passes through an actor.
use crate::exec::PROCESS;
use crate::link::{self, rpc};
use crate::{bundle, fifos, pod::Pod};
use kernel::{Cx, Fault, Result};
use messages::task::{CloseInput, CloseSession, JoinStreams, OpenSession, Resize, RunExec, Session, WaitExec};
use proto::prost_types::Any;
use proto::task as api;
use std::rc::Rc;
use std::time::Duration;

/// SIGHUP: what a terminal's processes hear when it is gone.
const HANGUP: u32 = 1;
/// How long they may take to say good-bye.
const GOODBYE: Duration = Duration::from_millis(500);

impl Pod {
    /// Makes the FIFOs.
    pub async fn open_session(self: Rc<Self>, _: Cx, m: OpenSession) -> Result<Session> {
        let container = self.container(&m.id)?;
        if container.ended().is_some() {
            return Err(Fault::failed_precondition(format!("container {} has ended", m.id)));
        }
        let dir = bundle::fifos(&self.args, &self.id);
        let exec_id = fifos::new_session();
        let make = |wanted: bool, name: &str| -> Result<String> {
            if !wanted {
                return Ok(String::new());
            }
            Ok(fifos::make(&dir, &m.id, &exec_id, name)?.display().to_string())
        };
        Ok(Session { stdin: make(m.stdin, "in")?, stdout: make(m.stdout, "out")?, stderr: make(m.stderr, "err")?, exec_id })
    }

    /// Adds and starts the process.
    pub async fn run_session(self: Rc<Self>, cx: Cx, m: RunExec) -> Result<()> {
        cx.attr("container.id", &m.id);
        let link = self.link(&cx).await?;
        let Session { exec_id, stdin, stdout, stderr } = m.session;
        let spec = Some(Any { type_url: PROCESS.into(), value: m.process });
        let add = api::ExecProcessRequest { id: m.id.clone(), exec_id: exec_id.clone(), terminal: m.terminal, stdin, stdout, stderr, spec };
        let limit = self.args.timeouts.call;
        self.ask(rpc(&cx, "Task/Exec", limit, |c| link.task.exec(c, &add))).await?;
        let start = api::StartRequest { id: m.id, exec_id };
        self.ask(rpc(&cx, "Task/Start", limit, |c| link.task.start(c, &start))).await?;
        self.collect_spans(&cx, &link);
        Ok(())
    }

    /// Waits for its end.
    pub async fn wait_session(self: Rc<Self>, cx: Cx, m: WaitExec) -> Result<i32> {
        let link = self.link(&cx).await?;
        Ok(link::wait(&cx, &link.task, &m.id, &m.exec_id).await?.exit_status as i32)
    }

    /// Attaches.
    pub async fn join_streams(self: Rc<Self>, cx: Cx, m: JoinStreams) -> Result<()> {
        self.container(&m.id)?;
        let link = self.link(&cx).await?;
        let request = proto::shim::AttachRequest {
            container_id: m.id,
            stdin_fifo: m.session.stdin,
            stdout_fifo: m.session.stdout,
            stderr_fifo: m.session.stderr,
        };
        self.ask(rpc(&cx, "Shim/Attach", self.args.timeouts.call, |c| link.shim.attach(c, &request))).await
    }

    /// Sets a terminal's size.
    pub async fn resize(self: Rc<Self>, cx: Cx, m: Resize) -> Result<()> {
        let link = self.link(&cx).await?;
        let request = api::ResizePtyRequest { id: m.id, exec_id: m.exec_id, width: m.width.into(), height: m.height.into() };
        self.ask(rpc(&cx, "Task/ResizePty", self.args.timeouts.call, |c| link.task.resize_pty(c, &request))).await
    }

    /// Ends the input.
    pub async fn close_input(self: Rc<Self>, cx: Cx, m: CloseInput) -> Result<()> {
        let link = self.link(&cx).await?;
        let request = api::CloseIoRequest { id: m.id, exec_id: m.exec_id, stdin: true };
        self.ask(rpc(&cx, "Task/CloseIO", self.args.timeouts.call, |c| link.task.close_io(c, &request))).await
    }

    /// Gives it back. The FIFOs go in any case. A process that still runs has lost its client: all that it began hears of it, and what goes on regardless is
    /// ended; only what had made itself independent (`nohup`) and has outlived the process stays, as with any lost terminal.
    pub async fn close_session(self: Rc<Self>, cx: Cx, m: CloseSession) -> Result<()> {
        let session = m.session;
        let remove = || {
            for path in [&session.stdin, &session.stdout, &session.stderr] {
                if !path.is_empty() {
                    let _ = std::fs::remove_file(path);
                    let _ = std::fs::remove_file(format!("{path}.cut"));
                }
            }
        };
        if !m.exec || self.is_gone() {
            remove();
            return Ok(());
        }
        // Where the shim cannot be asked, what is left of the FIFOs tells the next one who can.
        self.closed.borrow_mut().insert(session.exec_id.clone());
        let link = self.link(&cx).await?;
        let kill = api::KillRequest { id: m.id.clone(), exec_id: session.exec_id.clone(), signal: HANGUP, all: true };
        if rpc(&cx, "Task/Kill", self.args.timeouts.cleanup, |c| link.task.kill(c, &kill)).await.is_ok() {
            let _ = tokio::time::timeout(GOODBYE, link::wait(&cx, &link.task, &m.id, &session.exec_id)).await;
        }
        self.end_exec(&cx, &link, &m.id, &session.exec_id).await?;
        self.closed.borrow_mut().remove(&session.exec_id);
        remove();
        Ok(())
    }
}

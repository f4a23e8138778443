//! A process run in a container to its end, its output collected.
//!
//! The shim writes into FIFOs that we read. Until the process has started we hold a write end ourselves, so that an early reader sees no end of file; after
//! its end the output is read until all writers are gone, or for a short while if a grandchild keeps the pipe.
use crate::link::{self, Link, rpc};
use crate::pod::Pod;
use crate::{bundle, fifos};
use kernel::{Cx, Fault, Result, ResultExt};
use messages::task::{ExecResult, ExecSync};
use proto::prost_types::Any;
use proto::task as api;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::{OpenOptions, Receiver, Sender};
use tokio::time::{Instant, sleep_until};

/// Type of an exec's specification.
pub const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// One stream.
struct Stream {
    path: PathBuf,
    reader: RefCell<Receiver>,
    writer: RefCell<Option<Sender>>,
    kept: RefCell<Vec<u8>>,
}

impl Stream {
    fn open(dir: &Path, container: &str, exec_id: &str, name: &str) -> Result<Stream> {
        let path = fifos::make(dir, container, exec_id, name)?;
        let reader = OpenOptions::new().open_receiver(&path).context("open a FIFO")?;
        let writer = OpenOptions::new().open_sender(&path).context("open a FIFO")?;
        Ok(Stream { path, reader: RefCell::new(reader), writer: RefCell::new(Some(writer)), kept: RefCell::default() })
    }
    /// Reads to the end; keeps the first `most` bytes and lets the rest pass.
    #[allow(clippy::await_holding_refcell_ref, reason = "this is the reader's only user")]
    async fn read(&self, most: usize) -> std::io::Result<()> {
        let mut reader = self.reader.borrow_mut();
        let mut buffer = vec![0; 32 << 10];
        loop {
            let n = reader.read(&mut buffer).await?;
            if n == 0 {
                return Ok(());
            }
            let mut kept = self.kept.borrow_mut();
            let room = most.saturating_sub(kept.len()).min(n);
            kept.extend_from_slice(&buffer[..room]);
        }
    }
}

impl Pod {
    /// Runs it.
    pub async fn exec(self: Rc<Self>, cx: Cx, m: ExecSync) -> Result<ExecResult> {
        cx.attr("container.id", &m.id);
        let container = self.container(&m.id)?;
        if container.ended().is_some() {
            return Err(Fault::failed_precondition(format!("container {} has ended", m.id)));
        }
        let link = self.link(&cx).await?;
        let live = self.new_exec();
        let (dir, exec_id) = (bundle::fifos(&self.args, &self.id), live.id.as_str());
        let (out, err) = (Stream::open(&dir, &m.id, exec_id, "out")?, Stream::open(&dir, &m.id, exec_id, "err")?);
        let request = api::ExecProcessRequest {
            id: m.id.clone(),
            exec_id: exec_id.to_owned(),
            stdout: out.path.display().to_string(),
            stderr: err.path.display().to_string(),
            spec: Some(Any { type_url: PROCESS.into(), value: m.process.clone() }),
            ..Default::default()
        };
        let ended = match rpc(&cx, "Task/Exec", self.args.timeouts.call, |c| link.task.exec(c, &request)).await {
            Ok(_) => self.run_exec(&cx, &link, &m, exec_id, (&out, &err)).await,
            Err(fault) => Err(fault),
        };
        let cx = cx.without_deadline();
        let forgotten = match &ended {
            Ok(_) => self.delete_exec(&cx, &link, &m.id, exec_id).await,
            Err(_) => self.end_exec(&cx, &link, &m.id, exec_id).await,
        };
        match forgotten {
            Ok(()) => [&out, &err].into_iter().for_each(|s| drop(std::fs::remove_file(&s.path))),
            Err(e) => tracing::warn!(container = container.id, error = %e, "an exec is not deleted"),
        }
        let code = self.watch_for_silence(ended)?;
        Ok(ExecResult { code, stdout: out.kept.take(), stderr: err.kept.take() })
    }

    /// Starts it, and answers its code at its end.
    async fn run_exec(&self, cx: &Cx, link: &Link, m: &ExecSync, exec_id: &str, (out, err): (&Stream, &Stream)) -> Result<i32> {
        let limit = if m.timeout_ms == 0 { None } else { Some(Duration::from_millis(m.timeout_ms)) };
        let overdue = cx.deadline().map(Instant::from_std).into_iter().chain(limit.map(|l| Instant::now() + l)).min();
        let request = api::StartRequest { id: m.id.clone(), exec_id: exec_id.to_owned() };
        let reading = async {
            let (a, b) = futures::join!(out.read(m.max_output), err.read(m.max_output));
            a.and(b)
        };
        let running = async {
            rpc(cx, "Task/Start", self.args.timeouts.call, |c| link.task.start(c, &request)).await?;
            // The shim has the FIFOs open now.
            drop((out.writer.take(), err.writer.take()));
            cx.step("exec is running");
            link::wait(cx, &link.task, &m.id, exec_id).await
        };
        let (mut reading, mut running) = (std::pin::pin!(reading), std::pin::pin!(running));
        let (mut code, mut drained, mut until) = (None, false, overdue);
        while code.is_none() || !drained {
            tokio::select! {
                w = &mut running, if code.is_none() => {
                    code = Some(w?.exit_status as i32);
                    until = Some(Instant::now() + self.args.timeouts.drain);
                }
                r = &mut reading, if !drained => {
                    r.context("read the output")?;
                    drained = true;
                }
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => match code {
                    Some(_) => break,
                    None => return Err(Fault::deadline_exceeded(format!("exec in container {} did not end in time and was killed", m.id))),
                },
            }
        }
        code.ok_or_else(|| Fault::internal("no exit code"))
    }

    /// Kills an exec and waits for its end.
    pub async fn kill_exec(&self, cx: &Cx, link: &Link, id: &str, exec_id: &str) {
        let limit = self.args.timeouts.cleanup;
        let kill = api::KillRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), signal: 9, ..Default::default() };
        if rpc(cx, "Task/Kill", limit, |c| link.task.kill(c, &kill)).await.is_ok() {
            let _ = tokio::time::timeout(limit, link::wait(cx, &link.task, id, exec_id)).await;
        }
    }
}

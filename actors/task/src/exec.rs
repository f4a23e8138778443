//! A process run in a container to its end, its output collected.
//!
//! The shim writes into FIFOs that we read. Until the process has started we hold a write end ourselves, so that an early reader sees no end of file; after
//! its end the output is read until all writers are gone, or for a while if a grandchild keeps the pipe. A caller that goes away, or whose time is up,
//! takes the process and all that it began with it. The FIFOs go last: what a lost generation leaves of them names what has to be ended.
use crate::fifos::{self, Live};
use crate::link::{self, Link, rpc};
use crate::pod::Pod;
use crate::{Drain, bundle};
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

/// How long an answer waits for what it leaves to be gone.
const FORGET: Duration = Duration::from_secs(1);

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
    /// Reads to the end; keeps the first `most` bytes and lets the rest pass, so that the process is never held up.
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
        let (dir, exec_id) = (bundle::fifos(&self.args, &self.id), &live.id.clone());
        let (out, err) = (Stream::open(&dir, &m.id, exec_id, "out")?, Stream::open(&dir, &m.id, exec_id, "err")?);
        let request = api::ExecProcessRequest {
            id: m.id.clone(),
            exec_id: exec_id.to_owned(),
            stdout: out.path.display().to_string(),
            stderr: err.path.display().to_string(),
            spec: Some(Any { type_url: PROCESS.into(), value: m.process.clone() }),
            ..Default::default()
        };
        let ended = match self.ask(rpc(&cx, "Task/Exec", self.args.timeouts.call, |c| link.task.exec(c, &request))).await {
            Ok(_) => self.run_exec(&cx, &link, &m, exec_id, (&out, &err)).await,
            Err(fault) => Err(fault),
        };
        self.forget_exec(&cx.without_deadline(), link.clone(), &m.id, live, ended.is_ok(), [&out, &err].map(|s| s.path.clone())).await;
        let code = self.watch_for_silence(ended)?;
        let (mut stdout, mut stderr) = (out.kept.take(), err.kept.take());
        share(&mut stdout, &mut stderr, m.max_output);
        Ok(ExecResult { code, stdout, stderr })
    }

    /// Has the shim forget an exec, which is ended if it has not `ended` by itself. This takes milliseconds; where it does not, for the shim is silent, it
    /// goes on in the background.
    async fn forget_exec(self: &Rc<Self>, cx: &Cx, link: Link, id: &str, live: Live, ended: bool, paths: [PathBuf; 2]) {
        let (pod, id) = (self.clone(), id.to_owned());
        let (tell, told) = tokio::sync::oneshot::channel::<()>();
        cx.spawn("exec.forget", move |cx| async move {
            let forgotten =
                if ended { pod.delete_exec(&cx, &link, &id, &live.id).await } else { pod.end_exec(&cx, &link, &id, &live.id).await };
            match forgotten {
                Ok(()) => paths.iter().for_each(|path| drop(std::fs::remove_file(path))),
                // Its FIFOs stay: the sweep after the shim answers again finds it.
                Err(e) => tracing::warn!(container = id, error = %e, "an exec is not deleted"),
            }
            drop(tell);
        });
        let _ = tokio::time::timeout(FORGET, told).await;
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
            self.ask(rpc(cx, "Task/Start", self.args.timeouts.call, |c| link.task.start(c, &request))).await?;
            // The shim has the FIFOs open now.
            drop((out.writer.take(), err.writer.take()));
            cx.step("exec is running");
            link::wait(cx, &link.task, &m.id, exec_id).await
        };
        let (mut reading, mut running) = (std::pin::pin!(reading), std::pin::pin!(running));
        let mut gone = std::pin::pin!(cx.caller_gone());
        let (mut code, mut drained, mut until) = (None, false, overdue);
        while code.is_none() || !drained {
            tokio::select! {
                w = &mut running, if code.is_none() => {
                    code = Some(w?.exit_status as i32);
                    until = Some(Instant::now() + self.args.drain.limit());
                    cx.step("draining the output of the exec");
                }
                r = &mut reading, if !drained => {
                    r.context("read the output")?;
                    drained = true;
                }
                () = &mut gone => return Err(Fault::canceled(format!("the caller of an exec in container {} went away; it was killed", m.id))),
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => match code {
                    Some(_) if self.args.drain == Drain::Lenient => break,
                    Some(_) => return Err(Fault::deadline_exceeded(format!(
                        "failed to drain exec process {exec_id} in container {}: it ended, but a process that it began holds its output open", m.id))),
                    None => {
                        let limit = limit.map_or_else(|| "the caller's deadline".to_owned(), |l| format!("timeout {l:?}"));
                        return Err(Fault::deadline_exceeded(format!("{limit} exceeded: exec in container {} was killed", m.id)));
                    }
                },
            }
        }
        code.ok_or_else(|| Fault::internal("no exit code"))
    }

    /// Kills an exec with all that it began, and waits for its end.
    pub async fn kill_exec(&self, cx: &Cx, link: &Link, id: &str, exec_id: &str) {
        let limit = self.args.timeouts.cleanup;
        let kill = api::KillRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), signal: 9, all: true };
        if rpc(cx, "Task/Kill", limit, |c| link.task.kill(c, &kill)).await.is_ok() {
            let _ = tokio::time::timeout(limit, link::wait(cx, &link.task, id, exec_id)).await;
        }
    }
}

/// Cuts both to what one answer can carry: each has half for certain, and what the other does not need.
fn share(stdout: &mut Vec<u8>, stderr: &mut Vec<u8>, most: usize) {
    let half = most / 2;
    stdout.truncate(most - stderr.len().min(half));
    stderr.truncate(most - stdout.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_streams_fit_into_one_answer() {
        for (out, err, expected) in
            [(10, 10, (10, 10)), (100, 0, (100, 0)), (200, 0, (100, 0)), (200, 200, (50, 50)), (200, 20, (80, 20)), (20, 200, (20, 80))]
        {
            let (mut a, mut b) = (vec![0; out], vec![0; err]);
            share(&mut a, &mut b, 100);
            assert_eq!((a.len(), b.len()), expected, "{out} {err}");
        }
    }
}

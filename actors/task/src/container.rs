//! A container's task in the pod's shim: create, start, kill, delete, state, update, statistics, log.
use crate::link::{Link, is_silence, rpc};
use crate::pod::{Container, Pod};
use crate::process::{self, Process};
use crate::{bundle, cgroup, launch};
use kernel::{Class, Cx, Fault, Result};
use messages::task::{Create, Exit, Kill, TaskState};
use proto::prost_types::{Any, Timestamp};
use proto::task as api;
use proto::types;
use std::rc::Rc;
use std::time::Duration;

/// The signal that needs nobody's consent.
const SIGKILL: u32 = 9;
/// Longest local file work.
const FILES: Duration = Duration::from_secs(10);
/// Longest checkpoint of a client without a deadline.
const CHECKPOINT: Duration = Duration::from_secs(600);
const LINUX_RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

impl Pod {
    /// Makes bundle and task; on failure nothing is left.
    pub async fn create(self: Rc<Self>, cx: Cx, m: Create) -> Result<u32> {
        cx.attr("container.id", &m.id);
        let link = self.link(&cx).await?;
        let container = Container::new(&m.id, None);
        if self.containers.borrow().contains_key(&m.id) {
            return Err(Fault::already_exists(format!("container {} has a task", m.id)));
        }
        self.containers.borrow_mut().insert(m.id.clone(), container.clone());
        let id = m.id.clone();
        self.creating.borrow_mut().insert(id.clone());
        let created = self.begin_create(&cx, &link, m).await;
        match created {
            Ok(pid) => {
                container.pid.set(pid);
                self.creating.borrow_mut().remove(&id);
                self.watch(&cx, &link, &container);
                self.collect_spans(&cx, &link);
                Ok(pid)
            }
            Err(fault) => {
                let cx = cx.without_deadline();
                match self.undo_create(&cx, &link, &id).await {
                    Ok(()) => drop(self.containers.borrow_mut().remove(&id)),
                    Err(e) => tracing::warn!(container = id, error = %e, "undo of a failed create is incomplete"),
                }
                self.creating.borrow_mut().remove(&id);
                self.watch_for_silence(Err(fault))
            }
        }
    }

    async fn begin_create(&self, cx: &Cx, link: &Link, m: Create) -> Result<u32> {
        let path = self.make_container_bundle(cx, &m).await?;
        let mount =
            |m: messages::snapshot::Mount| types::Mount { r#type: m.fs_type, source: m.source, target: m.target, options: m.options };
        let request = api::CreateTaskRequest {
            id: m.id.clone(),
            bundle: path.display().to_string(),
            rootfs: m.rootfs.into_iter().map(mount).collect(),
            terminal: m.stdio.terminal,
            stdin: m.stdio.stdin,
            stdout: m.stdio.stdout,
            stderr: m.stdio.stderr,
            options: Some(launch::options(&self.row.borrow().runtime)),
            ..Default::default()
        };
        // The bundle names its pod, so adoption finds a task without a row: the row may become durable while the shim works.
        let saved = self.save(cx, |row| {
            row.containers.entry(m.id.clone()).or_default();
        });
        let created = self.ask(rpc(cx, "Task/Create", self.args.timeouts.call, |c| link.task.create(c, &request)));
        let ((), created) = futures::try_join!(saved, created)?;
        // Which process it is, for when the shim can no longer be asked.
        bundle::write(&path.join("created"), 0o600, process::stamp(created.pid).unwrap_or_default().as_bytes())?;
        Ok(created.pid)
    }

    async fn make_container_bundle(&self, cx: &Cx, m: &Create) -> Result<std::path::PathBuf> {
        let parent = self.bundle();
        let (args, id, sandbox, spec) = (self.args.clone(), m.id.clone(), self.id.clone(), m.spec.clone());
        let work = move || {
            let lost = |what: &str| Fault::data_loss(format!("the bundle of sandbox {sandbox} has no {what}"));
            let endpoint = bundle::read_endpoint(&parent).ok_or_else(|| lost("bootstrap.json"))?;
            let binary = bundle::read_binary(&parent).ok_or_else(|| lost("shim-binary-path"))?;
            bundle::make_container(&args, &id, &sandbox, &endpoint, &binary, &spec)
        };
        cx.run("bundle.make", |cx| async move { cx.blocking("bundle.make", FILES, work).await }).await
    }

    /// Removes what a create that did not finish may have made.
    pub async fn undo_create(&self, cx: &Cx, link: &Link, id: &str) -> Result<()> {
        let limit = self.args.timeouts.cleanup;
        let kill = api::KillRequest { id: id.to_owned(), signal: 9, all: true, ..Default::default() };
        let delete = api::DeleteRequest { id: id.to_owned(), ..Default::default() };
        let killed = rpc(cx, "Task/Kill", limit, |c| link.task.kill(c, &kill)).await;
        if killed.is_ok() {
            let _ = tokio::time::timeout(limit, crate::link::wait(cx, &link.task, id, "")).await;
        }
        let deleted = rpc(cx, "Task/Delete", limit, |c| link.task.delete(c, &delete)).await;
        match deleted {
            Err(f) if !f.is_not_found() => {
                // The bundle tells the shim, or its binary once it is gone, what to give back.
                self.suspect.notify_one();
                if !self.is_gone() {
                    return Err(f);
                }
                let container = self.container(id).unwrap_or_else(|_| Container::new(id, None));
                let _one = container.deleting.lock().await;
                self.give_back(&container).await?;
            }
            _ => {}
        }
        self.remove_bundle(cx, id).await?;
        self.save(cx, |row| {
            row.containers.remove(id);
        })
        .await
    }

    async fn remove_bundle(&self, cx: &Cx, id: &str) -> Result<()> {
        let (args, path) = (self.args.clone(), self.bundle_of(id));
        cx.run("bundle.remove", |cx| async move {
            cx.blocking("bundle.remove", FILES, move || {
                args.logs.retire(&path);
                bundle::remove(&args, &path)
            })
            .await
        })
        .await
    }

    /// Starts a created task.
    pub async fn start_task(self: Rc<Self>, cx: Cx, id: String) -> Result<u32> {
        cx.attr("container.id", &id);
        let container = self.container(&id)?;
        let link = self.link(&cx).await?;
        let request = api::StartRequest { id, ..Default::default() };
        let started = self.ask(rpc(&cx, "Task/Start", self.args.timeouts.call, |c| link.task.start(c, &request))).await?;
        self.collect_spans(&cx, &link);
        if started.pid != 0 {
            container.pid.set(started.pid);
        }
        Ok(container.pid.get())
    }

    /// Signals.
    pub async fn kill(self: Rc<Self>, cx: Cx, m: Kill) -> Result<()> {
        let container = self.container(&m.id)?;
        if m.exec_id.is_empty() && container.ended().is_some() {
            return Err(Fault::not_found(format!("container {} has ended", m.id)));
        }
        let by_shim = async {
            let link = self.link(&cx).await?;
            let request = api::KillRequest { id: m.id, exec_id: m.exec_id.clone(), signal: m.signal, all: m.all };
            self.ask(rpc(&cx, "Task/Kill", self.args.timeouts.call, |c| link.task.kill(c, &request))).await
        };
        match by_shim.await {
            Err(f) if m.signal == SIGKILL && m.exec_id.is_empty() && (is_silence(&f) || f.class == Class::Unavailable) => {
                self.kill_without_shim(&cx, &container).await
            }
            other => other,
        }
    }

    /// SIGKILL needs no shim, only the kernel; the pidfd tells of the end.
    async fn kill_without_shim(&self, cx: &Cx, container: &Rc<Container>) -> Result<()> {
        let (pid, id) = (container.pid.get(), container.id.clone());
        let process =
            Process::open(pid).map_err(|f| f.context(format!("container {id}: its shim does not answer, and its process is unknown")))?;
        tracing::warn!(container = id, "killed without its shim, which does not answer");
        container.killed.set(true);
        cx.blocking("kill a container", FILES, move || {
            cgroup::kill(pid, &id);
            Ok(())
        })
        .await?;
        process.kill();
        // The shim will not tell, so whoever killed does.
        if process.ended_within(self.args.timeouts.shutdown).await {
            self.lose(cx, container, Exit { code: 128 + SIGKILL, at_ns: nanos(None), oom: container.oom.get(), witness: "pidfd".into() })
                .await;
        }
        Ok(())
    }

    /// Deletes an ended task; what the shim no longer knows, or cannot be asked for, is deleted here alone.
    pub async fn delete(self: Rc<Self>, cx: Cx, id: String) -> Result<Option<Exit>> {
        let Ok(container) = self.container(&id) else { return Ok(None) };
        let _one = container.deleting.lock().await;
        if self.container(&id).is_err() {
            return Ok(container.ended());
        }
        if !self.is_gone() {
            let link = self.link(&cx).await?;
            let request = api::DeleteRequest { id: id.clone(), ..Default::default() };
            let deleted = self.ask(rpc(&cx, "Task/Delete", self.args.timeouts.call, |c| link.task.delete(c, &request)));
            match deleted.await {
                Ok(d) => container.settle(Exit {
                    code: d.exit_status,
                    at_ns: nanos(d.exited_at),
                    oom: container.oom.get(),
                    witness: "wait".into(),
                }),
                Err(f) if f.is_not_found() => {}
                Err(f) => return Err(f),
            }
        } else {
            cx.run("shim.delete", |_| self.give_back(&container)).await?;
        }
        // Whoever deletes knows of the end.
        container.announced.set(true);
        self.remove_bundle(&cx, &id).await?;
        self.save(&cx, |row| {
            row.containers.remove(&id);
        })
        .await?;
        self.containers.borrow_mut().remove(&id);
        Ok(container.ended())
    }

    /// The task's state.
    pub async fn state_of(self: Rc<Self>, cx: Cx, id: String) -> Result<Option<TaskState>> {
        let Ok(container) = self.container(&id) else { return Ok(None) };
        if let Some(exit) = container.ended() {
            return Ok(Some(TaskState::Exited(exit)));
        }
        let link = self.link(&cx).await?;
        let asked = self.ask_state(&cx, &link, &id).await;
        let s = match self.watch_for_silence(asked) {
            Err(f) if f.is_not_found() => return Ok(None),
            other => other?,
        };
        Ok(Some(match s.status() {
            types::Status::Created => TaskState::Created { pid: s.pid },
            types::Status::Paused | types::Status::Pausing => TaskState::Paused { pid: s.pid },
            types::Status::Stopped => TaskState::Exited(from_state(&s, &container)),
            _ => TaskState::Running { pid: s.pid },
        }))
    }

    /// Asks the shim.
    pub async fn ask_state(&self, cx: &Cx, link: &Link, id: &str) -> Result<api::StateResponse> {
        let request = api::StateRequest { id: id.to_owned(), ..Default::default() };
        rpc(cx, "Task/State", self.args.timeouts.state, |c| link.task.state(c, &request)).await
    }

    /// Changes resources.
    pub async fn update(self: Rc<Self>, cx: Cx, id: String, resources: Vec<u8>) -> Result<()> {
        self.container(&id)?;
        let link = self.link(&cx).await?;
        let request = api::UpdateTaskRequest {
            id,
            resources: Some(Any { type_url: LINUX_RESOURCES.into(), value: resources }),
            ..Default::default()
        };
        self.ask(rpc(&cx, "Task/Update", self.args.timeouts.call, |c| link.task.update(c, &request))).await
    }

    /// Writes the processes down; they go on.
    pub async fn checkpoint(self: Rc<Self>, cx: Cx, m: messages::task::Checkpoint) -> Result<()> {
        self.container(&m.id)?;
        let link = self.link(&cx).await?;
        let options = proto::runc_options::CheckpointOptions {
            image_path: m.images.display().to_string(),
            work_path: m.work.display().to_string(),
            ..Default::default()
        };
        let request = api::CheckpointTaskRequest { id: m.id, path: options.image_path.clone(), options: Some(proto::any(&options)) };
        // As long as it takes: the client's deadline bounds it.
        let limit = cx.remaining().unwrap_or(CHECKPOINT);
        rpc(&cx, "Task/Checkpoint", limit, |c| link.task.checkpoint(c, &request)).await.map(drop)
    }

    /// Statistics.
    pub async fn stats(self: Rc<Self>, cx: Cx, id: String) -> Result<Any> {
        self.container(&id)?;
        let link = self.link(&cx).await?;
        let request = api::StatsRequest { id: id.clone() };
        let answer = rpc(&cx, "Task/Stats", self.args.timeouts.stats, |c| link.task.stats(c, &request)).await;
        self.watch_for_silence(answer)?.stats.ok_or_else(|| Fault::not_found(format!("container {id} has no statistics")))
    }

    /// Has the shim open the log again.
    pub async fn reopen_log(self: Rc<Self>, cx: Cx, id: String) -> Result<()> {
        self.container(&id)?;
        let link = self.link(&cx).await?;
        let request = proto::shim::ReopenLogRequest { container_id: id };
        self.ask(rpc(&cx, "Shim/ReopenLog", self.args.timeouts.call, |c| link.shim.reopen_log(c, &request))).await
    }
}

/// The end that a state tells.
pub fn from_state(s: &api::StateResponse, container: &Container) -> Exit {
    Exit { code: s.exit_status, at_ns: nanos(s.exited_at), oom: container.oom.get(), witness: "wait".into() }
}

/// Unix nanoseconds; now, when the shim did not say.
pub fn nanos(at: Option<Timestamp>) -> i64 {
    match at {
        Some(t) if t.seconds > 0 => t.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(t.nanos)),
        _ => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX)),
    }
}

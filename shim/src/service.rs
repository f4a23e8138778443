//! The task service (v2 and v3). The sandbox service and the private one are in [`pod`].
use crate::bootstrap::Flags;
use crate::cgroup::Cgroup;
use crate::container::{Container, Process, follow};
use crate::engine::Engine;
use crate::events::Publisher;
use crate::idmap::{Mapper, Maps};
use crate::io::{Targets, Wiring};
use crate::log::Log;
use crate::reaper::{Exit, Reaper};
use crate::runtime::{Checkpoint, Runtime, Wish};
use crate::sandbox::Sandbox;
use crate::spans::{Origin, Spans};
use crate::{family, mounts, owner, sys};
use births::Births;
use patience::{hung, silent, step};
use proto::async_trait;
use proto::glue::{Context, fault};
use proto::task::*;
use proto::ttrpc::{Code, Result};
use proto::{events, types};
use serde_json::Value;
use std::collections::BTreeMap;
use std::future::pending;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::watch;

mod births;
mod patience;
mod pod;

/// The file of a bundle that tells what its log was given, eight little-endian numbers; the daemon reads it.
const LOG_COUNTERS: &str = "log-counters";

/// State of the server.
pub struct Service {
    namespace: String,
    containers: Mutex<BTreeMap<String, Container>>,
    births: Births,
    sandbox: Mutex<Option<Sandbox>>,
    stopped: watch::Sender<Option<Exit>>,
    engine: Engine,
    reaper: Reaper,
    events: Arc<Publisher>,
    spans: Spans,
    stop: watch::Sender<bool>,
}

fn failed(what: &str) -> impl Fn(std::io::Error) -> proto::ttrpc::Error + '_ {
    move |e| fault(Code::UNKNOWN, format!("{what}: {e}"))
}

fn missing(id: &str) -> proto::ttrpc::Error {
    fault(Code::NOT_FOUND, format!("container {id:?}: not found"))
}

impl Service {
    /// A server without containers.
    pub fn new(flags: &Flags, engine: Engine, reaper: Reaper, events: Publisher, stop: watch::Sender<bool>) -> Service {
        Service {
            namespace: flags.namespace.clone(),
            containers: Mutex::default(),
            births: Births::default(),
            sandbox: Mutex::default(),
            stopped: watch::channel(None).0,
            engine,
            reaper,
            events: Arc::new(events),
            spans: Spans::default(),
            stop,
        }
    }
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Container>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn pod(&self) -> MutexGuard<'_, Option<Sandbox>> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn find(&self, id: &str) -> Result<Container> {
        self.all().get(id).cloned().ok_or_else(|| missing(id))
    }
    fn process(&self, id: &str, exec_id: &str) -> Result<(Container, Process)> {
        let container = self.find(id)?;
        let process = if exec_id.is_empty() { Some(container.init.clone()) } else { container.execs.get(exec_id).cloned() };
        let process = process.ok_or_else(|| fault(Code::NOT_FOUND, format!("process {exec_id:?} of container {id:?}: not found")))?;
        Ok((container, process))
    }
    /// Watches a started process to its end.
    fn watch(
        &self,
        (id, exec_id): (&str, &str),
        (pid, born): (u32, Instant),
        wiring: Wiring,
        tell: watch::Sender<Option<Exit>>,
        container: Container,
    ) {
        let ended = self.reaper.wait(pid, born);
        let (events, id, exec_id) = (self.events.clone(), id.to_owned(), exec_id.to_owned());
        tokio::spawn(async move {
            let init = exec_id.is_empty();
            let oom = container.cgroup.clone();
            let at_once = || {
                if init {
                    oom.close();
                }
            };
            let Some(exit) = follow(ended, wiring, tell, at_once).await else { return };
            if init {
                if !container.own_pids {
                    oom.processes().into_iter().for_each(|p| drop(sys::kill(p, libc::SIGKILL as u32)));
                }
                if oom.oom_kills() > 0 {
                    events.publish("/tasks/oom", proto::any(&events::TaskOom { container_id: id.clone() }));
                }
            }
            let name = if init { id.clone() } else { exec_id };
            let event = events::TaskExit { container_id: id, id: name, pid, exit_status: exit.code, exited_at: Some(exit.at.into()) };
            events.publish("/tasks/exit", proto::any(&event));
        });
    }
}

#[async_trait]
impl Task for Service {
    async fn create(&self, cx: &Context, m: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let birth = self.births.begin(&m.id);
        let Some(birth) = birth.filter(|_| !self.all().contains_key(&m.id)) else {
            return Err(fault(Code::ALREADY_EXISTS, format!("container {:?} exists", m.id)));
        };
        let origin = Origin::of(cx);
        let (bundle, rootfs) = (PathBuf::from(&m.bundle), PathBuf::from(&m.bundle).join("rootfs"));
        let text = std::fs::read(bundle.join("config.json")).map_err(failed("read config.json"))?;
        let config: Value = serde_json::from_slice(&text).map_err(|e| fault(Code::INVALID_ARGUMENT, format!("config.json: {e}")))?;
        let options: proto::runc_options::Options = m.options.as_ref().and_then(proto::from_any).unwrap_or_default();
        let wish = Wish {
            binary: &options.binary_name,
            root: &options.root,
            systemd: options.systemd_cgroup,
            no_new_keyring: options.no_new_keyring,
            namespace: &self.namespace,
        };
        let runtime = Runtime::choose(&wish, &self.engine, self.reaper.clone());
        let (maps, mapper) = (Maps::of_container(&config), Mapper::of(&config).map_err(failed("open the user namespace"))?);
        owner::open_bundle(&bundle, &maps).map_err(failed("open the bundle to the pod's users"))?;
        let targets = Targets { stdin: m.stdin, stdout: m.stdout, stderr: m.stderr, terminal: m.terminal };
        let name = format!("create container {}", m.id);
        let opening = Log::of(&targets, bundle.join(LOG_COUNTERS));
        let log = step(cx, &name, silent(&targets.stdout), opening, birth.unwanted()).await?;
        let mounting = async { mounts::mount_all(&m.rootfs, &rootfs, &mapper) };
        let mounted = self.spans.time(&origin, "mount rootfs", &m.id, mounting).await;
        mounted.map_err(failed("mount the root file system")).inspect_err(|_| drop(mounts::unmount(&rootfs)))?;
        let born = Instant::now();
        let made = async {
            let mut wiring = Wiring::open(&targets, log)?;
            let io = wiring.child.take().ok_or_else(|| std::io::Error::other("streams are used up"))?;
            owner::give(&io, &config["process"], &maps);
            let pid = self.spans.time(&origin, "runtime.create", &m.id, runtime.create(&m.id, &bundle, io)).await?;
            wiring.connect()?;
            std::io::Result::Ok((pid, wiring))
        };
        let (pid, wiring) = match step(cx, &name, hung(&runtime, &bundle), made, birth.unwanted()).await {
            Ok(made) => made,
            Err(fault) => {
                let _ = runtime.delete(&m.id, &bundle).await;
                let _ = mounts::unmount(&rootfs);
                return Err(fault);
            }
        };
        let spaces = config.pointer("/linux/namespaces").and_then(|n| n.as_array()).cloned().unwrap_or_default();
        let own_pids = spaces.iter().any(|n| n["type"] == "pid" && n.get("path").is_none_or(|p| p == ""));
        let init = Process { pid, streamed: wiring.streamed.clone(), ..Process::new(targets, vec![]) };
        let (execs, cgroup) = (BTreeMap::new(), Cgroup::of(pid));
        let container = Container { bundle, runtime, init, execs, cgroup, maps, paused: false, own_pids, deleting: Arc::default() };
        self.all().insert(m.id.clone(), container.clone());
        self.watch((&m.id, ""), (pid, born), wiring, container.init.exit.clone(), container);
        self.events
            .publish("/tasks/create", proto::any(&events::TaskCreate { container_id: m.id, bundle: m.bundle, pid, ..Default::default() }));
        Ok(CreateTaskResponse { pid })
    }

    async fn start(&self, cx: &Context, m: StartRequest) -> Result<StartResponse> {
        let (container, process) = self.process(&m.id, &m.exec_id)?;
        let origin = Origin::of(cx);
        if m.exec_id.is_empty() {
            let starting = self.spans.time(&origin, "runtime.start", &m.id, container.runtime.start(&m.id, &container.bundle));
            step(cx, "start", hung(&container.runtime, &container.bundle), starting, process.unwanted()).await?;
            if let Some(c) = self.all().get_mut(&m.id) {
                c.init.started = true;
            }
            self.events.publish("/tasks/start", proto::any(&events::TaskStart { container_id: m.id, pid: process.pid }));
            return Ok(StartResponse { pid: process.pid });
        }
        if container.init.ended().is_some() {
            return Err(fault(Code::FAILED_PRECONDITION, format!("container {:?} has ended", m.id)));
        }
        let born = Instant::now();
        let mut wiring = Wiring::open(&process.targets, None).map_err(failed("open the streams"))?;
        let Some(io) = wiring.child.take() else { return Err(fault(Code::INTERNAL, "streams are used up")) };
        owner::give(&io, &serde_json::from_slice(&process.spec).unwrap_or_default(), &container.maps);
        let running = container.runtime.exec(&m.id, &m.exec_id, &container.bundle, &process.spec, io);
        let running = self.spans.time(&origin, "runtime.exec", &m.id, running);
        let pid = step(cx, "exec", hung(&container.runtime, &container.bundle), running, process.unwanted()).await?;
        wiring.connect().map_err(failed("take the terminal over"))?;
        match self.all().get_mut(&m.id).and_then(|c| c.execs.get_mut(&m.exec_id)) {
            Some(p) => (p.pid, p.started, p.streamed) = (pid, true, wiring.streamed.clone()),
            // Its caller gave up and deleted it while it was being started: nobody else would end it.
            None => drop(sys::kill(pid, libc::SIGKILL as u32)),
        }
        self.watch((&m.id, &m.exec_id), (pid, born), wiring, process.exit.clone(), container);
        self.events.publish("/tasks/exec-started", proto::any(&events::TaskExecStarted { container_id: m.id, exec_id: m.exec_id, pid }));
        Ok(StartResponse { pid })
    }

    async fn exec(&self, _: &Context, m: ExecProcessRequest) -> Result<()> {
        let mut all = self.all();
        let container = all.get_mut(&m.id).ok_or_else(|| missing(&m.id))?;
        if container.execs.contains_key(&m.exec_id) {
            return Err(fault(Code::ALREADY_EXISTS, format!("process {:?} exists", m.exec_id)));
        }
        let targets = Targets { stdin: m.stdin, stdout: m.stdout, stderr: m.stderr, terminal: m.terminal };
        container.execs.insert(m.exec_id.clone(), Process::new(targets, m.spec.unwrap_or_default().value));
        self.events.publish("/tasks/exec-added", proto::any(&events::TaskExecAdded { container_id: m.id, exec_id: m.exec_id }));
        Ok(())
    }

    async fn state(&self, _: &Context, m: StateRequest) -> Result<StateResponse> {
        let (container, process) = self.process(&m.id, &m.exec_id)?;
        let ended = process.ended();
        let status = match (&ended, container.paused, process.started) {
            (Some(_), ..) => types::Status::Stopped,
            (None, true, _) => types::Status::Paused,
            (None, _, true) => types::Status::Running,
            _ => types::Status::Created,
        };
        Ok(StateResponse {
            id: m.id,
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: process.pid,
            status: status as i32,
            stdin: process.targets.stdin,
            stdout: process.targets.stdout,
            stderr: process.targets.stderr,
            terminal: process.targets.terminal,
            exit_status: ended.map_or(0, |e| e.code),
            exited_at: ended.map(|e| e.at.into()),
            exec_id: m.exec_id,
        })
    }

    async fn wait(&self, _: &Context, m: WaitRequest) -> Result<WaitResponse> {
        let (_, process) = self.process(&m.id, &m.exec_id)?;
        let mut told = process.exit.subscribe();
        let exit = told.wait_for(Option::is_some).await.ok().and_then(|e| *e);
        let exit = exit.ok_or_else(|| fault(Code::UNAVAILABLE, "the process is not watched any more"))?;
        Ok(WaitResponse { exit_status: exit.code, exited_at: Some(exit.at.into()) })
    }

    async fn kill(&self, _: &Context, m: KillRequest) -> Result<()> {
        let (container, process) = self.process(&m.id, &m.exec_id)?;
        if process.ended().is_some() || process.pid == 0 {
            return Err(fault(Code::NOT_FOUND, "process already finished"));
        }
        if m.all && !m.exec_id.is_empty() {
            if m.signal == libc::SIGKILL as u32 {
                family::kill(process.pid, || container.cgroup.processes());
            } else {
                family::signal(process.pid, m.signal, &container.cgroup.processes());
            }
            return Ok(());
        }
        if m.all && m.exec_id.is_empty() {
            container.cgroup.processes().into_iter().for_each(|p| drop(sys::kill(p, m.signal)));
        }
        let killed = sys::kill(process.pid, m.signal);
        if m.signal == libc::SIGKILL as u32 {
            container.cgroup.thaw();
        }
        match killed {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Err(fault(Code::NOT_FOUND, "process already finished")),
            other => other.map_err(failed("kill")),
        }
    }

    async fn delete(&self, _: &Context, m: DeleteRequest) -> Result<DeleteResponse> {
        // Of a create whose caller is gone: what it makes is deleted, too.
        self.births.over(&m.id).await;
        let (container, process) = self.process(&m.id, &m.exec_id)?;
        if process.ended().is_none() && process.started {
            return Err(fault(Code::FAILED_PRECONDITION, format!("process of container {:?} still runs", m.id)));
        }
        process.give_up();
        if m.exec_id.is_empty() {
            container.execs.values().for_each(Process::give_up);
            let _one = container.deleting.lock().await;
            self.find(&m.id)?;
            container.runtime.delete(&m.id, &container.bundle).await.map_err(failed("delete"))?;
            mounts::unmount(&container.bundle.join("rootfs")).map_err(failed("unmount the root file system"))?;
            self.all().remove(&m.id);
        } else if let Some(c) = self.all().get_mut(&m.id) {
            c.execs.remove(&m.exec_id);
        }
        let exit = process.ended();
        let response = DeleteResponse { pid: process.pid, exit_status: exit.map_or(137, |e| e.code), exited_at: exit.map(|e| e.at.into()) };
        if m.exec_id.is_empty() {
            let event = events::TaskDelete {
                container_id: m.id,
                pid: response.pid,
                exit_status: response.exit_status,
                exited_at: response.exited_at,
                ..Default::default()
            };
            self.events.publish("/tasks/delete", proto::any(&event));
        }
        Ok(response)
    }

    async fn pids(&self, _: &Context, m: PidsRequest) -> Result<PidsResponse> {
        let container = self.find(&m.id)?;
        let processes = container.cgroup.processes().into_iter().map(|pid| types::ProcessInfo { pid, info: None });
        Ok(PidsResponse { processes: processes.collect() })
    }

    async fn checkpoint(&self, cx: &Context, m: CheckpointTaskRequest) -> Result<()> {
        let container = self.find(&m.id)?;
        let options: proto::runc_options::CheckpointOptions = m.options.as_ref().and_then(proto::from_any).unwrap_or_default();
        let wish = Checkpoint {
            image_path: if options.image_path.is_empty() { m.path } else { options.image_path }.into(),
            work_path: options.work_path.into(),
            exit: options.exit,
            open_tcp: options.open_tcp,
            external_unix_sockets: options.external_unix_sockets,
            terminal: options.terminal,
            file_locks: options.file_locks,
        };
        let writing = container.runtime.checkpoint(&m.id, &container.bundle, &wish);
        step(cx, "checkpoint", hung(&container.runtime, &container.bundle), writing, pending()).await?;
        self.events.publish("/tasks/checkpointed", proto::any(&events::TaskCheckpointed { container_id: m.id, checkpoint: String::new() }));
        Ok(())
    }

    async fn pause(&self, cx: &Context, m: PauseRequest) -> Result<()> {
        self.freeze(cx, &m.id, true).await
    }

    async fn resume(&self, cx: &Context, m: ResumeRequest) -> Result<()> {
        self.freeze(cx, &m.id, false).await
    }

    async fn close_io(&self, _: &Context, m: CloseIoRequest) -> Result<()> {
        let (_, process) = self.process(&m.id, &m.exec_id)?;
        if m.stdin {
            process.streamed.close_input().await;
        }
        Ok(())
    }

    async fn resize_pty(&self, _: &Context, m: ResizePtyRequest) -> Result<()> {
        let (_, process) = self.process(&m.id, &m.exec_id)?;
        process.streamed.resize(m.width, m.height).map_err(failed("resize the terminal"))
    }

    async fn update(&self, cx: &Context, m: UpdateTaskRequest) -> Result<()> {
        let container = self.find(&m.id)?;
        let resources = m.resources.unwrap_or_default().value;
        let updating = container.runtime.update(&m.id, &container.bundle, &resources);
        step(cx, "update", hung(&container.runtime, &container.bundle), updating, pending()).await
    }

    async fn stats(&self, _: &Context, m: StatsRequest) -> Result<StatsResponse> {
        Ok(StatsResponse { stats: Some(self.find(&m.id)?.cgroup.metrics()) })
    }

    async fn connect(&self, _: &Context, m: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = self.all().get(&m.id).map_or(0, |c| c.init.pid);
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, version: String::new() })
    }

    async fn shutdown(&self, _: &Context, _: ShutdownRequest) -> Result<()> {
        if self.all().is_empty() && self.pod().is_none() {
            self.stop.send_replace(true);
        }
        Ok(())
    }
}

impl Service {
    async fn freeze(&self, cx: &Context, id: &str, pause: bool) -> Result<()> {
        let container = self.find(id)?;
        let freezing = container.runtime.freeze(id, &container.bundle, pause);
        step(cx, "freeze", hung(&container.runtime, &container.bundle), freezing, pending()).await?;
        if let Some(c) = self.all().get_mut(id) {
            c.paused = pause;
        }
        Ok(())
    }
}

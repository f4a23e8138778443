//! The services: task (v2 and v3), sandbox, and the private one.
use crate::bootstrap::Flags;
use crate::cgroup::Cgroup;
use crate::container::{Container, Process, Targets, follow};
use crate::events::Publisher;
use crate::io::Wiring;
use crate::reaper::{Exit, Reaper};
use crate::runtime::Runtime;
use crate::sandbox::Sandbox;
use crate::{mounts, sys};
use proto::async_trait;
use proto::glue::{Context, fault};
use proto::task::*;
use proto::ttrpc::{Code, Result};
use proto::{events, sandbox as sb, shim as own, types};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// State of the server.
pub struct Service {
    namespace: String,
    containers: Mutex<BTreeMap<String, Container>>,
    sandbox: Mutex<Option<Sandbox>>,
    stopped: watch::Sender<Option<Exit>>,
    reaper: Reaper,
    events: Arc<Publisher>,
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
    pub fn new(flags: &Flags, reaper: Reaper, events: Publisher, stop: watch::Sender<bool>) -> Service {
        Service {
            namespace: flags.namespace.clone(),
            containers: Mutex::default(),
            sandbox: Mutex::default(),
            stopped: watch::channel(None).0,
            reaper,
            events: Arc::new(events),
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
    fn options(request: &CreateTaskRequest) -> proto::runc_options::Options {
        request.options.as_ref().and_then(proto::from_any).unwrap_or_default()
    }
    /// Watches a started process to its end.
    fn watch(&self, id: &str, exec_id: &str, pid: u32, wiring: Wiring, tell: watch::Sender<Option<Exit>>, container: Container) {
        let ended = self.reaper.wait(pid);
        let (events, id, exec_id) = (self.events.clone(), id.to_owned(), exec_id.to_owned());
        tokio::spawn(async move {
            let init = exec_id.is_empty();
            let oom = container.cgroup.clone();
            let Some(exit) = follow(ended, wiring, tell).await else { return };
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
    async fn create(&self, _: &Context, m: CreateTaskRequest) -> Result<CreateTaskResponse> {
        if self.all().contains_key(&m.id) {
            return Err(fault(Code::ALREADY_EXISTS, format!("container {:?} exists", m.id)));
        }
        if m.terminal {
            return Err(fault(Code::UNIMPLEMENTED, "terminals are not built yet"));
        }
        let options = Self::options(&m);
        let runtime = Runtime::new(&options.binary_name, &options.root, options.systemd_cgroup, &self.namespace, self.reaper.clone());
        let (bundle, rootfs) = (PathBuf::from(&m.bundle), PathBuf::from(&m.bundle).join("rootfs"));
        mounts::mount_all(&m.rootfs, &rootfs)
            .map_err(failed("mount the root file system"))
            .inspect_err(|_| drop(mounts::unmount(&rootfs)))?;
        let made = async {
            let mut wiring = Wiring::open(&m.stdin, &m.stdout, &m.stderr)?;
            let streams = wiring.streams.take().ok_or_else(|| std::io::Error::other("streams are used up"))?;
            let pid = runtime.create(&m.id, &bundle, streams).await?;
            std::io::Result::Ok((pid, wiring))
        };
        let (pid, wiring) = match made.await {
            Ok(made) => made,
            Err(e) => {
                let _ = runtime.delete(&m.id, &bundle).await;
                let _ = mounts::unmount(&rootfs);
                return Err(fault(Code::UNKNOWN, format!("create container {}: {e}", m.id)));
            }
        };
        let config: serde_json::Value =
            std::fs::read(bundle.join("config.json")).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
        let spaces = config.pointer("/linux/namespaces").and_then(|n| n.as_array()).cloned().unwrap_or_default();
        let own_pids = spaces.iter().any(|n| n["type"] == "pid" && n.get("path").is_none_or(|p| p == ""));
        let targets = Targets { stdin: m.stdin.clone(), stdout: m.stdout.clone(), stderr: m.stderr.clone() };
        let init = Process { pid, ..Process::new(targets, vec![]) };
        let container = Container {
            bundle,
            runtime,
            init,
            execs: BTreeMap::new(),
            cgroup: Cgroup::of(pid),
            log: wiring.log.clone(),
            paused: false,
            own_pids,
            deleting: Arc::default(),
        };
        self.all().insert(m.id.clone(), container.clone());
        self.watch(&m.id, "", pid, wiring, container.init.exit.clone(), container);
        self.events
            .publish("/tasks/create", proto::any(&events::TaskCreate { container_id: m.id, bundle: m.bundle, pid, ..Default::default() }));
        Ok(CreateTaskResponse { pid })
    }

    async fn start(&self, _: &Context, m: StartRequest) -> Result<StartResponse> {
        let (container, process) = self.process(&m.id, &m.exec_id)?;
        if m.exec_id.is_empty() {
            container.runtime.start(&m.id, &container.bundle).await.map_err(failed("start"))?;
            if let Some(c) = self.all().get_mut(&m.id) {
                c.init.started = true;
            }
            self.events.publish("/tasks/start", proto::any(&events::TaskStart { container_id: m.id, pid: process.pid }));
            return Ok(StartResponse { pid: process.pid });
        }
        if container.init.ended().is_some() {
            return Err(fault(Code::FAILED_PRECONDITION, format!("container {:?} has ended", m.id)));
        }
        let t = &process.targets;
        let mut wiring = Wiring::open(&t.stdin, &t.stdout, &t.stderr).map_err(failed("open the streams"))?;
        let Some(streams) = wiring.streams.take() else { return Err(fault(Code::INTERNAL, "streams are used up")) };
        let pid = container.runtime.exec(&m.id, &m.exec_id, &container.bundle, &process.spec, streams).await.map_err(failed("exec"))?;
        if let Some(p) = self.all().get_mut(&m.id).and_then(|c| c.execs.get_mut(&m.exec_id)) {
            (p.pid, p.started) = (pid, true);
        }
        self.watch(&m.id, &m.exec_id, pid, wiring, process.exit.clone(), container);
        self.events.publish("/tasks/exec-started", proto::any(&events::TaskExecStarted { container_id: m.id, exec_id: m.exec_id, pid }));
        Ok(StartResponse { pid })
    }

    async fn exec(&self, _: &Context, m: ExecProcessRequest) -> Result<()> {
        if m.terminal {
            return Err(fault(Code::UNIMPLEMENTED, "terminals are not built yet"));
        }
        let mut all = self.all();
        let container = all.get_mut(&m.id).ok_or_else(|| missing(&m.id))?;
        if container.execs.contains_key(&m.exec_id) {
            return Err(fault(Code::ALREADY_EXISTS, format!("process {:?} exists", m.exec_id)));
        }
        let targets = Targets { stdin: m.stdin, stdout: m.stdout, stderr: m.stderr };
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
            terminal: false,
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
        if m.all && m.exec_id.is_empty() {
            container.cgroup.processes().into_iter().for_each(|p| drop(sys::kill(p, m.signal)));
        }
        match sys::kill(process.pid, m.signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Err(fault(Code::NOT_FOUND, "process already finished")),
            other => other.map_err(failed("kill")),
        }
    }

    async fn delete(&self, _: &Context, m: DeleteRequest) -> Result<DeleteResponse> {
        let (container, process) = self.process(&m.id, &m.exec_id)?;
        if process.ended().is_none() && process.started {
            return Err(fault(Code::FAILED_PRECONDITION, format!("process of container {:?} still runs", m.id)));
        }
        if m.exec_id.is_empty() {
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

    async fn pause(&self, _: &Context, m: PauseRequest) -> Result<()> {
        self.freeze(&m.id, true).await
    }

    async fn resume(&self, _: &Context, m: ResumeRequest) -> Result<()> {
        self.freeze(&m.id, false).await
    }

    async fn close_io(&self, _: &Context, _: CloseIoRequest) -> Result<()> {
        Ok(())
    }

    async fn update(&self, _: &Context, m: UpdateTaskRequest) -> Result<()> {
        let container = self.find(&m.id)?;
        let resources = m.resources.unwrap_or_default().value;
        container.runtime.update(&m.id, &container.bundle, &resources).await.map_err(failed("update"))
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
    async fn freeze(&self, id: &str, pause: bool) -> Result<()> {
        let container = self.find(id)?;
        container.runtime.freeze(id, &container.bundle, pause).await.map_err(failed("freeze"))?;
        if let Some(c) = self.all().get_mut(id) {
            c.paused = pause;
        }
        Ok(())
    }
    /// Kills every container and the pod's init, and waits for their ends.
    async fn halt(&self) {
        let all: Vec<Container> = self.all().values().cloned().collect();
        for c in all.iter().filter(|c| c.init.ended().is_none()) {
            c.cgroup.processes().into_iter().for_each(|p| drop(sys::kill(p, libc::SIGKILL as u32)));
            let _ = sys::kill(c.init.pid, libc::SIGKILL as u32);
        }
        for c in all {
            let mut told = c.init.exit.subscribe();
            let _ = tokio::time::timeout(std::time::Duration::from_secs(5), told.wait_for(Option::is_some)).await;
        }
        let init = self.pod().as_mut().and_then(|p| p.init.take());
        if let Some(init) = init {
            let _ = sys::kill(init, libc::SIGKILL as u32);
            let _ = self.reaper.wait(init).await;
        }
        self.stopped.send_replace(Some(Exit { code: 0, at: std::time::SystemTime::now() }));
    }
}

#[async_trait]
impl sb::Sandbox for Service {
    async fn create_sandbox(&self, _: &Context, m: sb::CreateSandboxRequest) -> Result<sb::CreateSandboxResponse> {
        let wish = m.options.map(|o| o.value).unwrap_or_default();
        let wish = serde_json::from_slice(&wish).map_err(|e| fault(Code::INVALID_ARGUMENT, format!("options: {e}")))?;
        let made = Sandbox::make(&wish).map_err(failed("make the pod's namespaces"))?;
        *self.pod() = Some(made);
        Ok(sb::CreateSandboxResponse::default())
    }

    async fn start_sandbox(&self, _: &Context, _: sb::StartSandboxRequest) -> Result<sb::StartSandboxResponse> {
        let pod = self.pod();
        let pod = pod.as_ref().ok_or_else(|| fault(Code::NOT_FOUND, "no sandbox"))?;
        Ok(sb::StartSandboxResponse {
            pid: pod.init.unwrap_or_else(std::process::id),
            created_at: Some(pod.at.into()),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &Context, _: sb::PlatformRequest) -> Result<sb::PlatformResponse> {
        let platform = types::Platform { os: "linux".into(), architecture: std::env::consts::ARCH.into(), ..Default::default() };
        Ok(sb::PlatformResponse { platform: Some(platform) })
    }

    async fn stop_sandbox(&self, _: &Context, _: sb::StopSandboxRequest) -> Result<sb::StopSandboxResponse> {
        self.halt().await;
        Ok(sb::StopSandboxResponse::default())
    }

    async fn wait_sandbox(&self, _: &Context, _: sb::WaitSandboxRequest) -> Result<sb::WaitSandboxResponse> {
        let mut told = self.stopped.subscribe();
        let exit = told.wait_for(Option::is_some).await.ok().and_then(|e| *e);
        Ok(sb::WaitSandboxResponse { exit_status: exit.map_or(0, |e| e.code), exited_at: exit.map(|e| e.at.into()) })
    }

    async fn sandbox_status(&self, _: &Context, m: sb::SandboxStatusRequest) -> Result<sb::SandboxStatusResponse> {
        let pod = self.pod();
        let pod = pod.as_ref().ok_or_else(|| fault(Code::NOT_FOUND, "no sandbox"))?;
        let state = if self.stopped.borrow().is_some() { "SANDBOX_NOTREADY" } else { "SANDBOX_READY" };
        Ok(sb::SandboxStatusResponse {
            sandbox_id: m.sandbox_id,
            pid: pod.init.unwrap_or_else(std::process::id),
            state: state.into(),
            info: pod.paths().into_iter().collect(),
            created_at: Some(pod.at.into()),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &Context, _: sb::PingRequest) -> Result<sb::PingResponse> {
        Ok(sb::PingResponse::default())
    }

    async fn shutdown_sandbox(&self, _: &Context, _: sb::ShutdownSandboxRequest) -> Result<sb::ShutdownSandboxResponse> {
        self.halt().await;
        self.stop.send_replace(true);
        Ok(sb::ShutdownSandboxResponse::default())
    }
}

#[async_trait]
impl own::Shim for Service {
    async fn reopen_log(&self, _: &Context, m: own::ReopenLogRequest) -> Result<()> {
        let container = self.find(&m.container_id)?;
        container.log.map_or(Ok(()), |log| log.reopen()).map_err(failed("reopen the log"))
    }
}

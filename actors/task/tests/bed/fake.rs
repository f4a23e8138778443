//! A scripted shim: a ttrpc server in the test's process, `sleep`s as its own process and its containers' inits, and a shell script as its binary.
use super::Bed;
use parking_lot::Mutex;
use proto::sandbox::{self as sb, Sandbox};
use proto::task::{self as t, Task};
use proto::ttrpc::{Code, Result, r#async as ttrpc};
use proto::types::Status;
use proto::{async_trait, glue};
use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;

struct Proc {
    child: Mutex<Child>,
    started: AtomicBool,
    exit: watch::Sender<Option<u32>>,
    io: (String, String),
    args: Vec<String>,
}

#[derive(Default)]
pub struct State {
    processes: Mutex<HashMap<(String, String), Arc<Proc>>>,
    own: Mutex<Option<Child>>,
    /// Accepts, never answers.
    pub deaf: AtomicBool,
    /// `CreateSandbox` fails.
    pub refuse: AtomicBool,
    /// Speaks version 2 only.
    pub old: AtomicBool,
    pub calls: AtomicUsize,
    /// A `traceparent` came with `Task/Create`.
    pub traced: AtomicBool,
    /// What `UpdateSandbox` brought.
    pub resources: Mutex<Option<proto::prost_types::Any>>,
}

pub struct Fake {
    pub state: Arc<State>,
    server: ttrpc::Server,
}

/// What the binary says to `start`.
pub enum Says {
    Protobuf,
    Json,
    Text,
}

impl Fake {
    pub async fn new(bed: &Bed, id: &str, says: Says) -> Fake {
        let address = format!("unix://{}", bed.path(&format!("{id}.sock")).display());
        write_binary(bed, id, says, &address);
        let state = Arc::new(State::default());
        *state.own.lock() = Some(sleep());
        let mut services = proto::task::serve_both(state.clone());
        services.extend(proto::sandbox::serve(state.clone()));
        let mut server = ttrpc::Server::new().bind(&address).unwrap().register_service(services);
        server.start().await.unwrap();
        Fake { state, server }
    }
    pub fn pid(&self) -> u32 {
        self.state.own.lock().as_ref().unwrap().id()
    }
    pub fn runs(&self) -> bool {
        self.state.own.lock().as_mut().unwrap().try_wait().unwrap().is_none()
    }
    /// The shim dies: process and connections.
    pub async fn die(&mut self) {
        self.server.disconnect().await;
        let _ = self.server.stop_listen().await;
        self.state.end_own();
    }
    /// A container's init ends with `code`.
    pub fn exit(&self, id: &str, code: u32) {
        self.state.end(id, "", code);
    }
    /// Its init ends and the shim does not notice.
    pub fn vanish(&self, id: &str) {
        let p = self.state.processes.lock()[&(id.to_owned(), String::new())].clone();
        p.child.lock().kill().unwrap();
    }
    pub fn has(&self, id: &str) -> bool {
        self.state.processes.lock().contains_key(&(id.to_owned(), String::new()))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        for p in self.processes.lock().values() {
            let _ = p.child.lock().kill();
            let _ = p.child.lock().wait();
        }
        self.end_own();
    }
}

fn sleep() -> Child {
    Command::new("sleep").arg("300").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn write_binary(bed: &Bed, id: &str, says: Says, address: &str) {
    use proto::prost::Message;
    let reply = match says {
        Says::Text => address.as_bytes().to_vec(),
        Says::Json => format!("{{\"version\":3,\"address\":\"{address}\",\"protocol\":\"ttrpc\"}}").into_bytes(),
        Says::Protobuf => {
            proto::bootstrap::BootstrapResult { version: 3, address: address.into(), protocol: "ttrpc".into(), ..Default::default() }
                .encode_to_vec()
        }
    };
    std::fs::write(bed.path(&format!("{id}.reply")), reply).unwrap();
    let binary = bed.path("containerd-shim-fake-v2");
    // `delete` answers a DeleteResponse with exit status 137 (field 2).
    let script = r#"#!/bin/sh
dir=$(dirname "$0")
while [ $# -gt 1 ]; do if [ "$1" = -id ]; then id=$2; fi; shift; done
case $1 in
start) cat >"$dir/$id.params"; cat "$dir/$id.reply" ;;
delete) echo "$id" >>"$dir/deleted"; printf '\020\211\001' ;;
esac
"#;
    if !binary.exists() {
        std::fs::write(&binary, script).unwrap();
        std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}

impl State {
    async fn answer(&self, cx: &glue::Context) {
        let _ = cx;
        self.calls.fetch_add(1, Ordering::SeqCst);
        while self.deaf.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    fn end_own(&self) {
        if let Some(c) = self.own.lock().as_mut() {
            let _ = c.kill();
            let _ = c.wait();
        }
    }
    fn end(&self, id: &str, exec: &str, code: u32) {
        if let Some(p) = self.processes.lock().get(&(id.to_owned(), exec.to_owned())) {
            let _ = p.child.lock().kill();
            let _ = p.child.lock().wait();
            p.exit.send_if_modified(|e| e.replace(code).is_none());
        }
    }
    fn get(&self, id: &str, exec: &str) -> Result<Arc<Proc>> {
        let found = self.processes.lock().get(&(id.to_owned(), exec.to_owned())).cloned();
        found.ok_or_else(|| glue::fault(Code::NOT_FOUND, format!("no process {id} {exec}")))
    }
    fn insert(&self, id: &str, exec: &str, io: (String, String), args: Vec<String>) -> u32 {
        let child = sleep();
        let pid = child.id();
        let p = Proc { child: Mutex::new(child), started: AtomicBool::new(false), exit: watch::channel(None).0, io, args };
        self.processes.lock().insert((id.to_owned(), exec.to_owned()), Arc::new(p));
        pid
    }
}

#[async_trait]
impl Task for State {
    async fn connect(&self, cx: &glue::Context, r: t::ConnectRequest) -> Result<t::ConnectResponse> {
        self.answer(cx).await;
        let _ = r;
        Ok(t::ConnectResponse { shim_pid: self.own.lock().as_ref().unwrap().id(), ..Default::default() })
    }
    async fn create(&self, cx: &glue::Context, r: t::CreateTaskRequest) -> Result<t::CreateTaskResponse> {
        self.answer(cx).await;
        self.traced.store(glue::metadata(cx, "traceparent").is_some_and(|p| p.starts_with("00-")), Ordering::SeqCst);
        if r.id.starts_with("bad") {
            return Err(glue::fault(Code::INTERNAL, "mount: no such device"));
        }
        Ok(t::CreateTaskResponse { pid: self.insert(&r.id, "", (r.stdout, r.stderr), vec![]) })
    }
    async fn start(&self, cx: &glue::Context, r: t::StartRequest) -> Result<t::StartResponse> {
        self.answer(cx).await;
        let p = self.get(&r.id, &r.exec_id)?;
        p.started.store(true, Ordering::SeqCst);
        if !r.exec_id.is_empty() {
            let open = |path: &str| std::fs::OpenOptions::new().write(true).open(path).unwrap();
            let _ = p.child.lock().kill();
            let _ = p.child.lock().wait();
            let real = Command::new(&p.args[0])
                .args(&p.args[1..])
                .stdin(Stdio::null())
                .stdout(open(&p.io.0))
                .stderr(open(&p.io.1))
                .spawn()
                .unwrap();
            *p.child.lock() = real;
            let p = p.clone();
            tokio::spawn(async move {
                loop {
                    if let Some(s) = p.child.lock().try_wait().unwrap() {
                        use std::os::unix::process::ExitStatusExt;
                        let code = s.code().unwrap_or_else(|| 128 + s.signal().unwrap_or(0));
                        p.exit.send_if_modified(|e| e.replace(code as u32).is_none());
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            });
        }
        let pid = p.child.lock().id();
        Ok(t::StartResponse { pid })
    }
    async fn exec(&self, cx: &glue::Context, r: t::ExecProcessRequest) -> Result<()> {
        self.answer(cx).await;
        let spec: Vec<String> = String::from_utf8(r.spec.unwrap().value).unwrap().split('\n').map(str::to_owned).collect();
        self.insert(&r.id, &r.exec_id, (r.stdout, r.stderr), spec);
        Ok(())
    }
    async fn wait(&self, cx: &glue::Context, r: t::WaitRequest) -> Result<t::WaitResponse> {
        self.answer(cx).await;
        let p = self.get(&r.id, &r.exec_id)?;
        let mut exit = p.exit.subscribe();
        let code = (*exit.wait_for(Option::is_some).await.unwrap()).unwrap();
        self.answer(cx).await;
        Ok(t::WaitResponse { exit_status: code, exited_at: None })
    }
    async fn state(&self, cx: &glue::Context, r: t::StateRequest) -> Result<t::StateResponse> {
        self.answer(cx).await;
        let p = self.get(&r.id, &r.exec_id)?;
        let exit = *p.exit.borrow();
        let running = if p.started.load(Ordering::SeqCst) { Status::Running } else { Status::Created };
        let status = if exit.is_some() { Status::Stopped } else { running };
        let pid = p.child.lock().id();
        Ok(t::StateResponse { id: r.id, pid, status: status as i32, exit_status: exit.unwrap_or(0), ..Default::default() })
    }
    async fn kill(&self, cx: &glue::Context, r: t::KillRequest) -> Result<()> {
        self.answer(cx).await;
        self.get(&r.id, &r.exec_id)?;
        self.end(&r.id, &r.exec_id, 128 + r.signal);
        Ok(())
    }
    async fn delete(&self, cx: &glue::Context, r: t::DeleteRequest) -> Result<t::DeleteResponse> {
        self.answer(cx).await;
        let p = self.get(&r.id, &r.exec_id)?;
        let Some(code) = *p.exit.borrow() else { return Err(glue::fault(Code::FAILED_PRECONDITION, "it runs")) };
        self.processes.lock().remove(&(r.id, r.exec_id));
        Ok(t::DeleteResponse { exit_status: code, ..Default::default() })
    }
}

#[async_trait]
impl Sandbox for State {
    async fn create_sandbox(&self, cx: &glue::Context, r: sb::CreateSandboxRequest) -> Result<sb::CreateSandboxResponse> {
        self.answer(cx).await;
        assert_eq!(r.options.unwrap().type_url, "troupe.shim.v1.PodNamespaces");
        if self.refuse.load(Ordering::SeqCst) {
            return Err(glue::fault(Code::INTERNAL, "unshare: no memory"));
        }
        Ok(sb::CreateSandboxResponse {})
    }
    async fn start_sandbox(&self, cx: &glue::Context, _: sb::StartSandboxRequest) -> Result<sb::StartSandboxResponse> {
        self.answer(cx).await;
        Ok(sb::StartSandboxResponse { pid: 7, ..Default::default() })
    }
    async fn sandbox_status(&self, cx: &glue::Context, _: sb::SandboxStatusRequest) -> Result<sb::SandboxStatusResponse> {
        self.answer(cx).await;
        let info = HashMap::from([("ns.ipc".to_owned(), "/proc/7/ns/ipc".to_owned()), ("other".to_owned(), String::new())]);
        Ok(sb::SandboxStatusResponse { pid: 7, info, ..Default::default() })
    }
    async fn update_sandbox(&self, cx: &glue::Context, m: sb::UpdateSandboxRequest) -> Result<sb::UpdateSandboxResponse> {
        self.answer(cx).await;
        *self.resources.lock() = m.resources;
        Ok(sb::UpdateSandboxResponse {})
    }
    async fn stop_sandbox(&self, cx: &glue::Context, _: sb::StopSandboxRequest) -> Result<sb::StopSandboxResponse> {
        self.answer(cx).await;
        let all: Vec<(String, String)> = self.processes.lock().keys().cloned().collect();
        all.iter().for_each(|(id, exec)| self.end(id, exec, 137));
        Ok(sb::StopSandboxResponse {})
    }
    async fn shutdown_sandbox(&self, cx: &glue::Context, _: sb::ShutdownSandboxRequest) -> Result<sb::ShutdownSandboxResponse> {
        self.answer(cx).await;
        self.end_own();
        Ok(sb::ShutdownSandboxResponse {})
    }
}

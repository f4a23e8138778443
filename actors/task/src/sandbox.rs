//! A pod's sandbox: start, stop, remove.
use crate::link::rpc;
use crate::pod::{Pod, State};
use crate::process::{self, Process};
use crate::{bundle, cgroup, launch, locate};
use kernel::{Class, Cx, Fault, Result, ResultExt};
use messages::task::{PodNamespaces, SandboxHandle, StartSandbox};
use proto::prost_types::Any;
use proto::sandbox as api;
use proto::task::ShutdownRequest;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Longest local file work: directories and unmounts on a memory file system.
const FILES: Duration = Duration::from_secs(10);
/// How containerd names a pod's updated resources (`contracts/core.md` §6.5).
const UPDATED_RESOURCES: &str = "io.containerd.cri.v1/UpdatedResources";

impl Pod {
    /// Starts shim and sandbox; on failure nothing is left.
    pub async fn start(self: Rc<Self>, cx: Cx, m: StartSandbox) -> Result<SandboxHandle> {
        match self.begin(&cx, m).await {
            Ok(handle) => Ok(handle),
            Err(fault) => {
                let undone = self.clone().remove(cx.without_deadline()).await;
                undone
                    .err()
                    .into_iter()
                    .for_each(|e| tracing::warn!(sandbox = self.id, error = %e, "undo of a failed start is incomplete"));
                Err(fault)
            }
        }
    }

    async fn begin(self: &Rc<Self>, cx: &Cx, m: StartSandbox) -> Result<SandboxHandle> {
        cx.attr("k8s.pod.sandbox_id", &self.id);
        let binary = locate::locate(&m.runtime.name, &self.args.exe)?;
        let cgroups = cgroup::missing(&m.namespaces.cgroup_parent, m.runtime.systemd_cgroup);
        // The bundle is itself a record that the sweep of the next start finds, so the row may become durable while the binary runs.
        let path = self.make_bundle(cx, &binary).await?;
        let saved = self.save(cx, |row| (row.runtime, row.cgroups) = (m.runtime.clone(), cgroups));
        let started = cx.run("shim.start", |cx| {
            let (binary, path, runtime) = (&binary, &path, &m.runtime);
            async move { launch::start(&cx, &self.args, &self.id, binary, path, runtime).await }
        });
        let ((), (endpoint, mut begun)) = futures::try_join!(saved, started)?;
        bundle::write_endpoint(&path, &endpoint)?;
        let mut link = cx.run("shim.connect", |_| crate::link::Link::connect(&endpoint, self.args.timeouts.load)).await?;
        let (request, call) = (self.create_request(&m.namespaces, &path)?, self.args.timeouts.call);
        let client = link.sandbox.clone();
        let create = rpc(cx, "Sandbox/CreateSandbox", call, |c| client.create_sandbox(c, &request));
        // Both are on their way at once.
        let (hello, created) = futures::join!(link.hello(cx, &self.id, call), create);
        let hello = hello?;
        begun.keep();
        self.shim_pid.set(hello.shim_pid);
        if let Some(stamp) = process::stamp(hello.shim_pid) {
            bundle::write(&path.join("shim.pid"), 0o600, stamp.as_bytes())?;
        }
        let handle = match created {
            Ok(_) => self.start_created(cx, &link).await?,
            Err(f) if f.class == Class::Unimplemented && nothing_shared(&m.namespaces) => {
                SandboxHandle { pid: hello.shim_pid, namespaces: BTreeMap::new() }
            }
            Err(f) if f.class == Class::Unimplemented => {
                return Err(f.context(format!("{}: this shim cannot hold a pod's namespaces; use io.containerd.troupe.v2", m.runtime.name)));
            }
            Err(f) => return Err(f),
        };
        bundle::write(&path.join("started"), 0o600, b"")?;
        self.collect_spans(cx, &link);
        self.state.send_replace(State::Up(link));
        Ok(handle)
    }

    async fn make_bundle(&self, cx: &Cx, binary: &std::path::Path) -> Result<std::path::PathBuf> {
        let (args, id, binary) = ((*self.args).clone(), self.id.clone(), binary.to_owned());
        cx.run(
            "bundle.make",
            |cx| async move { cx.blocking("bundle.make", FILES, move || bundle::make_sandbox(&args, &id, &binary)).await },
        )
        .await
    }

    fn create_request(&self, namespaces: &PodNamespaces, path: &std::path::Path) -> Result<api::CreateSandboxRequest> {
        let json = serde_json::to_vec(namespaces).class(Class::Internal, "namespaces")?;
        Ok(api::CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: path.display().to_string(),
            options: Some(Any { type_url: "troupe.shim.v1.PodNamespaces".into(), value: json }),
            netns_path: namespaces.network.clone().unwrap_or_default(),
            ..Default::default()
        })
    }

    async fn start_created(&self, cx: &Cx, link: &crate::link::Link) -> Result<SandboxHandle> {
        let call = self.args.timeouts.call;
        let start = api::StartSandboxRequest { sandbox_id: self.id.clone() };
        let started = rpc(cx, "Sandbox/StartSandbox", call, |c| link.sandbox.start_sandbox(c, &start)).await?;
        let ask = api::SandboxStatusRequest { sandbox_id: self.id.clone(), verbose: true };
        let status = rpc(cx, "Sandbox/SandboxStatus", call, |c| link.sandbox.sandbox_status(c, &ask)).await?;
        let namespaces = status.info.iter().filter_map(|(k, v)| Some((k.strip_prefix("ns.")?.to_owned(), v.clone()))).collect();
        Ok(SandboxHandle { pid: started.pid, namespaces })
    }

    /// Tells the shim the pod's new resources; most have no use for them, and do not know the call.
    pub async fn update_sandbox(self: Rc<Self>, cx: Cx, resources: Vec<u8>) -> Result<()> {
        let link = self.link(&cx).await?;
        let request = api::UpdateSandboxRequest {
            sandbox_id: self.id.clone(),
            resources: Some(Any { type_url: UPDATED_RESOURCES.into(), value: resources }),
            ..Default::default()
        };
        let told = self.ask(rpc(&cx, "Sandbox/UpdateSandbox", self.args.timeouts.call, |c| link.sandbox.update_sandbox(c, &request))).await;
        match told {
            Err(f) if f.class == Class::Unimplemented => Ok(()),
            other => self.watch_for_silence(other.map(drop)),
        }
    }

    /// Ends what runs in the sandbox; the shim stays, so that its containers can still be asked for their ends.
    pub async fn stop(self: Rc<Self>, cx: Cx) -> Result<()> {
        if self.is_gone() {
            return Ok(());
        }
        let link = match self.link(&cx).await {
            Ok(link) => link,
            Err(fault) => return self.end_deaf_shim(&cx, fault).await,
        };
        let request = api::StopSandboxRequest { sandbox_id: self.id.clone(), timeout_secs: 0 };
        let stop = rpc(&cx, "Sandbox/StopSandbox", self.args.timeouts.call, |c| link.sandbox.stop_sandbox(c, &request));
        let stopped = match self.ask(stop).await {
            Err(f) if !self.is_up() => return self.end_deaf_shim(&cx, f).await,
            Err(f) if matches!(f.class, Class::Unimplemented | Class::NotFound) => {
                self.kill_all(&cx, &link).await;
                Ok(())
            }
            other => other.map(|_| ()),
        };
        self.watch_for_silence(stopped)
    }

    /// A pod that is to stop does not need its shim any more: one that does not answer is killed, and what it left ends with it.
    async fn end_deaf_shim(&self, cx: &Cx, why: Fault) -> Result<()> {
        if self.is_gone() {
            return Ok(());
        }
        let mut shim = self.shim_process(cx).await;
        if shim.is_empty() {
            return Err(why);
        }
        // What it works with may be as silent, and would not see its end.
        let helpers = process::shims_of(cx, &self.id, &self.args.grpc_address).await;
        shim.extend(helpers.into_iter().filter_map(|pid| Process::open(pid).ok()));
        tracing::warn!(sandbox = self.id, error = %why, "a deaf shim is killed to stop its pod");
        let ended = cx.run("shim.kill", |_| async {
            let ends = shim.iter().map(|process| self.end(process, self.args.timeouts.shutdown));
            futures::future::join_all(ends).await.into_iter().collect::<Result<()>>()
        });
        if let Err(e) = ended.await {
            // Its end will not be seen soon. It does nothing any more: a file system that does not answer holds a thread of it.
            tracing::warn!(sandbox = self.id, error = %e, "a killed shim is stuck in the kernel, and left there");
            self.state.send_replace(State::Gone("it was killed, and is stuck in the kernel".into()));
            self.lose_all(cx).await;
            return Ok(());
        }
        // The supervisor sees its end, and ends what it left.
        let gone = tokio::time::timeout(self.args.timeouts.load, self.ended()).await;
        gone.map_err(|_| Fault::unavailable(format!("pod {}: the end of the killed shim is not noted yet", self.id)))?.map(drop)
    }

    async fn kill_all(&self, cx: &Cx, link: &crate::link::Link) {
        let ids: Vec<String> = self.containers.borrow().values().filter(|c| c.ended().is_none()).map(|c| c.id.clone()).collect();
        let kills = ids.into_iter().map(|id| async move {
            let request = proto::task::KillRequest { id, signal: 9, all: true, ..Default::default() };
            rpc(cx, "Task/Kill", self.args.timeouts.shutdown, |c| link.task.kill(c, &request)).await
        });
        futures::future::join_all(kills).await;
    }

    /// Shuts the shim down (kills it when it does not answer) and gives back all that the pod has here. Succeeds when there is nothing.
    pub async fn remove(self: Rc<Self>, cx: Cx) -> Result<()> {
        self.removing.set(true);
        let shim = self.shim_process(&cx).await;
        let state = self.state.borrow().clone();
        if let State::Up(link) = &state {
            let pod = &self;
            let asked = cx.run("shim.shutdown", |cx| async move {
                pod.shut_down(&cx, link).await;
                Ok(())
            });
            asked.await?;
        }
        for process in shim {
            let patience = if matches!(state, State::Up(_)) { self.args.timeouts.shutdown } else { Duration::ZERO };
            if !process.ended_within(patience).await
                && let Err(e) = cx.run("shim.kill", |_| self.end(&process, self.args.timeouts.shutdown)).await
            {
                // It does nothing any more, for a file system that does not answer holds a thread of it; what it has is given back without it.
                tracing::warn!(sandbox = self.id, error = %e, "a killed shim is stuck in the kernel, and left there");
            }
        }
        self.state.send_replace(State::Gone("removed".into()));
        if !matches!(state, State::Up(_)) {
            self.find_stray_containers(&cx).await?;
        }
        cx.run("shim.delete", |_| self.give_back_all()).await?;
        self.settle_all("the pod was removed");
        self.remove_files(&cx).await?;
        self.forget(&cx).await
    }

    async fn shut_down(&self, cx: &Cx, link: &crate::link::Link) {
        let limit = self.args.timeouts.shutdown;
        let request = api::ShutdownSandboxRequest { sandbox_id: self.id.clone() };
        let asked = rpc(cx, "Sandbox/ShutdownSandbox", limit, |c| link.sandbox.shutdown_sandbox(c, &request)).await;
        if asked.is_err_and(|f| matches!(f.class, Class::Unimplemented | Class::NotFound | Class::FailedPrecondition)) {
            // Not a sandbox shim: it leaves only when it has no containers.
            self.kill_all(cx, link).await;
            for c in self.known() {
                let request = proto::task::DeleteRequest { id: c.id.clone(), ..Default::default() };
                let deleted = rpc(cx, "Task/Delete", limit, |c| link.task.delete(c, &request)).await;
                c.given_back.set(deleted.is_ok());
            }
            let request = ShutdownRequest { id: self.id.clone(), now: true };
            let _ = rpc(cx, "Task/Shutdown", limit, |c| link.task.shutdown(c, &request)).await;
        }
    }

    /// The shim's process, by what was written down, else by command line.
    async fn shim_process(&self, cx: &Cx) -> Vec<Process> {
        let written = std::fs::read_to_string(self.bundle().join("shim.pid")).ok();
        if let Some(text) = written {
            return process::from_stamp(&text).map(|(_, p)| p).into_iter().collect();
        }
        let found = process::shims_of(cx, &self.id, &self.args.grpc_address).await;
        found.into_iter().filter_map(|pid| Process::open(pid).ok()).collect()
    }

    async fn remove_files(&self, cx: &Cx) -> Result<()> {
        let mut bundles: Vec<_> = self.containers.borrow().keys().map(|id| self.bundle_of(id)).collect();
        bundles.push(self.bundle());
        let (args, fifos, cgroups) = ((*self.args).clone(), bundle::fifos(&self.args, &self.id), self.row.borrow().cgroups.clone());
        let socket = bundle::read_endpoint(&self.bundle()).and_then(|e| e.address.strip_prefix("unix:///").map(|p| format!("/{p}")));
        let work = move || {
            // A shim that was killed leaves it.
            socket.map_or(Ok(()), |s| kernel::absent(std::fs::remove_file(s))).context("remove the shim's socket")?;
            bundles.iter().try_for_each(|b| bundle::remove(&args, b))?;
            kernel::absent(std::fs::remove_dir_all(fifos)).context("remove FIFOs")?;
            cgroup::remove(&cgroups);
            Ok(())
        };
        cx.run("bundle.remove", |cx| async move { cx.blocking("bundle.remove", FILES, work).await }).await
    }
}

/// Does the pod share nothing but the network, so that a shim without a sandbox service will do?
fn nothing_shared(n: &PodNamespaces) -> bool {
    [&n.ipc, &n.uts, &n.pid].iter().all(|mode| mode.as_str() != "pod") && n.sysctls.is_empty()
}

/// A pod that is not there.
pub fn no_pod(id: &str) -> Fault {
    Fault::not_found(format!("there is no sandbox {id}"))
}

//! The sandbox service, and the private one.
use super::patience::{silent, step};
use super::{Service, failed};
use crate::container::Container;
use crate::reaper::Exit;
use crate::sandbox::Sandbox;
use crate::{io::together, sys};
use proto::async_trait;
use proto::glue::{Context, fault};
use proto::ttrpc::{Code, Result};
use proto::{sandbox as sb, shim as own, types};
use std::time::Duration;

/// Longest wait for a killed process.
const LAST: Duration = Duration::from_secs(5);

impl Service {
    /// Kills every container and the pod's init, and waits for their ends.
    async fn halt(&self) {
        let all: Vec<Container> = self.all().values().cloned().collect();
        for c in all.iter().filter(|c| c.init.ended().is_none()) {
            c.cgroup.processes().into_iter().for_each(|p| drop(sys::kill(p, libc::SIGKILL as u32)));
            let _ = sys::kill(c.init.pid, libc::SIGKILL as u32);
            c.cgroup.thaw();
        }
        let ends = all.into_iter().map(|c| async move {
            let mut told = c.init.exit.subscribe();
            let _ = tokio::time::timeout(LAST, told.wait_for(Option::is_some)).await;
        });
        together(ends).await;
        let init = self.pod().as_mut().and_then(|p| Some((p.init.take()?, p.born)));
        if let Some((init, born)) = init {
            let _ = sys::kill(init, libc::SIGKILL as u32);
            let _ = tokio::time::timeout(LAST, self.reaper.wait(init, born)).await;
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

    async fn update_sandbox(&self, _: &Context, _: sb::UpdateSandboxRequest) -> Result<sb::UpdateSandboxResponse> {
        // The pod's cgroup is the kubelet's, and there is no machine of the pod's own whose size would change.
        Ok(sb::UpdateSandboxResponse::default())
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
    async fn reopen_log(&self, cx: &Context, m: own::ReopenLogRequest) -> Result<()> {
        let Some(log) = self.find(&m.container_id)?.init.streamed.log else { return Ok(()) };
        let path = log.path().display().to_string();
        step(cx, "reopen the log", silent(&path), log.reopen(), std::future::pending()).await
    }

    async fn spans(&self, _: &Context, _: own::SpansRequest) -> Result<own::SpansResponse> {
        Ok(self.spans.take())
    }

    async fn attach(&self, _: &Context, m: own::AttachRequest) -> Result<()> {
        let container = self.find(&m.container_id)?;
        if container.init.ended().is_some() {
            return Err(fault(Code::FAILED_PRECONDITION, format!("container {:?} has ended", m.container_id)));
        }
        container.init.streamed.attach(&m.stdin_fifo, &m.stdout_fifo, &m.stderr_fifo).await.map_err(failed("attach"))
    }
}

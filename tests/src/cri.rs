//! A CRI client over a unix socket, with the few helpers that tests and the bench repeat.
use anyhow::{Context, Result};
use proto::cri::image_service_client::ImageServiceClient;
use proto::cri::runtime_service_client::RuntimeServiceClient;
use proto::cri::*;
use std::collections::HashMap;
use std::path::Path;
use tonic::transport::{Channel, Endpoint, Uri};

/// Both CRI services of one endpoint.
#[derive(Clone)]
pub struct Cri {
    /// Runtime service.
    pub runtime: RuntimeServiceClient<Channel>,
    /// Image service.
    pub image: ImageServiceClient<Channel>,
    /// Cgroup parent of the pods made here.
    pub cgroup_parent: String,
}

/// Connects to `socket`.
pub async fn connect(socket: &Path) -> Result<Cri> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("connect to {}", socket.display()))?;
    Ok(Cri {
        runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
        image: ImageServiceClient::new(channel),
        cgroup_parent: String::new(),
    })
}

/// Namespaces of a pod.
pub fn namespaces(host_network: bool, shared_pid: bool) -> NamespaceOption {
    NamespaceOption {
        network: if host_network { NamespaceMode::Node } else { NamespaceMode::Pod } as i32,
        pid: if shared_pid { NamespaceMode::Pod } else { NamespaceMode::Container } as i32,
        ipc: NamespaceMode::Pod as i32,
        ..Default::default()
    }
}

impl Cri {
    /// A pod configuration: `name` in namespace `default`, logs below `logs`.
    pub fn pod(&self, name: &str, host_network: bool, logs: &Path) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata { name: name.into(), uid: format!("uid-{name}"), namespace: "default".into(), attempt: 0 }),
            hostname: if host_network { String::new() } else { name.into() },
            log_directory: logs.to_string_lossy().into_owned(),
            labels: HashMap::from([("app".into(), name.into())]).into_iter().collect(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup_parent.clone(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(host_network, false)),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// A container configuration.
    pub fn container(&self, name: &str, image: &str, command: &[&str]) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(ImageSpec { image: image.into(), ..Default::default() }),
            command: command.iter().map(|s| s.to_string()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces(false, false)),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// PullImage by name.
    pub async fn pull(&mut self, image: &str) -> Result<String> {
        let image = ImageSpec { image: image.into(), ..Default::default() };
        Ok(self.image.pull_image(PullImageRequest { image: Some(image), ..Default::default() }).await?.into_inner().image_ref)
    }

    /// RunPodSandbox.
    pub async fn run_pod(&mut self, config: &PodSandboxConfig) -> Result<String> {
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        Ok(self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// CreateContainer.
    pub async fn create(&mut self, pod: &str, config: &ContainerConfig, sandbox: &PodSandboxConfig) -> Result<String> {
        let mut config = config.clone();
        // The kubelet repeats the pod's namespace options in each container.
        let of_pod = sandbox.linux.as_ref().and_then(|l| l.security_context.as_ref()).and_then(|s| s.namespace_options.clone());
        if let Some(context) = config.linux.as_mut().and_then(|l| l.security_context.as_mut())
            && let Some(of_pod) = of_pod
        {
            context.namespace_options = Some(of_pod);
        }
        let request = CreateContainerRequest { pod_sandbox_id: pod.into(), config: Some(config), sandbox_config: Some(sandbox.clone()) };
        Ok(self.runtime.create_container(request).await?.into_inner().container_id)
    }

    /// StartContainer.
    pub async fn start(&mut self, id: &str) -> Result<()> {
        self.runtime.start_container(StartContainerRequest { container_id: id.into() }).await?;
        Ok(())
    }

    /// CreateContainer and StartContainer.
    pub async fn run(&mut self, pod: &str, config: &ContainerConfig, sandbox: &PodSandboxConfig) -> Result<String> {
        let id = self.create(pod, config, sandbox).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// ContainerStatus.
    pub async fn status(&mut self, id: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: false };
        self.runtime.container_status(request).await?.into_inner().status.context("no status")
    }

    /// Waits until the container has exited (at most `seconds`).
    pub async fn wait_exit(&mut self, id: &str, seconds: u64) -> Result<ContainerStatus> {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
        loop {
            let status = self.status(id).await?;
            if status.state == ContainerState::ContainerExited as i32 {
                return Ok(status);
            }
            anyhow::ensure!(std::time::Instant::now() < end, "container {id} did not exit within {seconds} s: {status:?}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// ExecSync.
    pub async fn exec(&mut self, id: &str, cmd: &[&str], timeout: i64) -> Result<ExecSyncResponse> {
        let request = ExecSyncRequest { container_id: id.into(), cmd: cmd.iter().map(|s| s.to_string()).collect(), timeout };
        Ok(self.runtime.exec_sync(request).await?.into_inner())
    }

    /// StopContainer.
    pub async fn stop(&mut self, id: &str, timeout: i64) -> Result<()> {
        self.runtime.stop_container(StopContainerRequest { container_id: id.into(), timeout }).await?;
        Ok(())
    }

    /// RemoveContainer.
    pub async fn remove(&mut self, id: &str) -> Result<()> {
        self.runtime.remove_container(RemoveContainerRequest { container_id: id.into() }).await?;
        Ok(())
    }

    /// StopPodSandbox and RemovePodSandbox.
    pub async fn drop_pod(&mut self, pod: &str) -> Result<()> {
        self.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.into() }).await?;
        self.runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod.into() }).await?;
        Ok(())
    }
}

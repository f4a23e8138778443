//! The machine: a registry, the daemon, and what checks ask about cgroups.
use anyhow::{Context, Result, bail, ensure};
use proto::cri::*;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};
use troupe_tests::cri::{self, Cri};
use troupe_tests::registry::Registry;

/// Root of the unified hierarchy.
pub const CGROUPS: &str = "/sys/fs/cgroup";
const SOCKET: &str = "/run/troupe/troupe.sock";
const LOG: &str = "/var/log/troupe.log";

/// Everything a check needs.
pub struct World {
    /// systemd is PID 1 and makes the cgroups.
    pub systemd: bool,
    /// A client.
    pub cri: Cri,
    /// An image with busybox.
    pub image: String,
    pods: Vec<String>,
    serial: u32,
    _registry: Registry,
    _daemon: Option<Child>,
}

/// A pod of a check.
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What it was asked to be.
    pub config: PodSandboxConfig,
    /// Its cgroup, below [`CGROUPS`].
    pub cgroup: PathBuf,
}

/// Runs a command; fails if it does.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let Output { status, stdout, stderr } = Command::new(program).args(args).output().with_context(|| program.to_owned())?;
    ensure!(status.success(), "{program} {args:?}: {status}: {}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    Ok(String::from_utf8_lossy(&stdout).trim().to_owned())
}

/// The last lines of the daemon's log.
pub fn log() -> String {
    let text = std::fs::read_to_string(LOG).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Waits until `done` holds.
pub async fn until(what: &str, seconds: u64, mut done: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !done() {
        ensure!(Instant::now() < end, "not within {seconds} s: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn configuration(systemd: bool) -> String {
    format!(
        r#"version = 4
[debug]
level = "info"
# Emulated, and maybe on a busy machine: a thread may wait for seconds until it runs.
[plugins."io.troupe.kernel.v1.kernel"]
watchdog_period_ms = 20000
[plugins."io.containerd.cri.v1.images".registry]
config_path = "/etc/troupe/certs.d"
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = {systemd}
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.writable]
cgroup_writable = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.writable.options]
SystemdCgroup = {systemd}
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.external.options]
BinaryName = "runc"
SystemdCgroup = {systemd}
"#
    )
}

const NETWORK: &str = r#"{"cniVersion": "1.0.0", "name": "vm", "plugins": [{"type": "bridge", "bridge": "vm0", "isGateway": true, "ipMasq": true,
    "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}"#;

impl World {
    /// Sets the machine up and starts the daemon.
    pub async fn start() -> Result<World> {
        let systemd = Path::new("/run/systemd/system").exists();
        for dir in ["/etc/cni/net.d", "/etc/troupe/certs.d", "/var/log", "/usr/local/bin"] {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write("/etc/troupe/config.toml", configuration(systemd))?;
        std::fs::write("/etc/cni/net.d/10-vm.conflist", NETWORK)?;
        let registry = Registry::start().await;
        let image = registry.add_busybox()?;
        let binaries = troupe_tests::daemon::binaries();
        let mut child = None;
        if systemd {
            for binary in ["troupe", "containerd-shim-troupe-v2"] {
                std::fs::copy(binaries.join(binary), Path::new("/usr/local/bin").join(binary))?;
            }
            std::fs::copy(binaries.join("troupe.service"), "/etc/systemd/system/troupe.service")?;
            // A journal in an emulated machine costs seconds; the log is a file, as in the other mode.
            let drop_in = Path::new("/etc/systemd/system/troupe.service.d");
            std::fs::create_dir_all(drop_in)?;
            std::fs::write(drop_in.join("log.conf"), format!("[Service]\nStandardOutput=append:{LOG}\nStandardError=append:{LOG}\n"))?;
            run("systemctl", &["daemon-reload"])?;
            run("systemctl", &["start", "troupe"]).with_context(log)?;
        } else {
            let log = std::fs::File::create(LOG)?;
            child = Some(Command::new(binaries.join("troupe")).arg("daemon").stdout(log.try_clone()?).stderr(log).spawn()?);
        }
        let cri = connect().await?;
        let mut world = World { systemd, cri, image, pods: vec![], serial: 0, _registry: registry, _daemon: child };
        let image = world.image.clone();
        world.cri.pull(&image).await?;
        Ok(world)
    }

    /// Connects again, after a restart of the daemon.
    pub async fn reconnect(&mut self) -> Result<()> {
        self.cri = connect().await?;
        Ok(())
    }

    /// Runs a pod on the node's network, under a parent as the kubelet names it; `change` may ask for more.
    pub async fn pod_as(&mut self, handler: &str, change: impl FnOnce(&mut PodSandboxConfig)) -> Result<Pod> {
        self.serial += 1;
        let uid = format!("pod{}x{}", std::process::id(), self.serial);
        let (parent, cgroup) = if self.systemd {
            let slice = format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-{uid}.slice");
            (format!("/{slice}"), slice)
        } else {
            (format!("/kubepods/besteffort/{uid}"), format!("kubepods/besteffort/{uid}"))
        };
        let mut config = self.cri.pod(&uid, true, Path::new("/var/log/pods"));
        config.linux.get_or_insert_default().cgroup_parent = parent;
        change(&mut config);
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let id = self.cri.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        self.pods.push(id.clone());
        Ok(Pod { id, config, cgroup: Path::new(CGROUPS).join(cgroup) })
    }

    /// A plain pod.
    pub async fn pod(&mut self) -> Result<Pod> {
        self.pod_as("", |_| {}).await
    }

    /// Makes and starts a container that runs `script`.
    pub async fn container(&mut self, pod: &Pod, script: &str, change: impl FnOnce(&mut ContainerConfig)) -> Result<String> {
        self.serial += 1;
        let mut config = self.cri.container(&format!("c{}", self.serial), &self.image, &["sh", "-c", script]);
        change(&mut config);
        self.cri.run(&pod.id, &config, &pod.config).await
    }

    /// Standard output of a command in a container.
    pub async fn exec(&mut self, id: &str, script: &str) -> Result<String> {
        let said = self.cri.exec(id, &["sh", "-c", script], 20).await?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ensure!(said.exit_code == 0, "{script:?} ended with {}: {}{}", said.exit_code, text(&said.stdout), text(&said.stderr));
        Ok(text(&said.stdout))
    }

    /// Where a container's cgroup must be.
    pub fn cgroup(&self, pod: &Pod, id: &str) -> PathBuf {
        pod.cgroup.join(if self.systemd { scope(id) } else { id.to_owned() })
    }

    /// Removes the pods of the last check.
    pub async fn forget_pods(&mut self) {
        for pod in std::mem::take(&mut self.pods) {
            if let Err(e) = self.cri.drop_pod(&pod).await {
                println!("pod {pod} is not removed: {e:#}");
            }
        }
    }
}

/// Name of a container's scope.
pub fn scope(id: &str) -> String {
    format!("cri-containerd-{id}.scope")
}

async fn connect() -> Result<Cri> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok(mut cri) = cri::connect(Path::new(SOCKET)).await
            && cri.runtime.version(VersionRequest::default()).await.is_ok()
        {
            return Ok(cri);
        }
        if Instant::now() > end {
            bail!("the daemon does not serve {SOCKET}:\n{}", log());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The first word of a cgroup's file.
pub fn value(dir: &Path, file: &str) -> Result<String> {
    Ok(std::fs::read_to_string(dir.join(file)).with_context(|| dir.join(file).display().to_string())?.trim().to_owned())
}

/// Pid of a container's init.
pub async fn pid(cri: &mut Cri, id: &str) -> Result<u32> {
    let request = ContainerStatusRequest { container_id: id.into(), verbose: true };
    let info = cri.runtime.container_status(request).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("no info")?)?;
    Ok(info["pid"].as_u64().context("no pid")? as u32)
}

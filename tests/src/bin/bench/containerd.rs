//! A private containerd of this machine, for the other column.
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use troupe_tests::cri::{self, Cri};

/// It ends, with what it left, when dropped.
pub struct Containerd {
    /// Its directories.
    pub dir: PathBuf,
    child: Child,
}

const TAG: &str = "trpbenchctrd";

impl Containerd {
    /// Starts `containerd` with `restrict_oom_score_adj`, runc and a bridge network of its own.
    pub async fn start() -> Result<Containerd> {
        let dir = std::env::temp_dir().join(format!("{TAG}{}", std::process::id()));
        for sub in ["root", "state", "cni", "logs"] {
            std::fs::create_dir_all(dir.join(sub))?;
        }
        let at = dir.display();
        let config = format!(
            r#"version = 2
root = "{at}/root"
state = "{at}/state"
[grpc]
address = "{at}/c.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "{at}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "127.0.0.1:5000/pause:3.10"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{at}/cni"
"#
        );
        std::fs::write(dir.join("config.toml"), config)?;
        let network = serde_json::json!({"cniVersion": "1.0.0", "name": TAG, "plugins": [{"type": "bridge", "bridge": TAG, "isGateway": true,
            "ipam": {"type": "host-local", "dataDir": dir.join("ipam"), "ranges": [[{"subnet": "10.199.0.0/16"}]]}}]});
        std::fs::write(dir.join("cni/10.conflist"), network.to_string())?;
        let log = std::fs::File::create(dir.join("containerd.log"))?;
        let child = Command::new("containerd").arg("-c").arg(dir.join("config.toml")).stdout(Stdio::null()).stderr(log).spawn()?;
        let mut daemon = Containerd { dir, child };
        let began = Instant::now();
        loop {
            if let Ok(mut client) = cri::connect(&daemon.dir.join("c.sock")).await
                && client.runtime.status(proto::cri::StatusRequest::default()).await.is_ok()
            {
                break;
            }
            if daemon.child.try_wait()?.is_some() || began.elapsed() > Duration::from_secs(20) {
                bail!("containerd does not serve:\n{}", std::fs::read_to_string(daemon.dir.join("containerd.log"))?);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        daemon.make_pause_image()?;
        Ok(daemon)
    }

    /// containerd needs a pause image; it is imported, since there may be no registry that has one.
    fn make_pause_image(&self) -> Result<()> {
        let tar = self.dir.join("pause.tar");
        std::fs::write(&tar, troupe_tests::registry::archive("127.0.0.1:5000/pause:3.10", &["/bin/busybox", "sleep", "1000000"])?)?;
        let status = Command::new("ctr")
            .arg("-a")
            .arg(self.dir.join("c.sock"))
            .args(["-n", "k8s.io", "images", "import"])
            .arg(&tar)
            .stdout(Stdio::null())
            .status()?;
        anyhow::ensure!(status.success(), "ctr images import failed");
        Ok(())
    }

    /// Pid of the daemon.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A client of it.
    pub async fn cri(&self) -> Result<Cri> {
        let mut client = cri::connect(&self.dir.join("c.sock")).await?;
        client.cgroup_parent = format!("/{TAG}");
        Ok(client)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for (pid, _) in troupe_tests::census::processes_of(&self.dir, TAG) {
            // SAFETY: kill(2) with a plain pid and signal number touches no memory.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
        std::thread::sleep(Duration::from_millis(200));
        for mount in troupe_tests::census::mounts_below(&self.dir).iter().rev() {
            let _ = Command::new("umount").args(["-l", mount]).stderr(Stdio::null()).status();
        }
        let _ = Command::new("ip").args(["link", "del", TAG]).stderr(Stdio::null()).status();
        troupe_tests::census::remove_cgroups(TAG);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

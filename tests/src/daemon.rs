//! A private daemon: own directories, own sockets, own network, own cgroup; everything is cleaned up when it is dropped.
use crate::cri::{self, Cri};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// How to start a daemon.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Allow fault injection.
    pub chaos: bool,
    /// External runc-compatible binary; empty = the embedded engine.
    pub binary_name: String,
    /// Snapshotter, empty = overlayfs.
    pub snapshotter: String,
    /// Further keys of the CNI table.
    pub cni: String,
    /// A CNI plugin's deadline, empty = a minute.
    pub plugin_timeout: String,
    /// A root file system of so many MiB; 0 = the machine's.
    pub root_mib: u32,
    /// Further keys of the runtime's table.
    pub runtime: String,
    /// Further lines at the end of the configuration.
    pub extra: String,
}

/// A running daemon on private directories.
pub struct Daemon {
    /// Everything of it lives here.
    pub dir: PathBuf,
    /// Unique tag of this daemon: name of its cgroup, its bridge, its directory.
    pub tag: String,
    number: u32,
    child: Option<Child>,
    /// A file with the boot id that the daemon is to see, instead of the machine's.
    boot_id: Option<PathBuf>,
}

/// Directory of the binaries under test: `$TROUPE_BIN_DIR`, or beside the running test.
pub fn binaries() -> PathBuf {
    if let Some(dir) = std::env::var_os("TROUPE_BIN_DIR") {
        return dir.into();
    }
    let exe = std::env::current_exe().unwrap();
    let dir = exe.parent().unwrap();
    if dir.ends_with("deps") { dir.parent().unwrap().to_owned() } else { dir.to_owned() }
}

impl Daemon {
    /// Writes the configuration and starts `troupe daemon`; answers when its socket serves.
    pub async fn start(options: &Options) -> Result<Daemon> {
        Daemon::start_with(options, |text| text).await
    }

    /// The same with a change to the text of its configuration.
    pub async fn start_with(options: &Options, change: impl Fn(String) -> String) -> Result<Daemon> {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let tag = format!("trp{}x{number}", std::process::id());
        let dir = std::env::temp_dir().join(&tag);
        for sub in ["root", "state", "cni", "logs", "certs", "cnicache"] {
            std::fs::create_dir_all(dir.join(sub))?;
        }
        let mut daemon = Daemon { dir, tag, number, child: None, boot_id: None };
        if options.root_mib > 0 {
            let size = format!("size={}m", options.root_mib);
            let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(daemon.dir.join("root")).status()?;
            anyhow::ensure!(mounted.success(), "mount a small root: this test needs root");
        }
        daemon.write_configuration(options)?;
        let path = daemon.dir.join("config.toml");
        std::fs::write(&path, change(std::fs::read_to_string(&path)?))?;
        daemon.spawn().await?;
        Ok(daemon)
    }

    fn write_configuration(&self, options: &Options) -> Result<()> {
        let (dir, snapshotter) = (self.dir.display(), if options.snapshotter.is_empty() { "overlayfs" } else { &options.snapshotter });
        let config = format!(
            r#"version = 4
root = "{dir}/root"
state = "{dir}/state"
[debug]
level = "info"
[plugins."io.containerd.cri.v1.images"]
snapshotter = "{snapshotter}"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "{dir}/certs"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
{}
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{dir}/plugins", "/usr/lib/cni", "/opt/cni/bin"]
conf_dir = "{dir}/cni"
{}
[plugins."io.troupe.network.v1.cni"]
cache_dir = "{dir}/cnicache"
retry_after = "200ms"
plugin_timeout = "{}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{}"
[plugins."io.troupe.kernel.v1.chaos"]
enabled = {}
{}
"#,
            options.runtime,
            options.cni,
            if options.plugin_timeout.is_empty() { "1m" } else { &options.plugin_timeout },
            options.binary_name,
            options.chaos,
            options.extra
        );
        std::fs::write(self.dir.join("config.toml"), config)?;
        std::fs::write(self.dir.join("cni/10-test.conflist"), self.network())?;
        Ok(())
    }

    /// A bridge of this daemon's own, addresses of its own, no masquerading: nothing leaves the machine.
    fn network(&self) -> String {
        let plugin = self.bridge_plugin(&[&format!("{}.0/24", self.subnet())]);
        serde_json::json!({"cniVersion": "1.0.0", "name": self.tag, "plugins": [plugin]}).to_string()
    }

    /// The first three numbers of its IPv4 addresses; the host's own is `.1`.
    pub fn subnet(&self) -> String {
        let n = std::process::id().wrapping_mul(8).wrapping_add(self.number) % 60_000;
        format!("10.{}.{}", 90 + n / 256 % 100, n % 256)
    }

    /// The plugin that makes this daemon's network, with these ranges of addresses.
    pub fn bridge_plugin(&self, subnets: &[&str]) -> serde_json::Value {
        let ranges: Vec<_> = subnets.iter().map(|s| serde_json::json!([{ "subnet": s }])).collect();
        serde_json::json!({"type": "bridge", "bridge": self.bridge(), "isGateway": true, "ipam": {"type": "host-local",
            "dataDir": self.dir.join("ipam"), "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}})
    }

    /// Replaces the network's chain of plugins.
    pub fn set_network(&self, plugins: &serde_json::Value) {
        let list = serde_json::json!({"cniVersion": "1.0.0", "name": self.tag, "plugins": plugins});
        let draft = self.dir.join("network.draft");
        std::fs::write(&draft, list.to_string()).unwrap();
        std::fs::rename(draft, self.dir.join("cni/10-test.conflist")).unwrap();
    }

    /// Adds a CNI plugin: a shell script, with what it reads in `$input`.
    pub fn plugin(&self, name: &str, script: &str) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::create_dir_all(self.dir.join("plugins")).unwrap();
        // Written elsewhere and moved, so that it is never executed while it is open for writing.
        let draft = self.dir.join("plugin.draft");
        std::fs::write(&draft, format!("#!/bin/sh\ninput=$(cat)\n{script}\n")).unwrap();
        std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(draft, self.dir.join("plugins").join(name)).unwrap();
    }

    /// The bridge's name.
    pub fn bridge(&self) -> String {
        self.tag.chars().take(15).collect()
    }

    /// Starts the process (again) and waits until CRI answers; answers how long that took.
    pub async fn spawn(&mut self) -> Result<Duration> {
        let began = Instant::now();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let troupe = binaries().join("troupe");
        let child = self
            .command(&troupe)
            .arg("daemon")
            .arg("-c")
            .arg(self.dir.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", troupe.display()))?;
        self.child = Some(child);
        loop {
            if let Ok(mut client) = cri::connect(&self.socket()).await
                && client.runtime.version(proto::cri::VersionRequest::default()).await.is_ok()
            {
                return Ok(began.elapsed());
            }
            if let Some(status) = self.child.as_mut().unwrap().try_wait()? {
                bail!("the daemon ended with {status}:\n{}", self.log_tail());
            }
            if began.elapsed() > Duration::from_secs(20) {
                bail!("the daemon does not serve {}:\n{}", self.socket().display(), self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The command to run it: plainly, or where another boot id is bound over the machine's (in a mount namespace of its own, of which only /proc is apart).
    fn command(&self, troupe: &Path) -> Command {
        let Some(boot_id) = &self.boot_id else { return Command::new(troupe) };
        let script = r#"mount --make-private /proc && mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@""#;
        let mut command = Command::new("unshare");
        command.args(["-m", "--propagation", "unchanged", "sh", "-c", script, "sh"]).arg(boot_id).arg(troupe);
        command
    }

    /// As a reboot does it: all processes, mounts and the state directory are gone, and the next daemon sees another boot id.
    pub fn reboot(&mut self) -> Result<()> {
        self.kill();
        self.end_everything();
        std::fs::remove_dir_all(self.dir.join("state"))?;
        std::fs::create_dir_all(self.dir.join("state"))?;
        let file = self.dir.join("boot_id");
        std::fs::write(&file, format!("00000000-0000-4000-8000-{:012}\n", self.number))?;
        self.boot_id = Some(file);
        Ok(())
    }

    /// Kills every process of it, and takes its mounts, bridge and cgroups away.
    fn end_everything(&self) {
        for _ in 0..50 {
            let left = self.processes();
            for (pid, _) in &left {
                // SAFETY: kill(2) with a plain pid and signal number touches no memory.
                unsafe { libc::kill(*pid as i32, libc::SIGKILL) };
            }
            if left.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for mount in crate::census::mounts_below(&self.dir).iter().rev() {
            let _ = Command::new("umount").args(["-l", mount]).stderr(Stdio::null()).status();
        }
        let _ = Command::new("ip").args(["link", "del", &self.bridge()]).stderr(Stdio::null()).status();
        crate::census::remove_cgroups(&self.tag);
    }

    /// Its CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("state/troupe.sock")
    }

    /// Its log.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }

    /// Where tests put container logs.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Pid of the daemon.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map(Child::id).unwrap_or(0)
    }

    /// A client of it.
    pub async fn cri(&self) -> Result<Cri> {
        let mut client = cri::connect(&self.socket()).await?;
        client.cgroup_parent = format!("/{}", self.tag);
        Ok(client)
    }

    /// SIGKILL, as the kernel's OOM killer would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGKILL, without waiting for the end: a thread of it may be stuck in the kernel.
    pub fn kill_without_waiting(&mut self) -> Killed {
        let mut child = self.child.take();
        let _ = child.as_mut().map(Child::kill);
        Killed(child)
    }

    /// Runs `troupe …` against this daemon; answers its standard output.
    pub fn cli(&self, args: &[&str]) -> Result<String> {
        let output =
            Command::new(binaries().join("troupe")).arg("--control").arg(self.dir.join("state/control.sock")).args(args).output()?;
        if !output.status.success() {
            bail!("troupe {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// GET of its control socket; answers the body.
    pub fn http(&self, path: &str) -> Result<String> {
        use std::io::{Read, Write};
        let mut socket = std::os::unix::net::UnixStream::connect(self.dir.join("state/control.sock"))?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(socket, "GET {path} HTTP/1.0\r\nHost: troupe\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
        anyhow::ensure!(head.contains(" 200 "), "{head}");
        Ok(body.to_owned())
    }

    /// Processes that belong to this daemon: their command line or environment names its directory, or they are in its cgroup.
    pub fn processes(&self) -> Vec<(u32, String)> {
        crate::census::processes_of(&self.dir, &self.tag).into_iter().filter(|(pid, _)| *pid != self.pid()).collect()
    }
}

/// A daemon that was killed.
pub struct Killed(Option<Child>);

impl Killed {
    /// Waits for its end.
    pub fn wait(mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.wait();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log_path().display(), self.log_tail());
        }
        self.kill();
        self.end_everything();
        let _ = std::fs::remove_dir_all(&self.dir);
        let _ = Path::new(&self.dir).exists();
    }
}

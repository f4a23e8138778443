//! The kubelet's process, its configuration, and what its read-only port tells.
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use troupe_tests::daemon::Daemon;

/// What a kubelet sets when it starts.
const SYSCTLS: [&str; 3] = ["/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/panic", "/proc/sys/kernel/panic_on_oops"];

/// A kubelet without an API server.
pub struct Node {
    dir: PathBuf,
    port: u16,
    child: Child,
    sysctls: Vec<String>,
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// The kubelet wants its cgroup root to be there. On version 1 a new cpuset group has no processors until it is given some.
fn make_cgroups(tag: &str) -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return Ok(std::fs::create_dir_all(root.join(tag))?);
    }
    for tree in std::fs::read_dir(root)?.flatten().map(|e| e.path()).filter(|p| p.is_dir()) {
        std::fs::create_dir_all(tree.join(tag))?;
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(all) = std::fs::read(tree.join(file)) {
                std::fs::write(tree.join(tag).join(file), all)?;
            }
        }
    }
    Ok(())
}

impl Node {
    /// Starts it on the daemon's directories.
    pub fn start(binary: &Path, gates: &str, daemon: &Daemon) -> Result<Node> {
        let (dir, port) = (daemon.dir.clone(), free_port()?);
        for sub in ["manifests", "kubelet", "plugins", "host"] {
            std::fs::create_dir_all(dir.join(sub))?;
        }
        make_cgroups(&daemon.tag)?;
        let config = dir.join("kubelet.json");
        std::fs::write(&config, configuration(&dir, port, gates, daemon)?.to_string())?;
        let sysctls = SYSCTLS.iter().map(|s| std::fs::read_to_string(s).unwrap_or_default()).collect();
        let log = std::fs::File::create(dir.join("kubelet.log"))?;
        let mut command = Command::new(binary);
        command.arg("--config").arg(&config).arg("--root-dir").arg(dir.join("kubelet")).arg("--cert-dir").arg(dir.join("kubelet/pki"));
        command.args(["--hostname-override", "node"]).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("start {}", binary.display()))?;
        Ok(Node { dir, port, child, sysctls })
    }

    /// Adds or replaces a static pod; the kubelet never sees half a file.
    pub fn add(&self, file: &str, pod: &str) -> Result<()> {
        let draft = self.dir.join("draft");
        std::fs::write(&draft, pod)?;
        Ok(std::fs::rename(&draft, self.dir.join("manifests").join(file))?)
    }

    /// Removes all static pods.
    pub fn remove_all(&self) -> Result<()> {
        for entry in std::fs::read_dir(self.dir.join("manifests"))? {
            std::fs::remove_file(entry?.path())?;
        }
        Ok(())
    }

    /// Its pods, by the name in the manifest.
    pub fn pods(&self) -> Result<BTreeMap<String, Value>> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /pods HTTP/1.0\r\nHost: node\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| anyhow!("no answer"))?;
        ensure!(head.contains(" 200 "), "{head}");
        let list: Value = serde_json::from_str(body)?;
        let pods = list["items"].as_array().into_iter().flatten();
        Ok(pods.filter_map(|p| Some((p["metadata"]["name"].as_str()?.trim_end_matches("-node").to_owned(), p.clone()))).collect())
    }

    fn pod(&self, name: &str) -> Result<Value> {
        self.pods()?.remove(name).ok_or_else(|| anyhow!("the kubelet has no pod {name}"))
    }

    /// Is it ready?
    pub fn is_ready(&self, pod: &str) -> bool {
        let Ok(pod) = self.pod(pod) else { return false };
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True")
    }

    /// Its phase.
    pub fn phase(&self, pod: &str) -> Result<String> {
        Ok(self.pod(pod)?["status"]["phase"].as_str().unwrap_or_default().to_owned())
    }

    /// Restarts by container.
    pub fn restarts(&self, pod: &str) -> Result<BTreeMap<String, u64>> {
        let pod = self.pod(pod)?;
        let lists = ["initContainerStatuses", "containerStatuses"];
        let all = lists.iter().flat_map(|l| pod["status"][l].as_array().cloned().unwrap_or_default());
        Ok(all.map(|c| (c["name"].as_str().unwrap_or_default().to_owned(), c["restartCount"].as_u64().unwrap_or(0))).collect())
    }

    /// How often a container was restarted, and why it ended the last time.
    pub fn last_end(&self, pod: &str, container: &str) -> Result<(u64, String)> {
        let pod = self.pod(pod)?;
        let all = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
        let found = all.iter().find(|c| c["name"] == container).ok_or_else(|| anyhow!("no container {container}"))?;
        let reason = found["lastState"]["terminated"]["reason"].as_str().unwrap_or_default().to_owned();
        Ok((found["restartCount"].as_u64().unwrap_or(0), reason))
    }

    /// The kinds of errors in its log, the most frequent first.
    pub fn errors(&self) -> Result<String> {
        let log = std::fs::read_to_string(self.dir.join("kubelet.log"))?;
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for line in log.lines().filter(|l| l.starts_with('E')) {
            let kind = line.split_once("] ").map_or(line, |(_, text)| text);
            *kinds.entry(kind.split("err=").next().unwrap_or(kind)).or_default() += 1;
        }
        let mut kinds: Vec<_> = kinds.into_iter().map(|(kind, n)| format!("{n:>6} {kind}")).collect();
        kinds.sort_by(|a, b| b.cmp(a));
        kinds.truncate(20);
        Ok(kinds.join("\n"))
    }

    /// Ends it, and puts back what it changed on the machine.
    pub fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for (path, value) in SYSCTLS.iter().zip(&self.sysctls) {
            let _ = std::fs::write(path, value);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop();
    }
}

fn configuration(dir: &Path, port: u16, gates: &str, daemon: &Daemon) -> Result<Value> {
    let gates: BTreeMap<&str, bool> = gates.split(',').filter_map(|g| g.split_once('=')).map(|(k, v)| (k, v == "true")).collect();
    Ok(json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{}", daemon.socket().display()),
        "staticPodPath": dir.join("manifests"), "podLogsDir": dir.join("logs"), "volumePluginDir": dir.join("plugins"),
        "address": "127.0.0.1", "port": free_port()?, "readOnlyPort": port, "healthzPort": 0,
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}}, "authorization": {"mode": "AlwaysAllow"},
        // This machine may have cgroup version 1; what is on its disk is not ours to judge.
        "failCgroupV1": false, "cgroupRoot": format!("/{}", daemon.tag), "enforceNodeAllocatable": [], "failSwapOn": false,
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
        "makeIPTablesUtilChains": false, "oomScoreAdj": 0, "fileCheckFrequency": "2s", "syncFrequency": "10s",
        "containerLogMaxSize": "1Mi", "containerLogMaxFiles": 3, "containerLogMonitorInterval": "5s",
        "crashLoopBackOff": {"maxContainerRestartPeriod": "30s"},
        "featureGates": gates.into_iter().chain([("KubeletCrashLoopBackOffMax", true)]).collect::<BTreeMap<_, _>>(),
    }))
}

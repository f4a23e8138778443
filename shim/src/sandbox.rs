//! The pod's namespaces, held as descriptors: no pause process. Only a shared PID namespace has an init, a few pages large.
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::{ChildStdin, Command, Stdio};

/// A made sandbox.
pub struct Sandbox {
    held: Vec<(&'static str, File)>,
    /// Init of the shared PID namespace.
    pub init: Option<u32>,
    /// The init lives as long as this end of its pipe is open: it does not outlive the shim, and nor do the processes of its namespace.
    _alive: Option<ChildStdin>,
    /// Created.
    pub at: std::time::SystemTime,
}

impl Sandbox {
    /// Makes what `wish` (JSON, see `messages::task::PodNamespaces`) asks for.
    pub fn make(wish: &Value) -> io::Result<Sandbox> {
        let wish = wish.clone();
        // A thread of its own: namespaces belong to threads, and this one ends.
        let made = std::thread::Builder::new().name("namespaces".into()).stack_size(128 << 10).spawn(move || in_thread(&wish))?;
        let (held, init, _alive) = made.join().map_err(|_| io::Error::other("the namespaces' thread died"))??;
        Ok(Sandbox { held, init, _alive, at: std::time::SystemTime::now() })
    }
    /// Paths to join, by OCI type.
    pub fn paths(&self) -> BTreeMap<String, String> {
        let own = std::process::id();
        let mut all: BTreeMap<String, String> =
            self.held.iter().map(|(k, f)| (format!("ns.{k}"), format!("/proc/{own}/fd/{}", f.as_raw_fd()))).collect();
        if let Some(init) = self.init {
            all.insert("ns.pid".into(), format!("/proc/{init}/ns/pid"));
        }
        all
    }
}

type Made = (Vec<(&'static str, File)>, Option<u32>, Option<ChildStdin>);

fn in_thread(wish: &Value) -> io::Result<Made> {
    let text = |key: &str| wish.get(key).and_then(Value::as_str).unwrap_or_default();
    if !text("network").is_empty() {
        setns(File::open(text("network"))?, CloneFlags::CLONE_NEWNET)?;
    }
    let mut flags = CloneFlags::empty();
    if text("ipc") == "pod" {
        flags |= CloneFlags::CLONE_NEWIPC;
    }
    if text("uts") == "pod" {
        flags |= CloneFlags::CLONE_NEWUTS;
    }
    unshare(flags)?;
    if text("uts") == "pod" && !text("hostname").is_empty() {
        nix::unistd::sethostname(text("hostname"))?;
    }
    for (key, value) in wish.get("sysctls").and_then(Value::as_object).into_iter().flatten() {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        let value = value.as_str().unwrap_or_default();
        std::fs::write(&path, value).map_err(|e| io::Error::new(e.kind(), format!("sysctl {key}={value}: {e}")))?;
    }
    let mut held = Vec::new();
    for (kind, wanted) in [("ipc", text("ipc") == "pod"), ("uts", text("uts") == "pod")] {
        if wanted {
            held.push((kind, File::open(format!("/proc/thread-self/ns/{kind}"))?));
        }
    }
    let (mut init, mut alive) = (None, None);
    if text("pid") == "pod" {
        unshare(CloneFlags::CLONE_NEWPID)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("init").env_clear().stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        (init, alive) = (Some(child.id()), child.stdin.take());
    }
    Ok((held, init, alive))
}

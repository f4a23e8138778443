//! The pod's namespaces, held as descriptors: no pause process. Only a shared PID namespace has an init, a few pages large.
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, PipeWriter};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// A made sandbox.
pub struct Sandbox {
    held: Vec<(&'static str, File)>,
    /// Init of the shared PID namespace.
    pub init: Option<u32>,
    /// The init lives as long as this end of its pipe is open: it does not outlive the shim, and nor do the processes of its namespace.
    _alive: Option<PipeWriter>,
    /// Created.
    pub at: std::time::SystemTime,
    /// Before anything of it was.
    pub born: std::time::Instant,
}

impl Sandbox {
    /// Makes what `wish` (JSON, see `messages::task::PodNamespaces`) asks for.
    pub fn make(wish: &Value) -> io::Result<Sandbox> {
        let (mut wish, born) = (wish.clone(), std::time::Instant::now());
        let pipe = if wish["pid"] == "pod" { Some(io::pipe()?) } else { None };
        if let Some((theirs, _)) = &pipe {
            wish["alive"] = format!("/proc/{}/fd/{}", std::process::id(), theirs.as_raw_fd()).into();
        }
        // A thread of its own: namespaces belong to threads, and this one ends.
        let made = std::thread::Builder::new().name("namespaces".into()).stack_size(128 << 10).spawn(move || in_thread(&wish))?;
        let (held, init) = made.join().map_err(|_| io::Error::other("the namespaces' thread died"))??;
        Ok(Sandbox { held, init, _alive: pipe.map(|(_, ours)| ours), at: std::time::SystemTime::now(), born })
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

/// Namespaces by kind, and the init of a shared PID namespace.
pub type Made = (Vec<(&'static str, File)>, Option<u32>);

fn in_thread(wish: &Value) -> io::Result<Made> {
    if wish.get("userns").is_some_and(|u| !u.is_null()) {
        return crate::userns::make(wish);
    }
    if let Some(network) = wish["network"].as_str().filter(|p| !p.is_empty()) {
        setns(File::open(network)?, CloneFlags::CLONE_NEWNET)?;
    }
    let init = inside(wish, lifeline(wish)?)?;
    let open = |kind: &'static str| Ok((kind, File::open(format!("/proc/thread-self/ns/{kind}"))?));
    Ok((shared(wish).map(open).collect::<io::Result<Vec<_>>>()?, init))
}

/// The pipe that the init of a shared PID namespace reads; to be opened before the users change.
pub fn lifeline(wish: &Value) -> io::Result<Option<File>> {
    wish["alive"].as_str().map(File::open).transpose()
}

/// Kinds that the pod's containers share, without network and PID.
pub fn shared(wish: &Value) -> impl Iterator<Item = &'static str> + '_ {
    ["ipc", "uts"].into_iter().filter(|kind| wish[*kind] == "pod")
}

/// Makes the namespaces that the pod's containers share, owned by the present user namespace. The caller's process or thread ends afterwards.
pub fn inside(wish: &Value, alive: Option<File>) -> io::Result<Option<u32>> {
    let text = |key: &str| wish.get(key).and_then(Value::as_str).unwrap_or_default();
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
    let (Some(alive), "pod") = (alive, text("pid")) else { return Ok(None) };
    unshare(CloneFlags::CLONE_NEWPID)?;
    // By this link, because root of a user namespace may not pass on the way to the binary.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("containerd-shim-troupe-v2").arg("init").env_clear().stdin(alive).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(Some(command.spawn()?.id()))
}

//! A container's cgroup where systemd makes it.
//!
//! The rest of the engine is handed a plain path, always: libcgroups' own way with systemd sets properties that systemd refuses, asks a bus for every
//! exec, and knows nothing of huge pages. So the scope is made here, around a process that only holds its place; the container's processes are
//! cloned into it, and so are later execs. An update goes to systemd, and then to the files. The scope ends when it is empty.
#![allow(unsafe_code)]
use super::place;
use super::scope::Scope;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pause};
use serde_json::Value;
use std::io;
use std::path::Path;

/// File of a bundle with the `cgroupsPath` that was asked for.
const NOTE: &str = "cgroupsPath";

/// Holds a scope open until the container's own process is in it.
pub struct Holder(Pid);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

impl Holder {
    fn fork() -> io::Result<Holder> {
        // SAFETY: the worker has one thread; the child only sleeps until it is killed, or until the worker dies.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Holder(child)),
            ForkResult::Child => {
                // SAFETY: this call takes numbers only.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                loop {
                    pause();
                }
            }
        }
    }
}

/// Makes the scope that a bundle asks for, and writes its plain path in its place. The answer must live until the container is made.
pub fn prepare(bundle: &Path, systemd: bool) -> io::Result<Option<Holder>> {
    let file = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let wanted = config.pointer("/linux/cgroupsPath").and_then(Value::as_str).unwrap_or_default().to_owned();
    let Some(scope) = Scope::parse(&wanted)? else { return Ok(None) };
    if !systemd {
        let text = format!("cgroupsPath {wanted:?} is systemd's form, and the runtime's SystemdCgroup is false");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let path = scope.path();
    // With the older hierarchies a directory of the same name has to do.
    let holder = if place::unified()? {
        let holder = Holder::fork()?;
        let resources = config.pointer("/linux/resources").unwrap_or(&Value::Null);
        scope.start(holder.0.as_raw() as u32, resources)?;
        Some(holder)
    } else {
        None
    };
    std::fs::write(bundle.join(NOTE), &wanted)?;
    config["linux"]["cgroupsPath"] = path.to_string_lossy().into();
    std::fs::write(&file, config.to_string())?;
    Ok(holder)
}

/// Tells systemd of new limits, before the files are written, so that it does not undo them.
pub fn update(bundle: &Path, resources: &Value) -> io::Result<()> {
    let wanted = std::fs::read_to_string(bundle.join(NOTE)).unwrap_or_default();
    match Scope::parse(&wanted)? {
        Some(scope) if place::unified()? => scope.update(resources),
        _ => Ok(()),
    }
}

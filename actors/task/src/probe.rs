//! What a runtime can do on this machine, found out by doing it once.
use crate::{Args, launch, locate};
use kernel::{Fault, Result, ResultExt};
use messages::task::ProbeUserns;
use serde_json::Value;
use std::process::Stdio;
use tokio::process::Command;

/// Has the shim make a root with mapped ids, and gives it back. Of other shims nothing is known, and asking could start a server.
pub async fn userns(args: &Args, m: &ProbeUserns) -> Result<()> {
    let binary = locate::locate(&m.runtime.name, &args.exe)?;
    if !binary.file_name().is_some_and(|n| n.to_string_lossy().starts_with("containerd-shim-troupe-")) {
        return Err(Fault::unimplemented(format!("{}: only Troupe's own shim makes user namespaces", binary.display())));
    }
    if !m.runtime.binary_name.is_empty() {
        engine(args, &m.runtime.binary_name).await?;
    }
    let mut command = Command::new(&binary);
    command.kill_on_drop(true).env_clear().stdin(Stdio::null()).stderr(Stdio::null()).current_dir(&m.dir).arg("probe");
    let (status, output) = launch::capture_stdout(command, args.timeouts.cleanup).await.context("probe user namespaces")?;
    if status.success() { Ok(()) } else { Err(Fault::unimplemented(String::from_utf8_lossy(&output).trim().to_owned())) }
}

/// An external engine has to map the ids of volumes itself; it tells by its `features`.
async fn engine(args: &Args, binary: &str) -> Result<()> {
    let mut command = Command::new(binary);
    command.kill_on_drop(true).stdin(Stdio::null()).stderr(Stdio::null()).arg("features");
    let (_, output) = launch::capture_stdout(command, args.timeouts.cleanup).await.with_context(|| format!("run {binary} features"))?;
    let features: Value = serde_json::from_slice(&output).unwrap_or_default();
    if features.pointer("/linux/mountExtensions/idmap/enabled") == Some(&Value::Bool(true)) {
        return Ok(());
    }
    Err(Fault::unimplemented(format!("{binary} does not say that it can map the ids of mounts")))
}

//! What libcontainer 0.7 leaves out, put right around it: an exec'd process runs under its container's seccomp profile too, and `noNewPrivileges:
//! false` means the same as none.
use libcontainer::capabilities::drop_privileges;
use libcontainer::oci_spec::runtime::{Capability, LinuxCapabilities, LinuxCapabilitiesBuilder, LinuxSeccomp, Process, Spec};
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError, default};
use serde_json::Value;
use std::io;
use std::path::Path;

/// Devices that the engine makes in every container, whether asked for or not; asked for, it would make them twice and fail.
const DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx", "/dev/console"];

/// Takes out of a bundle what the engine stumbles over: devices that it makes anyhow, and `noNewPrivileges: false`, whose presence it takes for a yes
/// when it orders seccomp and capabilities.
pub fn normalise(bundle: &Path) -> io::Result<()> {
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    if let Some(process) = config.get_mut("process").and_then(Value::as_object_mut)
        && process.get("noNewPrivileges") == Some(&Value::Bool(false))
    {
        process.remove("noNewPrivileges");
    }
    if let Some(devices) = config.pointer_mut("/linux/devices").and_then(Value::as_array_mut) {
        devices.retain(|d| !d["path"].as_str().is_some_and(|p| DEVICES.contains(&p)));
    }
    // The engine knows the names without `r` only; it applies them recursively anyhow.
    if let Some(propagation) = config.pointer_mut("/linux/rootfsPropagation")
        && let Some(plain) = propagation.as_str().and_then(|p| p.strip_prefix('r'))
    {
        *propagation = plain.to_owned().into();
    }
    super::hierarchies::spell_out(&mut config)?;
    std::fs::write(&path, config.to_string())
}

/// Says which SELinux label the program gets that this process is about to become. Every process has its own wish, so nobody else's changes.
fn label(spec: &Spec) -> Result<(), ExecutorError> {
    let label = spec.process().as_ref().and_then(|p| p.selinux_label().as_deref()).unwrap_or_default();
    if label.is_empty() {
        return Ok(());
    }
    let written = std::fs::write("/proc/self/attr/exec", label);
    written.map_err(|e| ExecutorError::Other(format!("SELinux label {label:?}: {e}")))
}

/// Runs the program under its SELinux label, if it has one.
#[derive(Clone)]
pub struct Labelled;

impl Executor for Labelled {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        label(spec)?;
        default::get_executor().exec(spec)
    }
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        default::get_executor().validate(spec)
    }
}

/// Loads the filter as the last thing before the program, and then drops what loading it needed.
#[derive(Clone)]
pub struct Guard {
    seccomp: LinuxSeccomp,
    wanted: Option<LinuxCapabilities>,
}

impl Guard {
    /// For a process to be run in the container of `bundle`. Without `noNewPrivileges` a filter needs CAP_SYS_ADMIN, so the process file gets that
    /// (and CAP_SETPCAP, to give it up again) for the way to [`Executor::exec`]. `None` when the container has no filter.
    pub fn for_exec(bundle: &Path, file: &Path) -> io::Result<Option<Guard>> {
        let config: Value = serde_json::from_slice(&std::fs::read(bundle.join("config.json"))?)?;
        let Some(seccomp) = config.pointer("/linux/seccomp").filter(|s| !s.is_null()) else { return Ok(None) };
        let seccomp = serde_json::from_value(seccomp.clone())?;
        let mut process: Process = serde_json::from_slice(&std::fs::read(file)?)?;
        if process.no_new_privileges() == Some(true) {
            return Ok(Some(Guard { seccomp, wanted: None }));
        }
        process.set_no_new_privileges(None);
        let of = |set: &Option<std::collections::HashSet<Capability>>| set.clone().unwrap_or_default();
        let given = process.capabilities().clone();
        let given = given.as_ref();
        let set =
            |pick: fn(&LinuxCapabilities) -> &Option<std::collections::HashSet<Capability>>| given.map(|c| of(pick(c))).unwrap_or_default();
        let build = |more: &[Capability]| {
            let with = |mut all: std::collections::HashSet<Capability>| {
                all.extend(more.iter().copied());
                all
            };
            LinuxCapabilitiesBuilder::default()
                .bounding(with(set(LinuxCapabilities::bounding)))
                .effective(with(set(LinuxCapabilities::effective)))
                .permitted(with(set(LinuxCapabilities::permitted)))
                .inheritable(set(LinuxCapabilities::inheritable))
                .ambient(set(LinuxCapabilities::ambient))
                .build()
                .map_err(io::Error::other)
        };
        let wanted = build(&[])?;
        process.set_capabilities(Some(build(&[Capability::SysAdmin, Capability::Setpcap])?));
        std::fs::write(file, serde_json::to_vec(&process)?)?;
        Ok(Some(Guard { seccomp, wanted: Some(wanted) }))
    }
}

impl Executor for Guard {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let failed = |what: &str, e: &dyn std::error::Error| ExecutorError::Other(format!("{what}: {e}"));
        // Before the filter, which may not let it be written.
        label(spec)?;
        initialize_seccomp(&self.seccomp).map_err(|e| failed("seccomp", &e))?;
        if let Some(wanted) = &self.wanted {
            drop_privileges(wanted, create_syscall().as_ref()).map_err(|e| failed("capabilities", &e))?;
        }
        default::get_executor().exec(spec)
    }
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        default::get_executor().validate(spec)
    }
}

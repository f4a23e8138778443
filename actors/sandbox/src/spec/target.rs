//! PID namespace mode TARGET: a container that sees another's processes, as `kubectl debug --target` makes it.
use crate::World;
use crate::record::{ContainerRow, Phase};
use kernel::{Fault, Result};
use proto::cri::{self, NamespaceMode};

/// The pid of the container whose PID namespace is to be joined; `None` in other modes. It has to run in the same pod. Asked when the container is
/// created and again when it is started: the target may have ended in between.
pub(crate) fn pid(world: &World, options: &cri::NamespaceOption, pod: &str) -> Result<Option<u32>> {
    if options.pid != NamespaceMode::Target as i32 {
        return Ok(None);
    }
    let field = "namespace_options.target_id";
    if options.target_id.is_empty() {
        return Err(Fault::invalid_argument(format!("{field} is empty, and pid mode TARGET needs it")));
    }
    let target = crate::container::find(world, &options.target_id);
    let target = target.ok_or_else(|| Fault::invalid_argument(format!("{field}: container {:?} not found", options.target_id)))?;
    if target.sandbox_id != pod {
        return Err(Fault::invalid_argument(format!("{field}: container {} is not of this pod, but of {}", target.id, target.sandbox_id)));
    }
    if target.phase != Phase::Running || target.pid == 0 {
        return Err(Fault::failed_precondition(format!("{field}: container {} is not running", target.id)));
    }
    Ok(Some(target.pid))
}

/// At the start: the target runs still, in the namespace that the specification names.
pub(crate) fn check(world: &World, row: &ContainerRow) -> Result<()> {
    let options = crate::container::namespace_options(&row.config.0);
    let Some(pid) = pid(world, &options, &row.sandbox_id)? else { return Ok(()) };
    let spec = row.spec.value()?;
    let spaces = spec.pointer("/linux/namespaces").and_then(|n| n.as_array()).cloned().unwrap_or_default();
    if spaces.iter().any(|n| n["type"] == "pid" && n["path"] == path(pid)) {
        return Ok(());
    }
    Err(Fault::failed_precondition(format!(
        "namespace_options.target_id: container {} was started again since this container was created",
        options.target_id
    )))
}

/// Where a process' PID namespace is joined.
pub fn path(pid: u32) -> String {
    format!("/proc/{pid}/ns/pid")
}

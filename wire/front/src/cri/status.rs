//! Status: is this node fit to run pods?
//!
//! A daemon that lives is not a daemon that works: an actor that its supervisor gave up makes pods fail, and the kubelet should say so on the node
//! rather than on each pod.
use super::Cri;
use kernel::{Cx, Result, System};
use messages::sandbox as pods;
use proto::cri::{RuntimeCondition, RuntimeStatus, StatusResponse};

/// Actors without which no pod can be run or stopped. Without `network`, pods of the node's network still run: it has a condition of its own.
const NEEDED: [&str; 6] = ["store", "content", "snapshot", "image", "task", "sandbox"];

/// Which of them are down, and why.
fn down(system: &System, names: &[&str]) -> Vec<String> {
    let down = system.actors().into_iter().filter(|a| a.state.starts_with("down") && names.contains(&a.name.as_str()));
    down.map(|a| format!("{}: {}", a.name, a.last_crash)).collect()
}

fn set(status: &mut RuntimeStatus, kind: &str, reason: &str, down: &[String]) {
    let condition = RuntimeCondition {
        r#type: kind.into(),
        status: false,
        reason: reason.into(),
        message: format!("an actor of the daemon is down (see `troupe actors`): {}", down.join("; ")),
    };
    match status.conditions.iter_mut().find(|c| c.r#type == kind) {
        Some(old) => *old = condition,
        None => status.conditions.push(condition),
    }
}

/// The answer. It comes whatever is down: the kubelet reads reasons, not failures.
pub async fn answer(cri: &Cri, cx: &Cx, verbose: bool) -> Result<StatusResponse> {
    let (needed, network) = (down(&cri.system, &NEEDED), down(&cri.system, &["network"]));
    let mut response = match cri.sandboxes().call(cx, pods::Status { verbose }).await {
        Err(_) if !needed.is_empty() || !network.is_empty() => StatusResponse::default(),
        other => other?,
    };
    let status = response.status.get_or_insert_default();
    if !needed.is_empty() {
        set(status, "RuntimeReady", "ActorDown", &needed);
    }
    if !network.is_empty() {
        set(status, "NetworkReady", "NetworkPluginNotReady", &network);
    }
    Ok(response)
}

//! CRI's Status: conditions, and what the handlers can do.
use crate::World;
use kernel::{Cx, Fault, Result};
use messages::{network, task};
use proto::cri;
use serde_json::json;

/// Finds out, once, which handlers can give pods user namespaces: each distinct runtime does it for a try.
pub async fn probe(world: &World, cx: &Cx) {
    let mut all: Vec<(task::Runtime, std::result::Result<(), String>)> = vec![];
    for (name, runtime) in &world.args.settings.runtimes {
        let same = |r: &task::Runtime| (&r.name, &r.binary_name) == (&runtime.name, &runtime.binary_name);
        let known = all.iter().find(|(r, _)| same(r)).map(|(_, found)| found.clone());
        let found = match known {
            Some(found) => found,
            None => {
                let probe = task::ProbeUserns { runtime: runtime.clone(), dir: world.args.root.clone() };
                let tried = world.args.tasks.call(cx, probe).await;
                tried
                    .inspect_err(|error| tracing::info!(handler = name, %error, "pods cannot have user namespaces here"))
                    .map_err(|e| e.message)
            }
        };
        all.push((runtime.clone(), found.clone()));
        world.userns.borrow_mut().insert(name.clone(), found);
    }
}

/// Refuses what is known not to work, with the reason that the try gave.
pub fn check(world: &World, handler: &str) -> Result<()> {
    match world.userns.borrow().get(handler) {
        Some(Err(why)) => Err(Fault::failed_precondition(format!(
            "namespace_options.userns_options: pods of handler {handler:?} cannot have user namespaces on this node: {why}"
        ))),
        _ => Ok(()),
    }
}

/// Status.
pub async fn status(world: &World, cx: &Cx, verbose: bool) -> Result<cri::StatusResponse> {
    let network = world.args.network.call(cx, network::Status).await?;
    let condition = |kind: &str, status: bool, reason: &str, message: &str| cri::RuntimeCondition {
        r#type: kind.into(),
        status,
        reason: reason.into(),
        message: message.into(),
    };
    let conditions =
        vec![condition("RuntimeReady", true, "", ""), condition("NetworkReady", network.ready, &network.reason, &network.message)];
    let settings = &world.args.settings;
    let userns = |name: &str| matches!(world.userns.borrow().get(name), Some(Ok(())));
    let handler = |name: &str, known_as: &str| cri::RuntimeHandler {
        name: name.into(),
        features: Some(cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: userns(known_as) }),
    };
    // The default once more, under the name that requests without a handler have.
    let mut handlers = vec![handler("", &settings.default_handler)];
    handlers.extend(settings.runtimes.keys().map(|name| handler(name, name)));
    let features = cri::RuntimeFeatures {
        supplemental_groups_policy: true,
        user_namespaces_host_network: settings.runtimes.keys().any(|name| userns(name)),
    };
    let mut response = cri::StatusResponse {
        status: Some(cri::RuntimeStatus { conditions }),
        runtime_handlers: handlers,
        features: Some(features),
        ..Default::default()
    };
    if verbose {
        response.info.insert("config".into(), config(world).to_string());
        response.info.extend(network.info);
    }
    Ok(response)
}

/// Directories by containerd's names, which clients look for, and our settings.
fn config(world: &World) -> serde_json::Value {
    let args = &world.args;
    json!({
        "containerdRootDir": args.root,
        "rootDir": args.root,
        "stateDir": args.state,
        "settings": format!("{:?}", args.settings),
    })
}

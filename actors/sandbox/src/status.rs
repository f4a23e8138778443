//! CRI's Status: conditions, and what the handlers can do.
use crate::{Args, Handler};
use kernel::{Cx, Fault, Result};
use messages::{network, task};
use proto::cri;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// What is known of handlers: whether their pods can have user namespaces, and why not. Outside of all generations.
#[derive(Default)]
pub struct Userns(Mutex<BTreeMap<String, std::result::Result<(), String>>>);

impl Userns {
    fn get(&self, handler: &str) -> Option<std::result::Result<(), String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(handler).cloned()
    }
    fn set(&self, handler: &str, found: std::result::Result<(), String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(handler.to_owned(), found);
    }
}

/// Finds out, once, which handlers can give pods user namespaces: each distinct runtime does it for a try.
pub async fn probe(args: &Args, cx: &Cx) {
    let mut all: Vec<(task::Runtime, std::result::Result<(), String>)> = vec![];
    for (name, handler) in &args.settings.handlers {
        let runtime = &handler.runtime;
        let same = |r: &task::Runtime| (&r.name, &r.binary_name) == (&runtime.name, &runtime.binary_name);
        let known = all.iter().find(|(r, _)| same(r)).map(|(_, found)| found.clone());
        let found = match known {
            Some(found) => found,
            None => {
                let probe = task::ProbeUserns { runtime: runtime.clone(), dir: args.root.clone() };
                let tried = args.tasks.call(cx, probe).await;
                tried
                    .inspect_err(|error| tracing::info!(handler = name, %error, "pods cannot have user namespaces here"))
                    .map_err(|e| e.message)
            }
        };
        all.push((runtime.clone(), found.clone()));
        args.userns.set(name, found);
    }
}

/// Refuses what is known not to work, with the reason that the try gave.
pub fn check(args: &Args, handler: &str) -> Result<()> {
    match args.userns.get(handler) {
        Some(Err(why)) => Err(Fault::failed_precondition(format!(
            "namespace_options.userns_options: pods of handler {handler:?} cannot have user namespaces on this node: {why}"
        ))),
        _ => Ok(()),
    }
}

/// containerd's condition, which does not make a node unready.
const NO_DEPRECATIONS: &str = "ContainerdHasNoDeprecationWarnings";

fn condition(kind: &str, status: bool, reason: &str, message: &str) -> cri::RuntimeCondition {
    cri::RuntimeCondition { r#type: kind.into(), status, reason: reason.into(), message: message.into() }
}

/// Status.
pub async fn status(args: &Args, cx: &Cx, verbose: bool) -> Result<cri::StatusResponse> {
    let network = args.network.call(cx, network::Status).await?;
    let settings = &args.settings;
    let deprecations = if settings.deprecations.is_empty() {
        condition(NO_DEPRECATIONS, true, "", "")
    } else {
        condition(NO_DEPRECATIONS, false, "ContainerdHasDeprecationWarnings", &json!(settings.deprecations).to_string())
    };
    let conditions = vec![
        condition("RuntimeReady", true, "", ""),
        condition("NetworkReady", network.ready, &network.reason, &network.message),
        deprecations,
    ];
    let userns = |name: &str| matches!(args.userns.get(name), Some(Ok(())));
    let features = |known_as: &str, h: &Handler| cri::RuntimeHandlerFeatures {
        recursive_read_only_mounts: h.recursive_read_only,
        user_namespaces: userns(known_as),
    };
    // The default once more, under the name that requests without a handler have.
    let default = settings.handlers.get_key_value(&settings.default_handler).map(|(n, h)| (String::new(), features(n, h)));
    let all = settings.handlers.iter().map(|(n, h)| (n.clone(), features(n, h)));
    let handlers = default.into_iter().chain(all).map(|(name, features)| cri::RuntimeHandler { name, features: Some(features) });
    let mut response = cri::StatusResponse {
        status: Some(cri::RuntimeStatus { conditions }),
        runtime_handlers: handlers.collect(),
        features: Some(cri::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: settings.handlers.keys().any(|name| userns(name)),
        }),
        ..Default::default()
    };
    if verbose {
        let about = concat!("none: Troupe ", env!("CARGO_PKG_VERSION"), " is written in Rust");
        response.info = [("config", settings.info.clone()), ("golang", about.into())].map(|(k, v)| (k.to_owned(), v)).into();
        response.info.extend(network.info);
    }
    Ok(response)
}

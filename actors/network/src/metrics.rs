//! What is metered here. Operations of plugins are metered by the hops `network.Attach`, `network.Detach` and `network.Check`, under containerd's names.
use kernel::{Fault, Result};
use prometheus::{IntGauge, Registry};

/// Meters of networks. All clones count together.
#[derive(Clone)]
pub struct Meter {
    /// Pods whose network is not given back although that was asked for.
    pub(crate) pending: IntGauge,
}

impl Meter {
    /// Registers the meters; once for a registry.
    pub fn new(registry: &Registry) -> Result<Self> {
        let build = || -> prometheus::Result<Self> {
            let pending =
                IntGauge::new("troupe_network_releases_pending", "Pods whose network is not given back yet although that was asked for.")?;
            registry.register(Box::new(pending.clone()))?;
            Ok(Self { pending })
        };
        build().map_err(|e| Fault::internal(format!("register the meters of networks: {e}")))
    }
}

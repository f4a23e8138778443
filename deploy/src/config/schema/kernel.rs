//! Troupe's own tables.
use serde::{Deserialize, Serialize};

/// Troupe's kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Kernel {
    /// Shared actor threads.
    pub threads: usize,
    /// Spans kept by the flight recorder.
    pub recorder_spans: usize,
    /// Milliseconds between looks of the watchdog.
    pub watchdog_period_ms: u64,
    /// Restarts of one actor within ten seconds before it is put down; 0 = the manifest's. For chaos labs that kill faster than that.
    pub max_restarts: u32,
    /// Control socket of the `troupe` command; empty = `<state>/control.sock`.
    pub control_address: String,
}

impl Default for Kernel {
    fn default() -> Self {
        Self { threads: 2, recorder_spans: 16384, watchdog_period_ms: 1000, max_restarts: 0, control_address: String::new() }
    }
}

/// Fault injection.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Chaos {
    /// Rules are refused unless this is set.
    pub enabled: bool,
    /// Seed of probabilities, 0 = random (logged).
    pub seed: u64,
}

/// What containerd has no keys for in CNI.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Directory of CNI's cache.
    pub cache_dir: String,
    /// A plugin's deadline (Go duration): past it, its process group is killed.
    pub plugin_timeout: String,
    /// First pause before a DEL that was not acknowledged is tried again (Go duration); it doubles up to a minute.
    pub retry_after: String,
}

impl Default for Network {
    fn default() -> Self {
        Self { cache_dir: "/var/lib/cni".into(), plugin_timeout: "1m0s".into(), retry_after: "1s".into() }
    }
}

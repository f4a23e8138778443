//! CNI.
use serde::{Deserialize, Serialize};

/// CNI.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Cni {
    /// Plugins.
    pub bin_dirs: Vec<String>,
    /// Old name of `bin_dirs`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub bin_dir: String,
    /// Configurations.
    pub conf_dir: String,
    /// How many of them, 0 = all.
    pub max_conf_num: usize,
    /// Networks one after another.
    pub setup_serially: bool,
    /// Template of a configuration, empty = none.
    pub conf_template: String,
    /// Which address is the pod's: `ipv4`, `ipv6`, `cni`; empty = ipv4.
    pub ip_pref: String,
    /// Loopback without the plugin: Troupe always does it itself.
    pub use_internal_loopback: bool,
}

impl Default for Cni {
    fn default() -> Self {
        Self {
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            bin_dir: String::new(),
            conf_dir: "/etc/cni/net.d".into(),
            max_conf_num: 1,
            setup_serially: false,
            conf_template: String::new(),
            ip_pref: String::new(),
            use_internal_loopback: true,
        }
    }
}

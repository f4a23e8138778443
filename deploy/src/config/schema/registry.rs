//! Registries.
use anyhow::bail;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Registries.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Registry {
    /// Directories of `hosts.toml` files, separated by `:`.
    pub config_path: String,
    /// Extra request headers.
    pub headers: BTreeMap<String, Vec<String>>,
    /// Deprecated: mirrors by registry, `*` = all others. Instead of `config_path`, not beside it.
    pub mirrors: BTreeMap<String, Mirror>,
    /// Deprecated: credentials by host.
    pub configs: BTreeMap<String, RegistryConfig>,
    /// Deprecated: credentials by URL.
    pub auths: BTreeMap<String, RegistryAuth>,
}

/// Where certs.d directories usually are.
const CERTS: &str = "/etc/containerd/certs.d:/etc/docker/certs.d";

impl Default for Registry {
    fn default() -> Self {
        Self {
            config_path: CERTS.into(),
            headers: BTreeMap::new(),
            mirrors: BTreeMap::new(),
            configs: BTreeMap::new(),
            auths: BTreeMap::new(),
        }
    }
}

/// Mirrors of one registry.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Mirror {
    /// URLs, in the order in which they are tried.
    pub endpoint: Vec<String>,
}

/// What one host wants.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RegistryConfig {
    /// Credentials.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<RegistryAuth>,
}

/// Credentials.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RegistryAuth {
    /// User.
    pub username: String,
    /// Password.
    pub password: String,
    /// base64 of `user:password`.
    pub auth: String,
    /// OAuth refresh token.
    pub identitytoken: String,
}

impl std::fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegistryAuth")
    }
}

impl Registry {
    /// Credentials by host, from both tables.
    pub fn credentials(&self) -> BTreeMap<String, &RegistryAuth> {
        let host = |url: &str| url.split_once("://").map_or(url, |(_, rest)| rest).split('/').next().unwrap_or_default().to_owned();
        let configs = self.configs.iter().filter_map(|(name, c)| Some((name.clone(), c.auth.as_ref()?)));
        configs.chain(self.auths.iter().map(|(url, auth)| (host(url), auth))).collect()
    }
    /// Refuses what cannot be combined.
    pub fn validate(&self) -> anyhow::Result<()> {
        if !self.mirrors.is_empty() && !self.config_path.is_empty() && self.config_path != CERTS {
            bail!(
                "registry: `mirrors` cannot be set when `config_path` is: move the mirrors to hosts.toml files below {}",
                self.config_path
            );
        }
        Ok(())
    }
    /// What of it is deprecated.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        let used = [("mirrors", !self.mirrors.is_empty()), ("configs", !self.configs.is_empty()), ("auths", !self.auths.is_empty())];
        let text = |(key, _)| format!("registry.{key} is deprecated: use hosts.toml files below config_path, and image pull secrets");
        used.into_iter().filter(|(_, used)| *used).map(text)
    }
}

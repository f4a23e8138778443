//! `hosts.toml`: which hosts stand in for a registry, in containerd's certs.d layout (`contracts/core.md` §7.4).
use kernel::{Class, Fault, Result, ResultExt};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One host to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// `https://mirror.example/v2`, without a slash at the end.
    pub base: String,
    /// May resolve tags.
    pub resolve: bool,
    /// May serve blobs and manifests by digest.
    pub pull: bool,
    /// Certificates are not verified.
    pub skip_verify: bool,
    /// Further roots.
    pub ca: Vec<PathBuf>,
    /// Headers of every request.
    pub headers: BTreeMap<String, String>,
    /// A mirror: requests say whom it stands for (`?ns=`).
    pub mirror: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct File {
    server: Option<String>,
    host: toml::Table,
    #[serde(flatten)]
    own: Entry,
}

#[derive(Deserialize, Default, Clone)]
#[serde(default)]
struct Entry {
    capabilities: Option<Vec<String>>,
    skip_verify: Option<bool>,
    ca: Option<toml::Value>,
    header: BTreeMap<String, toml::Value>,
    override_path: bool,
}

/// The hosts of `registry` (`docker.io`, `127.0.0.1:5000`), in the order in which they are tried. `dirs` are looked through in order, `_default` last.
pub fn hosts(dirs: &[PathBuf], registry: &str) -> Result<Vec<Host>> {
    for dir in dirs {
        for name in [registry, "_default"] {
            let path = dir.join(name).join("hosts.toml");
            match std::fs::read_to_string(&path) {
                Ok(text) => return parse(&text, registry, &path),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(Fault::from(e).context(path.display())),
            }
        }
    }
    Ok(vec![upstream(registry)])
}

/// The registry itself: plain HTTP only on loopback.
fn upstream(registry: &str) -> Host {
    let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let loopback = name == "localhost" || name == "::1" || name == "[::1]" || name.starts_with("127.");
    let scheme = if loopback { "http" } else { "https" };
    let base = format!("{scheme}://{host}/v2");
    Host { base, resolve: true, pull: true, skip_verify: false, ca: vec![], headers: BTreeMap::new(), mirror: false }
}

fn parse(text: &str, registry: &str, path: &Path) -> Result<Vec<Host>> {
    let file: File = toml::from_str(text).class(Class::InvalidArgument, path.display())?;
    let mut hosts = Vec::new();
    for (url, entry) in &file.host {
        let entry: Entry = entry.clone().try_into().class(Class::InvalidArgument, format!("{}: host {url}", path.display()))?;
        hosts.push(host(url, &entry, path, true)?);
    }
    match file.server.as_deref() {
        // An empty server means: no fallback.
        Some("") => {}
        Some(server) => hosts.push(host(server, &file.own, path, false)?),
        None => hosts.push(upstream(registry)),
    }
    Ok(hosts)
}

fn host(url: &str, entry: &Entry, path: &Path, mirror: bool) -> Result<Host> {
    let full = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    let full = full.trim_end_matches('/');
    let base = if entry.override_path || full.ends_with("/v2") { full.to_owned() } else { format!("{full}/v2") };
    let may = |what: &str| entry.capabilities.as_ref().is_none_or(|all| all.iter().any(|c| c == what));
    let dir = path.parent().unwrap_or(Path::new("/"));
    let ca = match &entry.ca {
        Some(toml::Value::String(one)) => vec![dir.join(one)],
        Some(toml::Value::Array(many)) => many.iter().filter_map(|v| v.as_str()).map(|p| dir.join(p)).collect(),
        Some(_) => return Err(Fault::invalid_argument(format!("{}: ca must be a path or a list of paths", path.display()))),
        None => vec![],
    };
    let header = |v: &toml::Value| match v {
        toml::Value::Array(many) => many.iter().filter_map(|v| v.as_str()).collect::<Vec<_>>().join(", "),
        one => one.as_str().unwrap_or_default().to_owned(),
    };
    let headers = entry.header.iter().map(|(k, v)| (k.clone(), header(v))).collect();
    Ok(Host { base, resolve: may("resolve"), pull: may("pull"), skip_verify: entry.skip_verify.unwrap_or(false), ca, headers, mirror })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn mirrors_come_first_and_the_server_last() {
        let text = "server = \"https://up.example\"\n[host.\"http://m:5000\"]\ncapabilities = [\"pull\"]\n[host.\"https://n/x/v2\"]\noverride_path = true\nskip_verify = true\n";
        let all = parse(text, "up.example", Path::new("/c/up.example/hosts.toml")).unwrap();
        let bases: Vec<&str> = all.iter().map(|h| h.base.as_str()).collect();
        assert_eq!(bases, ["http://m:5000/v2", "https://n/x/v2", "https://up.example/v2"]);
        assert!(!all[0].resolve && all[0].pull && all[0].mirror && all[1].skip_verify && !all[2].mirror);
    }

    #[test]
    fn loopback_is_plain_and_the_rest_is_not() {
        assert_eq!(upstream("127.0.0.1:5000").base, "http://127.0.0.1:5000/v2");
        assert_eq!(upstream("docker.io").base, "https://registry-1.docker.io/v2");
        assert!(parse("server = 7", "x", Path::new("/c/hosts.toml")).unwrap_err().message.contains("/c/hosts.toml"));
    }
}

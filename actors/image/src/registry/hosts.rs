//! `hosts.toml`: which hosts stand in for a registry, in containerd's certs.d layout (`contracts/core.md` §7.4).
use kernel::{Class, Fault, Result, ResultExt};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What TLS needs beside the system's roots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// Certificates are not verified.
    pub skip_verify: bool,
    /// Further roots.
    pub ca: Vec<PathBuf>,
    /// Our own certificate, and its key if that is in another file.
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
}

impl Tls {
    /// All files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let client = self.client.iter().flat_map(|(c, k)| std::iter::once(c).chain(k));
        self.ca.iter().chain(client).map(PathBuf::as_path)
    }
}

/// One host to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// `https://mirror.example/v2`, without a slash at the end.
    pub base: String,
    /// May resolve tags.
    pub resolve: bool,
    /// May serve blobs and manifests by digest.
    pub pull: bool,
    /// TLS.
    pub tls: Tls,
    /// Headers of every request.
    pub headers: BTreeMap<String, String>,
    /// A mirror: requests say whom it stands for (`?ns=`).
    pub mirror: bool,
    /// How long a connection may take to be made.
    pub dial: Duration,
}

impl Host {
    /// `mirror.example:5000`.
    pub fn authority(&self) -> &str {
        let rest = self.base.split_once("://").map_or(self.base.as_str(), |(_, rest)| rest);
        rest.split('/').next().unwrap_or_default()
    }
}

/// containerd's, and long enough for any network that can carry an image.
const DIAL: Duration = Duration::from_secs(30);

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
    client: Option<toml::Value>,
    header: BTreeMap<String, toml::Value>,
    override_path: bool,
    dial_timeout: Option<String>,
}

/// The hosts of `registry` (`docker.io`, `127.0.0.1:5000`), in the order in which they are tried. `dirs` are looked through in order, `_default` last
/// in each. Blocking.
pub fn hosts(dirs: &[PathBuf], registry: &str) -> Result<Vec<Host>> {
    let with_port = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    for dir in dirs {
        for name in with_port.iter().map(String::as_str).chain([registry, "_default"]) {
            let dir = dir.join(name);
            let path = dir.join("hosts.toml");
            match std::fs::read_to_string(&path) {
                Ok(text) => return parse(&text, registry, &path),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && dir.is_dir() => {
                    return Ok(vec![Host { tls: certificates(&dir)?, ..upstream(registry) }]);
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(Fault::from(e).context(path.display())),
            }
        }
    }
    Ok(vec![upstream(registry)])
}

/// Hosts from the configuration's own `mirrors` table: endpoints in order, then the registry itself.
pub fn inline(mirrors: &BTreeMap<String, Vec<String>>, registry: &str) -> Result<Vec<Host>> {
    let mut hosts = Vec::new();
    let endpoints = mirrors.get(registry).or_else(|| mirrors.get("*")).cloned().unwrap_or_default();
    for url in &endpoints {
        hosts.push(host(url, &Entry::default(), Path::new("/registry.mirrors"), registry)?);
    }
    let own = upstream(registry);
    if !hosts.iter().any(|h| h.authority() == own.authority()) {
        hosts.push(own);
    }
    Ok(hosts)
}

/// Docker's layout: `*.crt` are roots, `*.cert` with `*.key` are ours.
fn certificates(dir: &Path) -> Result<Tls> {
    let mut tls = Tls::default();
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        paths.push(entry?.path());
    }
    paths.sort();
    for path in paths {
        match path.extension().and_then(|e| e.to_str()) {
            Some("crt") => tls.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                tls.client.push((path, Some(key)));
            }
            _ => {}
        }
    }
    Ok(tls)
}

fn is_loopback(host: &str) -> bool {
    let name = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit())).map_or(host, |(name, _)| name);
    name == "localhost" || name.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Docker's registry has three names.
pub fn same_registry(a: &str, b: &str) -> bool {
    let docker = |n: &str| matches!(n, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    a == b || (docker(a) && docker(b))
}

/// The registry itself: plain HTTP only on loopback.
fn upstream(registry: &str) -> Host {
    let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    let loopback = is_loopback(host);
    let scheme = if loopback && !host.ends_with(":443") { "http" } else { "https" };
    Host {
        base: format!("{scheme}://{host}/v2"),
        resolve: true,
        pull: true,
        tls: Tls { skip_verify: loopback, ..Default::default() },
        headers: BTreeMap::new(),
        mirror: false,
        dial: DIAL,
    }
}

fn parse(text: &str, registry: &str, path: &Path) -> Result<Vec<Host>> {
    let file: File = toml::from_str(text).class(Class::InvalidArgument, path.display())?;
    let mut hosts = Vec::new();
    for (url, entry) in &file.host {
        let entry: Entry = entry.clone().try_into().class(Class::InvalidArgument, format!("{}: host {url}", path.display()))?;
        hosts.push(host(url, &entry, path, registry)?);
    }
    // The file's own keys are the server's; without one they are the registry's, which may do everything.
    let server = file.server.filter(|s| !s.is_empty());
    let own = Entry { capabilities: file.own.capabilities.clone().filter(|_| server.is_some()), ..file.own };
    let base = upstream(registry);
    let url = server.clone().unwrap_or_else(|| base.base.trim_end_matches("/v2").to_owned());
    let mut last = host(&url, &own, path, registry)?;
    if server.is_none() {
        last.tls.skip_verify |= base.tls.skip_verify;
    }
    hosts.push(last);
    Ok(hosts)
}

fn host(url: &str, entry: &Entry, path: &Path, registry: &str) -> Result<Host> {
    let bad = |what: String| Fault::invalid_argument(format!("{}: host {url:?}: {what}", path.display()));
    let full = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    let full = full.trim_end_matches('/');
    let base = if entry.override_path || full.ends_with("/v2") { full.to_owned() } else { format!("{full}/v2") };
    let known = ["pull", "resolve", "push", "referrers"];
    if let Some(odd) = entry.capabilities.iter().flatten().find(|c| !known.contains(&c.as_str())) {
        return Err(bad(format!("capability {odd:?} is none of {known:?}")));
    }
    let may = |what: &str| entry.capabilities.as_ref().is_none_or(|all| all.iter().any(|c| c == what));
    let dir = path.parent().unwrap_or(Path::new("/"));
    let text = |v: &toml::Value| v.as_str().map(|p| dir.join(p));
    let ca = match &entry.ca {
        None => vec![],
        Some(toml::Value::Array(many)) if many.iter().all(toml::Value::is_str) => many.iter().filter_map(text).collect(),
        Some(one @ toml::Value::String(_)) => text(one).into_iter().collect(),
        Some(_) => return Err(bad("ca must be a path or a list of paths".into())),
    };
    let pair = |v: &toml::Value| match v {
        toml::Value::String(_) => text(v).map(|c| (c, None)),
        toml::Value::Array(pair) => match pair.as_slice() {
            [one] => text(one).map(|c| (c, None)),
            [certificate, key] => text(certificate).map(|c| (c, text(key).filter(|_| key.as_str() != Some("")))),
            _ => None,
        },
        _ => None,
    };
    let client = match &entry.client {
        None => Some(vec![]),
        Some(one @ toml::Value::String(_)) => pair(one).map(|p| vec![p]),
        Some(toml::Value::Array(many)) => many.iter().map(pair).collect(),
        Some(_) => None,
    };
    let client = client.ok_or_else(|| bad("client must be a path, a list of paths, or a list of [certificate, key]".into()))?;
    let header = |v: &toml::Value| match v {
        toml::Value::Array(many) => many.iter().filter_map(|v| v.as_str()).collect::<Vec<_>>().join(", "),
        one => one.as_str().unwrap_or_default().to_owned(),
    };
    let headers = entry.header.iter().map(|(k, v)| (k.clone(), header(v))).collect();
    let dial =
        entry.dial_timeout.as_deref().map(|t| seconds(t).ok_or_else(|| bad(format!("dial_timeout {t:?} is not a duration such as 5s"))));
    let mut host = Host {
        base,
        resolve: may("resolve") && may("pull"),
        pull: may("pull"),
        tls: Tls { skip_verify: entry.skip_verify.unwrap_or(false), ca, client },
        headers,
        mirror: false,
        dial: dial.transpose()?.unwrap_or(DIAL),
    };
    host.mirror = !same_registry(host.authority(), registry);
    Ok(host)
}

/// A simple Go duration: `5s`, `500ms`, `1m`.
fn seconds(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let unit = match &text[split..] {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(text[..split].parse::<f64>().ok()? * unit).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn at(text: &str) -> Result<Vec<Host>> {
        parse(text, "up.example", Path::new("/c/up.example/hosts.toml"))
    }

    #[test]
    fn mirrors_come_in_the_order_of_the_file_and_the_server_last() {
        let text = "server = \"https://up.example\"\n[host.\"http://z:5000\"]\ncapabilities = [\"pull\"]\n[host.\"https://n/x/v2\"]\noverride_path = true\nskip_verify = true\n[host.\"https://a/path\"]\noverride_path = true\n";
        let all = at(text).unwrap();
        let bases: Vec<&str> = all.iter().map(|h| h.base.as_str()).collect();
        assert_eq!(bases, ["http://z:5000/v2", "https://n/x/v2", "https://a/path", "https://up.example/v2"]);
        assert!(!all[0].resolve && all[0].pull && all[0].mirror && all[1].tls.skip_verify && !all[3].mirror);
        assert_eq!((all[0].authority(), all[1].authority()), ("z:5000", "n"));
    }

    #[test]
    fn certificates_headers_and_time_outs_are_read() {
        let text = "[host.\"https://m\"]\nca = [\"ca.pem\", \"/x.pem\"]\nclient = [[\"c.pem\", \"k.pem\"], [\"both.pem\", \"\"]]\ndial_timeout = \"1.5s\"\n[host.\"https://m\".header]\nx-a = [\"1\", \"2\"]\n";
        let all = at(text).unwrap();
        let dir = Path::new("/c/up.example");
        assert_eq!(all[0].tls.ca, [dir.join("ca.pem"), "/x.pem".into()]);
        assert_eq!(all[0].tls.client, [(dir.join("c.pem"), Some(dir.join("k.pem"))), (dir.join("both.pem"), None)]);
        assert_eq!((all[0].headers["x-a"].as_str(), all[0].dial.as_millis()), ("1, 2", 1500));
        assert_eq!(all[1].base, "https://up.example/v2", "without a server the registry itself comes last");
        for bad in
            ["server = 7", "[host.\"m\"]\ncapabilities = [\"fly\"]", "[host.\"m\"]\nclient = 3", "[host.\"m\"]\ndial_timeout = \"soon\""]
        {
            let fault = at(bad).unwrap_err();
            assert!(fault.message.contains("/c/up.example/hosts.toml") && fault.class == Class::InvalidArgument, "{fault}");
        }
    }

    #[test]
    fn loopback_is_plain_and_the_rest_is_not() {
        assert_eq!(upstream("127.0.0.1:5000").base, "http://127.0.0.1:5000/v2");
        assert_eq!(upstream("localhost:443").base, "https://localhost:443/v2");
        assert_eq!(upstream("docker.io").base, "https://registry-1.docker.io/v2");
        assert_eq!(upstream("127.example.com").base, "https://127.example.com/v2");
        assert_eq!(upstream("[::1]:5000").base, "http://[::1]:5000/v2");
    }

    #[test]
    fn directories_are_looked_through_in_order() {
        let root = std::env::temp_dir().join(format!("troupe-hosts-{}", std::process::id()));
        let file = |dir: &str, server: &str| {
            std::fs::create_dir_all(root.join(dir)).unwrap();
            std::fs::write(root.join(dir).join("hosts.toml"), format!("server = \"{server}\"\n")).unwrap();
        };
        let first = |registry: &str| hosts(std::slice::from_ref(&root), registry).unwrap()[0].clone();
        file("_default", "https://default");
        assert_eq!(first("r:5000").base, "https://default/v2");
        file("r:5000", "https://colon");
        assert_eq!(first("r:5000").base, "https://colon/v2");
        file("r_5000_", "https://underscore");
        assert_eq!(first("r:5000").base, "https://underscore/v2");
        std::fs::create_dir_all(root.join("certs.example")).unwrap();
        for name in ["a.crt", "b.cert", "b.key"] {
            std::fs::write(root.join("certs.example").join(name), "").unwrap();
        }
        let docker = first("certs.example");
        assert_eq!((docker.tls.ca.len(), docker.tls.client.len(), docker.base.as_str()), (1, 1, "https://certs.example/v2"));
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn inline_mirrors_stand_before_the_registry() {
        let mirrors =
            BTreeMap::from([("docker.io".to_owned(), vec!["http://m:1".to_owned()]), ("*".to_owned(), vec!["https://any".to_owned()])]);
        let bases = |r: &str| inline(&mirrors, r).unwrap().into_iter().map(|h| h.base).collect::<Vec<_>>();
        assert_eq!(bases("docker.io"), ["http://m:1/v2", "https://registry-1.docker.io/v2"]);
        assert_eq!(bases("x.example"), ["https://any/v2", "https://x.example/v2"]);
    }
}

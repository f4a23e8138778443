//! The registry client: hosts in order, authorisation, retries, resumed downloads. Every attempt is a step in the trace, and every failure says
//! which hosts were tried and what each answered.
pub mod auth;
pub mod client;
mod download;
pub mod hosts;
mod request;
mod tee;

pub use tee::{Tee, tee};

use auth::Credentials;
use hosts::Host;
use kernel::{Class, Cx, Fault, Result};
use parking_lot::Mutex;
use proto::cri::AuthConfig;
use reqwest::Method;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

/// Attempts for one document or blob on one host without any progress between them.
const ATTEMPTS: u32 = 5;
/// Manifests: what is accepted.
pub const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, */*";
/// Bytes of a manifest at most; containerd's limit is 4 MiB.
const MANIFEST_BYTES: usize = 8 << 20;
/// A `Retry-After` is honoured up to here: beyond it the client had better be told.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// How to reach registries.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Directories of `hosts.toml` files.
    pub dirs: Vec<PathBuf>,
    /// The configuration's own mirrors by registry, instead of `dirs`.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// The configuration's own credentials by registry, for requests that bring none.
    pub auths: BTreeMap<String, AuthConfig>,
    /// Time without a byte after which an attempt is given up.
    pub progress_timeout: Duration,
    /// Headers of every request.
    pub headers: BTreeMap<String, String>,
    /// Bytes of the pieces in which a large layer is fetched side by side; 0 = in one piece.
    pub piece: u64,
    /// Pieces of one layer at once.
    pub pieces: usize,
    /// Clients.
    pub clients: client::Clients,
}

/// One host with what is needed to ask it.
struct Way {
    host: Host,
    client: reqwest::Client,
    credentials: Credentials,
}

/// Where a blob's bytes came from.
#[derive(Default)]
struct Origins {
    /// Hosts that gave bytes of the blob.
    gave: BTreeMap<String, BTreeSet<usize>>,
    /// Hosts whose bytes were others than the digest says.
    wrong: BTreeMap<String, BTreeSet<usize>>,
}

/// A client for one repository.
pub struct Repository {
    ways: Vec<Way>,
    registry: String,
    name: String,
    tokens: Mutex<BTreeMap<String, String>>,
    origins: Mutex<Origins>,
    config: Config,
}

/// Something that went wrong with one attempt, and what may help.
pub(crate) struct Attempt {
    fault: Fault,
    /// Another attempt at this host may help, after so long if the host said so.
    again: Option<Option<Duration>>,
    /// The attempt brought the download forward.
    progress: bool,
}

impl Attempt {
    fn last(fault: Fault) -> Attempt {
        Attempt { fault, again: None, progress: false }
    }
    fn retry(fault: Fault) -> Attempt {
        Attempt { fault, again: Some(None), progress: false }
    }
}

impl Repository {
    /// `registry` and `name` of a normalised reference.
    pub async fn new(cx: &Cx, config: &Config, registry: &str, name: &str, credentials: Credentials) -> Result<Repository> {
        let (config, registry, name) = (config.clone(), registry.to_owned(), name.to_owned());
        let find = move || {
            let hosts =
                if config.mirrors.is_empty() { hosts::hosts(&config.dirs, &registry)? } else { hosts::inline(&config.mirrors, &registry)? };
            let way = |host: Host| -> Result<Way> {
                // The configuration's own credentials are for the host that they name, and for no mirror of it.
                let of_registry = config.auths.get(&registry).filter(|_| !host.mirror);
                let own = config.auths.get(host.authority()).or(of_registry);
                let credentials = if credentials.anonymous() { Credentials::new(own)? } else { credentials.for_host(host.authority()) };
                Ok(Way { client: config.clients.of(&host.tls, host.dial, host.base.starts_with("http://"))?, credentials, host })
            };
            // Where HTTPS cannot be had, hosts without it still serve.
            let (mut ways, mut lacking) = (Vec::new(), None);
            for host in hosts {
                match way(host) {
                    Err(fault) if fault.class == Class::FailedPrecondition => {
                        tracing::warn!(%fault, registry, "a host of the registry is passed over");
                        lacking = Some(fault);
                    }
                    found => ways.push(found?),
                }
            }
            if let Some(fault) = lacking.filter(|_| ways.is_empty()) {
                return Err(fault);
            }
            Ok(Repository { ways, registry, name, tokens: Mutex::default(), origins: Mutex::default(), config })
        };
        cx.blocking("read the hosts of a registry", Duration::from_secs(30), find).await
    }

    /// Digest of a manifest by tag or digest, if the registry tells it without the manifest.
    pub async fn digest(&self, cx: &Cx, reference: &str) -> Result<Option<String>> {
        let by_digest = reference.starts_with("sha256:");
        let path = format!("{}/manifests/{reference}", self.name);
        let told = self.each_way(
            cx,
            |w, _| if by_digest { w.host.pull } else { w.host.resolve },
            &path,
            async |way, _, cx| {
                match self.request(&cx, way, Method::HEAD, &path, MANIFESTS, None).await {
                    Ok(response) => Ok(header(&response, "docker-content-digest")),
                    // Some registries know no HEAD.
                    Err(e) if e.fault.class == Class::Unimplemented => Ok(None),
                    Err(e) => Err(e),
                }
            },
        );
        told.await
    }

    /// A manifest by tag or digest: bytes, and the digest computed from them.
    pub async fn manifest(&self, cx: &Cx, reference: &str) -> Result<(Vec<u8>, String)> {
        let by_digest = reference.starts_with("sha256:");
        let path = format!("{}/manifests/{reference}", self.name);
        let result = self.each_way(
            cx,
            |w, _| if by_digest { w.host.pull } else { w.host.resolve },
            &path,
            async |way, _, cx| {
                let response = self.request(&cx, way, Method::GET, &path, MANIFESTS, None).await?;
                let body = self.small(response).await?;
                let digest = crate::digest(&body);
                if by_digest && digest != reference {
                    return Err(Attempt::last(Fault::data_loss(format!("the manifest has digest {digest}, wanted {reference}"))));
                }
                Ok((body, digest))
            },
        );
        result.await
    }

    /// Tries each host that may, several times each; a failure tells the whole story.
    async fn each_way<T>(
        &self,
        cx: &Cx,
        may: impl Fn(&Way, usize) -> bool,
        path: &str,
        act: impl AsyncFn(&Way, usize, Cx) -> Result<T, Attempt>,
    ) -> Result<T> {
        let (mut story, mut class) = (Vec::new(), Class::NotFound);
        for (number, way) in self.ways.iter().enumerate().filter(|(n, w)| may(w, *n)) {
            let mut attempt = 1;
            loop {
                let mut trouble = (None, false);
                let result = cx
                    .run(format!("registry {path}"), async |cx: Cx| {
                        cx.attr("server.address", redact(&way.host.base));
                        cx.attr("attempt", attempt);
                        act(way, number, cx.clone()).await.map_err(|a| {
                            trouble = (a.again, a.progress);
                            a.fault
                        })
                    })
                    .await;
                let fault = match result {
                    Ok(value) => return Ok(value),
                    Err(fault) => fault,
                };
                if class == Class::NotFound {
                    class = fault.class;
                }
                // What fails often but gets on is not given up, and its story need not be told piece by piece.
                if trouble.1 && trouble.0.is_some() {
                    attempt = 1;
                } else {
                    story.push(format!("{} (attempt {attempt}): {fault}", redact(&way.host.base)));
                }
                let Some(wait) = trouble.0.filter(|_| attempt < ATTEMPTS) else { break };
                let wait = wait.unwrap_or(Duration::from_millis(100 << attempt));
                if cx.remaining().is_some_and(|r| r <= wait) {
                    break;
                }
                tokio::time::sleep(wait).await;
                attempt += 1;
            }
        }
        if story.is_empty() {
            story.push("no host is configured that may serve this".into());
        }
        Err(Fault::new(class, format!("{}/{path}: {}", self.registry, story.join("; "))))
    }

    /// The bytes of this blob were not what its digest says: whoever gave them is not asked for it again. Answers whether anybody else is left.
    pub fn distrust(&self, digest: &str) -> bool {
        let mut origins = self.origins.lock();
        let gave = origins.gave.remove(digest).unwrap_or_default();
        origins.wrong.entry(digest.to_owned()).or_default().extend(gave);
        drop(origins);
        self.trusted(digest)
    }
    /// How many hosts have had wrong bytes for this blob.
    pub fn distrusted(&self, digest: &str) -> usize {
        self.origins.lock().wrong.get(digest).map_or(0, BTreeSet::len)
    }
    /// Whether a host is left to ask for this blob.
    pub fn trusted(&self, digest: &str) -> bool {
        let origins = self.origins.lock();
        let wrong = origins.wrong.get(digest);
        self.ways.iter().enumerate().any(|(n, w)| w.host.pull && wrong.is_none_or(|wrong| !wrong.contains(&n)))
    }
}

pub(crate) fn header(response: &reqwest::Response, name: &str) -> Option<String> {
    response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned)
}

/// A URL without what may be secret: user, query, fragment.
pub(crate) fn redact(url: &str) -> String {
    let plain = url.split(['?', '#']).next().unwrap_or_default();
    match plain.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_once('/').map_or((rest, String::new()), |(a, p)| (a, format!("/{p}")));
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            format!("{scheme}://{host}{path}")
        }
        None => plain.to_owned(),
    }
}

/// An error and its causes, without the URL: its query may hold a signature.
pub(crate) fn text(e: reqwest::Error) -> String {
    let e = e.without_url();
    let mut all = e.to_string();
    let mut cause = std::error::Error::source(&e);
    while let Some(c) = cause {
        all = format!("{all}: {c}");
        cause = c.source();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_cut_out_of_urls() {
        assert_eq!(redact("https://u:p@h:1/a/b?sig=secret#x"), "https://h:1/a/b");
        assert_eq!(redact("https://h"), "https://h");
    }
}

//! The registry client: hosts in order, authorisation, retries, resumed downloads. Every attempt is a step in the trace, and every failure says
//! which hosts were tried and what each answered.
pub mod auth;
pub mod hosts;

use auth::Credentials;
use futures::StreamExt;
use hosts::Host;
use kernel::{Class, Cx, Fault, Result, ResultExt};
use messages::content::BlobWriter;
use parking_lot::Mutex;
use reqwest::{Response, StatusCode};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;

/// Attempts for one document or blob on one host.
const ATTEMPTS: u32 = 5;
/// Manifests: what is accepted.
pub const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// How to reach registries.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directories of `hosts.toml` files.
    pub dirs: Vec<PathBuf>,
    /// Time without a byte after which an attempt is given up.
    pub progress_timeout: Duration,
    /// Headers of every request.
    pub headers: BTreeMap<String, String>,
}

/// A client for one repository.
pub struct Repository {
    hosts: Vec<(Host, reqwest::Client)>,
    registry: String,
    name: String,
    credentials: Credentials,
    tokens: Mutex<BTreeMap<String, String>>,
    config: Config,
}

/// A chunk of a blob for whoever unpacks it while it comes in.
pub type Tee = std::sync::mpsc::SyncSender<bytes::Bytes>;

/// Something that went wrong with one attempt, and whether another may help.
struct Attempt(Fault, bool, Option<Duration>);

impl Repository {
    /// `registry` and `name` of a normalised reference.
    pub fn new(config: &Config, registry: &str, name: &str, credentials: Credentials) -> Result<Repository> {
        let hosts = hosts::hosts(&config.dirs, registry)?;
        let hosts = hosts.into_iter().map(|h| client(&h).map(|c| (h, c))).collect::<Result<_>>()?;
        Ok(Repository {
            hosts,
            registry: registry.into(),
            name: name.into(),
            credentials,
            tokens: Mutex::default(),
            config: config.clone(),
        })
    }

    /// A manifest by tag or digest: bytes, media type, and the digest computed from the bytes.
    pub async fn manifest(&self, cx: &Cx, reference: &str) -> Result<(Vec<u8>, String, String)> {
        let by_digest = reference.starts_with("sha256:");
        let path = format!("{}/manifests/{reference}", self.name);
        let result = self.each_host(
            cx,
            |h| if by_digest { h.pull } else { h.resolve },
            &path,
            async |host, client, cx| {
                let response = self.request(&cx, host, client, &path, MANIFESTS, 0).await?;
                let kind = response
                    .headers()
                    .get("content-type")
                    .and_then(|v| v.to_str().ok())
                    .unwrap_or_default()
                    .split(';')
                    .next()
                    .unwrap_or_default()
                    .to_owned();
                let body = response.bytes().await.map_err(|e| Attempt(Fault::unavailable(text(&e)), true, None))?;
                if body.len() > 8 << 20 {
                    return Err(Attempt(Fault::out_of_range("the manifest is larger than 8 MiB"), false, None));
                }
                let digest = crate::digest(&body);
                if by_digest && digest != reference {
                    return Err(Attempt(Fault::data_loss(format!("the manifest has digest {digest}, wanted {reference}")), false, None));
                }
                Ok((body.to_vec(), kind, digest))
            },
        );
        result.await
    }

    /// Downloads a blob into `writer` from where it stands, and into `tee` from `tee_from` on. Answers the writer, complete.
    pub async fn blob(
        &self,
        cx: &Cx,
        digest: &str,
        size: u64,
        writer: Box<dyn BlobWriter>,
        tee: Option<Tee>,
        progress: impl Fn(u64),
    ) -> Result<Box<dyn BlobWriter>> {
        let path = format!("{}/blobs/{digest}", self.name);
        let slot = Mutex::new(Some((writer, tee)));
        self.each_host(
            cx,
            |h| h.pull,
            &path,
            async |host, client, cx| {
                let Some((mut writer, tee)) = slot.lock().take() else {
                    return Err(Attempt(Fault::internal("the ingest was lost with an abandoned write"), false, None));
                };
                if size > 0
                    && writer.offset() > size
                    && let Err(e) = writer.reset()
                {
                    return Err(Attempt(e, false, None));
                }
                if size > 0 && writer.offset() == size {
                    *slot.lock() = Some((writer, tee));
                    return Ok(());
                }
                let response = match self.request(&cx, host, client, &path, "*/*", writer.offset()).await {
                    Ok(r) => r,
                    Err(e) => {
                        *slot.lock() = Some((writer, tee));
                        return Err(e);
                    }
                };
                let resumed = response.status() == StatusCode::PARTIAL_CONTENT;
                let (result, writer, tee) = self.pour(&cx, response, resumed, writer, tee, &progress).await;
                let short = writer.as_ref().is_some_and(|w| size > 0 && w.offset() < size);
                if let Some(writer) = writer {
                    *slot.lock() = Some((writer, tee));
                }
                result?;
                if short { Err(Attempt(Fault::unavailable("the connection ended early"), true, None)) } else { Ok(()) }
            },
        )
        .await?;
        slot.into_inner().map(|(w, _)| w).ok_or_else(|| Fault::internal("the ingest was lost"))
    }

    /// Body to writer and tee. A blocking thread writes, hashes and feeds the unpacker, while this task goes on reading from the network.
    async fn pour(
        &self,
        cx: &Cx,
        response: Response,
        resumed: bool,
        mut writer: Box<dyn BlobWriter>,
        tee: Option<Tee>,
        progress: &impl Fn(u64),
    ) -> (Result<(), Attempt>, Option<Box<dyn BlobWriter>>, Option<Tee>) {
        if !resumed && writer.offset() > 0 {
            if tee.is_some() {
                // What was unpacked already cannot be taken back.
                return (Err(Attempt(Fault::unavailable("the host does not resume downloads"), false, None)), Some(writer), tee);
            }
            if let Err(e) = writer.reset() {
                return (Err(Attempt(e, false, None)), Some(writer), tee);
            }
        }
        let (sender, mut chunks) = mpsc::channel::<bytes::Bytes>(32);
        let (done, finished) = tokio::sync::oneshot::channel();
        let written = cx.blocking("write layer", Duration::from_secs(24 * 3600), move || {
            let (mut writer, mut tee) = (writer, tee);
            let mut result = Ok(());
            while let Some(chunk) = chunks.blocking_recv() {
                if let Err(e) = writer.write(&chunk) {
                    result = Err(e);
                    break;
                }
                // An unpacker that gave up does not end the download: its own error is told.
                if let Some(to) = &tee
                    && to.send(chunk).is_err()
                {
                    tee = None;
                }
            }
            let _ = done.send((result, writer, tee));
            Ok(())
        });
        let limit = self.config.progress_timeout;
        // The sender moves in and is dropped with it: that is how the writer learns of the end.
        let read = async move {
            let mut body = response.bytes_stream();
            let mut total = 0u64;
            loop {
                match tokio::time::timeout(limit, body.next()).await {
                    Ok(Some(Ok(chunk))) => {
                        total += chunk.len() as u64;
                        progress(total);
                        if sender.send(chunk).await.is_err() {
                            break Ok(());
                        }
                    }
                    Ok(Some(Err(e))) => break Err(Attempt(Fault::unavailable(text(&e)), true, None)),
                    Ok(None) => break Ok(()),
                    Err(_) => {
                        break Err(Attempt(Fault::deadline_exceeded(format!("no byte for {limit:?}")), true, None));
                    }
                }
            }
        };
        let (written, read) = tokio::join!(written, read);
        match finished.await {
            Ok((Ok(()), writer, tee)) => (read, Some(writer), tee),
            Ok((Err(e), writer, tee)) => (Err(Attempt(e, false, None)), Some(writer), tee),
            Err(_) => (Err(Attempt(written.err().unwrap_or_else(|| Fault::internal("the writer ended")), false, None)), None, None),
        }
    }

    /// Tries each host that may, several times each; a failure tells the whole story.
    async fn each_host<T>(
        &self,
        cx: &Cx,
        may: impl Fn(&Host) -> bool,
        path: &str,
        act: impl AsyncFn(&Host, &reqwest::Client, Cx) -> Result<T, Attempt>,
    ) -> Result<T> {
        let (mut story, mut class) = (Vec::new(), Class::NotFound);
        for (host, client) in self.hosts.iter().filter(|(h, _)| may(h)) {
            for attempt in 1..=ATTEMPTS {
                let mut again = None;
                let result = cx
                    .run(format!("registry GET {path}"), async |cx: Cx| {
                        cx.attr("server.address", &host.base);
                        cx.attr("attempt", attempt);
                        act(host, client, cx.clone()).await.map_err(|Attempt(fault, retry, wait)| {
                            again = retry.then(|| wait.unwrap_or(Duration::from_millis(100 << attempt.min(6))));
                            fault
                        })
                    })
                    .await;
                let fault = match result {
                    Ok(value) => return Ok(value),
                    Err(fault) => fault,
                };
                story.push(format!("{} (attempt {attempt}): {fault}", host.base));
                if class == Class::NotFound {
                    class = fault.class;
                }
                match again {
                    Some(wait) if attempt < ATTEMPTS && cx.remaining().is_none_or(|r| r > wait) => tokio::time::sleep(wait).await,
                    _ => break,
                }
            }
        }
        if story.is_empty() {
            story.push("no host is configured for this".into());
        }
        Err(Fault::new(class, format!("{}/{path}: {}", self.registry, story.join("; "))))
    }

    async fn request(
        &self,
        cx: &Cx,
        host: &Host,
        client: &reqwest::Client,
        path: &str,
        accept: &str,
        from: u64,
    ) -> Result<Response, Attempt> {
        let mirror = if host.mirror { format!("?ns={}", self.registry) } else { String::new() };
        let url = format!("{}/{path}{mirror}", host.base);
        for challenged in [false, true] {
            let mut request = client.get(&url).header("Accept", accept).header("traceparent", cx.traceparent());
            for (name, value) in self.config.headers.iter().chain(&host.headers) {
                request = request.header(name, value);
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let token = self.tokens.lock().get(&host.base).cloned().or_else(|| self.credentials.ready());
            if let Some(token) = token {
                request = request.header("Authorization", token);
            }
            let sent = tokio::time::timeout(self.config.progress_timeout.min(Duration::from_secs(30)), request.send()).await;
            let response = match sent {
                Ok(Ok(response)) => response,
                Ok(Err(e)) => return Err(Attempt(Fault::unavailable(text(&e)), !e.is_connect(), None)),
                Err(_) => return Err(Attempt(Fault::deadline_exceeded("no answer"), true, None)),
            };
            let status = response.status();
            cx.attr("http.response.status_code", status.as_u16());
            let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
            return match status {
                s if s.is_success() => Ok(response),
                StatusCode::UNAUTHORIZED if !challenged => {
                    let challenge = header("www-authenticate").unwrap_or_default();
                    let token = auth::answer(client, &challenge, &self.name, &self.credentials).await;
                    let token = token.map_err(|e| Attempt(e, false, None))?;
                    self.tokens.lock().insert(host.base.clone(), token);
                    continue;
                }
                StatusCode::UNAUTHORIZED => Err(Attempt(Fault::unauthenticated("the registry refuses these credentials"), false, None)),
                StatusCode::FORBIDDEN => Err(Attempt(Fault::permission_denied("forbidden"), false, None)),
                StatusCode::NOT_FOUND => Err(Attempt(Fault::not_found("not found"), false, None)),
                s => {
                    let wait = header("retry-after").and_then(|v| v.parse().ok()).map(|s: u64| Duration::from_secs(s.min(30)));
                    let retry = s.is_server_error() || s == StatusCode::TOO_MANY_REQUESTS || s == StatusCode::REQUEST_TIMEOUT;
                    let class = if s == StatusCode::TOO_MANY_REQUESTS { Class::ResourceExhausted } else { Class::Unavailable };
                    Err(Attempt(Fault::new(class, s.to_string()), retry, wait))
                }
            };
        }
        Err(Attempt(Fault::unauthenticated("the registry asks again and again"), false, None))
    }
}

fn text(e: &reqwest::Error) -> String {
    let mut all = e.to_string();
    let mut cause = std::error::Error::source(e);
    while let Some(c) = cause {
        all = format!("{all}: {c}");
        cause = c.source();
    }
    all
}

fn client(host: &Host) -> Result<reqwest::Client> {
    // Another copy may have installed the same provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("troupe/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(10))
        .tls_danger_accept_invalid_certs(host.skip_verify);
    for path in &host.ca {
        let pem = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        for certificate in reqwest::Certificate::from_pem_bundle(&pem).class(Class::InvalidArgument, path.display())? {
            builder = builder.add_root_certificate(certificate);
        }
    }
    builder.build().class(Class::Internal, "make an HTTP client")
}

//! HTTP clients: one for each set of TLS material, kept as long as the files do not change; all of them on one thread of their own, so that decrypting
//! a download never holds up an actor.
use super::hosts::Tls;
use kernel::{Class, Fault, Result, ResultExt};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::runtime::Handle;

/// Connections that nobody uses are closed after this.
const IDLE: Duration = Duration::from_secs(30);
/// Clients kept; more certificates than that in use at once only cost handshakes.
const CLIENTS: usize = 64;

/// The clients of all generations.
#[derive(Clone, Default)]
pub struct Clients(Arc<Mutex<BTreeMap<String, reqwest::Client>>>);

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} clients", self.0.lock().len())
    }
}

/// The network thread's runtime.
fn network() -> Result<Handle> {
    static RUNTIME: OnceLock<Option<tokio::runtime::Runtime>> = OnceLock::new();
    let make = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("troupe-net").enable_all().build().ok();
    let runtime = RUNTIME.get_or_init(make).as_ref();
    runtime.map(|r| r.handle().clone()).ok_or_else(|| Fault::resource_exhausted("no thread for the network can be started"))
}

/// Runs a future on the network thread; it is dropped with the future that this answers.
pub(crate) async fn run<T: Send + 'static>(f: impl Future<Output = T> + Send + 'static) -> Result<T> {
    struct Ended<T>(tokio::task::JoinHandle<T>);
    impl<T> Drop for Ended<T> {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    let mut task = Ended(network()?.spawn(f));
    (&mut task.0).await.map_err(|e| Fault::internal(format!("the network task ended: {e}")))
}

impl Clients {
    /// A client for a host. Blocking: it reads certificates. A `plain` one is for a host without TLS, which a machine without certificates reaches too.
    pub(crate) fn of(&self, tls: &Tls, dial: Duration, plain: bool) -> Result<reqwest::Client> {
        let changed = |p: &Path| p.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        let files: Vec<SystemTime> = tls.files().map(changed).collect();
        let key = format!("{tls:?} {dial:?} {files:?} {plain}");
        if let Some(client) = self.0.lock().get(&key) {
            return Ok(client.clone());
        }
        let client = match build(tls, dial, true) {
            Err(_) if plain => build(tls, dial, false),
            built => built,
        }?;
        let mut all = self.0.lock();
        if all.len() >= CLIENTS {
            all.clear();
        }
        all.insert(key, client.clone());
        Ok(client)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// `system`: the machine's own certificates count, too.
fn build(tls: &Tls, dial: Duration, system: bool) -> Result<reqwest::Client> {
    // Another copy may have installed the same provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("troupe/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(dial)
        .pool_idle_timeout(IDLE)
        .http2_adaptive_window(true)
        // Redirects are followed by hand, because headers of one host are no other host's business.
        .redirect(reqwest::redirect::Policy::none())
        .tls_danger_accept_invalid_certs(tls.skip_verify);
    for path in &tls.ca {
        for certificate in reqwest::Certificate::from_pem_bundle(&read(path)?).class(Class::InvalidArgument, path.display())? {
            builder = builder.add_root_certificate(certificate);
        }
    }
    for (certificate, key) in &tls.client {
        let mut pem = read(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        // The file's name only: what is in it is a secret.
        let identity = reqwest::Identity::from_pem(&pem);
        let bad = |_| Fault::invalid_argument(format!("{}: not a certificate with its key in PEM", certificate.display()));
        builder = builder.identity(identity.map_err(bad)?);
    }
    if !system {
        builder = builder.tls_certs_only([]);
    }
    let hint = "make a client for HTTPS (the machine's certificates come with the package ca-certificates; a registry's own are named by `ca` in hosts.toml)";
    builder.build().map_err(super::text).class(Class::FailedPrecondition, hint)
}

//! The streaming server: Exec, Attach and PortForward of CRI, over SPDY/3.1 and WebSocket.
//!
//! A CRI call gets a URL ([`Server::url`]); the client dials it, once, within a minute. The server negotiates, takes the client's streams apart, and
//! hands them to a [`Backend`] as plain readers and writers; so the backend knows of no protocol.
//!
//! Owns: tokens and connections. Talks to: the backend. On a crash of a handler: its connection ends. Spans: the backend's. Limits: [`TOKENS`] URLs
//! at a time, each for [`LIFETIME`]; bounded queues for each stream, and back-pressure to whoever writes; a connection without traffic for
//! [`Config::idle`] ends, one whose streams do not come within [`Config::creation`] too.
#![forbid(unsafe_code)]
mod activity;
mod forward;
mod http;
mod remote;
mod spdy;
mod status;
#[cfg(test)]
mod tests;
mod tls;
mod websocket;

pub use tls::Tls;

use futures::future::BoxFuture;
use kernel::{Fault, Result};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::sync::mpsc;

/// URLs that wait to be dialled at most; more answer `ResourceExhausted`.
pub const TOKENS: usize = 1000;
/// A connection that nothing was sent on for so long is pinged: a client that is gone is noticed even while its own data wait, unread.
const PING: Duration = Duration::from_secs(5);
/// How long a URL is good for.
pub const LIFETIME: Duration = Duration::from_secs(60);

/// A stream to read.
pub type Reader = Box<dyn AsyncRead + Send + Unpin>;
/// A stream to write.
pub type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// Which streams a client wants.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Standard input.
    pub stdin: bool,
    /// Standard output.
    pub stdout: bool,
    /// Standard error; never with a terminal.
    pub stderr: bool,
    /// A terminal.
    pub tty: bool,
}

/// What a URL stands for.
#[derive(Clone, Debug)]
pub enum Request {
    /// Runs a command.
    Exec {
        /// Container id.
        container: String,
        /// Command.
        command: Vec<String>,
        /// Streams.
        wanted: Wanted,
    },
    /// Joins the streams of a container.
    Attach {
        /// Container id.
        container: String,
        /// Streams.
        wanted: Wanted,
    },
    /// Forwards ports of a pod.
    PortForward {
        /// Pod sandbox id.
        pod: String,
        /// Ports as the call listed them; only WebSocket's old protocols go by them.
        ports: Vec<u16>,
    },
}

impl Request {
    fn kind(&self) -> &'static str {
        match self {
            Request::Exec { .. } => "exec",
            Request::Attach { .. } => "attach",
            Request::PortForward { .. } => "portforward",
        }
    }
}

/// A client's streams.
pub struct Io {
    /// Ends when the client closes it.
    pub stdin: Option<Reader>,
    /// Closed by dropping it.
    pub stdout: Option<Writer>,
    /// The same.
    pub stderr: Option<Writer>,
    /// Sizes of the client's terminal: width, height.
    pub resize: mpsc::Receiver<(u16, u16)>,
}

/// Who does the work.
pub trait Backend: Send + Sync + 'static {
    /// Runs a command to its end, with all its output written; answers its exit code. Dropped when the client is gone; the command is ended then.
    fn exec(&self, container: String, command: Vec<String>, tty: bool, io: Io) -> BoxFuture<'_, Result<i32>>;
    /// Joins a container's streams until it ends or the client goes (then it is dropped).
    fn attach(&self, container: String, io: Io) -> BoxFuture<'_, Result<()>>;
    /// One connection to a port of a pod, until both sides have closed it.
    fn forward(&self, pod: String, port: u16, connection: DuplexStream) -> BoxFuture<'_, Result<()>>;
}

/// Settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// A connection without traffic for so long is closed.
    pub idle: Duration,
    /// How long a client may take to make its streams.
    pub creation: Duration,
    /// How long a command without a terminal may go on when its client is gone; then it is ended, or each lost connection would leave a process.
    pub grace: Duration,
    /// Serve over TLS.
    pub tls: Option<Tls>,
}

impl Default for Config {
    fn default() -> Self {
        Config { idle: Duration::from_secs(4 * 3600), creation: Duration::from_secs(30), grace: Duration::from_secs(10), tls: None }
    }
}

/// The server.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    backend: Arc<dyn Backend>,
    config: Config,
    base: String,
    tokens: Mutex<HashMap<String, (Instant, Request)>>,
}

impl Server {
    /// A server whose listener has this address.
    pub fn new(backend: Arc<dyn Backend>, address: SocketAddr, config: Config) -> Server {
        let scheme = if config.tls.is_some() { "https" } else { "http" };
        Server(Arc::new(Inner { backend, config, base: format!("{scheme}://{address}"), tokens: Mutex::default() }))
    }

    /// A URL for a request: good once, and for a minute. `ResourceExhausted` when too many wait, `InvalidArgument` for streams that make no sense.
    pub fn url(&self, request: Request) -> Result<String> {
        if let Request::Exec { wanted, .. } | Request::Attach { wanted, .. } = &request {
            if wanted.tty && wanted.stderr {
                return Err(Fault::invalid_argument("tty and stderr cannot both be true: a terminal has one output"));
            }
            if !(wanted.stdin || wanted.stdout || wanted.stderr) {
                return Err(Fault::invalid_argument("one of stdin, stdout, stderr must be set"));
            }
        }
        let token = uuid::Uuid::new_v4().simple().to_string();
        let url = format!("{}/{}/{token}", self.0.base, request.kind());
        let mut tokens = self.0.tokens.lock();
        tokens.retain(|_, (made, _)| made.elapsed() < LIFETIME);
        if tokens.len() >= TOKENS {
            return Err(Fault::resource_exhausted(format!("{TOKENS} streaming URLs wait to be dialled: try again in a minute")));
        }
        tokens.insert(token, (Instant::now(), request));
        Ok(url)
    }

    /// Serves until `stop` is done.
    pub async fn serve(self, listener: tokio::net::TcpListener, stop: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let (tls, routes) = (self.0.config.tls.clone(), http::routes(self));
        let served = match tls {
            Some(tls) => axum::serve(tls::Listener::new(listener, tls), routes).with_graceful_shutdown(stop).await,
            None => axum::serve(listener, routes).with_graceful_shutdown(stop).await,
        };
        served.map_err(Fault::from)
    }

    /// Takes what a token stands for; nobody else will get it.
    fn take(&self, kind: &str, token: &str) -> Option<Request> {
        let mut tokens = self.0.tokens.lock();
        if tokens.get(token).is_none_or(|(_, r)| r.kind() != kind) {
            return None;
        }
        tokens.remove(token).filter(|(made, _)| made.elapsed() < LIFETIME).map(|(_, request)| request)
    }
}

//! CRI over gRPC: `runtime.v1.RuntimeService` ([`runtime`]) and `ImageService` ([`image`]).
//!
//! Owns: nothing but the listener. Talks to: `sandbox` and `image`; lists and statuses come from their published views ([`lists`]).
//! On a crash of an actor: the call in flight fails with `Unavailable` (or is delivered again, if its message allows it); a panic here answers
//! `Internal` and touches no other call. Spans: one root for each call, named by the method. Limits: messages of 16 MiB, as containerd's.

mod feed;
mod image;
mod info;
mod lists;
mod meters;
mod runtime;
mod status;
pub mod streams;

use crate::call;
use crate::meter::Meter;
use crate::stop::bounded;
use kernel::{Cx, Fault, Result, System};
use messages::sandbox::Picture;
use messages::{image as images, sandbox};
use proto::cri::image_service_server::ImageServiceServer;
use proto::cri::runtime_service_server::RuntimeServiceServer;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::sync::oneshot::Receiver;
use tokio_stream::wrappers::UnixListenerStream;

/// Largest message either way: containerd's limit.
const MESSAGE_BYTES: usize = 16 << 20;
/// How long a list waits for the end of recovery after a start before it answers `Unavailable`: an incomplete list would make a kubelet start twins.
/// Recovery reads the store and takes milliseconds; clients retry.
const RECOVERY_WAIT: Duration = Duration::from_secs(5);
/// How often it looks.
const RECOVERY_POLL: Duration = Duration::from_millis(5);

/// What CRI tells of the daemon without asking an actor.
#[derive(Clone, Debug)]
pub struct About {
    /// Name of the runtime; tools look for `containerd` here.
    pub runtime_name: String,
    /// Version of the daemon.
    pub runtime_version: String,
    /// Cgroup driver of the default runtime: systemd, or else cgroupfs.
    pub systemd_cgroup: bool,
}

/// The CRI services.
#[derive(Clone)]
pub struct Cri {
    system: System,
    pods: Arc<sandbox::View>,
    images: Arc<images::View>,
    about: Arc<About>,
    streams: stream::Server,
    meter: Meter,
    pulls: meters::Pulls,
}

/// Serves CRI until `stop` is done; then finishes what is in flight.
pub async fn serve(cri: Cri, listener: UnixListener, stop: impl Future<Output = ()>) -> Result<()> {
    let runtime = RuntimeServiceServer::new(cri.clone()).max_decoding_message_size(MESSAGE_BYTES).max_encoding_message_size(MESSAGE_BYTES);
    let image = ImageServiceServer::new(cri).max_decoding_message_size(MESSAGE_BYTES).max_encoding_message_size(MESSAGE_BYTES);
    let serve = |asked: Receiver<()>| {
        let stop = async move { asked.await.unwrap_or_default() };
        let server = tonic::transport::Server::builder().add_service(runtime).add_service(image);
        server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
    };
    let served = bounded(stop, serve).await.unwrap_or(Ok(()));
    served.map_err(|e| Fault::unavailable(format!("serve CRI: {e}")))
}

impl Cri {
    /// Over the views that `sandbox` and `image` publish; `streams` serves what Exec, Attach and PortForward promise.
    pub fn new(system: System, pods: Arc<sandbox::View>, images: Arc<images::View>, about: About, streams: stream::Server) -> Result<Self> {
        let meter = Meter::new(system.metrics())?;
        let pulls = meters::register(&system, pods.clone())?;
        Ok(Self { system, pods, images, about: Arc::new(about), streams, meter, pulls })
    }

    /// One call: an operation around `work`.
    async fn call<Q, T, F, Fut>(&self, name: &'static str, request: tonic::Request<Q>, work: F) -> Result<tonic::Response<T>, tonic::Status>
    where
        F: FnOnce(Cx, Q) -> Fut + Send,
        Fut: Future<Output = Result<T>> + Send,
    {
        call::grpc(&self.system, &self.meter, name, request, work).await
    }

    /// The picture of pods and containers, once it is complete.
    async fn picture(&self, cx: &Cx) -> Result<Arc<Picture>> {
        let patience = cx.remaining().map_or(RECOVERY_WAIT, |r| (r / 2).min(RECOVERY_WAIT));
        let until = Instant::now() + patience;
        loop {
            let picture = self.pods.0.load_full();
            if picture.recovered {
                return Ok(picture);
            }
            if Instant::now() >= until {
                return Err(Fault::unavailable("server is not initialized yet: recovery of pods is still going on, try again"));
            }
            tokio::time::sleep(RECOVERY_POLL).await;
        }
    }

    /// The picture as it is now, complete or not: good enough to complete a shortened id.
    fn glance(&self) -> Arc<Picture> {
        self.pods.0.load_full()
    }
}

/// A field that must be there.
fn required<T>(value: Option<T>, field: &str) -> Result<T> {
    value.ok_or_else(|| Fault::invalid_argument(format!("{field} is missing")))
}

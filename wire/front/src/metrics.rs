//! HTTP for machines that watch: `/metrics` (Prometheus text) and `/healthz` (JSON; 503 while something is down).

use crate::stop::bounded;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use kernel::{Fault, Result, ResultExt as _, System};
use prometheus::{Encoder as _, TextEncoder};
use std::future::{Future, IntoFuture as _};
use std::path::Path;
use tokio::net::TcpListener;
use tokio::sync::oneshot::Receiver;

/// Serves until `stop` is done, on TCP or a unix socket.
pub async fn serve<L>(system: System, listener: L, stop: impl Future<Output = ()>) -> Result<()>
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    let serve = |asked: Receiver<()>| {
        let stop = async move { asked.await.unwrap_or_default() };
        axum::serve(listener, routes(system)).with_graceful_shutdown(stop).into_future()
    };
    let served = bounded(stop, serve).await.unwrap_or(Ok(()));
    served.map_err(|e| Fault::unavailable(format!("serve metrics: {e}")))
}

/// Binds `host:port` or `unix:///path` and serves there until `stop` is done.
pub async fn serve_at(system: System, address: &str, stop: impl Future<Output = ()>) -> Result<()> {
    if let Some(path) = address.strip_prefix("unix://") {
        return serve(system, crate::socket::bind(Path::new(path)).await?, stop).await;
    }
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address} for metrics"))?;
    serve(system, listener, stop).await
}

/// The routes, which the control socket has too.
pub fn routes(system: System) -> Router {
    Router::new().route("/metrics", get(metrics)).route("/healthz", get(health)).with_state(system)
}

async fn metrics(State(system): State<System>) -> Response {
    let encoder = TextEncoder::new();
    let mut body = Vec::new();
    match encoder.encode(&system.metrics().gather(), &mut body) {
        Ok(()) => ([(CONTENT_TYPE, encoder.format_type().to_owned())], body).into_response(),
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, format!("encode metrics: {e}\n")).into_response(),
    }
}

async fn health(State(system): State<System>) -> Response {
    let health = system.health();
    let status = if health.reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, crate::control::json(&health)).into_response()
}

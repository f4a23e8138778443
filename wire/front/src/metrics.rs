//! HTTP for machines that watch: `/metrics` (Prometheus text) and `/healthz` (JSON; 503 while something is down).

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use kernel::{Fault, Result, System};
use prometheus::{Encoder as _, TextEncoder};
use std::future::Future;

/// Serves until `stop` is done, on TCP or a unix socket.
pub async fn serve<L>(system: System, listener: L, stop: impl Future<Output = ()> + Send + 'static) -> Result<()>
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    let served = axum::serve(listener, routes(system)).with_graceful_shutdown(stop).await;
    served.map_err(|e| Fault::unavailable(format!("serve metrics: {e}")))
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
    let status = if health.ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, crate::control::json(&health)).into_response()
}

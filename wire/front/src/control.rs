//! The control API of the `troupe` command: JSON over HTTP/1 on a unix socket.
//!
//! | request | answer |
//! |---|---|
//! | `GET /actors`, `/ops`, `/blocking`, `/healthz`, `/metrics` | what the kernel sees |
//! | `GET /traces` | recent operations, newest first |
//! | `GET /trace/{id}` | spans of one trace |
//! | `GET /chaos`, `POST /chaos`, `DELETE /chaos` (all), `DELETE /chaos/{id}` | fault injection: refused unless the configuration enables it |
//! | `GET /events?follow=true&topic=/tasks/` | events as JSON lines ([`feed`]) |
//!
//! A failure is `{"class": …, "message": …}` with a fitting HTTP status. Nothing here waits for an actor but `/events`, which opens a reader.

mod feed;

use crate::stop::bounded;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use kernel::{Class, Fault, Result, Rule, System};
use serde::Serialize;
use std::future::{Future, IntoFuture as _};
use tokio::net::UnixListener;
use tokio::sync::oneshot::Receiver;

/// How many operations `/traces` shows.
const RECENT: usize = 200;

/// Serves until `stop` is done. Followers of events are cut off a little later.
pub async fn serve(system: System, listener: UnixListener, stop: impl Future<Output = ()>) -> Result<()> {
    let serve = |asked: Receiver<()>| {
        let stop = async move { asked.await.unwrap_or_default() };
        axum::serve(listener, routes(system)).with_graceful_shutdown(stop).into_future()
    };
    let served = bounded(stop, serve).await.unwrap_or(Ok(()));
    served.map_err(|e| Fault::unavailable(format!("serve the control API: {e}")))
}

fn routes(system: System) -> Router {
    let control = Router::new()
        .route("/actors", get(|State(s): State<System>| async move { json(&s.actors()) }))
        .route("/ops", get(|State(s): State<System>| async move { json(&s.ops()) }))
        .route("/blocking", get(|State(s): State<System>| async move { json(&s.blocking_calls()) }))
        .route("/traces", get(|State(s): State<System>| async move { json(&s.recent_roots(RECENT)) }))
        .route("/trace/{id}", get(trace))
        .route("/chaos", get(|State(s): State<System>| async move { json(&s.chaos().list()) }).post(add_rule).delete(clear_rules))
        .route("/chaos/{id}", delete(remove_rule))
        .route("/events", get(feed::events))
        .with_state(system.clone());
    control.merge(crate::metrics::routes(system))
}

async fn trace(State(system): State<System>, Path(id): Path<String>) -> Response {
    let spans = system.trace(&id);
    if spans.is_empty() {
        return failure(&Fault::not_found(format!("no span of trace {id} is in the flight recorder: it may have been overwritten")));
    }
    json(&spans)
}

async fn add_rule(State(system): State<System>, body: Bytes) -> Response {
    let rule: Rule = match serde_json::from_slice(&body) {
        Ok(rule) => rule,
        Err(e) => return failure(&Fault::invalid_argument(format!("chaos rule: {e}"))),
    };
    answer(system.chaos().add(rule))
}

async fn clear_rules(State(system): State<System>) -> Response {
    answer(system.chaos().clear(None))
}

async fn remove_rule(State(system): State<System>, Path(id): Path<u64>) -> Response {
    answer(system.chaos().clear(Some(id)))
}

fn answer<T: Serialize>(result: Result<T>) -> Response {
    match result {
        Ok(value) => json(&value),
        Err(fault) => failure(&fault),
    }
}

/// A value as a JSON answer.
pub(crate) fn json<T: Serialize>(value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => ([(CONTENT_TYPE, "application/json")], body).into_response(),
        Err(e) => failure(&Fault::internal(format!("encode the answer: {e}"))),
    }
}

/// A fault as an answer.
pub(crate) fn failure(fault: &Fault) -> Response {
    let status = match fault.class {
        Class::InvalidArgument | Class::OutOfRange => StatusCode::BAD_REQUEST,
        Class::NotFound => StatusCode::NOT_FOUND,
        Class::AlreadyExists | Class::Aborted => StatusCode::CONFLICT,
        Class::FailedPrecondition | Class::PermissionDenied => StatusCode::FORBIDDEN,
        Class::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Class::Unavailable | Class::ResourceExhausted => StatusCode::SERVICE_UNAVAILABLE,
        Class::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let body = serde_json::json!({ "class": format!("{:?}", fault.class), "message": fault.message }).to_string();
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

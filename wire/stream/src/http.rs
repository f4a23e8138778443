//! The HTTP side: tokens, the choice of protocol, and the upgrade.
use crate::activity::Activity;
use crate::remote::{self, Channels};
use crate::{Request, Server, forward, spdy, websocket};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request as Http, State};
use axum::http::header::{CONNECTION, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use std::time::Duration;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

const PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
const SPDY: &str = "SPDY/3.1";
/// SPDY protocols of exec and attach.
const REMOTE: [(&str, u8); 4] = [("v4.channel.k8s.io", 4), ("v3.channel.k8s.io", 3), ("v2.channel.k8s.io", 2), ("channel.k8s.io", 1)];
const FORWARD: &str = "portforward.k8s.io";
/// SPDY for port-forward within a WebSocket.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// A command may read its input as late as it likes.
const EVER: Duration = Duration::MAX;

/// How long a stream of a request may take nothing.
fn patience(request: &Request) -> Duration {
    if matches!(request, Request::PortForward { .. }) { spdy::STALL } else { EVER }
}

pub(crate) fn routes(server: Server) -> Router {
    Router::new().route("/{kind}/{token}", any(handle)).with_state(server)
}

async fn handle(State(server): State<Server>, Path((kind, token)): Path<(String, String)>, http: Http) -> Response {
    let wants = |what: &str| listed(http.headers(), &UPGRADE).iter().any(|u| u.eq_ignore_ascii_case(what));
    let (spdy, websocket) = (wants(SPDY), wants("websocket"));
    if !(spdy || websocket) {
        return (StatusCode::BAD_REQUEST, "unable to upgrade: ask for SPDY/3.1 or websocket").into_response();
    }
    let Some(request) = server.take(&kind, &token) else {
        return (StatusCode::NOT_FOUND, "no such stream: a URL is good once, for a minute").into_response();
    };
    if spdy { over_spdy(server, request, http) } else { over_websocket(server, request, http) }
}

/// The values of a header that is a list.
fn listed(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let values = headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty()).collect()
}

fn switch(headers: &[(HeaderName, &str)]) -> Response {
    let mut response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
    for (name, value) in headers {
        response = response.header(name, *value);
    }
    response.body(Body::empty()).unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

/// Runs `work` on the connection once the client has switched.
fn upgraded<F, Fut>(http: Http, work: F)
where
    F: FnOnce(TokioIo<Upgraded>) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    let upgrade = hyper::upgrade::on(http);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(connection) => work(TokioIo::new(connection)).await,
            Err(error) => tracing::debug!(%error, "a client did not switch protocols"),
        }
    });
}

fn over_spdy(server: Server, request: Request, http: Http) -> Response {
    let offered = listed(http.headers(), &PROTOCOL);
    if offered.is_empty() {
        return (StatusCode::BAD_REQUEST, "the X-Stream-Protocol-Version header is missing").into_response();
    }
    let known: Vec<(&str, u8)> = if matches!(request, Request::PortForward { .. }) { vec![(FORWARD, 0)] } else { REMOTE.to_vec() };
    let chosen = offered.iter().find_map(|o| known.iter().find(|(name, _)| name == o));
    let Some((name, version)) = chosen.copied() else {
        let mut refused = (StatusCode::FORBIDDEN, "none of the stream protocols is known here").into_response();
        for value in known.iter().filter_map(|(name, _)| name.parse().ok()) {
            refused.headers_mut().append(ACCEPTED, value);
        }
        return refused;
    };
    upgraded(http, move |connection| async move {
        let activity = Activity::new();
        let idle = server.0.config.idle;
        let connection = spdy::Connection::start(connection, activity.clone(), patience(&request));
        tokio::select! {
            () = serve_spdy(&server, request, version, connection) => {}
            () = activity.idle(idle) => {}
        }
    });
    switch(&[(CONNECTION, "Upgrade"), (UPGRADE, SPDY), (PROTOCOL, name)])
}

async fn serve_spdy(server: &Server, request: Request, version: u8, mut connection: spdy::Connection) {
    match &request {
        Request::PortForward { pod, .. } => forward::serve(server, pod, &mut connection).await,
        Request::Exec { wanted, .. } | Request::Attach { wanted, .. } => {
            match remote::gather(&mut connection, wanted, version, &server.0.config).await {
                Ok(channels) => {
                    let gone = connection.closed();
                    remote::run(server, request, channels, version, gone).await;
                }
                Err(fault) => tracing::warn!(%fault, "a streaming client is dropped"),
            }
        }
    }
    connection.finish().await;
}

fn over_websocket(server: Server, request: Request, http: Http) -> Response {
    let Some(key) = http.headers().get(SEC_WEBSOCKET_KEY).map(|k| derive_accept_key(k.as_bytes())) else {
        return (StatusCode::BAD_REQUEST, "the Sec-WebSocket-Key header is missing").into_response();
    };
    let mut offered = listed(http.headers(), &SEC_WEBSOCKET_PROTOCOL);
    if offered.is_empty() {
        offered.push(String::new());
    }
    let forwards = matches!(request, Request::PortForward { .. });
    let tunnels = |name: &String| forwards && name == TUNNEL;
    // Version 5 alone can close a client's input, so it comes first whatever the order.
    let best = offered.iter().find(|n| tunnels(n) || (!forwards && *n == "v5.channel.k8s.io"));
    let known = |n: &&String| websocket::packing(n).is_some_and(|p| !(forwards && p.version == 5));
    let Some(name) = best.or_else(|| offered.iter().find(known)).cloned() else {
        return (StatusCode::FORBIDDEN, "none of the WebSocket protocols is known here").into_response();
    };
    let mut headers = vec![(CONNECTION, "Upgrade"), (UPGRADE, "websocket"), (SEC_WEBSOCKET_ACCEPT, key.as_str())];
    if !name.is_empty() {
        headers.push((SEC_WEBSOCKET_PROTOCOL, name.as_str()));
    }
    let response = switch(&headers);
    let name = name.clone();
    upgraded(http, move |connection| async move {
        let activity = Activity::new();
        let idle = server.0.config.idle;
        let serving = async {
            match (websocket::packing(&name), request) {
                (None, request) => {
                    let inner = spdy::Connection::start(websocket::tunnel(connection).await, activity.clone(), spdy::STALL);
                    serve_spdy(&server, request, 4, inner).await;
                }
                (Some(packing), Request::PortForward { pod, ports }) => {
                    forward_channels(&server, pod, ports, connection, packing, activity.clone()).await
                }
                (Some(packing), request) => serve_channels(&server, request, connection, packing, activity.clone()).await,
            }
        };
        tokio::select! {
            () = serving => {}
            () = activity.idle(idle) => {}
        }
    });
    response
}

/// Exec and attach: 0 is stdin, 1 stdout, 2 stderr, 3 the error channel, 4 the terminal's size.
async fn serve_channels(server: &Server, request: Request, connection: TokioIo<Upgraded>, packing: websocket::Packing, activity: Activity) {
    let (connection, users) = websocket::Connection::start(connection, packing, 5, &[1, 2, 3], activity, EVER).await;
    let mut users = users.into_iter();
    let mut next = || users.next();
    let channels = Channels { stdin: next(), stdout: next(), stderr: next(), error: next(), resize: next() };
    remote::run(server, request, channels, packing.version, connection.closed()).await;
    connection.finish().await;
}

/// Port-forward: two channels for each port, data and error, which begin with the port's number.
async fn forward_channels(
    server: &Server,
    pod: String,
    ports: Vec<u16>,
    connection: TokioIo<Upgraded>,
    packing: websocket::Packing,
    activity: Activity,
) {
    use tokio::io::AsyncWriteExt;
    let ports: Vec<u16> = ports.into_iter().take(127).collect();
    let count = ports.len() as u8 * 2;
    let all: Vec<u8> = (0..count).collect();
    let (connection, users) = websocket::Connection::start(connection, packing, count, &all, activity, spdy::STALL).await;
    let mut users = users.into_iter();
    let mut pairs = tokio::task::JoinSet::new();
    for port in ports {
        let (Some(mut data), Some(mut error)) = (users.next(), users.next()) else { break };
        let (server, pod) = (server.clone(), pod.clone());
        pairs.spawn(async move {
            let number = port.to_le_bytes();
            if data.write_all(&number).await.is_ok() && error.write_all(&number).await.is_ok() {
                forward::forward(&server, pod, Some(port), data, error).await;
            }
        });
    }
    let gone = connection.closed();
    tokio::select! {
        () = async { while pairs.join_next().await.is_some() {} } => {}
        () = gone => pairs.shutdown().await,
    }
    connection.finish().await;
}

//! PortForward: pairs of a data and an error stream; each pair is one connection to the pod. A pair that fails says so on its error stream, and the
//! others go on.
use crate::Server;
use crate::spdy::Connection;
use kernel::{Fault, Result};
use std::collections::HashMap;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::task::JoinSet;

/// Halves of pairs that wait for their other half at most.
const HALVES: usize = 256;

/// Serves a connection until the client closes it.
pub(crate) async fn serve(server: &Server, pod: &str, connection: &mut Connection) {
    let mut halves: HashMap<String, (Option<DuplexStream>, Option<DuplexStream>)> = HashMap::new();
    let mut pairs = JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = connection.streams.recv() => stream,
            Some(_) = pairs.join_next() => continue,
        };
        let Some(stream) = stream else { break };
        let port = stream.headers.get("port").parse::<u16>().ok().filter(|p| *p > 0);
        let kind = stream.headers.get("streamType").to_owned();
        // Old clients name no request: their error stream comes right before its data stream.
        let request = match stream.headers.get("requestID") {
            "" if kind == "error" => stream.id.to_string(),
            "" => stream.id.saturating_sub(2).to_string(),
            id => id.to_owned(),
        };
        if halves.len() >= HALVES {
            halves.clear();
        }
        let pair = halves.entry(request.clone()).or_default();
        match kind.as_str() {
            "error" => pair.0 = Some(stream.io),
            "data" => pair.1 = Some(stream.io),
            _ => {}
        }
        if let (Some(_), Some(_)) = pair
            && let Some((Some(error), Some(data))) = halves.remove(&request)
        {
            let (server, pod) = (server.clone(), pod.to_owned());
            pairs.spawn(async move { forward(&server, pod, port, data, error).await });
        }
    }
    // The client is gone: what it had open ends with it.
    pairs.shutdown().await;
}

/// One connection.
pub(crate) async fn forward(server: &Server, pod: String, port: Option<u16>, data: DuplexStream, mut error: DuplexStream) {
    let result: Result<()> = match port {
        Some(port) => server.0.backend.forward(pod, port, data).await,
        None => Err(Fault::invalid_argument("the port must be between 1 and 65535")),
    };
    if let Err(fault) = result {
        let _ = error.write_all(fault.to_string().as_bytes()).await;
    }
    let _ = error.shutdown().await;
}

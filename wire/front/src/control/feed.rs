//! `GET /events`: the event bus as JSON lines.
//!
//! Query: `follow=true` keeps the connection open (otherwise only what comes within [`GLANCE`] is shown), `topic=/tasks/` (repeatable) chooses by prefix.
//! A line is an event or, when this reader was too slow, `{"missed": n, "next": seq}`.

use super::failure;
use crate::call::{self, Origin};
use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures::stream;
use kernel::System;
use messages::events::{Delivery, Event, Events, Reader, Subscribe};
use proto::events as payloads;
use proto::prost_types::Any;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long a request without `follow` collects events.
const GLANCE: Duration = Duration::from_secs(1);

/// Handler of `GET /events`.
pub async fn events(State(system): State<System>, RawQuery(query): RawQuery) -> Response {
    let (follow, topics) = parse(query.as_deref().unwrap_or_default());
    let bus = system.addr::<Events>();
    let origin = Origin { name: "control/events", traceparent: None, timeout: Some(Duration::from_secs(10)) };
    let reader = call::run(&system, origin, |cx| async move { bus.call(&cx, Subscribe { topics }).await }).await;
    match reader {
        Ok((reader, _)) => ([(CONTENT_TYPE, "application/x-ndjson")], lines(reader, follow)).into_response(),
        Err(f) => failure(&f.fault),
    }
}

fn parse(query: &str) -> (bool, Vec<String>) {
    let pairs = query.split('&').filter_map(|p| p.split_once('='));
    let mut follow = false;
    let mut topics = Vec::new();
    for (key, value) in pairs {
        match key {
            "follow" => follow = matches!(value, "true" | "1"),
            "topic" => topics.push(value.replace("%2F", "/").replace("%2f", "/")),
            _ => {}
        }
    }
    (follow, topics)
}

fn lines(reader: Box<dyn Reader>, follow: bool) -> Body {
    let until = (!follow).then(|| tokio::time::Instant::now() + GLANCE);
    Body::from_stream(stream::unfold(reader, move |mut reader| async move {
        let delivery = match until {
            Some(end) => tokio::time::timeout_at(end, reader.next()).await.ok().flatten(),
            None => reader.next().await,
        };
        let line = format!("{}\n", line(&delivery?));
        Some((Ok::<_, Infallible>(Bytes::from(line)), reader))
    }))
}

fn line(delivery: &Delivery) -> Value {
    match delivery {
        Delivery::Event(event) => one(event),
        Delivery::Gap { missed, next } => json!({ "missed": missed, "next": next }),
    }
}

fn one(event: &Event) -> Value {
    json!({
        "seq": event.seq,
        "at_unix_ms": millis(event.at),
        "namespace": event.namespace,
        "topic": event.topic,
        "type": event.payload.type_url,
        "event": payload(&event.payload),
        "traceparent": event.traceparent,
    })
}

fn millis(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The telling fields of the payloads we know; `null` for others.
fn payload(any: &Any) -> Value {
    macro_rules! known {
        ($($message:ident { $($field:ident),+ }),+ $(,)?) => {
            $(if let Some(m) = proto::from_any::<payloads::$message>(any) {
                return json!({ $(stringify!($field): m.$field),+ });
            })+
        };
    }
    known! {
        TaskCreate { container_id, pid },
        TaskStart { container_id, pid },
        TaskExit { container_id, id, pid, exit_status },
        TaskDelete { container_id, id, pid, exit_status },
        TaskOom { container_id },
        TaskExecAdded { container_id, exec_id },
        TaskExecStarted { container_id, exec_id, pid },
        TaskPaused { container_id },
        TaskResumed { container_id },
        ContainerCreate { id, image },
        ContainerUpdate { id, image },
        ContainerDelete { id },
        SandboxCreate { sandbox_id },
        SandboxStart { sandbox_id },
        SandboxExit { sandbox_id, exit_status },
        ImageCreate { name, labels },
        ImageUpdate { name, labels },
        ImageDelete { name },
        SnapshotPrepare { key, parent },
        SnapshotCommit { key, name },
        SnapshotRemove { key },
        ContentDelete { digest },
        NamespaceCreate { name },
        NamespaceDelete { name },
    }
    Value::Null
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn the_query_chooses() {
        assert_eq!(parse(""), (false, vec![]));
        assert_eq!(parse("follow=true&topic=%2Ftasks%2F&topic=/images/"), (true, vec!["/tasks/".to_owned(), "/images/".to_owned()]));
    }

    #[test]
    fn known_payloads_are_readable_and_gaps_are_told() {
        let exit = payloads::TaskExit { container_id: "c1".into(), pid: 7, exit_status: 137, ..Default::default() };
        let event = Event {
            seq: 3,
            at: UNIX_EPOCH + Duration::from_millis(1500),
            namespace: "k8s.io".into(),
            topic: "/tasks/exit".into(),
            payload: proto::any(&exit),
            traceparent: String::new(),
        };
        let told = line(&Delivery::Event(event.into()));
        assert_eq!((&told["seq"], &told["at_unix_ms"], &told["event"]["exit_status"]), (&json!(3), &json!(1500), &json!(137)));
        assert_eq!(line(&Delivery::Gap { missed: 2, next: 9 }), json!({ "missed": 2, "next": 9 }));
    }
}

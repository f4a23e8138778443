//! The ttrpc server at which shims (ours and containerd's) deliver their events: `containerd.services.events.ttrpc.v1.Events/Forward`.
//!
//! Owns: nothing but the listener. Talks to: `events`. A shim that gets an error sends the event again, so an event is acknowledged only once the bus
//! has it.

use crate::call::{self, Origin, TRACEPARENT};
use crate::status;
use kernel::{Fault, Result, System};
use messages::events::{Events as Bus, Publish};
use proto::events::{Envelope, Events, ForwardRequest};
use proto::{async_trait, glue, ttrpc};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

/// Namespace of a ttrpc call.
const NAMESPACE: &str = "containerd-namespace-ttrpc";

/// Serves until `stop` is done.
pub async fn serve(system: System, listener: UnixListener, stop: impl Future<Output = ()>) -> Result<()> {
    let routes = proto::events::serve(Arc::new(Forwarder { system }));
    let listener = ttrpc::r#async::transport::Listener::new(UnixListenerStream::new(listener));
    let mut server = ttrpc::r#async::Server::new().add_listener(listener).register_service(routes);
    server.start().await.map_err(|e| Fault::unavailable(format!("serve events of shims: {e}")))?;
    stop.await;
    server.shutdown().await.map_err(|e| Fault::unavailable(format!("stop serving events of shims: {e}")))
}

struct Forwarder {
    system: System,
}

#[async_trait]
impl Events for Forwarder {
    async fn forward(&self, cx: &glue::Context, request: ForwardRequest) -> ttrpc::Result<()> {
        let origin = Origin {
            name: "containerd.services.events.ttrpc.v1.Events/Forward",
            traceparent: glue::metadata(cx, TRACEPARENT),
            timeout: u64::try_from(cx.timeout_nano).ok().filter(|n| *n > 0).map(Duration::from_nanos),
        };
        let namespace = glue::metadata(cx, NAMESPACE).unwrap_or_default();
        let bus = self.system.addr::<Bus>();
        let outcome = call::run(&self.system, origin, |cx| async move {
            let event = event(request.envelope, namespace)?;
            cx.attr("event.topic", &event.topic);
            bus.call(&cx, event).await
        });
        outcome.await.map(|_| ()).map_err(|failure| status::ttrpc(&failure))
    }
}

fn event(envelope: Option<Envelope>, namespace: &str) -> Result<Publish> {
    let envelope = envelope.ok_or_else(|| Fault::invalid_argument("envelope is missing"))?;
    if envelope.topic.is_empty() {
        return Err(Fault::invalid_argument("envelope.topic is empty"));
    }
    let payload = envelope.event.ok_or_else(|| Fault::invalid_argument("envelope.event is missing"))?;
    let namespace = if envelope.namespace.is_empty() { namespace.to_owned() } else { envelope.namespace };
    let at = envelope.timestamp.and_then(|t| time(t.seconds, t.nanos));
    Ok(Publish { namespace, topic: envelope.topic, payload, at })
}

fn time(seconds: i64, nanos: i32) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanos).ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use kernel::Class;
    use proto::prost_types::{Any, Timestamp};

    #[test]
    fn an_envelope_becomes_an_event() {
        let payload = Any { type_url: "containerd.events.TaskExit".into(), value: vec![1] };
        let timestamp = Some(Timestamp { seconds: 5, nanos: 7 });
        let envelope = Envelope { topic: "/tasks/exit".into(), event: Some(payload.clone()), timestamp, ..Default::default() };
        let event = event(Some(envelope), "k8s.io").unwrap();
        assert_eq!((event.namespace.as_str(), event.topic.as_str(), &event.payload), ("k8s.io", "/tasks/exit", &payload));
        assert_eq!(event.at, Some(UNIX_EPOCH + Duration::new(5, 7)));
    }

    #[test]
    fn an_incomplete_envelope_is_refused_with_the_field() {
        for (envelope, field) in [(None, "envelope"), (Some(Envelope::default()), "topic")] {
            let fault = event(envelope, "").unwrap_err();
            assert_eq!(fault.class, Class::InvalidArgument);
            assert!(fault.message.contains(field), "{fault}");
        }
    }
}

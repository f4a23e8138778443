//! `events`: the event bus. Sequenced and bounded; a slow reader gets a gap marker and never blocks a publisher.
use kernel::Protocol;
use proto::prost_types::Any;
use std::sync::Arc;
use std::time::SystemTime;

/// The event bus' protocol.
pub struct Events;
impl Protocol for Events {
    const ACTOR: &'static str = "events";
}

/// An event as containerd's envelope has it, with the bus' sequence number.
#[derive(Clone, Debug)]
pub struct Event {
    /// Position on the bus, from 1, without holes.
    pub seq: u64,
    /// When it happened.
    pub at: SystemTime,
    /// containerd namespace, `k8s.io` for pods.
    pub namespace: String,
    /// Topic, such as `/tasks/exit`.
    pub topic: String,
    /// Payload; `type_url` is the full proto name without a prefix.
    pub payload: Any,
    /// Trace in which it was published (W3C traceparent), empty if none.
    pub traceparent: String,
}

/// What a reader gets.
#[derive(Clone, Debug)]
pub enum Delivery {
    /// An event.
    Event(Arc<Event>),
    /// `missed` events were dropped because this reader was slow; the next one has sequence number `next`.
    Gap {
        /// How many.
        missed: u64,
        /// Sequence number of the next event.
        next: u64,
    },
}

/// A subscription. Dropping it ends it. Not tied to the life of the bus' present generation: after a restart it continues, with a gap if any.
pub trait Reader: Send {
    /// The next delivery; `None` after shutdown.
    fn next(&mut self) -> futures::future::BoxFuture<'_, Option<Delivery>>;
}

/// Publishes; answers the sequence number. Never waits for readers.
#[derive(Clone, Debug)]
pub struct Publish {
    /// Namespace.
    pub namespace: String,
    /// Topic.
    pub topic: String,
    /// Payload.
    pub payload: Any,
    /// When; `None` = now.
    pub at: Option<SystemTime>,
}
/// Opens a reader of events whose topic begins with one of `topics` (empty = all).
#[derive(Clone, Debug)]
pub struct Subscribe {
    /// Topic prefixes.
    pub topics: Vec<String>,
}

kernel::messages! { Events = "events" => {
    Publish -> u64,
    Subscribe -> Box<dyn Reader> as idempotent,
} }

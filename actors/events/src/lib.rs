//! `events`: the event bus.
//!
//! Owns: a ring of the last events and their sequence numbers. Talks to: nobody. States: none beside the ring, which outlives generations
//! ([`Bus`], in the arguments). On a crash: readers go on where they were. Spans: each publication is a hop. Limits: [`KEPT`] events; a reader
//! that falls behind gets a gap marker instead of the events it missed. Readers keep a cursor, no queue: a reader that never reads costs nothing.
use futures::future::BoxFuture;
use kernel::{Actor, Cx, Handle, Reply, Result, Routes};
use messages::events::{Delivery, Event, Events, Publish, Reader, Subscribe};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;

/// Events kept for readers: several minutes of a busy node, about 2 MiB.
pub const KEPT: usize = 4096;

/// The ring, shared by all generations.
#[derive(Clone)]
pub struct Bus(Arc<Inner>);

struct Inner {
    ring: Mutex<VecDeque<Arc<Event>>>,
    last: watch::Sender<u64>,
}

impl Default for Bus {
    fn default() -> Self {
        Bus(Arc::new(Inner { ring: Mutex::default(), last: watch::channel(0).0 }))
    }
}

impl Bus {
    fn publish(&self, m: Publish, traceparent: String) -> u64 {
        let mut ring = self.0.ring.lock();
        let seq = *self.0.last.borrow() + 1;
        let at = m.at.unwrap_or_else(SystemTime::now);
        ring.push_back(Arc::new(Event { seq, at, namespace: m.namespace, topic: m.topic, payload: m.payload, traceparent }));
        if ring.len() > KEPT {
            ring.pop_front();
        }
        self.0.last.send_replace(seq);
        seq
    }
}

struct Cursor {
    bus: Bus,
    last: watch::Receiver<u64>,
    next: u64,
    topics: Vec<String>,
}

impl Cursor {
    /// The next delivery that is there already.
    fn look(&mut self) -> Option<Delivery> {
        let ring = self.bus.0.ring.lock();
        let oldest = ring.front()?.seq;
        if self.next < oldest {
            let missed = oldest - self.next;
            self.next = oldest;
            return Some(Delivery::Gap { missed, next: oldest });
        }
        for event in ring.range(((self.next - oldest) as usize).min(ring.len())..) {
            self.next = event.seq + 1;
            if self.topics.is_empty() || self.topics.iter().any(|t| event.topic.starts_with(t)) {
                return Some(Delivery::Event(event.clone()));
            }
        }
        None
    }
}

impl Reader for Cursor {
    fn next(&mut self) -> BoxFuture<'_, Option<Delivery>> {
        Box::pin(async move {
            loop {
                self.last.borrow_and_update();
                if let Some(delivery) = self.look() {
                    return Some(delivery);
                }
                self.last.changed().await.ok()?;
            }
        })
    }
}

/// The actor.
pub struct EventsActor(Bus);

impl Actor for EventsActor {
    type Proto = Events;
    type Args = Bus;
    async fn start(bus: Bus, _: Cx) -> Result<Self> {
        Ok(EventsActor(bus))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Publish>().on::<Subscribe>()
    }
}

impl Handle<Publish> for EventsActor {
    fn handle(&mut self, m: Publish, cx: Cx) -> Reply<u64> {
        Reply::ok(self.0.publish(m, cx.traceparent()))
    }
}

impl Handle<Subscribe> for EventsActor {
    fn handle(&mut self, m: Subscribe, _: Cx) -> Reply<Box<dyn Reader>> {
        let last = self.0.0.last.subscribe();
        let next = *last.borrow() + 1;
        Reply::ok(Box::new(Cursor { bus: self.0.clone(), last, next, topics: m.topics }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use kernel::testing;

    fn event(topic: &str) -> Publish {
        Publish { namespace: "k8s.io".into(), topic: topic.into(), payload: Default::default(), at: None }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_reader_that_sleeps_gets_a_gap_and_blocks_nobody() {
        let system = testing::system(&[testing::spec("events", 0)]).unwrap();
        let bus = system.start::<EventsActor>(Bus::default()).await.unwrap();
        let op = system.root("test", None, None);
        let mut all = bus.call(&op.cx, Subscribe { topics: vec![] }).await.unwrap();
        let mut tasks = bus.call(&op.cx, Subscribe { topics: vec!["/tasks/".into()] }).await.unwrap();
        bus.call(&op.cx, event("/images/create")).await.unwrap();
        bus.call(&op.cx, event("/tasks/exit")).await.unwrap();
        assert!(matches!(tasks.next().await, Some(Delivery::Event(e)) if e.topic == "/tasks/exit" && e.seq == 2));
        for _ in 0..KEPT {
            bus.call(&op.cx, event("/x")).await.unwrap();
        }
        assert!(matches!(all.next().await, Some(Delivery::Gap { missed: 2, next: 3 })));
        assert!(matches!(all.next().await, Some(Delivery::Event(e)) if e.seq == 3));
    }
}

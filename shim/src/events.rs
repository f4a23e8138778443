//! Events to the daemon: a bounded queue, tried again, never waited for.
use proto::events::{Client, Envelope, ForwardRequest};
use proto::prost_types::Any;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// Events that wait at most, as containerd's shims.
const QUEUE: usize = 2048;

/// Sends events.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
}

impl Publisher {
    /// Starts the sender. Without an address events are dropped.
    pub fn start(namespace: &str, address: Option<String>) -> Publisher {
        let (queue, mut events) = mpsc::channel::<Envelope>(QUEUE);
        tokio::spawn(async move {
            let mut client = None;
            while let Some(event) = events.recv().await {
                let Some(address) = &address else { continue };
                for attempt in 0..5u32 {
                    if client.is_none() {
                        client = connect(address).await;
                    }
                    if let Some(c) = &client {
                        let cx = proto::ttrpc::context::with_timeout(5_000_000_000);
                        let request = ForwardRequest { envelope: Some(event.clone()) };
                        if Client::new(Clone::clone(c)).forward(cx, &request).await.is_ok() {
                            break;
                        }
                        client = None;
                    }
                    tokio::time::sleep(Duration::from_millis(100 << attempt)).await;
                }
            }
        });
        Publisher { namespace: namespace.into(), queue }
    }
    /// Queues an event; what does not fit is lost, and the daemon learns of exits by asking.
    pub fn publish(&self, topic: &str, event: Any) {
        let envelope = Envelope {
            timestamp: Some(SystemTime::now().into()),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: Some(event),
        };
        let _ = self.queue.try_send(envelope);
    }
}

async fn connect(address: &str) -> Option<proto::ttrpc::r#async::Client> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    proto::ttrpc::r#async::Client::connect(&format!("unix://{path}")).await.ok()
}

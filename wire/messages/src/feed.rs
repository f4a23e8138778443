//! CRI's container events on their way to readers. Nobody waits for a reader: one that falls behind is told how many events it missed.
use proto::cri::ContainerEventResponse;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::broadcast::{self, error::RecvError};

/// Events kept for a slow reader: more than a node's worth of pods starting at once.
const BEHIND: usize = 1024;
/// Events kept while nobody reads, for the next who does: a kubelet that restarts. Few, because most nodes have no reader at all.
const KEPT: usize = 256;
/// And how long.
const FRESH: Duration = Duration::from_secs(300);

type Event = Arc<ContainerEventResponse>;

/// The feed.
pub struct Feed {
    live: broadcast::Sender<Event>,
    kept: Mutex<VecDeque<(Instant, Event)>>,
    dropped: AtomicU64,
}

impl Default for Feed {
    fn default() -> Self {
        Feed { live: broadcast::channel(BEHIND).0, kept: Mutex::default(), dropped: AtomicU64::new(0) }
    }
}

impl Feed {
    /// Gives an event to all who read, or keeps it for the next.
    pub fn publish(&self, event: ContainerEventResponse) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if self.live.receiver_count() > 0 {
            // The last reader may be going just now: nobody misses what comes after it.
            let _ = self.live.send(Arc::new(event));
            return;
        }
        if kept.len() >= KEPT {
            kept.pop_front();
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        kept.push_back((Instant::now(), Arc::new(event)));
    }
    /// Events from now on, with those that nobody has read before them.
    pub fn subscribe(&self) -> Reader<'_> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let before = kept.len();
        kept.retain(|(at, _)| at.elapsed() < FRESH);
        self.dropped.fetch_add((before - kept.len()) as u64, Ordering::Relaxed);
        Reader { feed: self, first: std::mem::take(&mut *kept).into_iter().map(|(_, e)| e).collect(), live: self.live.subscribe() }
    }
    /// Events that no reader will see, or that one missed.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// A reader.
pub struct Reader<'a> {
    feed: &'a Feed,
    first: VecDeque<Event>,
    live: broadcast::Receiver<Event>,
}

impl Reader<'_> {
    /// The next event, or how many were missed: all that was there for it is given up then, since what follows makes no sense without them.
    /// `None`: there will be no more.
    pub async fn next(&mut self) -> Option<Result<Event, u64>> {
        if let Some(event) = self.first.pop_front() {
            return Some(Ok(event));
        }
        match self.live.recv().await {
            Ok(event) => Some(Ok(event)),
            Err(RecvError::Closed) => None,
            Err(RecvError::Lagged(missed)) => {
                let missed = missed + self.live.len() as u64;
                self.live = self.feed.live.subscribe();
                self.feed.dropped.fetch_add(missed, Ordering::Relaxed);
                Some(Err(missed))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn event(n: usize) -> ContainerEventResponse {
        ContainerEventResponse { container_id: n.to_string(), ..Default::default() }
    }

    #[tokio::test]
    async fn the_first_reader_gets_what_nobody_read_and_all_get_what_follows() {
        let feed = Feed::default();
        (0..KEPT + 10).for_each(|n| feed.publish(event(n)));
        let (mut first, mut second) = (feed.subscribe(), feed.subscribe());
        feed.publish(event(9999));
        for n in 10..KEPT + 10 {
            assert_eq!(first.next().await.unwrap().unwrap().container_id, n.to_string());
        }
        for reader in [&mut first, &mut second] {
            assert_eq!(reader.next().await.unwrap().unwrap().container_id, "9999");
        }
        assert_eq!(feed.dropped(), 10);
    }

    #[tokio::test]
    async fn one_that_does_not_read_is_told_how_many_it_missed() {
        let feed = Feed::default();
        let (mut slow, mut quick) = (feed.subscribe(), feed.subscribe());
        for n in 0..3000 {
            feed.publish(event(n));
            assert_eq!(quick.next().await.unwrap().unwrap().container_id, n.to_string());
        }
        assert_eq!(slow.next().await.unwrap().unwrap_err(), 3000);
        feed.publish(event(5));
        assert_eq!(slow.next().await.unwrap().unwrap().container_id, "5");
        assert_eq!(feed.dropped(), 3000);
    }
}

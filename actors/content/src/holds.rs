//! Who relies on what: names that pulls hold, and the one the collector removes at this moment.
//!
//! A pull that finds a blob relies on it before any record refers to it. So it first holds the name, then looks; the collector first begins a round,
//! then reads the records, and removes a name only if nobody held it since. In whatever order the two meet, either the collector sees the hold,
//! or the pull sees that the blob is gone.
use messages::content::Held;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::Notify;

#[derive(Default)]
struct State {
    held: BTreeMap<String, usize>,
    /// Held at some time since the round began.
    touched: BTreeSet<String>,
    doomed: BTreeSet<String>,
    round: u64,
}

/// All holds, outside of generations.
#[derive(Clone, Default)]
pub(crate) struct Holds {
    state: Arc<Mutex<State>>,
    freed: Arc<Notify>,
}

struct Hold(Holds, Vec<String>);
impl Held for Hold {}
impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        for name in &self.1 {
            if let Some(count) = state.held.get_mut(name) {
                *count -= 1;
                if *count == 0 {
                    state.held.remove(name);
                }
            }
        }
    }
}

struct Doom(Holds, String);
impl Held for Doom {}
impl Drop for Doom {
    fn drop(&mut self) {
        self.0.state.lock().doomed.remove(&self.1);
        self.0.freed.notify_waiters();
    }
}

impl Holds {
    pub async fn hold(&self, names: Vec<String>) -> Box<dyn Held> {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            {
                let mut state = self.state.lock();
                if !names.iter().any(|n| state.doomed.contains(n)) {
                    for name in &names {
                        *state.held.entry(name.clone()).or_default() += 1;
                        state.touched.insert(name.clone());
                    }
                    return Box::new(Hold(self.clone(), names));
                }
            }
            freed.await;
        }
    }
    pub fn begin(&self) -> u64 {
        let mut state = self.state.lock();
        state.round += 1;
        state.touched = state.held.keys().cloned().collect();
        state.round
    }
    pub fn condemn(&self, round: u64, name: String) -> Option<Box<dyn Held>> {
        let mut state = self.state.lock();
        if round != state.round || state.touched.contains(&name) || !state.doomed.insert(name.clone()) {
            return None;
        }
        Some(Box::new(Doom(self.clone(), name)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn what_was_held_since_the_round_began_stays() {
        let holds = Holds::default();
        let names = || vec!["a".to_owned()];
        let before = holds.hold(names()).await;
        let round = holds.begin();
        drop(before);
        assert!(holds.condemn(round, "a".into()).is_none(), "the record that the pull wrote may be newer than what the round has read");
        let round = holds.begin();
        drop(holds.hold(names()).await);
        assert!(holds.condemn(round, "a".into()).is_none());
        let next = holds.begin();
        assert!(holds.condemn(round, "a".into()).is_none(), "an old round");
        let doom = holds.condemn(next, "a".into()).unwrap();
        let waiting = tokio::time::timeout(Duration::from_millis(20), holds.hold(names())).await;
        assert!(waiting.is_err(), "a removal under way is waited for");
        drop(doom);
        drop(tokio::time::timeout(Duration::from_secs(5), holds.hold(names())).await.unwrap());
        assert!(holds.state.lock().held.is_empty());
    }
}

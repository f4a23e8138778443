//! Reading many things of the kernel on its blocking threads, such that one that hangs costs itself alone: it is given up after [`READ`], what stood
//! behind it is read by another thread, and it is not tried again while that read still hangs.
use kernel::{Cx, Result};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// One batch, and so one thing that hangs, takes no longer.
const READ: Duration = Duration::from_secs(2);
/// Things in a batch: few enough to be quick, many enough for a thread to be worth it.
const BATCH: usize = 64;

/// What hangs.
#[derive(Default)]
pub struct Gather {
    stuck: RefCell<HashMap<String, Weak<()>>>,
}

/// A batch as its thread and its waiter see it.
struct Batch<T, R> {
    items: Vec<(String, T)>,
    at: AtomicUsize,
    given_up: AtomicBool,
    done: Mutex<Vec<(String, R)>>,
}

impl Gather {
    /// Reads all; what hangs or panics is left out.
    pub async fn all<T, R>(&self, cx: &Cx, items: Vec<(String, T)>, read: fn(&str, &T) -> R) -> HashMap<String, R>
    where
        T: Clone + Send + Sync + 'static,
        R: Send + 'static,
    {
        self.stuck.borrow_mut().retain(|_, hangs| hangs.strong_count() > 0);
        let stuck = |id: &String| self.stuck.borrow().contains_key(id);
        let mut items = items.into_iter().filter(|(id, _)| !stuck(id));
        let mut batches = vec![];
        loop {
            let batch: Vec<_> = items.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                break;
            }
            batches.push(self.batch(cx, batch, read));
        }
        futures::future::join_all(batches).await.into_iter().flatten().collect()
    }

    async fn batch<T, R>(&self, cx: &Cx, mut items: Vec<(String, T)>, read: fn(&str, &T) -> R) -> Vec<(String, R)>
    where
        T: Clone + Send + Sync + 'static,
        R: Send + 'static,
    {
        let mut all = vec![];
        while !items.is_empty() {
            let batch = Arc::new(Batch { items, at: 0.into(), given_up: false.into(), done: Mutex::new(vec![]) });
            let (mine, token) = (batch.clone(), Arc::new(()));
            let hangs = Arc::downgrade(&token);
            let work = move || -> Result<()> {
                let _hangs = token;
                for (at, (id, item)) in mine.items.iter().enumerate() {
                    mine.at.store(at, Ordering::Release);
                    if mine.given_up.load(Ordering::Acquire) {
                        break;
                    }
                    let read = read(id, item);
                    mine.done.lock().unwrap_or_else(PoisonError::into_inner).push((id.clone(), read));
                }
                Ok(())
            };
            let outcome = cx.blocking("read statistics", READ, work).await;
            batch.given_up.store(true, Ordering::Release);
            all.append(&mut batch.done.lock().unwrap_or_else(PoisonError::into_inner));
            let Err(error) = outcome else { break };
            let at = batch.at.load(Ordering::Acquire);
            tracing::warn!(what = batch.items[at].0, %error, "statistics could not be read; the others are");
            self.stuck.borrow_mut().insert(batch.items[at].0.clone(), hangs);
            // The thread that hangs keeps its list.
            items = batch.items[at + 1..].to_vec();
        }
        all
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kernel::testing;
    use std::time::Instant;

    fn read(id: &str, n: &u32) -> u32 {
        if id == "hangs" {
            std::thread::sleep(Duration::from_secs(6));
        }
        *n * 2
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_that_hangs_costs_itself_alone() {
        let system = testing::system(&[]).unwrap();
        let op = system.root("test", None, None);
        let gather = Gather::default();
        let items = || (0..200).map(|n| (if n == 3 { "hangs".to_owned() } else { n.to_string() }, n)).collect::<Vec<_>>();
        let all = gather.all(&op.cx, items(), read).await;
        assert_eq!((all.len(), all.get("4"), all.get("199")), (199, Some(&8), Some(&398)));
        // It still hangs, and is not waited for again.
        let began = Instant::now();
        assert_eq!(gather.all(&op.cx, items(), read).await.len(), 199);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    }
}

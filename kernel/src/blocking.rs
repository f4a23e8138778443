//! Blocking system calls: on threads of the kernel's own, named, listed, abandoned past their limit.
use crate::cx::Cx;
use crate::{Fault, Result};
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Threads at most that are not abandoned.
const THREADS: usize = 64;
/// An idle thread ends after this.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// A call under way.
#[derive(Clone, Debug, serde::Serialize)]
pub struct BlockingInfo {
    /// Name.
    pub name: &'static str,
    /// Actor.
    pub actor: String,
    /// Age.
    pub age: Duration,
    /// Its caller has given it up.
    pub abandoned: bool,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    running: BTreeMap<u64, (&'static str, Arc<str>, Instant, bool)>,
}

/// The pool.
#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    wake: Condvar,
    next: AtomicU64,
    pub abandoned: AtomicU64,
}

impl Pool {
    pub async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        cx: &Cx,
        name: &'static str,
        limit: Duration,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (tx, rx) = tokio::sync::oneshot::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (pool, actor, inside) = (self.clone(), cx.0.actor.clone(), cx.clone());
        self.submit(Box::new(move || {
            pool.state.lock().running.insert(id, (name, actor, Instant::now(), false));
            let _entered = crate::scope::enter(&inside);
            let result = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| Err(Fault::internal(format!("{name} panicked"))));
            let mut state = pool.state.lock();
            if let Some((.., true)) = state.running.remove(&id) {
                state.threads += 1;
            }
            drop(state);
            let _ = tx.send(result);
        }));
        match tokio::time::timeout(limit, rx).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Fault::internal(format!("{name}: lost"))),
            Err(_) => {
                self.abandon(id);
                Err(Fault::deadline_exceeded(format!("{name} did not return within {limit:?}; its thread is given up")))
            }
        }
    }

    fn abandon(&self, id: u64) {
        let mut state = self.state.lock();
        if let Some(entry) = state.running.get_mut(&id) {
            entry.3 = true;
            // Its place may be taken by a new thread.
            state.threads = state.threads.saturating_sub(1);
            self.abandoned.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn submit(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            self.wake.notify_one();
        } else if state.threads < THREADS {
            state.threads += 1;
            let pool = self.clone();
            if std::thread::Builder::new().name("troupe-block".into()).stack_size(512 << 10).spawn(move || pool.work()).is_err() {
                state.threads -= 1;
            }
        }
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
                if state.threads > THREADS {
                    break;
                }
                continue;
            }
            state.idle += 1;
            let idle = self.wake.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
            if idle && state.jobs.is_empty() {
                break;
            }
        }
        state.threads = state.threads.saturating_sub(1);
    }

    pub fn list(&self) -> Vec<BlockingInfo> {
        let state = self.state.lock();
        state
            .running
            .values()
            .map(|(name, actor, began, abandoned)| BlockingInfo {
                name,
                actor: actor.to_string(),
                age: began.elapsed(),
                abandoned: *abandoned,
            })
            .collect()
    }
}

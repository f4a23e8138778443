//! Blocking system calls: on threads of the kernel's own, named, listed, abandoned past their limit. What may never return gets a thread for itself,
//! so that it takes no place in the pool, and keeps no file of the process open ([`crate::alone`]).
use crate::cx::Cx;
use crate::{Fault, Result};
use parking_lot::{Condvar, Mutex};
use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Threads at most that are not abandoned.
const THREADS: usize = 64;
/// Calls at most that have a thread for themselves.
const ALONE: usize = 256;
/// An idle thread ends after this.
const IDLE: Duration = Duration::from_secs(10);

/// Stack of a thread.
const STACK: usize = 512 << 10;

type Job = Box<dyn FnOnce() + Send>;
type Outcome<T> = tokio::sync::oneshot::Receiver<Result<T>>;

/// A call under way.
#[derive(Clone, Debug, serde::Serialize)]
pub struct BlockingInfo {
    /// Name.
    pub name: String,
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
    running: BTreeMap<u64, Running>,
    alone: usize,
}

/// A call under way.
struct Running {
    name: Cow<'static, str>,
    actor: Arc<str>,
    began: Instant,
    abandoned: bool,
    pooled: bool,
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
        name: Cow<'static, str>,
        limit: Duration,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (id, job, rx) = self.job(cx, name.clone(), true, f);
        self.submit(job);
        self.outcome(id, name, limit, rx).await
    }

    /// On a thread of its own that holds none of the process's files.
    pub async fn run_alone<T: Send + 'static>(
        self: &Arc<Self>,
        cx: &Cx,
        name: Cow<'static, str>,
        limit: Duration,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let apart = || crate::alone::let_go_of_files().map_err(Fault::from).and_then(|()| f());
        let (id, job, rx) = self.job(cx, name.clone(), false, apart);
        self.spawn_alone(job).map_err(|f| f.context(&name))?;
        self.outcome(id, name, limit, rx).await
    }

    /// A call as a job for a thread, its number, and where its result comes.
    fn job<T: Send + 'static>(
        self: &Arc<Self>,
        cx: &Cx,
        name: Cow<'static, str>,
        pooled: bool,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> (u64, Job, Outcome<T>) {
        let (tx, rx) = tokio::sync::oneshot::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (pool, inside) = (self.clone(), cx.clone());
        (id, Box::new(move || pool.perform(id, &inside, name, pooled, f, tx)), rx)
    }

    fn spawn_alone(self: &Arc<Self>, job: Job) -> Result<()> {
        let mut state = self.state.lock();
        if state.alone >= ALONE {
            return Err(Fault::resource_exhausted(format!("{ALONE} calls that may hang are under way already")));
        }
        state.alone += 1;
        drop(state);
        let pool = self.clone();
        let work = move || {
            job();
            pool.state.lock().alone -= 1;
        };
        let spawned = std::thread::Builder::new().name("troupe-alone".into()).stack_size(STACK).spawn(work);
        spawned.map(drop).map_err(|e| {
            self.state.lock().alone -= 1;
            Fault::from(e).context("no thread")
        })
    }

    /// The thread's part.
    fn perform<T>(
        &self,
        id: u64,
        cx: &Cx,
        name: Cow<'static, str>,
        pooled: bool,
        f: impl FnOnce() -> Result<T>,
        tx: tokio::sync::oneshot::Sender<Result<T>>,
    ) {
        if tx.is_closed() {
            // Given up while it waited for a thread: whoever asked was told that it did not happen.
            return;
        }
        let (actor, panicked) = (cx.0.actor.clone(), format!("{name} panicked"));
        self.state.lock().running.insert(id, Running { name, actor, began: Instant::now(), abandoned: false, pooled });
        let _entered = crate::scope::enter(cx);
        let result = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| Err(Fault::internal(panicked)));
        let mut state = self.state.lock();
        if state.running.remove(&id).is_some_and(|r| r.abandoned && r.pooled) {
            state.threads += 1;
        }
        drop(state);
        let _ = tx.send(result);
    }

    /// The caller's part.
    async fn outcome<T>(&self, id: u64, name: Cow<'static, str>, limit: Duration, rx: Outcome<T>) -> Result<T> {
        // Whoever drops the future gives the call up as much as one whose time is over.
        let mut given_up = GivenUp(self, Some(id));
        match tokio::time::timeout(limit, rx).await {
            Ok(result) => {
                given_up.1 = None;
                result.unwrap_or_else(|_| Err(Fault::internal(format!("{name}: lost"))))
            }
            Err(_) => Err(Fault::deadline_exceeded(format!("{name} did not return within {limit:?}; its thread is given up"))),
        }
    }

    fn abandon(&self, id: u64) {
        let mut state = self.state.lock();
        if let Some(entry) = state.running.get_mut(&id) {
            entry.abandoned = true;
            if entry.pooled {
                // Its place may be taken by a new thread.
                state.threads = state.threads.saturating_sub(1);
            }
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
            if std::thread::Builder::new().name("troupe-block".into()).stack_size(STACK).spawn(move || pool.work()).is_err() {
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
            .map(|r| BlockingInfo { name: r.name.to_string(), actor: r.actor.to_string(), age: r.began.elapsed(), abandoned: r.abandoned })
            .collect()
    }
}

/// Gives a call up when it is dropped before the call has ended.
struct GivenUp<'a>(&'a Pool, Option<u64>);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.1 {
            self.0.abandon(id);
        }
    }
}

//! Addresses are names: valid for ever, across restarts. The mailbox and the state of the entry live here, outside of every generation.
use crate::cell::Erased;
use crate::chaos::Rule;
use crate::cx::Cx;
use crate::manifest::Spec;
use crate::{Fault, Message, Protocol, Result, System};
use parking_lot::Mutex;
use std::any::{Any, TypeId};
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{Semaphore, oneshot, watch};

/// A message on its way.
pub(crate) struct Env {
    pub name: &'static str,
    pub type_id: TypeId,
    pub body: Box<dyn Any + Send>,
    pub cx: Cx,
    pub enqueued: Instant,
    pub start: SystemTime,
    pub reply: oneshot::Sender<Result<Erased>>,
    pub chaos: Option<Arc<Rule>>,
    taken: Arc<AtomicU64>,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

/// The bounded mailbox.
pub(crate) struct Queue {
    list: Mutex<VecDeque<Env>>,
    waker: futures::task::AtomicWaker,
    room: Arc<Semaphore>,
}

impl Queue {
    pub fn new(bound: usize) -> Queue {
        Queue { list: Mutex::default(), waker: Default::default(), room: Arc::new(Semaphore::new(bound)) }
    }
    pub fn register(&self, waker: &std::task::Waker) {
        self.waker.register(waker);
    }
    pub fn wake(&self) {
        self.waker.wake();
    }
    pub fn len(&self) -> usize {
        self.list.lock().len()
    }
    pub fn oldest(&self) -> Option<(&'static str, Duration)> {
        self.list.lock().front().map(|e| (e.name, e.enqueued.elapsed()))
    }
    pub fn pop(&self, generation: u64) -> Option<Env> {
        let env = self.list.lock().pop_front()?;
        env.taken.store(generation, Ordering::Release);
        Some(env)
    }
    fn push(&self, env: Env) {
        self.list.lock().push_back(env);
        self.waker.wake();
    }
    pub fn clear(&self) {
        self.list.lock().clear();
    }
}

/// Phase of an actor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting,
    Running,
    /// Waits for its next generation.
    Restarting,
    /// Gave up: why.
    Down(String),
    Gone,
}

/// One name in the system.
pub(crate) struct Entry {
    pub name: Arc<str>,
    pub spec: Spec,
    pub queue: Queue,
    pub generation: AtomicU64,
    pub stopping: AtomicBool,
    pub phase: watch::Sender<(u64, Phase)>,
    pub last_crash: Mutex<String>,
    /// The last crash in full: where, the messages before it, the backtrace.
    pub report: Mutex<String>,
    /// Names and traces of the last messages taken.
    recent: Mutex<VecDeque<(&'static str, u128)>>,
    pub restarts: AtomicU64,
    pub handled: AtomicU64,
    pub queue_wait: prometheus::Histogram,
    pub handle_time: prometheus::Histogram,
}

/// Messages kept for a crash report.
const RECENT: usize = 8;

impl Entry {
    pub fn new(name: Arc<str>, spec: Spec, queue_wait: prometheus::Histogram, handle_time: prometheus::Histogram) -> Entry {
        Entry {
            queue: Queue::new(spec.mailbox),
            name,
            spec,
            generation: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            phase: watch::channel((0, Phase::Starting)).0,
            last_crash: Mutex::default(),
            report: Mutex::default(),
            recent: Mutex::default(),
            restarts: AtomicU64::new(0),
            handled: AtomicU64::new(0),
            queue_wait,
            handle_time,
        }
    }
    /// Notes a message that is taken.
    pub fn took(&self, message: &'static str, trace: u128) {
        let mut recent = self.recent.lock();
        if recent.len() >= RECENT {
            recent.pop_front();
        }
        recent.push_back((message, trace));
    }
    /// The last messages, oldest first.
    pub fn recent(&self) -> Vec<String> {
        self.recent.lock().iter().map(|(message, trace)| format!("{message} (trace {trace:032x})")).collect()
    }
    pub fn running(&self) {
        self.phase.send_modify(|p| p.1 = Phase::Running);
    }
    pub fn observe(&self, waited: Duration, handled: Duration) {
        self.handled.fetch_add(1, Ordering::Relaxed);
        self.queue_wait.observe(waited.as_secs_f64());
        self.handle_time.observe(handled.as_secs_f64());
    }
    fn lost(&self, generation: u64, message: &str) -> Fault {
        let why = self.last_crash.lock().clone();
        Fault::unavailable(format!("{} generation {generation} died while it handled {message}: {why}", self.name))
    }
}

/// Address of the actor that speaks `P`.
pub struct Addr<P: Protocol> {
    pub(crate) system: System,
    pub(crate) name: Arc<str>,
    pub(crate) _p: PhantomData<fn(P)>,
}
impl<P: Protocol> Clone for Addr<P> {
    fn clone(&self) -> Self {
        Addr { system: self.system.clone(), name: self.name.clone(), _p: PhantomData }
    }
}

impl<P: Protocol> Addr<P> {
    /// Name of the actor.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Sends a request and waits for its answer. Fails with `Unavailable` if the generation that took it died (after one redelivery if the message
    /// is idempotent) or the actor is down, `DeadlineExceeded`, `ResourceExhausted` (mailbox full, outside requests), `FailedPrecondition` (uphill).
    pub async fn call<M: Message<To = P>>(&self, cx: &Cx, m: M) -> Result<M::Reply> {
        let Some(entry) = self.system.entry(&self.name) else {
            return Err(Fault::not_found(format!("there is no actor {}", self.name)));
        };
        self.system.may_call(cx, &entry)?;
        let deadline = cx.deadline().unwrap_or_else(|| Instant::now() + entry.spec.deadline);
        let _waits = cx.0.op.calls(format!("{} {}", entry.name, M::NAME));
        let limit = tokio::time::sleep_until(deadline.into());
        tokio::select! {
            r = self.exchange(cx, &entry, m) => r,
            () = limit => Err(Fault::deadline_exceeded(format!("{} of {} did not answer in time", M::NAME, entry.name))),
        }
    }

    async fn exchange<M: Message<To = P>>(&self, cx: &Cx, entry: &Arc<Entry>, m: M) -> Result<M::Reply> {
        let spare = m.again();
        match self.deliver(cx, entry, m).await {
            Err((fault, true)) => match spare {
                Some(again) => self.deliver(cx, entry, again).await.map_err(|(f, _)| f),
                None => Err(fault),
            },
            other => other.map_err(|(f, _)| f),
        }
    }

    /// One delivery. The flag of the error says that the receiving generation died.
    async fn deliver<M: Message<To = P>>(&self, cx: &Cx, entry: &Arc<Entry>, m: M) -> Result<M::Reply, (Fault, bool)> {
        let mut phase = entry.phase.subscribe();
        match &phase.borrow().1 {
            Phase::Down(why) => return Err((Fault::unavailable(format!("{} is down: {why}", entry.name)), false)),
            // Nobody takes anything from its mailbox any more.
            Phase::Gone => return Err((Fault::unavailable(format!("{} was stopped", entry.name)), false)),
            _ => {}
        }
        let chaos = self.system.chaos().hit(entry.spec.name, M::NAME);
        if let Some(rule) = &chaos {
            rule.before(M::NAME).await.map_err(|f| (f, false))?;
        }
        let twin = chaos.as_ref().filter(|c| c.fault == crate::chaos::FaultKind::Duplicate).and_then(|_| m.again());
        let permit = match entry.queue.room.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) if cx.0.layer == u8::MAX => {
                return Err((Fault::resource_exhausted(format!("the mailbox of {} is full", entry.name)), false));
            }
            Err(_) => entry.queue.room.clone().acquire_owned().await.map_err(|_| (Fault::unavailable("shutting down"), false))?,
        };
        let (reply, mut answer) = oneshot::channel();
        let taken = Arc::new(AtomicU64::new(0));
        entry.queue.push(Env {
            name: M::NAME,
            type_id: TypeId::of::<M>(),
            body: Box::new(m),
            cx: cx.clone(),
            enqueued: Instant::now(),
            start: SystemTime::now(),
            reply,
            chaos,
            taken: taken.clone(),
            _permit: permit,
        });
        if let Some(twin) = twin
            && let Ok(permit) = entry.queue.room.clone().try_acquire_owned()
        {
            // Nobody waits for the second answer.
            let (reply, _) = oneshot::channel();
            entry.queue.push(Env {
                name: M::NAME,
                type_id: TypeId::of::<M>(),
                body: Box::new(twin),
                cx: cx.clone(),
                enqueued: Instant::now(),
                start: SystemTime::now(),
                reply,
                chaos: None,
                taken: Arc::default(),
                _permit: permit,
            });
        }
        loop {
            tokio::select! {
                biased;
                result = &mut answer => {
                    return match result {
                        Ok(Ok(value)) => value.downcast::<M::Reply>().map(|v| *v).map_err(|_| (Fault::internal(format!("{}: answer of another type", M::NAME)), false)),
                        Ok(Err(fault)) => Err((fault, false)),
                        Err(_) => {
                            let generation = taken.load(Ordering::Acquire);
                            self.settled(entry, generation).await;
                            Err((entry.lost(generation, M::NAME), true))
                        }
                    };
                }
                changed = phase.changed() => {
                    let now = phase.borrow_and_update().clone();
                    let generation = taken.load(Ordering::Acquire);
                    if changed.is_err() || now.1 == Phase::Gone {
                        return Err((Fault::unavailable(format!("{} was stopped", entry.name)), false));
                    }
                    if let Phase::Down(why) = now.1 {
                        return Err((Fault::unavailable(format!("{} is down: {why}", entry.name)), false));
                    }
                    if generation != 0 && generation < now.0 {
                        return Err((entry.lost(generation, M::NAME), true));
                    }
                }
            }
        }
    }

    /// Waits a moment until the supervisor has taken note of the crash, so that the reason can be told.
    async fn settled(&self, entry: &Arc<Entry>, generation: u64) {
        let mut phase = entry.phase.subscribe();
        let noted = phase.wait_for(|p| p.0 > generation || matches!(p.1, Phase::Down(_) | Phase::Gone | Phase::Restarting));
        let _ = tokio::time::timeout(Duration::from_millis(500), noted).await;
    }
}

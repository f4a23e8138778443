//! The system: names, threads, supervision, watchdog, operations.
use crate::addr::{Addr, Entry, Phase};
use crate::blocking::{BlockingInfo, Pool};
use crate::cell::{self, End};
use crate::chaos::Chaos;
use crate::cx::{Cx, Inner as CxInner, random};
use crate::manifest::{Isolation, Manifest, Restart, Strategy};
use crate::metrics::Metrics;
use crate::operation::{Now, Op, OpInfo, Operation, new_trace, parse_traceparent};
use crate::recorder::{Recorder, SpanRecord};
use crate::thread::Home;
use crate::{Actor, Fault, Protocol, Result};
use dashmap::DashMap;
use parking_lot::Mutex;
use std::borrow::Cow;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

/// How to boot.
#[derive(Clone, Debug)]
pub struct Options {
    /// Shared threads.
    pub threads: usize,
    /// Spans in the flight recorder.
    pub recorder_spans: usize,
    /// Period of the watchdog.
    pub watchdog_period: Duration,
    /// Allow fault injection.
    pub chaos_enabled: bool,
    /// Seed, 0 = random.
    pub chaos_seed: u64,
    /// Restarts within an actor's period before it is put down, instead of the manifest's.
    pub max_restarts: Option<u32>,
}
impl Default for Options {
    fn default() -> Self {
        Options {
            threads: 2,
            recorder_spans: 16384,
            watchdog_period: Duration::from_secs(1),
            chaos_enabled: false,
            chaos_seed: 0,
            max_restarts: None,
        }
    }
}

/// A system of actors.
#[derive(Clone)]
pub struct System(Arc<Inner>);

struct Inner {
    manifest: Manifest,
    entries: DashMap<Arc<str>, Arc<Entry>>,
    ops: Arc<DashMap<u64, Weak<Op>>>,
    next_op: AtomicU64,
    recorder: Recorder,
    chaos: Chaos,
    metrics: Metrics,
    pool: Arc<Pool>,
    homes: Mutex<Vec<Arc<Home>>>,
    where_: DashMap<Arc<str>, Arc<Home>>,
    leaked: Mutex<Vec<String>>,
    runtime: tokio::runtime::Handle,
    next_home: AtomicU64,
    down: AtomicBool,
    max_restarts: Option<u32>,
    watches: std::sync::OnceLock<HashMap<&'static str, Vec<SpanWatch>>>,
}

/// Is told of a span: how long it took, and whether it went well. Runs where the span ended, so it must be quick.
pub type SpanWatch = Box<dyn Fn(Duration, bool) + Send + Sync>;

/// An actor, for `troupe actors`.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ActorInfo {
    /// Name.
    pub name: String,
    /// Layer.
    pub layer: u8,
    /// starting, running, restarting, down.
    pub state: String,
    /// Generation.
    pub generation: u64,
    /// Restarts.
    pub restarts: u64,
    /// Messages waiting.
    pub mailbox: usize,
    /// Bound.
    pub mailbox_bound: usize,
    /// Oldest waiting message and its age.
    pub oldest: Option<(String, Duration)>,
    /// Messages handled.
    pub handled: u64,
    /// Text of the last crash.
    pub last_crash: String,
    /// The last crash in full: where, the messages before it, the backtrace.
    pub crash_report: String,
    /// Thread.
    pub thread: String,
}

/// Health.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Health {
    /// `ok` or `degraded`.
    pub status: &'static str,
    /// Why.
    pub reasons: Vec<String>,
}

/// An actor that is down gets another chance after so many of its periods: what made it crash may have passed, and nobody should have to restart a node's
/// daemon at night for one actor.
const REST: u32 = 3;

/// Waits; `false` if the actor is to end meanwhile.
async fn rest(entry: &Entry, pause: Duration) -> bool {
    let until = Instant::now() + pause;
    while Instant::now() < until {
        if entry.stopping.load(Ordering::Acquire) {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    true
}

impl System {
    /// Boots an empty system on the tokio runtime that runs this.
    pub fn boot(manifest: Manifest, options: Options) -> Result<System> {
        manifest.check()?;
        let mut homes = Vec::new();
        for n in 0..options.threads.max(1) {
            homes.push(Home::start(format!("troupe-{n}"))?);
        }
        let chaos = Chaos::new(options.chaos_enabled, options.chaos_seed);
        let system = System(Arc::new(Inner {
            manifest,
            entries: DashMap::new(),
            ops: Arc::default(),
            next_op: AtomicU64::new(1),
            watches: Default::default(),
            recorder: Recorder::new(options.recorder_spans),
            chaos,
            metrics: Metrics::new()?,
            pool: Arc::default(),
            homes: Mutex::new(homes),
            where_: DashMap::new(),
            leaked: Mutex::default(),
            runtime: tokio::runtime::Handle::current(),
            next_home: AtomicU64::new(0),
            down: AtomicBool::new(false),
            max_restarts: options.max_restarts,
        }));
        crate::crash::install();
        system.0.metrics.watch(&system)?;
        let watch = Arc::downgrade(&system.0);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(options.watchdog_period).await;
                let Some(inner) = watch.upgrade() else { return };
                System(inner).look(options.watchdog_period);
            }
        });
        Ok(system)
    }

    /// Tells others of calls, hops and steps by their names. Once, by whoever composes the system; later calls change nothing.
    pub fn watch_spans(&self, watches: Vec<(&'static str, SpanWatch)>) {
        let mut by_name: HashMap<&'static str, Vec<SpanWatch>> = HashMap::new();
        for (name, watch) in watches {
            by_name.entry(name).or_default().push(watch);
        }
        let _ = self.0.watches.set(by_name);
    }
    pub(crate) fn span_ended(&self, name: &str, took: Duration, ok: bool) {
        let watches = self.0.watches.get().and_then(|w| w.get(name));
        watches.into_iter().flatten().for_each(|watch| watch(took, ok));
    }
    pub(crate) fn recorder(&self) -> &Recorder {
        &self.0.recorder
    }
    pub(crate) fn blocking_pool(&self) -> &Arc<Pool> {
        &self.0.pool
    }
    pub(crate) fn entry(&self, name: &str) -> Option<Arc<Entry>> {
        self.0.entries.get(name).map(|e| e.clone())
    }
    /// The downhill rule, and the manifest's list of callees.
    pub(crate) fn may_call(&self, cx: &Cx, to: &Entry) -> Result<()> {
        let from = &cx.0;
        if from.layer == u8::MAX {
            return Ok(());
        }
        if from.layer > to.spec.layer {
            if from.calls.is_empty() || from.calls.contains(&to.spec.name) {
                return Ok(());
            }
            return Err(Fault::failed_precondition(format!("{} may not call {}: the manifest does not say so", from.actor, to.name)));
        }
        Err(Fault::failed_precondition(format!(
            "{} (layer {}) may not call {} (layer {}): requests go downhill",
            from.actor, from.layer, to.name, to.spec.layer
        )))
    }
    /// Address of an actor.
    pub fn addr<P: Protocol>(&self) -> Addr<P> {
        Addr { system: self.clone(), name: P::ACTOR.into(), _p: PhantomData }
    }
    /// Address of a child.
    pub fn child<P: Protocol>(&self, id: &str) -> Addr<P> {
        Addr { system: self.clone(), name: format!("{}/{id}", P::ACTOR).into(), _p: PhantomData }
    }
    /// Starts a declared actor; answers when its first generation runs (or failed to start: it is tried again in the background).
    pub async fn start<A: Actor>(&self, args: A::Args) -> Result<Addr<A::Proto>> {
        self.launch::<A>(A::Proto::ACTOR.into(), args).await?;
        Ok(self.addr())
    }
    /// Starts a child. `AlreadyExists` if it lives.
    pub async fn spawn_child<A: Actor>(&self, id: &str, args: A::Args) -> Result<Addr<A::Proto>> {
        self.launch::<A>(format!("{}/{id}", A::Proto::ACTOR).into(), args).await?;
        Ok(self.child(id))
    }
    /// The same without waiting for its first generation: it has its name and its mailbox at once. For many children at a time.
    pub fn spawn_child_soon<A: Actor>(&self, id: &str, args: A::Args) -> Result<Addr<A::Proto>> {
        self.register::<A>(format!("{}/{id}", A::Proto::ACTOR).into(), args)?;
        Ok(self.child(id))
    }
    /// Ends a child after what it has in its mailbox.
    pub async fn stop_child<P: Protocol>(&self, id: &str) {
        self.stop(&format!("{}/{id}", P::ACTOR)).await;
    }
    async fn stop(&self, name: &str) {
        let Some(entry) = self.entry(name) else { return };
        entry.stopping.store(true, Ordering::Release);
        entry.queue.wake();
        let mut phase = entry.phase.subscribe();
        let gone = phase.wait_for(|p| matches!(p.1, Phase::Gone | Phase::Down(_)));
        let _ = tokio::time::timeout(Duration::from_secs(5), gone).await;
        self.0.entries.remove(name);
    }
    /// Ends everything, top layer first.
    pub async fn shutdown(&self, limit: Duration) {
        self.0.down.store(true, Ordering::Release);
        let mut all: Vec<(u8, Arc<str>)> = self.0.entries.iter().map(|e| (e.spec.layer, e.name.clone())).collect();
        all.sort_by_key(|(layer, _)| std::cmp::Reverse(*layer));
        let _ = tokio::time::timeout(limit, async {
            for (_, name) in all {
                self.stop(&name).await;
            }
        })
        .await;
    }

    async fn launch<A: Actor>(&self, name: Arc<str>, args: A::Args) -> Result<()> {
        let mut phase = self.register::<A>(name, args)?;
        let started = phase.wait_for(|p| !matches!(p.1, Phase::Starting));
        let _ = tokio::time::timeout(Duration::from_secs(10), started).await;
        Ok(())
    }

    /// Gives the actor its name and its supervisor.
    fn register<A: Actor>(&self, name: Arc<str>, args: A::Args) -> Result<tokio::sync::watch::Receiver<(u64, Phase)>> {
        let template = A::Proto::ACTOR;
        let spec = *self.0.manifest.find(template).ok_or_else(|| Fault::invalid_argument(format!("{template} is not in the manifest")))?;
        let metrics = &self.0.metrics;
        let (waits, handles) = (metrics.queue_wait.with_label_values(&[template]), metrics.handle.with_label_values(&[template]));
        let entry = Arc::new(Entry::new(name.clone(), spec, waits, handles));
        match self.0.entries.entry(name) {
            dashmap::Entry::Occupied(e) => return Err(Fault::already_exists(format!("actor {} lives", e.key()))),
            dashmap::Entry::Vacant(v) => {
                v.insert(entry.clone());
            }
        }
        let phase = entry.phase.subscribe();
        let (system, supervised) = (self.clone(), entry.clone());
        self.0.runtime.spawn(async move { system.supervise::<A>(supervised, args).await });
        Ok(phase)
    }

    /// The life of one name: generation after generation. Waits only for the end of a generation, never for an answer.
    async fn supervise<A: Actor>(self, entry: Arc<Entry>, args: A::Args) {
        let mut crashes: Vec<Instant> = Vec::new();
        loop {
            let generation = entry.generation.fetch_add(1, Ordering::AcqRel) + 1;
            entry.phase.send_modify(|p| *p = (generation, if generation == 1 { Phase::Starting } else { Phase::Restarting }));
            let end = self.generation::<A>(&entry, generation, args.clone()).await;
            let (crash, trace) = match end {
                End::Stopped => break,
                End::Crash(text, trace) => (text, trace),
                End::Replaced if entry.stopping.load(Ordering::Acquire) => break,
                End::Replaced => {
                    entry.restarts.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
            };
            let messages = entry.recent();
            tracing::error!(actor = %entry.name, generation, crash, at = trace.location, ?messages, "actor crashed");
            *entry.report.lock() = format!("{crash}\nat {}\nlast messages: {}", trace.location, messages.join(", "));
            let (reported, told) = (entry.clone(), crash.clone());
            // Nobody waits for the frames' names.
            self.0.runtime.spawn_blocking(move || {
                let backtrace = trace.backtrace();
                if !backtrace.is_empty() {
                    tracing::error!(actor = %reported.name, generation, crash = told, backtrace, "backtrace of a crash");
                    let mut report = reported.report.lock();
                    report.push('\n');
                    report.push_str(&backtrace);
                }
            });
            *entry.last_crash.lock() = crash.clone();
            if entry.stopping.load(Ordering::Acquire) || entry.spec.restart == Restart::Temporary {
                break;
            }
            entry.restarts.fetch_add(1, Ordering::Relaxed);
            self.0.metrics.restarts.with_label_values(&[entry.spec.name, if crash == "hung" { "hung" } else { "panic" }]).inc();
            let (most, period) = entry.spec.intensity;
            let most = self.0.max_restarts.unwrap_or(most);
            crashes.retain(|c| c.elapsed() < period);
            crashes.push(Instant::now());
            if crashes.len() > most as usize {
                let why = format!("{} restarts within {period:?}; last: {crash}", crashes.len());
                tracing::error!(actor = %entry.name, why, "actor is down");
                entry.phase.send_modify(|p| p.1 = Phase::Down(why));
                entry.generation.fetch_add(1, Ordering::AcqRel);
                entry.queue.clear();
                if !rest(&entry, period * REST).await {
                    break;
                }
                // One chance: a crash within the period puts it down again at once.
                crashes = vec![Instant::now(); most as usize];
                entry.restarts.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(actor = %entry.name, "actor is given another chance");
                continue;
            }
            entry.phase.send_modify(|p| p.1 = Phase::Restarting);
            if entry.spec.strategy == Strategy::RestForOne {
                self.restart_dependants(&entry);
            }
            let backoff = Duration::from_millis(if crashes.len() <= 1 { 0 } else { 10 << crashes.len().min(8) });
            tokio::time::sleep(backoff).await;
        }
        entry.phase.send_modify(|p| p.1 = Phase::Gone);
        entry.queue.clear();
        self.0.entries.remove_if(&entry.name, |_, e| Arc::ptr_eq(e, &entry));
        self.0.where_.remove(&entry.name);
    }

    fn restart_dependants(&self, entry: &Entry) {
        for other in self.0.entries.iter() {
            if other.spec.calls.contains(&entry.spec.name) {
                self.replace(&other, &format!("restarted with {}, which it depends on", entry.name));
            }
        }
    }

    /// Makes the present generation end by itself at its next turn.
    fn replace(&self, entry: &Entry, why: &str) {
        *entry.last_crash.lock() = why.to_owned();
        entry.generation.fetch_add(1, Ordering::AcqRel);
        entry.queue.wake();
    }

    async fn generation<A: Actor>(&self, entry: &Arc<Entry>, generation: u64, args: A::Args) -> End {
        let home = match self.home(entry) {
            Ok(home) => home,
            Err(e) => return End::Crash(format!("no thread: {e}"), Default::default()),
        };
        self.0.where_.insert(entry.name.clone(), home.clone());
        let (done, mut ended) = tokio::sync::oneshot::channel();
        let op = self.open_op("actor", entry.name.clone(), 0);
        let cx = Cx(Arc::new(CxInner {
            system: self.clone(),
            trace: new_trace(),
            span: random(),
            deadline: None,
            op,
            actor: entry.name.clone(),
            generation,
            layer: entry.spec.layer,
            calls: entry.spec.calls,
            attrs: Mutex::default(),
        }));
        self.0.ops.remove(&cx.op_id());
        let hosted = entry.clone();
        home.run(move || cell::host::<A>(hosted, generation, args, cx, done));
        loop {
            tokio::select! {
                end = &mut ended => return end.unwrap_or_else(|_| End::Crash("its thread ended".into(), Default::default())),
                () = tokio::time::sleep(Duration::from_millis(100)) => {
                    if home.leaked.load(Ordering::Acquire) {
                        return End::Crash("hung".into(), Default::default());
                    }
                }
            }
        }
    }

    fn home(&self, entry: &Entry) -> Result<Arc<Home>> {
        if entry.spec.isolation == Isolation::Own {
            return Ok(Home::start(format!("troupe-{}", entry.spec.name))?);
        }
        let mut homes = self.0.homes.lock();
        homes.retain(|h| !h.leaked.load(Ordering::Acquire));
        if homes.is_empty() {
            homes.push(Home::start(format!("troupe-{}", self.0.next_home.load(Ordering::Relaxed)))?);
        }
        let next = self.0.next_home.fetch_add(1, Ordering::Relaxed) as usize;
        Ok(homes[next % homes.len()].clone())
    }

    /// One look of the watchdog.
    fn look(&self, period: Duration) {
        let mut homes: Vec<Arc<Home>> = self.0.homes.lock().clone();
        for e in self.0.where_.iter() {
            if !homes.iter().any(|h| Arc::ptr_eq(h, e.value())) {
                homes.push(e.value().clone());
            }
        }
        for home in homes {
            if home.leaked.load(Ordering::Acquire) || home.silence_ms() < period.as_millis() as u64 {
                continue;
            }
            home.leaked.store(true, Ordering::Release);
            let living: Vec<String> = self.0.where_.iter().filter(|e| Arc::ptr_eq(e.value(), &home)).map(|e| e.key().to_string()).collect();
            tracing::error!(thread = home.name, actors = ?living, "a thread stopped answering and is given up");
            self.0.leaked.lock().push(format!("{}: {}", home.name, living.join(", ")));
            let mut pool = self.0.homes.lock();
            if let Some(slot) = pool.iter_mut().find(|h| Arc::ptr_eq(h, &home))
                && let Ok(fresh) = Home::start(format!("{}'", home.name))
            {
                *slot = fresh;
            }
        }
    }

    pub(crate) fn open_op(&self, name: impl Into<Cow<'static, str>>, actor: Arc<str>, trace: u128) -> Arc<Op> {
        let id = self.0.next_op.fetch_add(1, Ordering::Relaxed);
        let op = Arc::new(Op {
            id,
            name: name.into(),
            actor,
            began: Instant::now(),
            now: Mutex::new(Now::of(trace)),
            table: Arc::downgrade(&self.0.ops),
            over: Default::default(),
        });
        self.0.ops.insert(id, Arc::downgrade(&op));
        op
    }
    /// An outside request.
    pub fn root(&self, name: impl Into<Cow<'static, str>>, parent: Option<&str>, timeout: Option<Duration>) -> Operation {
        let name = name.into();
        let (trace, parent) = parent.and_then(parse_traceparent).unwrap_or_else(|| (new_trace(), 0));
        let op = self.open_op(name.clone(), "-".into(), trace);
        let cx = Cx(Arc::new(CxInner {
            system: self.clone(),
            trace,
            span: random(),
            deadline: timeout.map(|t| Instant::now() + t),
            op,
            actor: "-".into(),
            generation: 0,
            layer: u8::MAX,
            calls: &[],
            attrs: Mutex::default(),
        }));
        Operation { cx, name, parent, start: SystemTime::now(), began: Instant::now(), done: false }
    }
    /// Metrics.
    pub fn metrics(&self) -> &prometheus::Registry {
        &self.0.metrics.registry
    }
    /// Fault injection.
    pub fn chaos(&self) -> &Chaos {
        &self.0.chaos
    }
    /// The actors.
    pub fn actors(&self) -> Vec<ActorInfo> {
        let mut all: Vec<ActorInfo> = self
            .0
            .entries
            .iter()
            .map(|e| {
                let (generation, phase) = e.phase.borrow().clone();
                ActorInfo {
                    name: e.name.to_string(),
                    layer: e.spec.layer,
                    state: match &phase {
                        Phase::Starting => "starting".into(),
                        Phase::Running => "running".into(),
                        Phase::Restarting => "restarting".into(),
                        Phase::Down(_) => "down".into(),
                        Phase::Gone => "gone".into(),
                    },
                    generation,
                    restarts: e.restarts.load(Ordering::Relaxed),
                    mailbox: e.queue.len(),
                    mailbox_bound: e.spec.mailbox,
                    oldest: e.queue.oldest().map(|(n, a)| (n.to_owned(), a)),
                    handled: e.handled.load(Ordering::Relaxed),
                    last_crash: e.last_crash.lock().clone(),
                    crash_report: e.report.lock().clone(),
                    thread: self.0.where_.get(&e.name).map(|h| h.name.clone()).unwrap_or_default(),
                }
            })
            .collect();
        all.sort_by(|a, b| (a.layer, &a.name).cmp(&(b.layer, &b.name)));
        all
    }
    /// Operations under way.
    pub fn ops(&self) -> Vec<OpInfo> {
        let mut all: Vec<OpInfo> = self
            .0
            .ops
            .iter()
            .filter_map(|e| e.value().upgrade())
            .map(|op| {
                let now = op.now.lock();
                OpInfo {
                    id: op.id,
                    name: op.name.to_string(),
                    actor: op.actor.to_string(),
                    step: now.step().to_owned(),
                    waiting_on: now.waiting_on().to_owned(),
                    trace_id: format!("{:032x}", now.trace),
                    age: op.began.elapsed(),
                }
            })
            .collect();
        all.sort_by_key(|o| o.id);
        all
    }
    /// For what must not keep the system alive.
    pub(crate) fn downgrade(&self) -> impl Fn() -> Option<System> + Send + Sync + use<> {
        let weak = Arc::downgrade(&self.0);
        move || weak.upgrade().map(System)
    }
    /// Blocking calls that were given up, ever.
    pub(crate) fn blocking_abandoned(&self) -> u64 {
        self.0.pool.abandoned.load(Ordering::Relaxed)
    }
    /// Spans that the exporter had no room for.
    pub(crate) fn telemetry_dropped(&self) -> u64 {
        self.0.recorder.dropped.load(Ordering::Relaxed)
    }
    /// Blocking calls under way.
    pub fn blocking_calls(&self) -> Vec<BlockingInfo> {
        self.0.pool.list()
    }
    /// Threads that were given up.
    pub fn leaked_threads(&self) -> Vec<String> {
        self.0.leaked.lock().clone()
    }
    /// Spans of a trace.
    pub fn trace(&self, id: &str) -> Vec<SpanRecord> {
        self.0.recorder.trace(id)
    }
    /// The latest outside requests.
    pub fn recent_roots(&self, n: usize) -> Vec<SpanRecord> {
        self.0.recorder.roots(n)
    }
    /// Where finished spans go besides; bounded: what does not fit is dropped and counted.
    pub fn export_spans(&self, to: std::sync::mpsc::SyncSender<SpanRecord>) {
        self.0.recorder.export_to(to);
    }
    /// Health.
    pub fn health(&self) -> Health {
        let mut reasons: Vec<String> = self
            .0
            .entries
            .iter()
            .filter_map(|e| if let Phase::Down(why) = &e.phase.borrow().1 { Some(format!("{} is down: {why}", e.name)) } else { None })
            .collect();
        reasons.extend(self.0.leaked.lock().iter().map(|l| format!("thread given up: {l}")));
        Health { status: if reasons.is_empty() { "ok" } else { "degraded" }, reasons }
    }
}

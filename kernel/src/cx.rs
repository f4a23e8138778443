//! The context that travels with every piece of work: trace, deadline, operation, and who is doing it.
use crate::operation::Op;
use crate::recorder::{More, Raw, SpanKind, nanos};
use crate::scope::Scoped;
use crate::{Fault, Result, System};
use parking_lot::Mutex;
use std::borrow::Cow;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Context of the work at hand. Cheap to clone.
#[derive(Clone)]
pub struct Cx(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub system: System,
    pub trace: u128,
    pub span: u64,
    pub deadline: Option<Instant>,
    pub op: Arc<Op>,
    pub actor: Arc<str>,
    pub generation: u64,
    pub layer: u8,
    /// Whom the actor may call; empty = whoever is below it.
    pub calls: &'static [&'static str],
    pub attrs: Mutex<Vec<(String, String)>>,
}

pub(crate) fn random() -> u64 {
    use std::cell::Cell;
    use std::hash::{BuildHasher, Hasher};
    thread_local! { static STATE: Cell<u64> = Cell::new(std::collections::hash_map::RandomState::new().build_hasher().finish() | 1) }
    STATE.with(|s| {
        // xorshift64*: ids need to be unlike, not secret.
        let mut x = s.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        s.set(x);
        x.wrapping_mul(0x2545_F491_4F6C_DD1D).max(1)
    })
}

/// A step of a future that may be dropped.
struct Step<'a>(&'a Cx);

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.0.0.op.step_done(self.0.0.span, false);
    }
}

impl Cx {
    pub(crate) fn derive(&self, change: impl FnOnce(&mut Inner)) -> Cx {
        let i = &self.0;
        let mut inner = Inner {
            system: i.system.clone(),
            trace: i.trace,
            span: i.span,
            deadline: i.deadline,
            op: i.op.clone(),
            actor: i.actor.clone(),
            generation: i.generation,
            layer: i.layer,
            calls: i.calls,
            attrs: Mutex::default(),
        };
        change(&mut inner);
        Cx(Arc::new(inner))
    }
    /// 32 hex digits.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.0.trace)
    }
    /// 16 hex digits of the current span.
    pub fn span_id(&self) -> String {
        format!("{:016x}", self.0.span)
    }
    /// W3C `traceparent` of the current span.
    pub fn traceparent(&self) -> String {
        format!("00-{:032x}-{:016x}-01", self.0.trace, self.0.span)
    }
    /// When the work must be done.
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline
    }
    /// Time left.
    pub fn remaining(&self) -> Option<Duration> {
        self.0.deadline.map(|d| d.saturating_duration_since(Instant::now()))
    }
    /// The same context with a deadline that is not later than the present one.
    pub fn with_timeout(&self, limit: Duration) -> Cx {
        let end = Instant::now() + limit;
        self.derive(|i| i.deadline = Some(i.deadline.map_or(end, |d| d.min(end))))
    }
    /// For clean-up that must finish.
    pub fn without_deadline(&self) -> Cx {
        self.derive(|i| i.deadline = None)
    }
    /// Done when nobody waits for the outside request any more: it was answered, or its caller went away. Work goes on regardless; whoever does
    /// something for the caller alone, such as running a command, looks here. Never done for background operations.
    pub async fn caller_gone(&self) {
        self.0.op.ended().await;
    }
    /// Id of the operation.
    pub fn op_id(&self) -> u64 {
        self.0.op.id
    }
    /// The actor that does the work.
    pub fn actor(&self) -> &str {
        &self.0.actor
    }
    /// Its generation.
    pub fn generation(&self) -> u64 {
        self.0.generation
    }
    /// The system.
    pub fn system(&self) -> &System {
        &self.0.system
    }
    /// Sets the operation's current step without a span of its own (progress texts). It is over with the span that it is set in.
    pub fn step(&self, step: impl Into<Cow<'static, str>>) {
        self.0.op.step(self.0.span, step.into());
    }
    /// An attribute of the current span.
    pub fn attr(&self, key: &'static str, value: impl std::fmt::Display) {
        self.0.attrs.lock().push((key.to_owned(), value.to_string()));
    }
    /// Polls a future as work of this context, so that its log lines carry trace and span.
    pub fn scope<F: Future>(&self, future: F) -> Scoped<F> {
        Scoped::new(self.clone(), future)
    }
    /// One named step: the operation's current step, and a span with its outcome.
    pub async fn run<T, F, Fut>(&self, step: impl Into<Cow<'static, str>>, f: F) -> Result<T>
    where
        F: FnOnce(Cx) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let name = step.into();
        let child = self.derive(|i| i.span = random());
        child.step(name.clone());
        // Whoever waits may stop to.
        let _over = Step(&child);
        let (start, began) = (SystemTime::now(), Instant::now());
        let result = Scoped::new(child.clone(), f(child.clone())).await;
        child.push(SpanKind::Step, self.0.span, name, start, Duration::ZERO, began.elapsed(), result.as_ref().err());
        result
    }
    #[allow(clippy::too_many_arguments, reason = "a span has that many parts")]
    pub(crate) fn push(
        &self,
        kind: SpanKind,
        parent: u64,
        name: Cow<'static, str>,
        start: SystemTime,
        queue: Duration,
        took: Duration,
        error: Option<&Fault>,
    ) {
        self.0.op.step_done(self.0.span, error.is_some());
        self.0.system.span_ended(&name, took, error.is_none());
        let attrs = std::mem::take(&mut *self.0.attrs.lock());
        let failure = error.map(|e| format!("{:?}: {}", e.class, e.message));
        let more = (failure.is_some() || !attrs.is_empty()).then(|| Box::new(More { failure, attrs }));
        self.0.system.recorder().push(Raw {
            trace: self.0.trace,
            span: self.0.span,
            parent,
            name,
            actor: self.0.actor.clone(),
            kind,
            start: nanos(start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()),
            queue: nanos(queue),
            took: nanos(took),
            more,
        });
    }
    /// A span that was measured elsewhere, such as in a shim.
    pub fn record_span(&self, name: String, start: SystemTime, end: SystemTime, ok: bool, attrs: Vec<(String, String)>) {
        let child = self.derive(|i| i.span = random());
        *child.0.attrs.lock() = attrs;
        let failed = Fault::unknown("failed");
        let took = end.duration_since(start).unwrap_or_default();
        child.push(SpanKind::Step, self.0.span, Cow::Owned(name), start, Duration::ZERO, took, (!ok).then_some(&failed));
    }
    /// Runs a blocking function on a thread of the kernel: named, listed, abandoned past its limit.
    pub async fn blocking<T: Send + 'static>(
        &self,
        name: &'static str,
        limit: Duration,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let limit = self.remaining().map_or(limit, |r| r.min(limit));
        self.0.system.blocking_pool().run(self, name.into(), limit, f).await
    }
    /// The same for what may never return, such as a path on a file system whose server is gone: on a thread of its own that holds none of the process's
    /// files, so that it is in nobody's way, not even in that of the daemon's successor. `f` must not use a descriptor that was opened outside of it.
    pub async fn blocking_alone<T: Send + 'static>(
        &self,
        name: impl Into<Cow<'static, str>>,
        limit: Duration,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let limit = self.remaining().map_or(limit, |r| r.min(limit));
        self.0.system.blocking_pool().run_alone(self, name.into(), limit, f).await
    }
    /// A background operation of this generation of the actor: cancelled on restart, traced by itself, without a deadline.
    pub fn spawn<F, Fut>(&self, name: &'static str, f: F)
    where
        F: FnOnce(Cx) -> Fut + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let parent = self.trace_id();
        let op = self.0.system.open_op(name, self.0.actor.clone(), 0);
        let trace = (u128::from(random()) << 64) | u128::from(random());
        op.trace(trace);
        let cx = self.derive(|i| {
            i.op = op.clone();
            i.deadline = None;
            i.trace = trace;
            i.span = random();
        });
        cx.attr("linked_trace", parent);
        crate::cell::spawn_local(
            cx.clone(),
            Scoped::new(cx.clone(), async move {
                f(cx).await;
                drop(op);
            }),
        );
    }
}

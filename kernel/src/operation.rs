//! Operations: what is under way, at which step, for how long.
use crate::cx::{Cx, random};
use crate::recorder::SpanKind;
use crate::{Fault, Result};
use parking_lot::Mutex;
use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// One operation under way.
pub(crate) struct Op {
    pub id: u64,
    pub name: Cow<'static, str>,
    pub actor: Arc<str>,
    pub began: Instant,
    pub now: Mutex<Now>,
    pub table: std::sync::Weak<dashmap::DashMap<u64, std::sync::Weak<Op>>>,
    /// Nobody waits for it any more.
    pub over: (AtomicBool, tokio::sync::Notify),
}

/// Where an operation stands. Parts of it may go on side by side; the one shown is the youngest that is not over.
#[derive(Default)]
pub(crate) struct Now {
    begun: u64,
    /// Steps that are not over, by the span they belong to, the youngest last.
    steps: Vec<(u64, u64, Cow<'static, str>)>,
    /// What began last of what failed last: the cause, of which those around it failed, too.
    failed: Option<(u64, Cow<'static, str>)>,
    /// Calls that are not answered, by numbers of their own.
    calls: Vec<(u64, String)>,
    pub trace: u128,
}

impl Now {
    pub fn of(trace: u128) -> Now {
        Now { trace, ..Default::default() }
    }
    /// Once nothing goes on, the step that failed is shown, so that an error can name it.
    pub fn step(&self) -> &str {
        let failed = self.failed.as_ref().map(|(_, step)| step);
        self.steps.last().map(|(_, _, step)| step).or(failed).map_or("", |step| step)
    }
    pub fn waiting_on(&self) -> &str {
        self.calls.last().map_or("", |(_, call)| call)
    }
}

impl Op {
    /// A step of a span begins, in place of the one before.
    pub fn step(&self, span: u64, step: Cow<'static, str>) {
        let mut now = self.now.lock();
        now.begun += 1;
        let begun = now.begun;
        now.steps.retain(|(of, ..)| *of != span);
        now.steps.push((span, begun, step));
    }
    /// The step of a span, if it has one, is over.
    pub fn step_done(&self, span: u64, failed: bool) {
        let mut now = self.now.lock();
        let Some(at) = now.steps.iter().rposition(|(of, ..)| *of == span) else { return };
        let (_, begun, step) = now.steps.remove(at);
        if failed && now.failed.as_ref().is_none_or(|(within, _)| *within < begun) {
            now.failed = Some((begun, step));
        }
    }
    /// A call begins; it is over when the answer is dropped.
    pub fn calls(&self, call: String) -> impl Drop {
        struct Calling<'a>(&'a Op, u64);
        impl Drop for Calling<'_> {
            fn drop(&mut self) {
                self.0.now.lock().calls.retain(|(number, _)| *number != self.1);
            }
        }
        let mut now = self.now.lock();
        now.begun += 1;
        let begun = now.begun;
        now.calls.push((begun, call));
        Calling(self, begun)
    }
    pub fn trace(&self, trace: u128) {
        self.now.lock().trace = trace;
    }
    fn end(&self) {
        self.over.0.store(true, Ordering::Release);
        self.over.1.notify_waiters();
    }
    pub async fn ended(&self) {
        let mut told = std::pin::pin!(self.over.1.notified());
        // Listens before it looks, so that no end falls between the two.
        told.as_mut().enable();
        if !self.over.0.load(Ordering::Acquire) {
            told.await;
        }
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        if let Some(table) = self.table.upgrade() {
            table.remove(&self.id);
        }
    }
}

/// An operation, for `troupe ops`.
#[derive(Clone, Debug, serde::Serialize)]
pub struct OpInfo {
    /// Id.
    pub id: u64,
    /// RPC or background task.
    pub name: String,
    /// Actor that owns it, `-` for outside requests.
    pub actor: String,
    /// Current step.
    pub step: String,
    /// What it waits for.
    pub waiting_on: String,
    /// Trace.
    pub trace_id: String,
    /// Age.
    pub age: Duration,
}

/// An outside request. Ends when dropped.
pub struct Operation {
    /// Context for the calls made for it.
    pub cx: Cx,
    pub(crate) name: Cow<'static, str>,
    pub(crate) parent: u64,
    pub(crate) start: SystemTime,
    pub(crate) began: Instant,
    pub(crate) done: bool,
}

impl Operation {
    /// Ends it with an outcome.
    pub fn finish<T>(mut self, result: &Result<T>) {
        self.end(result.as_ref().err());
    }
    /// Where it stands: `op=… step=… trace=…`.
    pub fn describe(&self) -> String {
        let now = self.cx.0.op.now.lock();
        let wait = Some(now.waiting_on()).filter(|w| !w.is_empty()).map(|w| format!(" waiting_on={w}")).unwrap_or_default();
        format!("op={} step={:?}{wait} trace={}", self.cx.0.op.id, now.step(), self.cx.trace_id())
    }
    fn end(&mut self, error: Option<&Fault>) {
        if !std::mem::replace(&mut self.done, true) {
            self.cx.0.op.end();
            self.cx.push(SpanKind::Root, self.parent, self.name.clone(), self.start, Duration::ZERO, self.began.elapsed(), error);
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.end(Some(&Fault::canceled("the caller went away")));
    }
}

/// Reads `00-<trace>-<span>-<flags>`.
pub(crate) fn parse_traceparent(text: &str) -> Option<(u128, u64)> {
    let mut parts = text.split('-');
    let (_, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
    let ids = (u128::from_str_radix(trace, 16).ok()?, u64::from_str_radix(span, 16).ok()?);
    (ids.0 != 0 && ids.1 != 0).then_some(ids)
}

pub(crate) fn new_trace() -> u128 {
    (u128::from(random()) << 64) | u128::from(random())
}

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
    pub now: Mutex<(Cow<'static, str>, String, u128)>,
    pub table: std::sync::Weak<dashmap::DashMap<u64, std::sync::Weak<Op>>>,
    /// Nobody waits for it any more.
    pub over: (AtomicBool, tokio::sync::Notify),
}

impl Op {
    pub fn step(&self, step: Cow<'static, str>) -> Cow<'static, str> {
        std::mem::replace(&mut self.now.lock().0, step)
    }
    /// A step ends: what was before it is shown again, unless a step beside it has begun meanwhile.
    pub fn step_done(&self, step: &str, before: Cow<'static, str>) {
        let mut now = self.now.lock();
        if now.0 == step {
            now.0 = before;
        }
    }
    pub fn waits(&self, on: String) -> String {
        std::mem::replace(&mut self.now.lock().1, on)
    }
    pub fn trace(&self, trace: u128) {
        self.now.lock().2 = trace;
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
        let wait = if now.1.is_empty() { String::new() } else { format!(" waiting_on={}", now.1) };
        format!("op={} step={:?}{wait} trace={}", self.cx.0.op.id, now.0, self.cx.trace_id())
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

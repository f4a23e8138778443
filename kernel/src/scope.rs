//! The trace and span that this thread works for, so that log lines can carry them. Two words in a thread-local: a span of the `tracing` crate would
//! cost more than the rest of a hop.
use crate::Cx;
use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

thread_local! { static NOW: Cell<(u128, u64)> = const { Cell::new((0, 0)) } }

/// Trace id (32 hex digits) and span id (16) of the work that this thread does at the moment.
pub fn current() -> Option<(String, String)> {
    let (trace, span) = NOW.with(Cell::get);
    (trace != 0).then(|| (format!("{trace:032x}"), format!("{span:016x}")))
}

/// Puts the ids up until it is dropped.
pub(crate) struct Entered((u128, u64));

pub(crate) fn enter(cx: &Cx) -> Entered {
    Entered(NOW.with(|n| n.replace((cx.0.trace, cx.0.span))))
}

impl Drop for Entered {
    fn drop(&mut self) {
        NOW.with(|n| n.set(self.0));
    }
}

/// A future that works for a context whenever it is polled.
pub struct Scoped<F> {
    cx: Cx,
    future: Pin<Box<F>>,
}

impl<F> Scoped<F> {
    pub(crate) fn new(cx: Cx, future: F) -> Self {
        Scoped { cx, future: Box::pin(future) }
    }
}

impl<F: Future> Future for Scoped<F> {
    type Output = F::Output;
    fn poll(mut self: Pin<&mut Self>, t: &mut Context<'_>) -> Poll<F::Output> {
        let _entered = enter(&self.cx);
        self.future.as_mut().poll(t)
    }
}

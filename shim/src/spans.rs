//! Finished spans, kept until the daemon asks for them: this process has no exporter.
use proto::glue::{Context, metadata};
use proto::shim::{Span, SpansResponse};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Spans kept at most; older ones are dropped and counted.
const KEPT: usize = 256;

/// The spans.
#[derive(Clone, Default)]
pub struct Spans(Arc<Mutex<(VecDeque<Span>, u64)>>);

/// The caller's place in its trace.
#[derive(Clone, Default)]
pub struct Origin {
    trace: String,
    parent: String,
}

impl Origin {
    /// From the call's `traceparent`.
    pub fn of(cx: &Context) -> Origin {
        let mut parts = metadata(cx, "traceparent").unwrap_or_default().split('-').skip(1);
        Origin { trace: parts.next().unwrap_or_default().into(), parent: parts.next().unwrap_or_default().into() }
    }
}

impl Spans {
    /// Runs a phase and notes how long it took.
    pub async fn time<T, E>(&self, origin: &Origin, name: &str, id: &str, phase: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let from = SystemTime::now();
        let done = phase.await;
        self.note(origin, name, id, from, done.is_ok());
        done
    }
    /// Notes a phase that ends now.
    pub fn note(&self, origin: &Origin, name: &str, id: &str, from: SystemTime, ok: bool) {
        if origin.trace.is_empty() {
            return;
        }
        let nanos = |at: SystemTime| at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let span = Span {
            trace_id: origin.trace.clone(),
            parent_id: origin.parent.clone(),
            name: name.into(),
            start_unix_nanos: nanos(from),
            end_unix_nanos: nanos(SystemTime::now()),
            ok,
            attrs: [("container.id".to_owned(), id.to_owned())].into_iter().collect(),
            ..Default::default()
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.0.len() >= KEPT {
            all.0.pop_front();
            all.1 += 1;
        }
        all.0.push_back(span);
    }
    /// Hands them over.
    pub fn take(&self) -> SpansResponse {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        SpansResponse { spans: all.0.drain(..).collect(), dropped: std::mem::take(&mut all.1) }
    }
}

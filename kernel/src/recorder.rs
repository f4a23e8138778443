//! The flight recorder: a bounded ring of spans, always on.
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SpanKind {
    /// An outside request.
    Root,
    /// A message from one actor to another.
    Hop,
    /// A named step.
    Step,
    /// A crash or a restart.
    Event,
}

/// A finished span.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SpanRecord {
    /// 32 hex digits.
    pub trace_id: String,
    /// 16 hex digits.
    pub span_id: String,
    /// 16 hex digits or empty.
    pub parent_id: String,
    /// Message, step or RPC.
    pub name: String,
    /// Actor that did it.
    pub actor: String,
    /// Kind.
    pub kind: SpanKind,
    /// Begin (a hop: when it was enqueued).
    pub start: SystemTime,
    /// Time in the mailbox.
    pub queue_wait: Duration,
    /// From begin to end.
    pub duration: Duration,
    /// `ok` or the error.
    pub outcome: String,
    /// Attributes.
    pub attrs: Vec<(String, String)>,
}

/// Raw record: ids as numbers, names without copies, so that recording stays below a microsecond.
#[derive(Clone)]
pub(crate) struct Raw {
    pub trace: u128,
    pub span: u64,
    pub parent: u64,
    pub name: std::borrow::Cow<'static, str>,
    pub actor: std::sync::Arc<str>,
    pub kind: SpanKind,
    /// Nanoseconds, the first since 1970.
    pub start: u64,
    pub queue: u64,
    pub took: u64,
    /// Most hops have none: a thin box keeps the ring small.
    pub more: Option<Box<More>>,
}

/// Failure and attributes of a record.
#[derive(Clone, Default)]
pub(crate) struct More {
    pub failure: Option<String>,
    pub attrs: Vec<(String, String)>,
}

/// Whole nanoseconds; 584 years fit.
pub(crate) fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

impl Raw {
    fn public(&self) -> SpanRecord {
        let more = self.more.as_deref().cloned().unwrap_or_default();
        SpanRecord {
            trace_id: format!("{:032x}", self.trace),
            span_id: format!("{:016x}", self.span),
            parent_id: if self.parent == 0 { String::new() } else { format!("{:016x}", self.parent) },
            name: self.name.to_string(),
            actor: self.actor.to_string(),
            kind: self.kind,
            start: SystemTime::UNIX_EPOCH + Duration::from_nanos(self.start),
            queue_wait: Duration::from_nanos(self.queue),
            duration: Duration::from_nanos(self.took),
            outcome: more.failure.unwrap_or_else(|| "ok".into()),
            attrs: more.attrs,
        }
    }
}

/// The ring.
pub(crate) struct Recorder {
    ring: Mutex<VecDeque<Raw>>,
    bound: usize,
    export: Mutex<Option<std::sync::mpsc::SyncSender<SpanRecord>>>,
    pub dropped: AtomicU64,
}

impl Recorder {
    pub fn new(bound: usize) -> Self {
        Recorder {
            ring: Mutex::new(VecDeque::with_capacity(bound.min(1024))),
            bound: bound.max(16),
            export: Mutex::new(None),
            dropped: AtomicU64::new(0),
        }
    }
    pub fn push(&self, raw: Raw) {
        if let Some(export) = &*self.export.lock()
            && export.try_send(raw.public()).is_err()
        {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        let mut ring = self.ring.lock();
        if ring.len() >= self.bound {
            ring.pop_front();
        }
        ring.push_back(raw);
    }
    pub fn export_to(&self, to: std::sync::mpsc::SyncSender<SpanRecord>) {
        *self.export.lock() = Some(to);
    }
    pub fn trace(&self, id: &str) -> Vec<SpanRecord> {
        let Ok(wanted) = u128::from_str_radix(id, 16) else { return vec![] };
        self.ring.lock().iter().filter(|r| r.trace == wanted).map(Raw::public).collect()
    }
    pub fn roots(&self, n: usize) -> Vec<SpanRecord> {
        self.ring.lock().iter().rev().filter(|r| r.kind == SpanKind::Root).take(n).map(Raw::public).collect()
    }
}

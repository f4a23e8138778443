//! OTLP export of the flight recorder, by the standard `OTEL_*` variables. It never blocks the daemon: what does not fit is dropped and counted.
use kernel::{SpanKind as Kind, SpanRecord, System};
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// Spans that may wait for the exporter.
const WAITING: usize = 8192;
/// Spans in one request, and how long they wait for company.
const BATCH: (usize, Duration) = (512, Duration::from_secs(1));

/// Starts the exporter if `OTEL_EXPORTER_OTLP_ENDPOINT` (or `…_TRACES_ENDPOINT`) is set and `OTEL_SDK_DISABLED` is not `true`. Answers whether it did.
pub fn start(system: &System) -> anyhow::Result<bool> {
    let set = |name: &str| std::env::var(name).is_ok_and(|v| !v.is_empty());
    let wanted = set("OTEL_EXPORTER_OTLP_ENDPOINT") || set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
    if !wanted
        || std::env::var("OTEL_SDK_DISABLED").is_ok_and(|v| v == "true")
        || std::env::var("OTEL_TRACES_EXPORTER").is_ok_and(|v| v == "none")
    {
        return Ok(false);
    }
    let mut exporter = SpanExporter::builder().with_tonic().build()?;
    let service = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| "troupe".into());
    exporter.set_resource(&Resource::builder().with_service_name(service).build());
    let (sender, receiver) = sync_channel(WAITING);
    system.export_spans(sender);
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new().name("troupe-otlp".into()).spawn(move || run(&exporter, &receiver, &runtime))?;
    Ok(true)
}

fn run(exporter: &SpanExporter, receiver: &Receiver<SpanRecord>, runtime: &tokio::runtime::Handle) {
    loop {
        let mut batch = Vec::new();
        let end = Instant::now() + BATCH.1;
        while batch.len() < BATCH.0 {
            match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(span) => batch.extend(translate(&span)),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        if batch.is_empty() {
            continue;
        }
        let count = batch.len();
        if let Err(error) = runtime.block_on(exporter.export(batch)) {
            tracing::debug!(%error, count, "spans could not be exported");
        }
    }
}

fn translate(span: &SpanRecord) -> Option<SpanData> {
    let context = |id: &str| {
        Some(SpanContext::new(
            TraceId::from_hex(&span.trace_id).ok()?,
            SpanId::from_hex(id).ok()?,
            TraceFlags::SAMPLED,
            false,
            TraceState::default(),
        ))
    };
    let mut attributes: Vec<KeyValue> = span.attrs.iter().map(|(k, v)| KeyValue::new(k.clone(), v.clone())).collect();
    attributes.push(KeyValue::new("troupe.actor", span.actor.clone()));
    attributes.push(KeyValue::new("troupe.queue_wait_us", span.queue_wait.as_micros() as i64));
    if span.kind == Kind::Root {
        attributes.push(KeyValue::new("rpc.system.name", "grpc"));
        attributes.push(KeyValue::new("rpc.method", span.name.clone()));
    }
    Some(SpanData {
        span_context: context(&span.span_id)?,
        parent_span_id: SpanId::from_hex(&span.parent_id).unwrap_or(SpanId::INVALID),
        parent_span_is_remote: false,
        span_kind: if span.kind == Kind::Root { SpanKind::Server } else { SpanKind::Internal },
        name: span.name.clone().into(),
        start_time: span.start,
        end_time: span.start + span.duration,
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: if span.outcome == "ok" { Status::Ok } else { Status::error(span.outcome.clone()) },
        instrumentation_scope: InstrumentationScope::builder("troupe").build(),
    })
}

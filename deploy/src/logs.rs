//! Logs: text or JSON lines on standard error. Inside a request every line carries `trace_id` and `span_id`, as the kernel knows them.
use std::fmt;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Sets the process' logger up. `level` and `format` are the configuration's; `TROUPE_LOG` (env-filter syntax) overrides the level.
pub fn init(level: &str, format: &str) {
    let level = match level {
        "" => "info",
        "fatal" | "panic" => "error",
        other => other,
    };
    let filter = std::env::var("TROUPE_LOG")
        .unwrap_or_else(|_| format!("{level},h2=warn,hyper=warn,tonic=warn,ttrpc=warn,reqwest=warn,rustls=warn"));
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter);
    if format == "json" {
        builder.event_format(Json).init()
    } else {
        builder.with_ansi(false).event_format(Text(Format::default().with_target(false).with_ansi(false))).init()
    }
}

/// The usual line, and the trace behind it.
struct Text(Format);

impl<S, N> FormatEvent<S, N> for Text
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, cx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let Some((trace, span)) = kernel::current() else { return self.0.format_event(cx, writer, event) };
        let mut line = String::new();
        self.0.format_event(cx, Writer::new(&mut line), event)?;
        writeln!(writer, "{} trace_id={trace} span_id={span}", line.trim_end())
    }
}

/// One JSON object a line, with containerd's names: `time`, `level`, `msg`.
struct Json;

#[derive(Default)]
struct Fields(serde_json::Map<String, serde_json::Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        let name = if field.name() == "message" { "msg" } else { field.name() };
        self.0.insert(name.into(), value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().into(), value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().into(), value.into());
    }
}

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        if let Some((trace, span)) = kernel::current() {
            fields.0.insert("trace_id".into(), trace.into());
            fields.0.insert("span_id".into(), span.into());
        }
        event.record(&mut fields);
        fields.0.insert("level".into(), event.metadata().level().as_str().to_lowercase().into());
        fields.0.insert("time".into(), now().into());
        let line = serde_json::to_string(&fields.0).map_err(|_| fmt::Error)?;
        writeln!(writer, "{line}")
    }
}

/// RFC 3339 in UTC with microseconds.
fn now() -> String {
    let mut text = String::new();
    let time = tracing_subscriber::fmt::time::SystemTime;
    let _ = tracing_subscriber::fmt::time::FormatTime::format_time(&time, &mut Writer::new(&mut text));
    text
}

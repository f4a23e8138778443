//! What libcontainer logs on its way, kept in the bundle: its errors come back as a heading only, the cause is in the log.
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Bytes of the diary that go into an error's text.
const TOLD: usize = 1024;

struct Diary(File);

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}

impl Subscriber for Diary {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::ERROR
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let _ = writeln!(&self.0, "{}", text.0.trim_end());
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Starts the diary of this process and its children; answers where it is.
pub fn open(bundle: &Path) -> Option<PathBuf> {
    let path = bundle.join("engine.log");
    let file = File::create(&path).ok()?;
    tracing::subscriber::set_global_default(Diary(file)).ok()?;
    Some(path)
}

/// What was written, for an error's text.
pub fn read(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.dedup();
    let mut told = lines.join("; ");
    told.truncate(told.floor_char_boundary(TOLD));
    told
}

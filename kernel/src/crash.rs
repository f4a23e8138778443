//! What is known of a panic: where, and by which way. Unwinding loses both, so a hook keeps them for whoever catches it.
use std::backtrace::Backtrace;
use std::cell::RefCell;
use std::sync::{Arc, Once};

/// Lines of a backtrace that are kept: the frames near the panic tell what matters.
const LINES: usize = 40;

thread_local! {
    static LAST: RefCell<Option<Trace>> = const { RefCell::new(None) };
    /// A thread whose panics are caught by the kernel; others keep the process' own hook.
    static CAUGHT: RefCell<bool> = const { RefCell::new(false) };
}

/// Where a panic came from.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace {
    pub location: String,
    frames: Option<Arc<Backtrace>>,
}

impl Trace {
    /// The frames near the panic, as text. Slow, the first time by seconds: it reads the debug information of the whole program. Never on an actor's thread,
    /// whose other actors would wait, and the watchdog would take for hung.
    pub fn backtrace(&self) -> String {
        let Some(frames) = &self.frames else { return String::new() };
        let all = frames.to_string();
        // The first frames are the machinery of panicking itself.
        let frames = all.lines().skip_while(|l| !l.contains("rust_begin_unwind") && !l.contains("panicking::panic_fmt"));
        let kept: Vec<&str> = frames.take(LINES).collect();
        if kept.is_empty() { all.lines().take(LINES).collect::<Vec<_>>().join("\n") } else { kept.join("\n") }
    }
}

/// Installs the hook, once for the process.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !CAUGHT.with(|c| *c.borrow()) {
                return before(info);
            }
            let location = info.location().map(ToString::to_string).unwrap_or_default();
            let frames = Some(Arc::new(Backtrace::force_capture()));
            LAST.with(|l| *l.borrow_mut() = Some(Trace { location, frames }));
        }));
    });
}

/// From now on panics on this thread are the kernel's to report.
pub(crate) fn caught_here() {
    CAUGHT.with(|c| *c.borrow_mut() = true);
}

/// The last panic of this thread.
pub(crate) fn take() -> Trace {
    LAST.with(|l| l.borrow_mut().take()).unwrap_or_default()
}

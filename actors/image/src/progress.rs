//! What `troupe ops` shows of a pull.
use crate::manifest::Descriptor;
use kernel::Cx;
use std::cell::RefCell;
use std::time::{Duration, Instant};

/// How often the text changes.
const TICK: Duration = Duration::from_millis(250);

#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    #[default]
    Waiting,
    Fetching,
    Unpacking,
    Done,
}

pub(crate) struct Progress {
    total: u64,
    layers: RefCell<Vec<(Phase, u64)>>,
    began: Instant,
}

impl Progress {
    pub fn new(layers: &[Descriptor]) -> Progress {
        let total = layers.iter().map(|l| l.size).sum();
        Progress { total, layers: RefCell::new(vec![Default::default(); layers.len()]), began: Instant::now() }
    }
    /// A layer has brought so many bytes.
    pub fn bytes(&self, layer: usize, bytes: u64) {
        self.layers.borrow_mut()[layer].1 = bytes;
    }
    pub fn phase(&self, layer: usize, phase: Phase) {
        self.layers.borrow_mut()[layer].0 = phase;
    }
    /// `layers 1/3 done, 1 fetching, 1 unpacking, 12.0/60.0 MiB, 31.2 MiB/s`.
    pub fn text(&self) -> String {
        let layers = self.layers.borrow();
        let count = |phase: Phase| layers.iter().filter(|l| l.0 == phase).count();
        let mib = |b: u64| b as f64 / f64::from(1 << 20);
        let bytes: u64 = layers.iter().map(|l| l.1).sum();
        let mut text = format!("layers {}/{} done", count(Phase::Done), layers.len());
        for (phase, word) in [(Phase::Fetching, "fetching"), (Phase::Unpacking, "unpacking")] {
            if count(phase) > 0 {
                text += &format!(", {} {word}", count(phase));
            }
        }
        let rate = mib(bytes) / self.began.elapsed().as_secs_f64().max(0.001);
        text + &format!(", {:.1}/{:.1} MiB, {rate:.1} MiB/s", mib(bytes), mib(self.total))
    }
    /// Keeps the operation's step up to date for as long as it is polled.
    pub async fn show(&self, cx: &Cx) -> std::convert::Infallible {
        loop {
            cx.step(self.text());
            tokio::time::sleep(TICK).await;
        }
    }
}

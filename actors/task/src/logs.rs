//! What containers' logs were given, as containerd counts it. Each shim tells it in a file of the bundle; here the files are read when somebody asks for
//! metrics, so nothing is polled and a stuck shim holds nobody up. A container's last numbers are kept when its bundle goes.
use kernel::System;
use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Opts};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A bundle's file: these numbers, little-endian, in this order.
const FILE: &str = "log-counters";
const NUMBERS: [(&str, &str); 8] = [
    ("containerd_cri_input_entries_total", "Lines that containers wrote."),
    ("containerd_cri_output_entries_total", "Log entries written."),
    ("containerd_cri_input_bytes_total", "Bytes that containers wrote."),
    ("containerd_cri_output_bytes_total", "Bytes of log written."),
    ("containerd_cri_split_entries_total", "Log entries that are no line's end."),
    ("containerd_cri_split_bytes_total", "Bytes in log entries that are no line's end."),
    ("troupe_log_lost_entries_total", "Log entries that were lost, because the log's file system had no room for them."),
    ("troupe_log_lost_bytes_total", "Their bytes."),
];

type Numbers = [u64; NUMBERS.len()];

/// Sums of the containers that are gone.
#[derive(Clone, Debug, Default)]
pub struct Logs(Arc<Mutex<Numbers>>);

fn read(bundle: &Path) -> Option<Numbers> {
    let bytes = std::fs::read(bundle.join(FILE)).ok()?;
    let mut numbers = Numbers::default();
    for (place, chunk) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
        *place = u64::from_le_bytes(chunk.try_into().ok()?);
    }
    Some(numbers)
}

fn add(sum: &mut Numbers, more: Numbers) {
    sum.iter_mut().zip(more).for_each(|(s, m)| *s = s.wrapping_add(m));
}

impl Logs {
    /// Keeps what a bundle tells before it goes.
    pub(crate) fn retire(&self, bundle: &Path) {
        let mut gone = self.0.lock();
        if let Some(last) = read(bundle)
            && std::fs::remove_file(bundle.join(FILE)).is_ok()
        {
            add(&mut gone, last);
        }
    }
    fn sum(&self, bundles: &Path) -> Numbers {
        // Held meanwhile, so that no bundle counts twice or not at all.
        let gone = self.0.lock();
        let mut sum = *gone;
        let all = std::fs::read_dir(bundles).into_iter().flatten().flatten();
        all.filter_map(|e| read(&e.path())).for_each(|n| add(&mut sum, n));
        sum
    }
    /// Shows them with the system's metrics; again after a restart, which changes nothing.
    pub(crate) fn show(&self, system: &System, bundles: PathBuf) {
        let build = || -> prometheus::Result<Vec<Counter>> {
            let opts = |(name, help): (&str, &str)| Opts::new(name, help);
            NUMBERS.into_iter().map(|n| Counter::with_opts(opts(n))).collect()
        };
        let shown = build().and_then(|counters| system.metrics().register(Box::new(Shown { logs: self.clone(), bundles, counters })));
        match shown {
            Ok(()) | Err(prometheus::Error::AlreadyReg) => {}
            Err(error) => tracing::warn!(%error, "counters of logs are not shown"),
        }
    }
}

struct Shown {
    logs: Logs,
    bundles: PathBuf,
    counters: Vec<Counter>,
}

impl Collector for Shown {
    fn desc(&self) -> Vec<&Desc> {
        self.counters.iter().flat_map(Collector::desc).collect()
    }
    fn collect(&self) -> Vec<MetricFamily> {
        let sum = self.logs.sum(&self.bundles);
        for (counter, n) in self.counters.iter().zip(sum) {
            counter.reset();
            counter.inc_by(n as f64);
        }
        self.counters.iter().flat_map(Collector::collect).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_a_container_wrote_counts_once_and_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let tell = |name: &str, n: u64| {
            let bundle = dir.path().join(name);
            std::fs::create_dir_all(&bundle).unwrap();
            let bytes: Vec<u8> = (0..8).flat_map(|i| (n + i).to_le_bytes()).collect();
            std::fs::write(bundle.join(FILE), bytes).unwrap();
            bundle
        };
        let logs = Logs::default();
        let (one, _two) = (tell("one", 10), tell("two", 100));
        assert_eq!(logs.sum(dir.path()), [110, 112, 114, 116, 118, 120, 122, 124]);
        logs.retire(&one);
        assert_eq!(logs.sum(dir.path())[0], 110);
        logs.retire(&one);
        std::fs::remove_dir_all(one).unwrap();
        assert_eq!(logs.sum(dir.path())[0], 110);
    }
}

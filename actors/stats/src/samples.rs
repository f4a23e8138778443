//! CPU rates from samples. Two samples make a rate; without them there is none, which is not the same as zero.
use std::collections::HashMap;
use std::time::Duration;

/// Two samples must be this far apart, or their quotient is noise.
const APART_NS: i64 = 500_000_000;

/// A sample that is older than the last by less than this has been overtaken; by more, the clock was set back.
const LATE_NS: i64 = 60_000_000_000;

/// CPU time at a moment.
#[derive(Clone, Copy)]
struct Sample {
    at_ns: i64,
    usage_ns: u64,
}

/// By container or pod: the last sample, and one before it.
pub struct Samples {
    all: HashMap<String, (Sample, Option<Sample>)>,
    retention_ns: i64,
}

impl Samples {
    /// None yet; samples older than `retention` are worth nothing.
    pub fn new(retention: Duration) -> Samples {
        Samples { all: HashMap::new(), retention_ns: i64::try_from(retention.as_nanos()).unwrap_or(i64::MAX) }
    }
    /// Forgets what is gone.
    pub fn retain(&mut self, lives: impl Fn(&str) -> bool) {
        self.all.retain(|id, _| lives(id));
    }
    /// Notes a sample; answers nanoseconds of CPU a second since an earlier one, if there is one.
    pub fn rate(&mut self, id: &str, at_ns: i64, usage_ns: u64) -> Option<u64> {
        let now = Sample { at_ns, usage_ns };
        let Some((last, before)) = self.all.get_mut(id) else {
            self.all.insert(id.to_owned(), (now, None));
            return None;
        };
        // Read before the last one and told after it: what is known is newer.
        if at_ns < last.at_ns && last.at_ns - at_ns < LATE_NS {
            return before.as_ref().and_then(|b| quotient(b, last));
        }
        // A counter that began anew, a clock that was set back, or a pause that was too long.
        if usage_ns < last.usage_ns || at_ns < last.at_ns || at_ns - last.at_ns > self.retention_ns {
            (*last, *before) = (now, None);
            return None;
        }
        if at_ns - last.at_ns >= APART_NS {
            (*before, *last) = (Some(*last), now);
        }
        quotient(before.as_ref()?, &now)
    }
}

fn quotient(since: &Sample, now: &Sample) -> Option<u64> {
    let (spent, passed) = (now.usage_ns.saturating_sub(since.usage_ns), now.at_ns - since.at_ns);
    (passed >= APART_NS).then(|| u64::try_from(u128::from(spent) * 1_000_000_000 / passed as u128).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: i64 = 1_000_000_000;

    #[test]
    fn a_rate_needs_two_samples_and_a_counter_that_grows() {
        let mut samples = Samples::new(Duration::from_secs(120));
        let mut rate = |at: i64, usage: u64| samples.rate("c", at, usage);
        assert_eq!(rate(10 * S, 100), None, "one sample is none");
        assert_eq!(rate(10 * S + S / 10, 150), None, "too near");
        assert_eq!(rate(11 * S, 500_000_100), Some(500_000_000));
        assert_eq!(rate(11 * S + S / 10, 500_000_100), Some(454_545_454), "with the one before");
        assert_eq!(rate(12 * S, 500_000_100), Some(0), "idle is not absent");
        assert_eq!(rate(13 * S, 5), None, "it began anew");
        assert_eq!(rate(14 * S, 1_000_000_005), Some(1_000_000_000));
        assert_eq!(rate(13 * S + S / 2, 500_000_005), Some(1_000_000_000), "overtaken by the one before");
        assert_eq!(rate(300 * S, 2_000_000_005), None, "too old");
    }
}

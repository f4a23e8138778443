//! Fault injection at delivery.
use crate::{Class, Fault, Result};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultKind {
    /// The receiver panics.
    Panic,
    /// The caller gets `Unavailable`.
    Error,
    /// Delivered late.
    Delay,
    /// Never delivered.
    Drop,
    /// Delivered twice; only messages that may be redelivered can be.
    Duplicate,
    /// Delivered, never answered.
    Hang,
    /// The receiver's thread is blocked while it handles the message, for `delay_ms` or a minute: what the watchdog is for.
    Block,
}

/// A rule.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct Rule {
    /// Given by [`Chaos::add`].
    #[serde(default)]
    pub id: u64,
    /// Actor (or template), empty = any.
    #[serde(default)]
    pub actor: String,
    /// Message, empty = any.
    #[serde(default)]
    pub message: String,
    /// Fault.
    pub fault: FaultKind,
    /// Hits only the n-th match (from 1).
    #[serde(default)]
    pub nth: Option<u64>,
    /// Hits with this probability.
    #[serde(default)]
    pub probability: Option<f64>,
    /// Milliseconds for `delay` and `block`.
    #[serde(default)]
    pub delay_ms: u64,
    /// Matches so far.
    #[serde(default)]
    pub matches: AtomicU64,
    /// Hits so far.
    #[serde(default)]
    pub hits: AtomicU64,
}

impl Rule {
    pub(crate) async fn before(&self, message: &str) -> Result<()> {
        match self.fault {
            FaultKind::Error => Err(Fault::new(Class::Unavailable, format!("injected by chaos rule {} at {message}", self.id))),
            FaultKind::Delay => {
                tokio::time::sleep(Duration::from_millis(self.delay_ms)).await;
                Ok(())
            }
            FaultKind::Drop => std::future::pending().await,
            FaultKind::Panic | FaultKind::Duplicate | FaultKind::Hang | FaultKind::Block => Ok(()),
        }
    }
}

/// The rules.
pub struct Chaos {
    enabled: bool,
    seed: u64,
    state: Mutex<(Vec<Arc<Rule>>, u64, u64)>,
}

impl Chaos {
    pub(crate) fn new(enabled: bool, seed: u64) -> Chaos {
        let seed = if seed == 0 { crate::cx::random() } else { seed };
        Chaos { enabled, seed, state: Mutex::new((vec![], seed | 1, 0)) }
    }
    /// Seed of the probabilities.
    pub fn seed(&self) -> u64 {
        self.seed
    }
    /// Adds a rule; answers its id. `FailedPrecondition` unless the configuration enables chaos.
    pub fn add(&self, mut rule: Rule) -> Result<u64> {
        if !self.enabled {
            return Err(Fault::failed_precondition(
                "chaos is not enabled in the configuration ([plugins.\"io.troupe.kernel.v1.chaos\"] enabled = true)",
            ));
        }
        let mut state = self.state.lock();
        state.2 += 1;
        rule.id = state.2;
        tracing::warn!(?rule, seed = self.seed, "chaos rule added");
        state.0.push(Arc::new(rule));
        Ok(state.2)
    }
    /// The rules.
    pub fn list(&self) -> Vec<Arc<Rule>> {
        self.state.lock().0.clone()
    }
    /// Removes one rule, or all.
    pub fn clear(&self, id: Option<u64>) -> Result<()> {
        self.state.lock().0.retain(|r| id.is_some_and(|id| r.id != id));
        Ok(())
    }
    pub(crate) fn hit(&self, actor: &str, message: &str) -> Option<Arc<Rule>> {
        if !self.enabled {
            return None;
        }
        let mut state = self.state.lock();
        let (rules, random, _) = &mut *state;
        for rule in rules.iter() {
            if (!rule.actor.is_empty() && rule.actor != actor) || (!rule.message.is_empty() && rule.message != message) {
                continue;
            }
            let n = rule.matches.fetch_add(1, Ordering::Relaxed) + 1;
            if rule.nth.is_some_and(|nth| nth != n) {
                continue;
            }
            if let Some(p) = rule.probability {
                *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                if (*random >> 11) as f64 / (1u64 << 53) as f64 >= p {
                    continue;
                }
            }
            rule.hits.fetch_add(1, Ordering::Relaxed);
            return Some(rule.clone());
        }
        None
    }
}

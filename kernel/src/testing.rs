//! For tests: small systems with a permissive manifest.
use crate::{Isolation, Manifest, Options, Restart, Result, Spec, Strategy, System};
use std::time::Duration;

/// A row with easy values.
pub const fn spec(name: &'static str, layer: u8) -> Spec {
    Spec {
        name,
        layer,
        mailbox: 1024,
        deadline: Duration::from_secs(30),
        restart: Restart::Permanent,
        strategy: Strategy::OneForOne,
        intensity: (5, Duration::from_secs(10)),
        isolation: Isolation::Shared,
        calls: &[],
        child_of: None,
    }
}

/// Boots a system with these rows, chaos enabled.
pub fn system(rows: &[Spec]) -> Result<System> {
    let actors: &'static [Spec] = Box::leak(rows.to_vec().into_boxed_slice());
    System::boot(Manifest { actors }, Options { chaos_enabled: true, watchdog_period: Duration::from_millis(200), ..Default::default() })
}

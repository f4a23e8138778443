//! The manifest: every actor of the daemon, in one table.
//!
//! Requests go from a higher layer to a lower one only; what has to go up goes as an event on the bus. So no cycle of waiting can exist, and
//! [`kernel::Manifest::check`] refuses a table in which one could. Layers are tens, to leave room; children sit just below their parent.
use kernel::{Isolation, Manifest, Restart, Spec, Strategy};
use std::time::Duration;

/// A row with the usual values: permanent, one for one, five restarts in ten seconds, shared threads.
const fn row(name: &'static str, layer: u8, calls: &'static [&'static str]) -> Spec {
    Spec {
        name,
        layer,
        // Deep enough for a node's worth of pods at once, small enough that what waits in it is answered before a kubelet gives up.
        mailbox: 1024,
        // The kubelet's own default for runtime requests is two minutes; half of it leaves room for the answer that explains.
        deadline: Duration::from_secs(60),
        restart: Restart::Permanent,
        strategy: Strategy::OneForOne,
        intensity: (5, Duration::from_secs(10)),
        isolation: Isolation::Shared,
        calls,
        child_of: None,
    }
}

/// A template of children.
const fn child(parent: &'static str, spec: Spec) -> Spec {
    Spec { child_of: Some(parent), mailbox: 256, ..spec }
}

/// A row with another default deadline: work that is slow by nature.
const fn slow(seconds: u64, spec: Spec) -> Spec {
    Spec { deadline: Duration::from_secs(seconds), ..spec }
}

/// The table.
pub const MANIFEST: Manifest = Manifest {
    actors: &[
        row("store", 0, &[]),
        row("events", 0, &[]),
        slow(3600, row("content", 10, &["store", "events"])),
        slow(3600, row("snapshot", 10, &["store", "events"])),
        slow(120, row("network", 10, &["store", "events"])),
        slow(3600, row("image", 20, &["store", "events", "content", "snapshot"])),
        slow(3600, child("task", row("task.shim", 20, &["store", "events"]))),
        slow(3600, row("task", 25, &["store", "events", "task.shim"])),
        slow(60, row("stats", 30, &["snapshot"])),
        slow(600, row("gc", 30, &["store", "events", "content", "snapshot", "image"])),
        slow(600, child("sandbox", row("sandbox.pod", 30, &["store", "events", "content", "snapshot", "network", "image", "task"]))),
        slow(600, row("sandbox", 35, &["store", "events", "content", "snapshot", "network", "image", "task", "sandbox.pod"])),
    ],
};

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_call_goes_uphill_and_no_cycle_of_waiting_exists() {
        MANIFEST.check().unwrap();
        fn walk(name: &str, path: &mut Vec<&'static str>) {
            for callee in MANIFEST.find(name).unwrap().calls {
                assert!(!path.contains(callee), "cycle: {path:?} -> {callee}");
                path.push(callee);
                walk(callee, path);
                path.pop();
            }
        }
        for spec in MANIFEST.actors {
            walk(spec.name, &mut vec![spec.name]);
        }
    }

    #[test]
    fn every_protocol_has_its_row_and_every_row_its_protocol() {
        let rows: BTreeSet<&str> = MANIFEST.actors.iter().filter(|s| s.child_of.is_none()).map(|s| s.name).collect();
        let protocols = BTreeSet::from(["content", "events", "gc", "image", "network", "sandbox", "snapshot", "stats", "store", "task"]);
        assert_eq!(rows, protocols);
    }
}

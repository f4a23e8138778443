//! Counters of a pod's network interfaces.
use nix::sched::{CloneFlags, setns};
use std::fs::File;

/// One interface.
#[derive(Clone, Debug, Default)]
pub struct Interface {
    pub name: String,
    /// Bytes, packets, errors, drops.
    pub received: [u64; 4],
    /// The same.
    pub sent: [u64; 4],
}

/// All but `lo` of a namespace; none when it is gone. A thread of its own enters it, and ends.
pub fn interfaces(netns: &str) -> Vec<Interface> {
    let read = || {
        let file = File::open(netns).ok()?;
        setns(file, CloneFlags::CLONE_NEWNET).ok()?;
        std::fs::read_to_string("/proc/thread-self/net/dev").ok()
    };
    let text = std::thread::scope(|s| {
        let thread = std::thread::Builder::new().name("troupe-netdev".into()).stack_size(128 << 10).spawn_scoped(s, read);
        thread.ok().and_then(|t| t.join().ok()).flatten()
    });
    text.as_deref().map(parse).unwrap_or_default()
}

fn parse(text: &str) -> Vec<Interface> {
    let row = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let n: Vec<u64> = counters.split_whitespace().filter_map(|c| c.parse().ok()).collect();
        let four = |at: usize| Some([*n.get(at)?, *n.get(at + 1)?, *n.get(at + 2)?, *n.get(at + 3)?]);
        Some(Interface { name: name.trim().into(), received: four(0)?, sent: four(8)? })
    };
    text.lines().filter_map(row).filter(|i| i.name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let text = "Inter-| Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 4 0 0 0 0 20 5 6 7 0 0 0 0\n";
        let all = parse(text);
        assert_eq!((all.len(), all[0].name.as_str(), all[0].received, all[0].sent), (1, "eth0", [10, 2, 3, 4], [20, 5, 6, 7]));
    }
}

//! Is a process as good as gone? One of whose threads is stuck in the kernel survives even SIGKILL, with its files, its locks and its listeners, but it will
//! never again run a line of its own: its successor need not wait for it.

/// Bit of SIGKILL in the masks of `/proc/<pid>/status`.
const KILL: u64 = 1 << 8;
/// The kernel's mark of a thread that is ending (`PF_EXITING`).
const EXITING: u64 = 4;

/// Has every thread of the process ended, or been killed? Also of a process that does not exist.
pub fn dying(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    threads.flatten().all(|thread| {
        let read = |file: &str| std::fs::read_to_string(thread.path().join(file)).ok();
        // A thread that has just gone has no files.
        read("stat").is_none_or(|s| ending(&s)) || read("status").is_none_or(|s| killed(&s))
    })
}

/// By `stat`: the state follows the name, which may hold anything; the flags are six fields on.
fn ending(stat: &str) -> bool {
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let state = fields.next().unwrap_or_default();
    let flags: u64 = fields.nth(5).and_then(|f| f.parse().ok()).unwrap_or(0);
    matches!(state, "Z" | "X") || flags & EXITING != 0
}

fn killed(status: &str) -> bool {
    let masks = status.lines().filter_map(|l| l.strip_prefix("SigPnd:").or_else(|| l.strip_prefix("ShdPnd:")));
    masks.filter_map(|m| u64::from_str_radix(m.trim(), 16).ok()).any(|m| m & KILL != 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_living_process_is_not_dying_and_a_killed_one_is() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!dying(std::process::id()) && !dying(child.id()));
        child.kill().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !dying(child.id()) {
            assert!(std::time::Instant::now() < end, "a zombie is not seen as dying");
        }
        child.wait().unwrap();
        assert!(dying(child.id()), "gone");
    }

    #[test]
    fn what_the_kernel_writes_is_understood() {
        assert!(ending("7 (a) R) Z 1 7 7 0 -1 4228300 0") && ending("7 (a) D 1 7 7 0 -1 4228100 0"));
        assert!(!ending("7 (a) D 1 7 7 0 -1 4194560 0") && !ending(""));
        assert!(killed("Name:\ta\nSigPnd:\t0000000000000100\n") && !killed("SigPnd:\t0000000000000000\nSigBlk:\t0000000000000100\n"));
    }
}

//! What a process that does not end is waiting for.

/// Where a process hangs, in the words of the kernel.
pub fn where_it_sleeps(pid: u32) -> String {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let stat = read("stat");
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').next()).unwrap_or("?");
    let (wchan, stack) = (read("wchan"), read("stack"));
    let top = stack.lines().next().map(str::trim).unwrap_or_default();
    format!("is in state {state}, waiting in {} {top}", if wchan.is_empty() || wchan == "0" { "?" } else { &wchan })
}

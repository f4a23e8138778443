//! The processes that an exec has begun: its descendants, and whoever is in its session. What left both before anybody looked is not known.
use crate::sys;

/// How often it looks again: what is being killed may be forking.
const PASSES: usize = 16;

/// Kills `root` and its family among the processes of a container, until none is left.
pub fn kill(root: u32, processes: impl Fn() -> Vec<u32>) {
    let root_now = || std::iter::once(root).filter(|r| stat(*r).is_some());
    for pass in 0..PASSES {
        let all: Vec<Kin> = processes().into_iter().chain(root_now()).filter_map(stat).collect();
        let family = family(root, &all);
        if family.is_empty() {
            return;
        }
        if pass > 0 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        family.into_iter().for_each(|pid| drop(sys::kill(pid, libc::SIGKILL as u32)));
    }
}

/// What is asked of a process.
#[derive(Clone, Copy, Debug)]
struct Kin {
    pid: u32,
    parent: u32,
    session: u32,
    zombie: bool,
}

/// Sends another signal to all of them, once.
pub fn signal(root: u32, signal: u32, processes: &[u32]) {
    let all: Vec<Kin> = processes.iter().copied().chain([root]).filter_map(stat).collect();
    family(root, &all).into_iter().for_each(|pid| drop(sys::kill(pid, signal)));
}

fn stat(pid: u32) -> Option<Kin> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the parenthesised name: state, parent, group, session.
    let mut words = text.rsplit_once(')')?.1.split_whitespace();
    let (state, parent, session) = (words.next()?, words.next()?.parse().ok()?, words.nth(1)?.parse().ok()?);
    Some(Kin { pid, parent, session, zombie: state == "Z" || state == "X" })
}

fn family(root: u32, all: &[Kin]) -> Vec<u32> {
    let mut known = vec![root];
    loop {
        let more = all.iter().filter(|k| !known.contains(&k.pid) && (k.session == root || known.contains(&k.parent)));
        let more: Vec<u32> = more.map(|k| k.pid).collect();
        if more.is_empty() {
            break;
        }
        known.extend(more);
    }
    let lives = |pid: &u32| all.iter().any(|k| k.pid == *pid && !k.zombie);
    known.retain(lives);
    known
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::zombie_processes)]
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    #[test]
    fn children_and_those_of_the_session_belong_to_it() {
        let kin = |pid, parent, session| Kin { pid, parent, session, zombie: false };
        let all =
            [kin(10, 1, 10), kin(11, 10, 10), kin(12, 11, 12), kin(13, 1, 10), kin(20, 1, 20), Kin { zombie: true, ..kin(14, 10, 10) }];
        let mut found = family(10, &all);
        found.sort_unstable();
        assert_eq!(found, [10, 11, 12, 13]);
    }

    #[test]
    fn a_living_family_is_killed() {
        let mut root =
            Command::new("sh").args(["-c", "sleep 987 & setsid sleep 987 & wait"]).stdin(Stdio::null()).process_group(0).spawn().unwrap();
        let sleepers = || {
            let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
            pids.collect::<Vec<u32>>()
        };
        let mine = |root: u32| family(root, &sleepers().into_iter().filter_map(stat).collect::<Vec<_>>());
        for _ in 0..200 {
            if mine(root.id()).len() == 3 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let before = mine(root.id());
        assert_eq!(before.len(), 3);
        kill(root.id(), sleepers);
        root.wait().unwrap();
        assert!(before.iter().all(|pid| stat(*pid).is_none_or(|k| k.zombie || k.parent == 0)), "{before:?}");
    }
}

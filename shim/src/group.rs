//! A process group that does not outlive the interest in it.
//!
//! It is noted in a bundle as long as it lives (`step.<leader>`, with the leader's start time, which tells it from a later process): should this
//! server be killed, whoever cleans up after it ends what is noted.
use crate::sys;
use std::path::{Path, PathBuf};

/// Beginning of a note's name.
const NOTE: &str = "step.";

/// Killed when this is dropped, unless it has ended.
pub struct Group {
    leader: Option<u32>,
    note: Option<PathBuf>,
}

impl Group {
    /// The group of this leader, which lives or is not known to have been reaped: its number is nobody else's.
    pub fn of(leader: u32) -> Group {
        Group { leader: Some(leader), note: None }
    }
    /// The same, noted in a bundle.
    pub fn noted(leader: u32, bundle: &Path) -> Group {
        let note = bundle.join(format!("{NOTE}{leader}"));
        let written = start_time(leader).is_some_and(|at| std::fs::write(&note, at).is_ok());
        Group { leader: Some(leader), note: written.then_some(note) }
    }
    /// Its leader has ended as it should; what that has left running is meant to.
    pub fn ended(&mut self) {
        self.leader = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.leader {
            sys::kill_group(leader);
        }
        if let Some(note) = &self.note {
            let _ = std::fs::remove_file(note);
        }
    }
}

/// Kills the groups that a killed server has left noted in a bundle.
pub fn end_noted(bundle: &Path) {
    for entry in std::fs::read_dir(bundle).into_iter().flatten().flatten() {
        let leader = entry.file_name().to_str().and_then(|n| n.strip_prefix(NOTE)?.parse().ok());
        if let Some(leader) = leader
            && start_time(leader) == std::fs::read_to_string(entry.path()).ok()
        {
            sys::kill_group(leader);
        }
    }
}

fn start_time(pid: u32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the parenthesised name: state is the 3rd field, the start time the 22nd.
    text.rsplit_once(')')?.1.split_whitespace().nth(19).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::Command;

    #[test]
    fn a_noted_group_is_ended_and_another_with_its_number_is_not() {
        let bundle = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("987").process_group(0).spawn().unwrap();
        let note = bundle.path().join(format!("{NOTE}{}", child.id()));
        std::fs::write(&note, "12345").unwrap();
        end_noted(bundle.path());
        assert!(child.try_wait().unwrap().is_none(), "an earlier one's note");
        let group = Group::noted(child.id(), bundle.path());
        end_noted(bundle.path());
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        drop(group);
        assert!(!note.exists());
    }
}

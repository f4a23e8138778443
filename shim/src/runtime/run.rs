//! One run of a binary to its end. Whoever stops waiting for it ends it, with all that is in its process group: a hung runtime costs its own call only.
use super::{ChildIo, Streams};
use crate::group::Group;
use crate::reaper::Reaper;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// Bytes of what it prints that are kept; the rest is read and forgotten, so that it never waits for us.
const PRINTED: usize = 4096;
/// Bytes at the end of its log that are looked at.
const LOGGED: u64 = 64 << 10;
/// Bytes of garbage that go into an error's text.
const QUOTED: usize = 300;

/// Runs a command to its end; `step` names it in errors, whose text is the last error of its log, or what it printed.
pub async fn run(mut command: Command, step: &str, log: &Path, io: Option<ChildIo>, reaper: &Reaper) -> io::Result<()> {
    let mut errors = None;
    match io {
        Some(ChildIo::Streams(Streams { stdin, stdout, stderr })) => {
            command.stdin(stdin).stdout(stdout).stderr(stderr);
        }
        Some(ChildIo::Terminal(_)) | None => {
            let (ours, theirs) = io::pipe()?;
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(theirs);
            errors = Some(pipe::Receiver::from_owned_fd(ours.into())?);
        }
    }
    let (began, binary) = (Instant::now(), command.get_program().to_string_lossy().into_owned());
    let child = command.process_group(0).spawn().map_err(|e| io::Error::new(e.kind(), format!("{binary}: {e}")))?;
    // Our copies of the write ends live in it.
    drop(command);
    let mut group = Group::noted(child.id(), log.parent().unwrap_or(log));
    let mut ended = reaper.wait(child.id(), began);
    let mut printed = Vec::new();
    let exit = tokio::select! {
        exit = &mut ended => exit,
        never = listen(&mut errors, &mut printed) => match never {},
    };
    group.ended();
    let exit = exit.map_err(|_| io::Error::other("the reaper ended"))?;
    if exit.code == 0 {
        let _ = std::fs::remove_file(log);
        return Ok(());
    }
    // What it wrote last. Whoever holds the pipe open beyond its end is not waited for.
    let mut buffer = [0; PRINTED];
    while let Some(n) = errors.as_ref().and_then(|e| e.try_read(&mut buffer).ok()).filter(|n| *n > 0 && printed.len() < PRINTED) {
        printed.extend_from_slice(&buffer[..n]);
    }
    Err(io::Error::other(match logged(log) {
        Some(Said { error: true, text }) => text,
        other => {
            let printed = String::from_utf8_lossy(&printed).trim().to_owned();
            let said = if printed.is_empty() { other.map(|said| said.text).unwrap_or_default() } else { printed };
            let how =
                if exit.code > 128 { format!("was killed by signal {}", exit.code - 128) } else { format!("ended with {}", exit.code) };
            if said.is_empty() { format!("{binary} {step} {how}") } else { format!("{binary} {step} {how}: {said}") }
        }
    }))
}

/// Reads what it prints, for as long as it is asked to.
async fn listen(errors: &mut Option<pipe::Receiver>, printed: &mut Vec<u8>) -> std::convert::Infallible {
    let mut buffer = [0; PRINTED];
    while let Some(from) = errors {
        match from.read(&mut buffer).await {
            Ok(n) if n > 0 => printed.extend_from_slice(&buffer[..n.min(PRINTED - printed.len())]),
            _ => *errors = None,
        }
    }
    std::future::pending().await
}

/// Runs a command in a process without a reaper, for at most `limit`. Did it succeed?
pub fn alone(mut command: Command, limit: Duration) -> bool {
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else { return false };
    let (mut group, end) = (Group::of(child.id()), Instant::now() + limit);
    let mut pause = Duration::from_millis(1);
    while Instant::now() < end {
        if let Ok(Some(status)) = child.try_wait() {
            group.ended();
            return status.success();
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    false
}

/// What a log ends with: its last error, or its last line, whatever that means.
struct Said {
    error: bool,
    text: String,
}

fn logged(log: &Path) -> Option<Said> {
    let mut file = std::fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOGGED))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOGGED).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let entries = || text.lines().rev().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    let error = entries().find(|e| e["level"] == "error" || e["level"] == "fatal").and_then(|e| e["msg"].as_str().map(str::to_owned));
    if let Some(error) = error.filter(|e| !e.trim().is_empty()) {
        return Some(Said { error: true, text: error.trim().to_owned() });
    }
    let last = text.lines().rev().find(|l| !l.trim().is_empty())?;
    Some(Said { error: false, text: last[..last.floor_char_boundary(QUOTED)].trim().to_owned() })
}

/// The last that a log says, for the error about a step that did not end.
pub fn last_words(log: &Path) -> Option<String> {
    logged(log).map(|said| said.text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn script(text: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        command
    }

    fn lives(pid: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    }

    #[tokio::test]
    async fn whoever_stops_waiting_ends_it_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let (reaper, pids) = (Reaper::modest(), dir.path().join("pids"));
        let text = format!("sleep 876 & echo $$ $! > {0}.draft; mv {0}.draft {0}; wait", pids.display());
        let log = dir.path().join("log");
        let running = run(script(&text), "create", &log, None, &reaper);
        let written = async {
            while !pids.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            done = running => panic!("{done:?}"),
            () = written => {}
        }
        let pids = std::fs::read_to_string(&pids).unwrap();
        for _ in 0..400 {
            if !pids.split_whitespace().any(lives) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{pids} live on");
    }

    #[tokio::test]
    async fn a_flood_of_errors_and_a_child_that_keeps_the_pipe_hold_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let (reaper, log) = (Reaper::modest(), dir.path().join("log"));
        let text = "head -c 300000 /dev/zero | tr '\\0' x >&2; sleep 15 & exit 7";
        let began = Instant::now();
        let error =
            tokio::time::timeout(Duration::from_secs(20), run(script(text), "delete", &log, None, &reaper)).await.unwrap().unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(14), "{:?}", began.elapsed());
        let text = error.to_string();
        assert!(text.starts_with("sh delete ended with 7: xxx") && text.len() < 5000, "{}", &text[..text.len().min(60)]);
    }

    #[tokio::test]
    async fn its_own_error_is_told_and_garbage_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let (reaper, log) = (Reaper::modest(), dir.path().join("log"));
        let path = log.display();
        for (text, expected) in [
            (format!(r#"printf '{{"level":"error","msg":"no such cgroup"}}\n\377\376{{"level"' > {path}; exit 1"#), "no such cgroup"),
            (format!(r"printf '\377\376 what is this\n\n' > {path}; exit 1"), "sh start ended with 1: \u{fffd}\u{fffd} what is this"),
            (format!("rm {path}; kill -9 $$"), "sh start was killed by signal 9"),
        ] {
            let error = run(script(&text), "start", &log, None, &reaper).await.unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}

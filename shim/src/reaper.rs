//! One reaper for all children: runtimes, containers' inits (orphans that come to us), execs.
use crate::sys;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// 128 + signal for killed ones.
    pub code: u32,
    /// When it was reaped.
    pub at: SystemTime,
}

/// Ends of processes that nobody has asked for yet.
const KEPT: usize = 256;

#[derive(Default)]
struct State {
    waiting: HashMap<u32, Vec<oneshot::Sender<Exit>>>,
    /// Oldest first; when each was reaped.
    kept: VecDeque<(u32, Instant, Exit)>,
}

/// The reaper.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<State>>);

impl Reaper {
    /// Starts it on the present runtime.
    pub fn start() -> std::io::Result<Reaper> {
        let reaper = Reaper::default();
        let (me, mut signals) = (reaper.clone(), signal(SignalKind::child())?);
        tokio::task::spawn(async move {
            loop {
                me.sweep();
                if signals.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn sweep(&self) {
        while let Some((pid, code)) = sys::reap(sys::ANY) {
            self.ended(pid, code);
        }
    }
    fn ended(&self, pid: u32, code: u32) {
        let exit = Exit { code, at: SystemTime::now() };
        let mut state = self.state();
        match state.waiting.remove(&pid) {
            Some(all) => all.into_iter().for_each(|w| {
                // Who asked may have gone.
                let _ = w.send(exit);
            }),
            None => {
                if state.kept.len() >= KEPT {
                    state.kept.pop_front();
                }
                state.kept.push_back((pid, Instant::now(), exit));
            }
        }
    }
    /// The end of a child; also if it has ended already. `born`: a moment before it was made, for an earlier process may have had its number.
    pub fn wait(&self, pid: u32, born: Instant) -> oneshot::Receiver<Exit> {
        let (tell, told) = oneshot::channel();
        let mut state = self.state();
        let known = state.kept.iter().rev().find(|(p, at, _)| *p == pid && *at >= born).map(|(.., exit)| *exit);
        state.kept.retain(|(p, ..)| *p != pid);
        match known {
            Some(exit) => {
                let _ = tell.send(exit);
            }
            None => state.waiting.entry(pid).or_default().push(tell),
        }
        told
    }
}

#[cfg(test)]
impl Reaper {
    /// One that reaps only what it is asked for: other tests of this process have children, too.
    pub fn modest() -> Reaper {
        let reaper = Reaper::default();
        let me = reaper.clone();
        tokio::spawn(async move {
            loop {
                let asked: Vec<u32> = me.state().waiting.keys().copied().collect();
                asked.into_iter().filter_map(|pid| sys::reap(pid as i32)).for_each(|(pid, code)| me.ended(pid, code));
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        });
        reaper
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_end_of_an_earlier_process_with_that_number_is_not_taken_for_its_own() {
        let reaper = Reaper::default();
        let keep = |code| reaper.state().kept.push_back((4711, Instant::now(), Exit { code, at: SystemTime::now() }));
        keep(3);
        std::thread::sleep(Duration::from_millis(2));
        let born = Instant::now();
        assert!(reaper.wait(4711, born).try_recv().is_err(), "another's");
        keep(5);
        assert_eq!(reaper.wait(4711, born).try_recv().unwrap().code, 5, "it was quicker than its caller");
        assert!(reaper.wait(4711, born).try_recv().is_err(), "told once");
    }
}

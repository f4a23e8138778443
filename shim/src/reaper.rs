//! One reaper for all children: runtimes, containers' inits (orphans that come to us), execs.
use crate::sys;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
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
    kept: BTreeMap<u32, Exit>,
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
        while let Some((pid, code)) = sys::reap() {
            let exit = Exit { code, at: SystemTime::now() };
            let mut state = self.state();
            match state.waiting.remove(&pid) {
                Some(all) => all.into_iter().for_each(|w| {
                    // Who asked may have gone.
                    let _ = w.send(exit);
                }),
                None => {
                    if state.kept.len() >= KEPT {
                        state.kept.pop_first();
                    }
                    state.kept.insert(pid, exit);
                }
            }
        }
    }
    /// The end of a child; also if it has ended already.
    pub fn wait(&self, pid: u32) -> oneshot::Receiver<Exit> {
        let (tell, told) = oneshot::channel();
        let mut state = self.state();
        match state.kept.remove(&pid) {
            Some(exit) => {
                let _ = tell.send(exit);
            }
            None => state.waiting.entry(pid).or_default().push(tell),
        }
        told
    }
}

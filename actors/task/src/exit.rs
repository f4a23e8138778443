//! The witnesses of an exit, and what is done with their word: waiters are answered, a lost exit is made durable, the bus hears of it once.
use crate::NAMESPACE;
use crate::container::{from_state, nanos};
use crate::link::{self, Link, rpc};
use crate::pod::{Container, Pod};
use crate::process::Process;
use kernel::{Cx, Fault, Result};
use messages::events::{Events, Publish};
use messages::task::Exit;
use proto::events::TaskExit;
use proto::prost_types::Timestamp;
use proto::task::StatsRequest;
use std::rc::Rc;
use std::time::Duration;

/// SIGKILL.
const KILLED: u32 = 137;
/// A shim that has just answered has the reason of an exit at hand; on a busy machine it may take its time all the same.
const REASON: Duration = Duration::from_secs(5);
/// A shim that was killed with its pod ends at the same time, but not in the same instant.
const DEAD: Duration = Duration::from_millis(100);
/// Nobody knows.
pub const UNKNOWN: u32 = 255;

impl Container {
    /// Takes a witness' word, unless an earlier one was taken.
    pub fn settle(&self, exit: Exit) {
        self.exit.send_if_modified(|e| {
            let first = e.is_none();
            e.get_or_insert(exit);
            first
        });
    }
    /// The end, when it comes.
    pub async fn wait(&self) -> Result<Exit> {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.map_err(|_| Fault::unavailable("shutting down"))?;
        ended.clone().ok_or_else(|| Fault::internal("no exit"))
    }
    /// An end that nobody saw.
    pub fn lost(&self, code: u32, witness: &str) -> Exit {
        Exit { code, at_ns: nanos(None), oom: self.oom.get(), witness: witness.to_owned() }
    }
}

enum Seen {
    Settled,
    Waited(Result<proto::task::WaitResponse>),
    Ended,
}

impl Pod {
    /// Keeps `Wait` open and a pidfd in hand until the container's end is known.
    pub fn watch(self: &Rc<Self>, cx: &Cx, link: &Link, container: &Rc<Container>) {
        if container.ended().is_some() || container.watched.replace(true) {
            return;
        }
        let (pod, link, c) = (self.clone(), link.clone(), container.clone());
        cx.spawn("task.wait", move |cx| async move {
            cx.step(format!("container {}", c.id));
            let process = Process::open(c.pid.get()).ok();
            let ended = async {
                match &process {
                    Some(p) => p.ended().await,
                    None => std::future::pending().await,
                }
                // The shim knows the code; it is given the time to say it, if it says anything at all.
                if pod.is_up() {
                    tokio::time::sleep(pod.args.timeouts.exit_grace).await;
                }
            };
            let seen = tokio::select! {
                _ = c.wait() => Seen::Settled,
                answer = link::wait(&cx, &link.task, &c.id, "") => Seen::Waited(answer),
                () = ended => Seen::Ended,
            };
            c.watched.set(false);
            match seen {
                Seen::Settled => {}
                Seen::Waited(Ok(w)) => pod.waited(&cx, &link, &c, w).await,
                Seen::Waited(Err(f)) if f.is_not_found() => pod.lose(&cx, &c, c.lost(UNKNOWN, "lost")).await,
                // The connection ended: the supervisor looks after it, and watches again if there is anything left to watch.
                Seen::Waited(Err(_)) => pod.suspect.notify_one(),
                Seen::Ended => pod.ended_unseen(&cx, &link, &c).await,
            }
        });
    }

    async fn waited(self: &Rc<Self>, cx: &Cx, link: &Link, c: &Rc<Container>, w: proto::task::WaitResponse) {
        // An OOM kill of any of its processes counts, however its init ended.
        let oom = c.oom.get() || self.saw_oom(cx, link, &c.id).await;
        c.settle(Exit { code: w.exit_status, at_ns: nanos(w.exited_at), oom, witness: "wait".into() });
        self.announce_later(cx, c);
    }

    /// The init has ended, and the shim has not said so.
    async fn ended_unseen(self: &Rc<Self>, cx: &Cx, link: &Link, c: &Rc<Container>) {
        let answer = if self.is_up() { self.ask_state(cx, link, &c.id).await } else { Err(Fault::unavailable("not asked")) };
        match answer {
            Ok(s) if s.status() == proto::types::Status::Stopped => {
                let exit = from_state(&s, c);
                let oom = exit.oom || self.saw_oom(cx, link, &c.id).await;
                c.settle(Exit { oom, ..exit });
            }
            answer => {
                if answer.is_err() {
                    self.suspect.notify_one();
                    // The clean-up after a dead shim learns more from its binary than this witness knows.
                    if self.shim_is_dead().await && tokio::time::timeout(self.args.timeouts.load, c.wait()).await.is_ok() {
                        return;
                    }
                }
                self.lose(cx, c, c.lost(if c.killed.get() { KILLED } else { UNKNOWN }, "pidfd")).await;
            }
        }
        self.announce_later(cx, c);
    }

    async fn shim_is_dead(&self) -> bool {
        match Process::open(self.shim_pid.get()) {
            Ok(shim) => shim.ended_within(DEAD).await,
            Err(_) => self.shim_pid.get() != 0,
        }
    }

    /// Did the container's cgroup see an OOM kill? Asked before `Delete`, while the cgroup is there.
    async fn saw_oom(&self, cx: &Cx, link: &Link, id: &str) -> bool {
        let request = StatsRequest { id: id.to_owned() };
        let asked = rpc(cx, "Task/Stats", REASON, |c| link.task.stats(c, &request)).await;
        let Ok(Some(any)) = asked.map(|a| a.stats) else { return false };
        if let Some(v2) = proto::from_any::<proto::cgroups2::Metrics>(&any) {
            return v2.memory_events.is_some_and(|m| m.oom_kill > 0);
        }
        proto::from_any::<proto::cgroups1::Metrics>(&any).and_then(|m| m.memory_oom_control).is_some_and(|m| m.oom_kill > 0)
    }

    /// The shim's event.
    pub fn told(&self, cx: &Cx, id: &str, exit: Exit) {
        let Ok(c) = self.container(id) else { return };
        c.announced.set(true);
        let settle = move |c: &Container| c.settle(Exit { oom: c.oom.get(), ..exit });
        if c.oom.get() || !c.watched.get() {
            return settle(&c);
        }
        // The kernel may have killed one of its processes: the other witness asks, and settles with the answer. If it has none, this word counts.
        cx.spawn("task.told", move |_| async move {
            let _ = tokio::time::timeout(REASON, c.wait()).await;
            settle(&c);
        });
    }

    /// An end that the shim will not tell: durable, then published.
    pub async fn lose(&self, cx: &Cx, c: &Rc<Container>, exit: Exit) {
        c.settle(exit);
        let known = c.ended();
        let saved = self.save(cx, |row| {
            if let Some(r) = row.containers.get_mut(&c.id) {
                r.exit = known;
            }
        });
        if let Err(e) = saved.await {
            tracing::warn!(container = c.id, error = %e, "an exit is not written down");
        }
        self.announce(cx, c).await;
    }

    /// Publishes the exit, if the shim has not done so after a while.
    pub fn announce_later(self: &Rc<Self>, cx: &Cx, c: &Rc<Container>) {
        let (pod, c) = (self.clone(), c.clone());
        cx.spawn("task.announce", move |cx| async move {
            tokio::time::sleep(pod.args.timeouts.exit_grace).await;
            pod.announce(&cx, &c).await;
        });
    }

    async fn announce(&self, cx: &Cx, c: &Container) {
        let Some(exit) = c.ended() else { return };
        if c.announced.replace(true) {
            return;
        }
        let exited_at = Timestamp { seconds: exit.at_ns.div_euclid(1_000_000_000), nanos: exit.at_ns.rem_euclid(1_000_000_000) as i32 };
        let event =
            TaskExit { container_id: c.id.clone(), id: c.id.clone(), pid: c.pid.get(), exit_status: exit.code, exited_at: Some(exited_at) };
        let publish = Publish { namespace: NAMESPACE.into(), topic: "/tasks/exit".into(), payload: proto::any(&event), at: None };
        if let Err(e) = cx.system().addr::<Events>().call(cx, publish).await {
            tracing::warn!(container = c.id, error = %e, "an exit is not published");
        }
    }

    /// Answers everybody who waits for a container that is no more.
    pub fn settle_all(&self, why: &str) {
        for c in self.containers.borrow().values() {
            if c.ended().is_none() {
                tracing::info!(container = c.id, why, "ended without a witness");
            }
            c.settle(c.lost(KILLED, "lost"));
        }
    }
}

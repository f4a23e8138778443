//! A pod as its child actor holds it: row, link to the shim, containers. Shared by the operations of one generation, on one thread.
use crate::link::Link;
use crate::process::Process;
use crate::row::Row;
use crate::{Args, bundle};
use kernel::{Cx, Fault, Result};
use messages::task::Exit;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// How the shim is.
#[derive(Clone)]
pub enum State {
    /// Being started or adopted.
    Connecting,
    /// Answers.
    Up(Link),
    /// Connected, but does not answer: why. Quarantined: calls fail at once until it answers again.
    Deaf(String),
    /// Ended: why.
    Gone(String),
}

/// A pod.
pub struct Pod {
    /// Sandbox id.
    pub id: String,
    /// Configuration.
    pub args: Arc<Args>,
    /// The row.
    pub row: RefCell<Row>,
    /// How the shim is.
    pub state: watch::Sender<State>,
    /// Wakes the supervisor: a call was not answered, or the connection ended.
    pub suspect: Notify,
    /// Process of the shim, once known.
    pub shim_pid: Cell<u32>,
    /// Being removed: its end is no accident.
    pub removing: Cell<bool>,
    /// Containers whose `Create` is under way in this generation.
    pub creating: RefCell<HashSet<String>>,
    /// Execs that callers of this generation wait for.
    pub execs: RefCell<HashSet<String>>,
    /// Execs of sessions that were closed while the shim could not be told.
    pub closed: RefCell<HashSet<String>>,
    /// Containers by id.
    pub containers: RefCell<HashMap<String, Rc<Container>>>,
}

/// A container.
pub struct Container {
    /// Id.
    pub id: String,
    /// Pid of the init, 0 = unknown.
    pub pid: Cell<u32>,
    /// Its end.
    pub exit: watch::Sender<Option<Exit>>,
    /// An OOM kill was reported.
    pub oom: Cell<bool>,
    /// Killed without its shim, which did not answer.
    pub killed: Cell<bool>,
    /// Somebody keeps `Wait` open.
    pub watched: Cell<bool>,
    /// The bus has had its exit.
    pub announced: Cell<bool>,
    /// The binary's `delete` has given back what it had.
    pub given_back: Cell<bool>,
    /// Held by the one who deletes: an ended task is deleted by its watcher, and by whoever removes the container.
    pub deleting: tokio::sync::Mutex<()>,
}

impl Container {
    /// A container that runs, or has ended.
    pub fn new(id: &str, exit: Option<Exit>) -> Rc<Container> {
        let exit = watch::channel(exit).0;
        Rc::new(Container {
            id: id.to_owned(),
            pid: Cell::new(0),
            exit,
            oom: Cell::new(false),
            killed: Cell::new(false),
            watched: Cell::new(false),
            announced: Cell::new(false),
            given_back: Cell::new(false),
            deleting: tokio::sync::Mutex::new(()),
        })
    }
    /// Its end, if it has ended.
    pub fn ended(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }
}

impl Pod {
    /// A pod.
    pub fn new(id: &str, args: Arc<Args>, row: Row) -> Rc<Pod> {
        let containers = row.containers.iter().map(|(id, r)| (id.clone(), Container::new(id, r.exit.clone()))).collect();
        Rc::new(Pod {
            id: id.to_owned(),
            args,
            row: RefCell::new(row),
            state: watch::channel(State::Connecting).0,
            suspect: Notify::new(),
            shim_pid: Cell::new(0),
            removing: Cell::new(false),
            creating: RefCell::default(),
            execs: RefCell::default(),
            closed: RefCell::default(),
            containers: RefCell::new(containers),
        })
    }
    /// Its bundle.
    pub fn bundle(&self) -> PathBuf {
        bundle::sandboxes(&self.args).join(&self.id)
    }
    /// A container's bundle.
    pub fn bundle_of(&self, container: &str) -> PathBuf {
        bundle::tasks(&self.args).join(container)
    }
    /// A container.
    pub fn container(&self, id: &str) -> Result<Rc<Container>> {
        let found = self.containers.borrow().get(id).cloned();
        found.ok_or_else(|| Fault::not_found(format!("container {id} has no task")))
    }
    /// The link; waits while the shim is being adopted, fails at once when it is deaf or gone.
    pub async fn link(&self, cx: &Cx) -> Result<Link> {
        let limit = cx.remaining().map_or(self.args.timeouts.load, |r| r.min(self.args.timeouts.load));
        let mut state = self.state.subscribe();
        let known = tokio::time::timeout(limit, state.wait_for(|s| !matches!(s, State::Connecting))).await;
        match known {
            Err(_) => Err(Fault::unavailable(format!("the shim of pod {} is still being connected", self.id))),
            Ok(Err(_)) => Err(Fault::unavailable("shutting down")),
            Ok(Ok(state)) => match &*state {
                State::Up(link) => Ok(link.clone()),
                State::Deaf(why) => {
                    Err(Fault::unavailable(format!("the shim of pod {} is deaf ({why}); it is tried again in the background", self.id)))
                }
                State::Gone(why) => Err(Fault::unavailable(format!("the shim of pod {} is gone: {why}", self.id))),
                State::Connecting => Err(Fault::unavailable("connecting")),
            },
        }
    }
    /// Passes a result on, and has the shim probed if it did not answer.
    pub fn watch_for_silence<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(f) = &result
            && (crate::link::is_silence(f) || f.class == kernel::Class::Unavailable)
        {
            self.suspect.notify_one();
        }
        let which = format!("pod {}", self.id);
        result.map_err(|f| if f.message.starts_with(&which) { f } else { f.context(which) })
    }
    /// A call that fails early when its shim turns out to be deaf, or ends, meanwhile.
    pub async fn ask<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let mut state = self.state.subscribe();
        let deaf = async {
            tokio::time::sleep(self.args.timeouts.suspicion).await;
            self.suspect.notify_one();
            // A shim that works on something long still answers the probe.
            let _ = state.wait_for(|s| matches!(s, State::Deaf(_) | State::Gone(_))).await;
        };
        let result = tokio::select! {
            result = call => result,
            () = deaf => Err(Fault::unavailable(format!("the shim of pod {} stopped answering", self.id))),
        };
        self.watch_for_silence(result)
    }
    /// Does the shim answer?
    pub fn is_up(&self) -> bool {
        matches!(&*self.state.borrow(), State::Up(_))
    }
    /// Ends a process for certain: SIGKILL, then waits for its end.
    pub async fn end(&self, process: &Process, limit: Duration) -> Result<()> {
        process.kill();
        if process.ended_within(limit).await {
            Ok(())
        } else {
            Err(Fault::deadline_exceeded(format!("pod {}: a process survives SIGKILL for {limit:?}", self.id)))
        }
    }
    /// Waits until the shim is gone; answers why.
    pub async fn ended(&self) -> Result<String> {
        let mut state = self.state.subscribe();
        match &*state.wait_for(|s| matches!(s, State::Gone(_))).await.map_err(|_| Fault::unavailable("shutting down"))? {
            State::Gone(why) => Ok(why.clone()),
            _ => Err(Fault::internal("the shim is not gone")),
        }
    }
    /// Is the shim gone?
    pub fn is_gone(&self) -> bool {
        matches!(&*self.state.borrow(), State::Gone(_))
    }
    /// Hands the shim's spans over to the trace of `cx`, in the background.
    pub fn collect_spans(&self, cx: &Cx, link: &Link) {
        if !link.troupe {
            return;
        }
        let (link, limit, origin) = (link.clone(), self.args.timeouts.stats, cx.without_deadline());
        cx.spawn("shim.spans", move |cx| async move {
            let request = proto::shim::SpansRequest {};
            let Ok(answer) = crate::link::rpc(&cx, "Shim/Spans", limit, |c| link.shim.spans(c, &request)).await else { return };
            for s in answer.spans {
                let at = |nanos| std::time::UNIX_EPOCH + Duration::from_nanos(nanos);
                origin.record_span(s.name, at(s.start_unix_nanos), at(s.end_unix_nanos), s.ok, s.attrs.into_iter().collect());
            }
        });
    }
}

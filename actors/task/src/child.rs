//! The child actor `task.shim/<sandbox id>`: the owner of one shim. It rebuilds itself from row, bundle and shim.
use crate::Args;
use crate::adopt::supervise;
use crate::pod::{Pod, State as Link};
use crate::row::Row;
use kernel::{Actor, Cx, Handle, Message, Protocol, Reply, Result, Routes};
use messages::store::{Get, Store, decode, table};
use messages::task::{
    Adopted, Checkpoint, CloseInput, CloseSession, Create, Delete, ExecSync, Exit, JoinStreams, Kill, OpenSession, RemoveSandbox,
    ReopenLog, Resize, RunExec, Start, StartSandbox, State, Stats, StopSandbox, Tasks, Update, UpdateSandbox, Wait, WaitExec, WaitSandbox,
};
use std::rc::Rc;
use std::sync::Arc;

/// Protocol of the children: the parent's messages, wrapped, and what the bus says.
pub struct TaskShim;
impl Protocol for TaskShim {
    const ACTOR: &'static str = "task.shim";
}

/// A message of the parent's protocol, passed on.
pub struct For<M>(pub M);
impl<M: Message<To = Tasks>> Message for For<M> {
    type To = TaskShim;
    type Reply = M::Reply;
    const NAME: &'static str = M::NAME;
    const IDEMPOTENT: bool = M::IDEMPOTENT;
    fn again(&self) -> Option<Self> {
        self.0.again().map(For)
    }
}

/// The shim's event of an exit.
#[derive(Clone, Debug)]
pub struct Exited {
    /// Container id.
    pub id: String,
    /// Its end.
    pub exit: Exit,
}
/// The shim's event of an OOM kill.
#[derive(Clone, Debug)]
pub struct Oom {
    /// Container id.
    pub id: String,
}
kernel::messages! { TaskShim = "task.shim" => { Exited -> () as idempotent, Oom -> () as idempotent, } }

/// Arguments of a child.
#[derive(Clone)]
pub struct ChildArgs {
    /// Configuration.
    pub args: Arc<Args>,
    /// Sandbox id.
    pub id: String,
    /// The first generation finds nothing: `StartSandbox` comes.
    pub fresh: bool,
}

/// The actor.
pub struct Child {
    pod: Rc<Pod>,
}

impl Actor for Child {
    type Proto = TaskShim;
    type Args = ChildArgs;
    async fn start(args: ChildArgs, cx: Cx) -> Result<Self> {
        if args.fresh && cx.generation() == 1 {
            return Ok(Child { pod: Pod::new(&args.id, args.args, Row { id: args.id.clone(), ..Default::default() }) });
        }
        let row = cx.system().addr::<Store>().call(&cx, Get { table: table::TASKS, key: args.id.clone() }).await?;
        let row = match row {
            Some(bytes) => decode::<Row>(&bytes)?,
            None => Row { id: args.id.clone(), ..Default::default() },
        };
        let pod = Pod::new(&args.id, args.args, row);
        supervise(&pod, &cx, true);
        Ok(Child { pod })
    }
    fn routes() -> Routes<Self> {
        let r = Routes::new()
            .on::<For<StartSandbox>>()
            .on::<For<UpdateSandbox>>()
            .on::<For<StopSandbox>>()
            .on::<For<RemoveSandbox>>()
            .on::<For<Create>>()
            .on::<For<Start>>();
        let r = r
            .on::<For<Kill>>()
            .on::<For<Wait>>()
            .on::<For<Delete>>()
            .on::<For<State>>()
            .on::<For<Update>>()
            .on::<For<Checkpoint>>()
            .on::<For<ExecSync>>();
        let r = r.on::<For<OpenSession>>().on::<For<RunExec>>().on::<For<WaitExec>>().on::<For<JoinStreams>>();
        let r = r.on::<For<Resize>>().on::<For<CloseInput>>().on::<For<CloseSession>>();
        r.on::<For<ReopenLog>>().on::<For<Stats>>().on::<For<Adopted>>().on::<For<WaitSandbox>>().on::<Exited>().on::<Oom>()
    }
}

macro_rules! handle { ($($message:ty => |$pod:ident, $m:ident, $cx:ident| $answer:expr;)*) => { $(
    impl Handle<For<$message>> for Child {
        fn handle(&mut self, For($m): For<$message>, $cx: Cx) -> Reply<<$message as Message>::Reply> {
            let $pod = self.pod.clone();
            Reply::op($answer)
        }
    }
)* } }

handle! {
    StartSandbox => |pod, m, cx| async move {
        let handle = pod.clone().start(cx.clone(), m).await?;
        supervise(&pod, &cx, false);
        Ok(handle)
    };
    UpdateSandbox => |pod, m, cx| pod.update_sandbox(cx, m.resources);
    StopSandbox => |pod, _m, cx| pod.stop(cx);
    RemoveSandbox => |pod, _m, cx| pod.remove(cx.without_deadline());
    WaitSandbox => |pod, _m, _cx| async move { pod.ended().await };
    Create => |pod, m, cx| pod.create(cx, m);
    Start => |pod, m, cx| pod.start_task(cx, m.id);
    Kill => |pod, m, cx| pod.kill(cx, m);
    Wait => |pod, m, _cx| async move { pod.container(&m.id)?.wait().await };
    Delete => |pod, m, cx| pod.delete(cx, m.id);
    State => |pod, m, cx| pod.state_of(cx, m.id);
    Update => |pod, m, cx| pod.update(cx, m.id, m.resources);
    Checkpoint => |pod, m, cx| pod.checkpoint(cx, m);
    ExecSync => |pod, m, cx| pod.exec(cx, m);
    OpenSession => |pod, m, cx| pod.open_session(cx, m);
    RunExec => |pod, m, cx| pod.run_session(cx, m);
    WaitExec => |pod, m, cx| pod.wait_session(cx, m);
    JoinStreams => |pod, m, cx| pod.join_streams(cx, m);
    Resize => |pod, m, cx| pod.resize(cx, m);
    CloseInput => |pod, m, cx| pod.close_input(cx, m);
    CloseSession => |pod, m, cx| pod.close_session(cx.without_deadline(), m);
    ReopenLog => |pod, m, cx| pod.reopen_log(cx, m.id);
    Stats => |pod, m, cx| pod.stats(cx, m.id);
    Adopted => |pod, _m, _cx| async move {
        if matches!(&*pod.state.borrow(), Link::Gone(_)) {
            return Ok(Vec::new());
        }
        Ok(std::iter::once(pod.id.clone()).chain(pod.containers.borrow().keys().cloned()).collect())
    };
}

impl Handle<Exited> for Child {
    fn handle(&mut self, m: Exited, cx: Cx) -> Reply<()> {
        self.pod.told(&cx, &m.id, m.exit);
        Reply::ok(())
    }
}

impl Handle<Oom> for Child {
    fn handle(&mut self, m: Oom, _cx: Cx) -> Reply<()> {
        if let Ok(c) = self.pod.container(&m.id) {
            c.oom.set(true);
        }
        Reply::ok(())
    }
}

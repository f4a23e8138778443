//! The child actor `sandbox.pod/<id>`: one pod and its containers.
//!
//! Owns: the pod's rows, files and mounts, its place in the published picture. Talks to: `network`, `task`, `image`, `snapshot`, `store`, `events`.
//! States: see [`record::PodPhase`](crate::record::PodPhase) and [`record::Phase`](crate::record::Phase). On a crash it costs the calls of its own pod
//! only; the next generation reads the rows again, takes down what was half made, and watches what runs. Spans: each step of making and ending.
//! Limits: one operation at a time on the pod as a whole and on each container; stops never hold a lock while they wait.
use crate::record::boot_id;
use crate::slots::Slot;
use crate::world::World;
use crate::{Args, checkpoint, container, pod, recover};
use kernel::{Actor, Cx, Handle, Message, Protocol, Reply, Result, Routes};
use messages::sandbox::*;
use proto::cri;
use std::rc::Rc;
use std::sync::Arc;

/// Protocol of the children: the parent's messages, wrapped.
pub struct SandboxPod;
impl Protocol for SandboxPod {
    const ACTOR: &'static str = "sandbox.pod";
}

/// A message of the parent's protocol, passed on.
pub struct For<M>(pub M);
impl<M: Message<To = Sandboxes>> Message for For<M> {
    type To = SandboxPod;
    type Reply = M::Reply;
    const NAME: &'static str = M::NAME;
    const IDEMPOTENT: bool = M::IDEMPOTENT;
    fn again(&self) -> Option<Self> {
        self.0.again().map(For)
    }
}

/// Arguments of a child.
#[derive(Clone)]
pub struct ChildArgs {
    /// What every pod needs.
    pub args: Args,
    /// The pod's slot.
    pub slot: Arc<Slot>,
}

/// The actor.
pub struct PodActor(Rc<World>);

impl Actor for PodActor {
    type Proto = SandboxPod;
    type Args = ChildArgs;
    async fn start(child: ChildArgs, cx: Cx) -> Result<Self> {
        let boot = boot_id();
        let rows = match child.slot.take_seed() {
            Some(rows) => rows,
            None => recover::read(&child.args, &child.slot.id, &boot, &cx).await?,
        };
        let world = Rc::new(World::new(child.args, child.slot, boot, rows));
        world.publish_own();
        recover::run(&world, &cx);
        Ok(PodActor(world))
    }
    fn routes() -> Routes<Self> {
        let r = Routes::new().on::<For<RunPod>>().on::<For<StopPod>>().on::<For<RemovePod>>().on::<For<UpdatePod>>();
        let r = r.on::<For<CreateContainer>>().on::<For<StartContainer>>().on::<For<StopContainer>>().on::<For<RemoveContainer>>();
        r.on::<For<UpdateContainer>>().on::<For<ReopenLog>>().on::<For<ExecSync>>().on::<For<ExecProcess>>().on::<For<Checkpoint>>()
    }
}

macro_rules! operations { ($($message:ident($world:ident, $m:ident, $cx:ident) -> $reply:ty = $run:expr;)*) => { $(
    impl Handle<For<$message>> for PodActor {
        fn handle(&mut self, For($m): For<$message>, $cx: Cx) -> Reply<$reply> {
            let $world = self.0.clone();
            let call = $world.slot.enter();
            Reply::op(async move {
                let _call = call;
                $run
            })
        }
    }
)* } }

operations! {
    RunPod(world, m, cx) -> String = pod::run(&world, &cx, m).await;
    StopPod(world, m, cx) -> () = { let _ = m; pod::stop(&world, &cx).await };
    RemovePod(world, m, cx) -> () = { let _ = m; pod::remove(&world, &cx).await };
    UpdatePod(world, m, cx) -> () = pod::update(&world, &cx, m.request).await;
    CreateContainer(world, m, cx) -> String = container::create(&world, &cx, m).await;
    StartContainer(world, m, cx) -> () = container::start(&world, &cx, &m.id).await;
    StopContainer(world, m, cx) -> () = container::stop(&world, &cx, &m.id, m.grace_s).await;
    RemoveContainer(world, m, cx) -> () = container::remove(&world, &cx, &m.id).await;
    UpdateContainer(world, m, cx) -> () = container::update(&world, &cx, m.request).await;
    Checkpoint(world, m, cx) -> () = checkpoint::run(&world, &cx, m.request).await;
    ReopenLog(world, m, cx) -> () = container::reopen_log(&world, &cx, m.id).await;
    ExecSync(world, m, cx) -> cri::ExecSyncResponse = container::exec(&world, &cx, m).await;
    ExecProcess(world, m, _cx) -> (String, Vec<u8>) = container::exec_process(&world, &m.id, &m.cmd, m.terminal);
}

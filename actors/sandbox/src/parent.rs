//! The parent actor `sandbox`: knows which pod has which container, and passes every message on to that pod's own actor. It waits for no pod, and a pod
//! that crashes costs its own calls only.
use crate::child::{ChildArgs, For, PodActor, SandboxPod};
use crate::record::{boot_id, new_id, pod_name};
use crate::slots::{Call, Slot};
use crate::{Args, publish, recover, status};
use kernel::{Actor, Addr, Cx, Fault, Handle, Message, Reply, Result, Routes};
use messages::sandbox::*;
use proto::cri;
use std::sync::Arc;
use std::time::Duration;

/// A creation goes on when its client goes away or gives up, so that a retry can join it; but not for ever.
const CREATION: Duration = Duration::from_secs(600);

/// The actor.
pub struct SandboxActor(Args);

impl Actor for SandboxActor {
    type Proto = Sandboxes;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        // A later generation finds the slots, and the picture is kept by the pods themselves.
        if !args.view.0.load().recovered {
            let pods = recover::read_all(&args, &boot_id(), &cx).await?;
            publish::everything(&args, &pods);
            for (id, rows) in pods {
                let name = rows.0.as_ref().map(|p| pod_name(&p.config.0)).transpose()?.unwrap_or_default();
                let labels = rows.0.iter().map(|p| &p.label).chain(rows.1.iter().map(|c| &c.label));
                labels.for_each(|label| args.selinux.reserve(label));
                args.slots.add(&id, &name, rows);
            }
        }
        for slot in args.slots.all() {
            give_birth(&args, &cx, &slot);
        }
        let probing = args.clone();
        cx.spawn("probe user namespaces", move |cx| async move { status::probe(&probing, &cx).await });
        let kept = args.clone();
        cx.spawn("sandbox.reap", move |cx| async move {
            loop {
                for id in kept.slots.take_unused() {
                    cx.system().stop_child::<SandboxPod>(&id).await;
                }
                kept.slots.idle().await;
            }
        });
        Ok(SandboxActor(args))
    }
    fn routes() -> Routes<Self> {
        let r = Routes::new().on::<RunPod>().on::<StopPod>().on::<RemovePod>().on::<UpdatePod>().on::<CreateContainer>();
        let r = r.on::<StartContainer>().on::<StopContainer>().on::<RemoveContainer>().on::<UpdateContainer>().on::<ReopenLog>();
        r.on::<ExecSync>().on::<ExecProcess>().on::<Checkpoint>().on::<Status>().on::<UpdateRuntimeConfig>()
    }
}

/// Starts the pod's actor, unless it lives. Waits for nothing: what is sent to it waits in its mailbox.
fn give_birth(args: &Args, cx: &Cx, slot: &Arc<Slot>) {
    let born = cx.system().spawn_child_soon::<PodActor>(&slot.id, ChildArgs { args: args.clone(), slot: slot.clone() });
    if let Err(error) = born
        && !error.is_already_exists()
    {
        tracing::error!(%error, id = slot.id, "a pod's actor cannot be started");
    }
}

fn child(cx: &Cx, id: &str) -> Addr<SandboxPod> {
    cx.system().child(id)
}

/// Passes a message on to a pod; the pod's slot is held meanwhile.
fn pass<M: Message<To = Sandboxes>>(call: Call, m: M, cx: Cx) -> Reply<M::Reply> {
    Reply::op(async move { child(&cx, &call.0.id).call(&cx, For(m)).await })
}

impl SandboxActor {
    /// The pod that has a container.
    fn owner(&self, container: &str) -> Option<Call> {
        let picture = self.0.view.0.load();
        picture.containers.get(container).and_then(|c| self.0.slots.of_id(&c.sandbox_id))
    }
    fn to_owner<M: Message<To = Sandboxes>>(&self, container: &str, m: M, cx: Cx) -> Reply<M::Reply> {
        match self.owner(container) {
            Some(call) => pass(call, m, cx),
            None => Reply::err(Fault::not_found(format!("container {container:?} not found"))),
        }
    }
}

impl Handle<RunPod> for SandboxActor {
    fn handle(&mut self, m: RunPod, cx: Cx) -> Reply<String> {
        let name = match pod_name(&m.config) {
            Ok(name) => name,
            Err(fault) => return Reply::err(fault),
        };
        let call = self.0.slots.of_name(&name, new_id);
        give_birth(&self.0, &cx, &call.0);
        pass(call, m, cx.without_deadline().with_timeout(CREATION))
    }
}

impl Handle<CreateContainer> for SandboxActor {
    fn handle(&mut self, m: CreateContainer, cx: Cx) -> Reply<String> {
        match self.0.slots.of_id(&m.sandbox_id) {
            Some(call) => pass(call, m, cx.without_deadline().with_timeout(CREATION)),
            None => Reply::err(Fault::not_found(format!("sandbox {:?} not found", m.sandbox_id))),
        }
    }
}

impl Handle<UpdatePod> for SandboxActor {
    fn handle(&mut self, m: UpdatePod, cx: Cx) -> Reply<()> {
        match self.0.slots.of_id(&m.request.pod_sandbox_id) {
            Some(call) => pass(call, m, cx),
            None => Reply::err(Fault::not_found(format!("sandbox {:?} not found", m.request.pod_sandbox_id))),
        }
    }
}

/// Messages that succeed when what they are about is absent.
macro_rules! to_the_end { ($($message:ident by $find:ident;)*) => { $(
    impl Handle<$message> for SandboxActor {
        fn handle(&mut self, m: $message, cx: Cx) -> Reply<()> {
            match self.$find(&m.id) {
                Some(call) => pass(call, m, cx),
                None => Reply::ok(()),
            }
        }
    }
)* } }
to_the_end! { StopPod by pod; RemovePod by pod; StopContainer by owner; RemoveContainer by owner; }

impl SandboxActor {
    fn pod(&self, id: &str) -> Option<Call> {
        self.0.slots.of_id(id)
    }
}

/// Messages about a container that must exist.
macro_rules! to_the_owner { ($($message:ident.$($field:ident).+ -> $reply:ty;)*) => { $(
    impl Handle<$message> for SandboxActor {
        fn handle(&mut self, m: $message, cx: Cx) -> Reply<$reply> {
            self.to_owner(&m.$($field).+.clone(), m, cx)
        }
    }
)* } }
to_the_owner! {
    StartContainer.id -> ();
    UpdateContainer.request.container_id -> ();
    Checkpoint.request.container_id -> ();
    ReopenLog.id -> ();
    ExecSync.id -> cri::ExecSyncResponse;
    ExecProcess.id -> (String, Vec<u8>);
}

impl Handle<Status> for SandboxActor {
    fn handle(&mut self, m: Status, cx: Cx) -> Reply<cri::StatusResponse> {
        let args = self.0.clone();
        Reply::op(async move { status::status(&args, &cx, m.verbose).await })
    }
}

impl Handle<UpdateRuntimeConfig> for SandboxActor {
    fn handle(&mut self, m: UpdateRuntimeConfig, cx: Cx) -> Reply<()> {
        let network = self.0.network.clone();
        Reply::op(async move { network.call(&cx, messages::network::Configure { pod_cidr: m.pod_cidr }).await })
    }
}

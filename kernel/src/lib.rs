//! The microkernel: mechanism only. Actors, envelopes, addresses, supervision, deadlines, operations, flight recorder, fault injection, metrics.
//! It knows nothing of containers. `kernel/README.md` has the model on a page.
#![deny(unsafe_code)]
mod addr;
mod alone;
mod blocking;
mod cell;
mod chaos;
mod crash;
mod cx;
mod dying;
mod fault;
mod manifest;
mod message;
mod metrics;
mod operation;
mod recorder;
pub mod saga;
mod scope;
mod system;
pub mod testing;
mod thread;

pub use addr::Addr;
pub use blocking::BlockingInfo;
pub use chaos::{Chaos, FaultKind, Rule};
pub use cx::Cx;
pub use dying::dying;
pub use fault::{Class, Fault, Result, ResultExt, absent};
pub use manifest::{Isolation, Manifest, Restart, Spec, Strategy};
pub use message::{Message, Protocol};
pub use operation::{OpInfo, Operation};
pub use recorder::{SpanKind, SpanRecord};
pub use saga::{Journal, Outcome, Saga, Step};
pub use scope::{Scoped, current};
pub use system::{ActorInfo, Health, Options, SpanWatch, System};

use futures::future::LocalBoxFuture;
use std::any::TypeId;
use std::collections::HashMap;
use std::future::Future;

/// An actor: its state lives outside; each generation is rebuilt by [`Actor::start`].
pub trait Actor: Sized + 'static {
    /// What it speaks.
    type Proto: Protocol;
    /// Configuration and addresses, the same for every generation.
    type Args: Clone + Send + Sync + 'static;
    /// First start and restart: rebuild from what is outside. Messages queue meanwhile; long recovery goes into [`Cx::spawn`].
    fn start(args: Self::Args, cx: Cx) -> impl Future<Output = Result<Self>> + 'static;
    /// The messages it handles.
    fn routes() -> Routes<Self>;
    /// Orderly shutdown only.
    fn stopping(&mut self, _cx: Cx) -> impl Future<Output = ()> {
        async {}
    }
}

/// Handling of one kind of message. Never blocks, never slow: slow work is a [`Reply::op`].
pub trait Handle<M: Message>: Actor {
    /// Handles it.
    fn handle(&mut self, m: M, cx: Cx) -> Reply<M::Reply>;
}

/// An answer now, or an operation that will have it.
pub enum Reply<R> {
    /// Now.
    Now(Result<R>),
    /// Later; the actor goes on answering others.
    Op(LocalBoxFuture<'static, Result<R>>),
    /// The same, dropped when nobody waits for the answer any more.
    Wanted(LocalBoxFuture<'static, Result<R>>),
}

impl<R> Reply<R> {
    /// A value.
    pub fn ok(value: R) -> Self {
        Reply::Now(Ok(value))
    }
    /// A fault.
    pub fn err(fault: Fault) -> Self {
        Reply::Now(Err(fault))
    }
    /// An operation owned by this generation.
    pub fn op(f: impl Future<Output = Result<R>> + 'static) -> Self {
        Reply::Op(Box::pin(f))
    }
    /// An operation that ends with its caller: when the caller has gone away (its client has, or its deadline has passed), the future is dropped, and
    /// what it owns has to give itself back.
    pub fn while_wanted(f: impl Future<Output = Result<R>> + 'static) -> Self {
        Reply::Wanted(Box::pin(f))
    }
}

impl<R> From<Result<R>> for Reply<R> {
    fn from(result: Result<R>) -> Self {
        Reply::Now(result)
    }
}

type Route<A> = Box<dyn Fn(&mut A, Box<dyn std::any::Any + Send>, Cx) -> cell::ErasedReply>;

/// The dispatch table of an actor.
pub struct Routes<A>(pub(crate) HashMap<TypeId, Route<A>>);

impl<A: Actor> Default for Routes<A> {
    fn default() -> Self {
        Self::new()
    }
}

impl<A: Actor> Routes<A> {
    /// Empty.
    pub fn new() -> Self {
        Routes(HashMap::new())
    }
    /// Adds a message.
    pub fn on<M: Message>(mut self) -> Self
    where
        A: Handle<M>,
    {
        let route: Route<A> = Box::new(|actor, body, cx| match body.downcast::<M>() {
            Ok(m) => cell::erase(actor.handle(*m, cx)),
            Err(_) => cell::ErasedReply::Now(Err(Fault::internal(format!("{}: body of another type", M::NAME)))),
        });
        self.0.insert(TypeId::of::<M>(), route);
        self
    }
}

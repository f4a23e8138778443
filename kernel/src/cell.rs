//! The guarded cell: one generation of one actor, hosted by actix. No panic ever reaches actix; the mailbox is outside and survives.
use crate::addr::{Entry, Env};
use crate::chaos::FaultKind;
use crate::cx::Cx;
use crate::recorder::SpanKind;
use crate::{Actor, Fault, Reply, Result, Routes};
use actix::prelude::{ActorContext, ActorFutureExt, AsyncContext, Context};
use futures::future::LocalBoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{self, Poll};
use std::time::{Duration, Instant};

/// Messages handled before other actors of the thread get their turn.
const BUDGET: usize = 32;

/// After a message an actor looks for the next one for so long before its thread may sleep: waking a thread costs 20 µs and more on each side, and
/// messages come in bursts. Costs at most this much of a core for each burst, and nothing when idle.
const LINGER: Duration = Duration::from_micros(40);

type Spawned = Rc<RefCell<Vec<LocalBoxFuture<'static, ()>>>>;
thread_local! { static CURRENT: RefCell<Option<Spawned>> = const { RefCell::new(None) } }

/// Spawns a background future into the generation that is being polled on this thread.
pub(crate) fn spawn_local(cx: Cx, f: impl Future<Output = ()> + 'static) {
    let spawned = CURRENT.with(|c| c.borrow().clone());
    match spawned {
        Some(list) => list.borrow_mut().push(Box::pin(f)),
        None => tracing::error!(actor = cx.actor(), "a background task was spawned outside of an actor and is dropped"),
    }
}

/// How a generation ended.
pub(crate) enum End {
    /// Panicked or failed to start.
    Crash(String, crate::crash::Trace),
    /// Asked to stop.
    Stopped,
    /// Another generation took over: by the watchdog, or with an actor that this one depends on.
    Replaced,
}

pub(crate) type Erased = Box<dyn Any + Send>;
pub(crate) enum ErasedReply {
    Now(Result<Erased>),
    Op(LocalBoxFuture<'static, Result<Erased>>),
    Wanted(LocalBoxFuture<'static, Result<Erased>>),
}

pub(crate) fn erase<R: Send + 'static>(reply: Reply<R>) -> ErasedReply {
    match reply {
        Reply::Now(r) => ErasedReply::Now(r.map(|v| Box::new(v) as Erased)),
        Reply::Op(f) => ErasedReply::Op(Box::pin(async move { f.await.map(|v| Box::new(v) as Erased) })),
        Reply::Wanted(f) => ErasedReply::Wanted(Box::pin(async move { f.await.map(|v| Box::new(v) as Erased) })),
    }
}

/// The actix side: it only hosts the pump.
struct Host {
    pump: Option<LocalBoxFuture<'static, End>>,
    done: Option<tokio::sync::oneshot::Sender<End>>,
}
impl actix::Actor for Host {
    type Context = Context<Self>;
    fn started(&mut self, cx: &mut Self::Context) {
        let Some(pump) = self.pump.take() else { return };
        cx.spawn(actix::fut::wrap_future::<_, Self>(pump).map(|end, host, cx| {
            if let Some(done) = host.done.take() {
                let _ = done.send(end);
            }
            cx.terminate();
        }));
    }
}

/// Starts a generation on this thread (inside its LocalSet).
pub(crate) fn host<A: Actor>(entry: Arc<Entry>, generation: u64, args: A::Args, cx: Cx, done: tokio::sync::oneshot::Sender<End>) {
    let pump = Pump::<A> {
        entry,
        generation,
        cx: cx.clone(),
        state: State::Starting(Box::pin(A::start(args, cx))),
        routes: A::routes(),
        ops: FuturesUnordered::new(),
        spawned: Rc::default(),
        taken: None,
    };
    actix::Actor::start(Host { pump: Some(Box::pin(pump)), done: Some(done) });
}

enum State<A> {
    Starting(LocalBoxFuture<'static, Result<A>>),
    Running(Box<A>),
    Stopping(LocalBoxFuture<'static, ()>),
}

struct Pump<A: Actor> {
    entry: Arc<Entry>,
    generation: u64,
    cx: Cx,
    state: State<A>,
    routes: Routes<A>,
    ops: FuturesUnordered<LocalBoxFuture<'static, Result<(), String>>>,
    spawned: Spawned,
    /// When the last message was taken.
    taken: Option<Instant>,
}

fn text(panic: Box<dyn Any + Send>) -> String {
    let message = panic.downcast_ref::<&str>().map(|s| s.to_string()).or_else(|| panic.downcast_ref::<String>().cloned());
    message.unwrap_or_else(|| "panic without a text".into())
}

/// A future that ends with the panic's text instead of unwinding.
struct Caught<F>(Pin<Box<F>>);
impl<F: Future> Future for Caught<F> {
    type Output = Result<F::Output, String>;
    fn poll(mut self: Pin<&mut Self>, t: &mut task::Context<'_>) -> Poll<Self::Output> {
        match catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(t))) {
            Ok(p) => p.map(Ok),
            Err(e) => Poll::Ready(Err(text(e))),
        }
    }
}

impl<A: Actor> Future for Pump<A> {
    type Output = End;
    fn poll(self: Pin<&mut Self>, t: &mut task::Context<'_>) -> Poll<End> {
        let me = self.get_mut();
        CURRENT.with(|c| *c.borrow_mut() = Some(me.spawned.clone()));
        let result = catch_unwind(AssertUnwindSafe(|| me.turn(t)));
        CURRENT.with(|c| *c.borrow_mut() = None);
        match result {
            Ok(poll) => poll,
            Err(panic) => Poll::Ready(End::Crash(text(panic), crate::crash::take())),
        }
    }
}

impl<A: Actor> Pump<A> {
    fn turn(&mut self, t: &mut task::Context<'_>) -> Poll<End> {
        if self.entry.generation.load(Ordering::Acquire) != self.generation {
            // Given up by the watchdog: this generation must touch nothing any more.
            return Poll::Ready(End::Replaced);
        }
        if let State::Starting(start) = &mut self.state {
            match start.as_mut().poll(t) {
                Poll::Pending => {
                    return match self.poll_ops(t) {
                        Some(end) => Poll::Ready(end),
                        None => Poll::Pending,
                    };
                }
                Poll::Ready(Err(e)) => return Poll::Ready(End::Crash(format!("start failed: {e}"), Default::default())),
                Poll::Ready(Ok(actor)) => {
                    self.state = State::Running(Box::new(actor));
                    self.entry.running();
                }
            }
        }
        self.entry.queue.register(t.waker());
        for _ in 0..BUDGET {
            let State::Running(actor) = &mut self.state else { break };
            let Some(env) = self.entry.queue.pop(self.generation) else {
                if self.entry.stopping.load(Ordering::Acquire) {
                    let cx = self.cx.clone();
                    let actor = std::mem::replace(&mut self.state, State::Stopping(Box::pin(async {})));
                    let State::Running(mut actor) = actor else { break };
                    self.state = State::Stopping(Box::pin(async move { actor.stopping(cx).await }));
                }
                break;
            };
            self.taken = Some(Instant::now());
            let routes = &self.routes;
            if let Some(f) = serve(env, actor.as_mut(), routes, &self.cx, &self.entry) {
                self.ops.push(Box::pin(Caught(Box::pin(f))));
            }
        }
        if self.entry.queue.len() > 0 && matches!(self.state, State::Running(_)) {
            t.waker().wake_by_ref();
        }
        if self.taken.is_some_and(|t| t.elapsed() < LINGER) {
            t.waker().wake_by_ref();
        }
        if let State::Stopping(f) = &mut self.state
            && f.as_mut().poll(t).is_ready()
        {
            return Poll::Ready(End::Stopped);
        }
        match self.poll_ops(t) {
            Some(end) => Poll::Ready(end),
            None => Poll::Pending,
        }
    }

    fn poll_ops(&mut self, t: &mut task::Context<'_>) -> Option<End> {
        loop {
            for f in self.spawned.borrow_mut().drain(..) {
                self.ops.push(Box::pin(Caught(Box::pin(f))));
            }
            match self.ops.poll_next_unpin(t) {
                Poll::Ready(Some(Err(panic))) => return Some(End::Crash(panic, crate::crash::take())),
                Poll::Ready(Some(Ok(()))) => {}
                Poll::Ready(None) | Poll::Pending => {
                    if self.spawned.borrow().is_empty() {
                        return None;
                    }
                }
            }
        }
    }
}

/// Handles one envelope; a slow answer comes back as a future.
fn serve<A: Actor>(env: Env, actor: &mut A, routes: &Routes<A>, me: &Cx, entry: &Arc<Entry>) -> Option<LocalBoxFuture<'static, ()>> {
    let waited = env.enqueued.elapsed();
    let Env { name, type_id, body, cx: caller, enqueued, start, reply, chaos, .. } = env;
    let cx = caller.derive(|i| {
        i.actor = me.0.actor.clone();
        i.generation = me.0.generation;
        i.layer = me.0.layer;
        i.calls = me.0.calls;
        i.span = crate::cx::random();
    });
    let finish = {
        let (cx, entry) = (cx.clone(), entry.clone());
        move |reply: tokio::sync::oneshot::Sender<Result<Erased>>, result: Result<Erased>| {
            let took = enqueued.elapsed();
            entry.observe(waited, took.saturating_sub(waited));
            cx.push(SpanKind::Hop, caller.0.span, name.into(), start, waited, took, result.as_ref().err());
            let _ = reply.send(result);
        }
    };
    if cx.deadline().is_some_and(|d| d <= Instant::now()) {
        let fault = Fault::deadline_exceeded(format!("{}: the deadline passed after {waited:?} in the mailbox of {}", name, entry.name));
        finish(reply, Err(fault));
        return None;
    }
    let Some(route) = routes.0.get(&type_id) else {
        finish(reply, Err(Fault::unimplemented(format!("{} does not handle {}", entry.name, name))));
        return None;
    };
    entry.took(name, cx.0.trace);
    let _entered = crate::scope::enter(&cx);
    let panics = chaos.as_ref().is_some_and(|c| c.fault == FaultKind::Panic);
    if panics {
        #[allow(clippy::panic, reason = "an injected panic is what was asked for")]
        std::panic::panic_any(format!("injected by chaos rule {} at {}", chaos.as_ref().map_or(0, |c| c.id), name));
    }
    match chaos.as_ref().map(|c| (c.fault, c.delay_ms)) {
        Some((FaultKind::Hang, _)) => {
            return Some(Box::pin(async move {
                let _never = reply;
                std::future::pending().await
            }));
        }
        Some((FaultKind::Block, ms)) => std::thread::sleep(Duration::from_millis(if ms == 0 { 60_000 } else { ms })),
        _ => {}
    }
    let scope = cx.clone();
    match route(actor, body, cx) {
        ErasedReply::Now(result) => {
            finish(reply, result);
            None
        }
        ErasedReply::Op(f) => Some(Box::pin(async move {
            let result = crate::scope::Scoped::new(scope, f).await;
            finish(reply, result);
        })),
        ErasedReply::Wanted(f) => Some(Box::pin(async move {
            let mut reply = reply;
            let result = tokio::select! {
                result = crate::scope::Scoped::new(scope, f) => result,
                () = reply.closed() => Err(Fault::canceled("the caller went away")),
            };
            finish(reply, result);
        })),
    }
}

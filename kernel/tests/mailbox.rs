//! Bounds, deadlines, layers, context.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
mod common;
use common::*;
use kernel::{Actor, Class, Cx, Handle, Manifest, Protocol, Reply, Routes, SpanKind, Spec, testing};
use std::sync::atomic::Ordering;

worker!(one, "one");
worker!(two, "two");

/// An actor whose messages pass a call on to `one`.
struct Caller;
struct Callers;
impl Protocol for Callers {
    const ACTOR: &'static str = "caller";
}
struct Pass;
struct Ids;
/// Never answers; says when it was dropped.
struct Forever(std::sync::Arc<std::sync::atomic::AtomicBool>);
kernel::messages! { Callers = "caller" => { Pass -> u32, Ids -> (String, u64, bool), Forever -> (), } }
struct OnDrop(std::sync::Arc<std::sync::atomic::AtomicBool>);
impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
impl Handle<Forever> for Caller {
    fn handle(&mut self, m: Forever, _: Cx) -> Reply<()> {
        Reply::while_wanted(async move {
            let _dropped = OnDrop(m.0);
            std::future::pending().await
        })
    }
}
impl Actor for Caller {
    type Proto = Callers;
    type Args = ();
    async fn start(_: (), _: Cx) -> kernel::Result<Self> {
        Ok(Caller)
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Pass>().on::<Ids>().on::<Forever>()
    }
}
impl Handle<Pass> for Caller {
    fn handle(&mut self, _: Pass, cx: Cx) -> Reply<u32> {
        Reply::op(async move { cx.system().addr::<one::Proto>().call(&cx, one::Echo(7)).await })
    }
}
impl Handle<Ids> for Caller {
    fn handle(&mut self, _: Ids, cx: Cx) -> Reply<(String, u64, bool)> {
        Reply::op(async move {
            cx.system().addr::<one::Proto>().call(&cx, one::Log).await?;
            Ok((cx.trace_id(), cx.op_id(), cx.deadline().is_some()))
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_for_a_caller_hears_that_it_is_gone() {
    let system = testing::system(&[]).unwrap();
    let op = system.root("test", None, None);
    let (cx, late) = (op.cx.clone(), op.cx.clone());
    let waiting = tokio::spawn(async move { cx.caller_gone().await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished(), "it is waited for");
    drop(op);
    tokio::time::timeout(Duration::from_secs(1), waiting).await.unwrap().unwrap();
    tokio::time::timeout(Duration::from_secs(1), late.caller_gone()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_mailbox_refuses_at_the_edge_and_holds_back_inside() {
    let small = Spec { mailbox: 4, isolation: kernel::Isolation::Own, ..testing::spec("one", 1) };
    let system = testing::system(&[small, testing::spec("caller", 2)]).unwrap();
    let outside = one::Outside::default();
    let one = system.start::<one::Worker>(outside.clone()).await.unwrap();
    let caller = system.start::<Caller>(()).await.unwrap();
    let op = system.root("test", None, None);
    // Too short for the watchdog, long enough to fill the mailbox behind it.
    let busy = {
        let (one, cx) = (one.clone(), op.cx.clone());
        tokio::spawn(async move { one.call(&cx, one::Busy(150)).await })
    };
    until(|| system.actors().iter().any(|a| a.name == "one" && a.mailbox == 0)).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let burst: Vec<_> = (0..32)
        .map(|n| {
            let (one, cx) = (one.clone(), op.cx.clone());
            tokio::spawn(async move { one.call(&cx, one::Echo(n)).await })
        })
        .collect();
    let inside: Vec<_> = (0..8)
        .map(|_| {
            let (caller, cx) = (caller.clone(), op.cx.clone());
            tokio::spawn(async move { caller.call(&cx, Pass).await })
        })
        .collect();
    let (mut done, mut refused) = (0, 0);
    for answer in burst {
        match answer.await.unwrap() {
            Ok(_) => done += 1,
            Err(f) if f.class == Class::ResourceExhausted => refused += 1,
            Err(f) => panic!("{f}"),
        }
    }
    assert!(refused > 0 && done > 0, "{done} done, {refused} refused");
    for answer in inside {
        assert_eq!(answer.await.unwrap().unwrap(), 7, "a caller inside waits for room");
    }
    busy.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_that_passes_in_the_queue_fails_there_unhandled() {
    let own = Spec { isolation: kernel::Isolation::Own, ..testing::spec("one", 1) };
    let system = testing::system(&[own]).unwrap();
    let outside = one::Outside::default();
    let one = system.start::<one::Worker>(outside.clone()).await.unwrap();
    let op = system.root("test", None, None);
    let busy = {
        let (one, cx) = (one.clone(), op.cx.clone());
        tokio::spawn(async move { one.call(&cx, one::Busy(120)).await })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    let fault = one.call(&op.cx.with_timeout(Duration::from_millis(20)), one::Echo(1)).await.unwrap_err();
    assert_eq!(fault.class, Class::DeadlineExceeded);
    busy.await.unwrap().unwrap();
    one.call(&op.cx, one::Log).await.unwrap();
    assert_eq!(outside.handled.load(Ordering::SeqCst), 0, "it was never handled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_up_the_layers_is_refused() {
    let system = testing::system(&[testing::spec("one", 5), testing::spec("caller", 5)]).unwrap();
    system.start::<one::Worker>(Default::default()).await.unwrap();
    let caller = system.start::<Caller>(()).await.unwrap();
    let op = system.root("test", None, None);
    let fault = caller.call(&op.cx, Pass).await.unwrap_err();
    assert_eq!(fault.class, Class::FailedPrecondition);
    assert!(fault.message.contains("requests go downhill"), "{fault}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_the_manifest_does_not_list_may_not_be_called() {
    let narrow = Spec { calls: &["two"], ..testing::spec("caller", 5) };
    let system = testing::system(&[testing::spec("one", 1), testing::spec("two", 1), narrow]).unwrap();
    system.start::<one::Worker>(Default::default()).await.unwrap();
    let caller = system.start::<Caller>(()).await.unwrap();
    let op = system.root("test", None, None);
    let fault = caller.call(&op.cx, Pass).await.unwrap_err();
    assert!(fault.class == Class::FailedPrecondition && fault.message.contains("caller may not call one"), "{fault}");
}

#[test]
fn a_manifest_with_a_call_uphill_is_refused() {
    let uphill: &'static [Spec] = Box::leak(Box::new([Spec { calls: &["two"], ..testing::spec("one", 1) }, testing::spec("two", 2)]));
    assert!(Manifest { actors: uphill }.check().unwrap_err().message.contains("uphill"));
}

#[tokio::test(flavor = "multi_thread")]
async fn context_arrives_at_the_third_hop_and_the_recorder_shows_each() {
    let system = testing::system(&[testing::spec("one", 1), testing::spec("caller", 2)]).unwrap();
    system.start::<one::Worker>(Default::default()).await.unwrap();
    let caller = system.start::<Caller>(()).await.unwrap();
    let parent = "00-0123456789abcdef0123456789abcdef-0011223344556677-01";
    let op = system.root("rpc", Some(parent), Some(Duration::from_secs(5)));
    let (trace, operation, deadline) = caller.call(&op.cx, Ids).await.unwrap();
    assert_eq!((trace.as_str(), operation, deadline), ("0123456789abcdef0123456789abcdef", op.cx.op_id(), true));
    op.finish(&kernel::Result::Ok(()));
    let spans = system.trace("0123456789abcdef0123456789abcdef");
    let find = |name: &str| spans.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("no span {name} in {spans:?}"));
    let (root, first, second) = (find("rpc"), find("caller.Ids"), find("one.Log"));
    assert_eq!((root.kind, root.parent_id.as_str()), (SpanKind::Root, "0011223344556677"));
    assert_eq!((&first.parent_id, &second.parent_id), (&root.span_id, &first.span_id));
    for hop in [first, second] {
        assert!(hop.kind == SpanKind::Hop && hop.queue_wait <= hop.duration && hop.duration > Duration::ZERO, "{hop:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_names_the_step_that_failed() {
    let system = testing::system(&[]).unwrap();
    let op = system.root("rpc", None, None);
    let failed =
        op.cx.run("outer", |cx| async move { cx.run("inner", |_| async { Err::<(), _>(kernel::Fault::unknown("no")) }).await }).await;
    failed.unwrap_err();
    assert!(op.describe().contains("step=\"inner\""), "{}", op.describe());
    op.cx.run("fine", |_| async { Ok(()) }).await.unwrap();
    assert!(op.describe().contains("step=\"inner\""), "an undo that works is not the cause: {}", op.describe());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_steps_side_by_side_the_one_that_goes_on_is_shown() {
    let system = testing::system(&[]).unwrap();
    let op = system.root("rpc", None, None);
    let (go_on, gate) = tokio::sync::oneshot::channel::<()>();
    let hangs = op.cx.run("hangs", |_| async move {
        let _ = gate.await;
        Ok(())
    });
    let quick = op.cx.run("quick", |cx| async move { cx.run("part", |_| async { Ok(()) }).await });
    let mut hangs = std::pin::pin!(hangs);
    assert!(futures::poll!(hangs.as_mut()).is_pending());
    quick.await.unwrap();
    assert!(op.describe().contains("step=\"hangs\""), "{}", op.describe());
    drop(go_on);
    hangs.await.unwrap();
    assert!(op.describe().contains("step=\"\""), "{}", op.describe());
    let given_up = op.cx.run("given up", |_| std::future::pending::<kernel::Result<()>>());
    assert!(tokio::time::timeout(std::time::Duration::from_millis(10), given_up).await.is_err());
    assert!(op.describe().contains("step=\"\""), "{}", op.describe());
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_show_mailboxes_operations_and_restarts() {
    let system = testing::system(&[testing::spec("one", 1)]).unwrap();
    let one = system.start::<one::Worker>(Default::default()).await.unwrap();
    let op = system.root("rpc", None, None);
    one.call(&op.cx, one::Boom).await.unwrap_err();
    one.call(&op.cx, one::Echo(1)).await.unwrap();
    let all = prometheus::TextEncoder::new().encode_to_string(&system.metrics().gather()).unwrap();
    for line in [
        "troupe_actor_mailbox_depth{actor=\"one\"} 0",
        "troupe_actor_up{actor=\"one\"} 1",
        "troupe_actor_restarts_total{actor=\"one\",reason=\"panic\"} 1",
        "troupe_operations_in_flight 1",
        "troupe_telemetry_dropped_total 0",
        "troupe_threads_leaked_total 0",
    ] {
        assert!(all.contains(line), "{line} is not in\n{all}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_only_its_caller_wants_ends_with_the_caller() {
    let system = testing::system(&[testing::spec("one", 1), testing::spec("caller", 2)]).unwrap();
    let caller = system.start::<Caller>(()).await.unwrap();
    let dropped = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let op = system.root("test", None, None);
    let (addr, cx, flag) = (caller.clone(), op.cx.clone(), dropped.clone());
    let call = tokio::spawn(async move { addr.call(&cx, Forever(flag)).await });
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert!(!dropped.load(Ordering::SeqCst));
    call.abort();
    until(|| dropped.load(Ordering::SeqCst)).await;
    // A deadline is a caller that goes away.
    dropped.store(false, Ordering::SeqCst);
    let late = caller.call(&op.cx.with_timeout(std::time::Duration::from_millis(20)), Forever(dropped.clone())).await;
    assert_eq!(late.unwrap_err().class, Class::DeadlineExceeded);
    until(|| dropped.load(Ordering::SeqCst)).await;
}

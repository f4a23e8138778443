//! Threads that stop answering.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
mod common;
use common::*;
use kernel::{Class, FaultKind, Isolation, Rule, Spec, testing};

worker!(one, "one");
worker!(two, "two");

fn own(name: &'static str) -> Spec {
    Spec { isolation: Isolation::Own, ..testing::spec(name, 1) }
}

/// The watchdog of `testing::system` looks every 200 ms; two seconds beyond that are the promise.
const PROMISE: Duration = Duration::from_millis(200 + 2000);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_loop_is_replaced_and_its_thread_counted() {
    let system = testing::system(&[own("one"), own("two")]).unwrap();
    let one = system.start::<one::Worker>(Default::default()).await.unwrap();
    let two = system.start::<two::Worker>(Default::default()).await.unwrap();
    let op = system.root("test", None, None);
    let began = Instant::now();
    let answer = one.call(&op.cx, one::Busy(6000)).await.unwrap();
    assert_eq!(answer, 2, "the next generation answers the idempotent call");
    assert!(began.elapsed() < PROMISE, "{:?}", began.elapsed());
    assert_eq!(system.leaked_threads().len(), 1);
    assert!(system.leaked_threads()[0].contains("one"), "{:?}", system.leaked_threads());
    assert_eq!(system.health().status, "degraded");
    assert_eq!(two.call(&op.cx, two::Sleep(0)).await.unwrap(), 1, "another thread's actor is the same generation");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blocking_call_in_a_handler_is_replaced_and_its_late_answer_dropped() {
    let system = testing::system(&[own("one")]).unwrap();
    let outside = one::Outside::default();
    let one = system.start::<one::Worker>(outside.clone()).await.unwrap();
    let op = system.root("test", None, None);
    let block = Rule { delay_ms: 1500, ..rule(FaultKind::Block, "one.Count") };
    system.chaos().add(Rule { nth: Some(1), ..block }).unwrap();
    let began = Instant::now();
    let fault = one.call(&op.cx, one::Count).await.unwrap_err();
    assert!(began.elapsed() < PROMISE, "{:?}", began.elapsed());
    assert_eq!(fault.class, Class::Unavailable);
    assert!(fault.message.contains("hung"), "{fault}");
    assert_eq!(one.call(&op.cx, one::Sleep(0)).await.unwrap(), 2);
    // The blocked thread wakes up and answers nobody; the present generation goes on.
    tokio::time::sleep(Duration::from_millis(1600)).await;
    assert_eq!(one.call(&op.cx, one::Sleep(0)).await.unwrap(), 2);
}

fn rule(fault: FaultKind, message: &str) -> Rule {
    Rule {
        id: 0,
        actor: String::new(),
        message: message.into(),
        fault,
        nth: None,
        probability: None,
        delay_ms: 0,
        matches: Default::default(),
        hits: Default::default(),
    }
}

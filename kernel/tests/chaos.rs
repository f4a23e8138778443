//! Every kind of fault, at the message that its rule names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
mod common;
use common::*;
use kernel::{Class, FaultKind, Options, Rule, System, testing};
use std::sync::atomic::Ordering;

worker!(one, "one");

fn rule(fault: FaultKind, message: &str) -> Rule {
    Rule {
        id: 0,
        actor: "one".into(),
        message: message.into(),
        fault,
        nth: Some(1),
        probability: None,
        delay_ms: 0,
        matches: Default::default(),
        hits: Default::default(),
    }
}

async fn bed() -> (System, kernel::Addr<one::Proto>, one::Outside) {
    let system = testing::system(&[testing::spec("one", 1)]).unwrap();
    let outside = one::Outside::default();
    let one = system.start::<one::Worker>(outside.clone()).await.unwrap();
    (system, one, outside)
}

#[tokio::test(flavor = "multi_thread")]
async fn panic_and_error_hit_the_message_they_name() {
    let (system, one, _) = bed().await;
    let op = system.root("test", None, None);
    system.chaos().add(rule(FaultKind::Error, "one.Count")).unwrap();
    assert_eq!(one.call(&op.cx, one::Echo(1)).await.unwrap(), 1, "another message is let through");
    let fault = one.call(&op.cx, one::Count).await.unwrap_err();
    assert!(fault.class == Class::Unavailable && fault.message.contains("chaos rule 1"), "{fault}");
    one.call(&op.cx, one::Count).await.unwrap();
    system.chaos().add(rule(FaultKind::Panic, "one.Count")).unwrap();
    let fault = one.call(&op.cx, one::Count).await.unwrap_err();
    assert!(fault.message.contains("generation 1 died") && fault.message.contains("chaos rule 2"), "{fault}");
    assert_eq!(one.call(&op.cx, one::Sleep(0)).await.unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn delay_drop_and_hang() {
    let (system, one, outside) = bed().await;
    let op = system.root("test", None, None);
    system.chaos().add(Rule { delay_ms: 80, ..rule(FaultKind::Delay, "one.Echo") }).unwrap();
    let began = Instant::now();
    assert_eq!(one.call(&op.cx, one::Echo(3)).await.unwrap(), 3);
    assert!(began.elapsed() >= Duration::from_millis(80));
    for (kind, handled) in [(FaultKind::Drop, 1), (FaultKind::Hang, 1)] {
        system.chaos().clear(None).unwrap();
        system.chaos().add(rule(kind, "one.Count")).unwrap();
        let fault = one.call(&op.cx.with_timeout(Duration::from_millis(60)), one::Count).await.unwrap_err();
        assert_eq!(fault.class, Class::DeadlineExceeded, "{kind:?}");
        assert_eq!(outside.handled.load(Ordering::SeqCst), handled, "{kind:?}");
        assert_eq!(one.call(&op.cx, one::Sleep(0)).await.unwrap(), 1, "{kind:?}: the actor goes on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicate_delivers_twice_and_answers_once() {
    let (system, one, outside) = bed().await;
    let op = system.root("test", None, None);
    system.chaos().add(rule(FaultKind::Duplicate, "one.Echo")).unwrap();
    assert_eq!(one.call(&op.cx, one::Echo(9)).await.unwrap(), 9);
    until(|| outside.handled.load(Ordering::SeqCst) == 2).await;
    assert_eq!(one.call(&op.cx, one::Echo(9)).await.unwrap(), 9);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(outside.handled.load(Ordering::SeqCst), 3, "the rule hit its first match only");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_hits_the_same_messages() {
    async fn run(seed: u64) -> (u64, Vec<bool>) {
        let rows: &'static [kernel::Spec] = Box::leak(Box::new([testing::spec("one", 1)]));
        let options = Options { chaos_enabled: true, chaos_seed: seed, ..Default::default() };
        let system = System::boot(kernel::Manifest { actors: rows }, options).unwrap();
        let one = system.start::<one::Worker>(Default::default()).await.unwrap();
        system.chaos().add(Rule { nth: None, probability: Some(0.5), ..rule(FaultKind::Error, "one.Echo") }).unwrap();
        let op = system.root("test", None, None);
        let mut hits = Vec::new();
        for n in 0..40 {
            hits.push(one.call(&op.cx, one::Echo(n)).await.is_err());
        }
        (system.chaos().seed(), hits)
    }
    let (seed, first) = run(0).await;
    println!("seed {seed}");
    assert!(first.contains(&true) && first.contains(&false), "seed {seed}: {first:?}");
    assert_eq!(run(seed).await, (seed, first), "seed {seed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_are_refused_unless_chaos_is_enabled() {
    let rows: &'static [kernel::Spec] = Box::leak(Box::new([testing::spec("one", 1)]));
    let system = System::boot(kernel::Manifest { actors: rows }, Options::default()).unwrap();
    assert_eq!(system.chaos().add(rule(FaultKind::Panic, "")).unwrap_err().class, Class::FailedPrecondition);
}

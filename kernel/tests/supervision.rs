//! Panics, generations, intensity, dependants.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
mod common;
use common::*;
use kernel::{Class, Spec, Strategy, testing};

worker!(one, "one");
worker!(two, "two");
worker!(three, "three");

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_costs_its_caller_only() {
    let system = testing::system(&[testing::spec("one", 1), testing::spec("two", 1)]).unwrap();
    let one = system.start::<one::Worker>(Default::default()).await.unwrap();
    let two = system.start::<two::Worker>(Default::default()).await.unwrap();
    let op = system.root("test", None, None);
    let (idempotent, other, fault) =
        tokio::join!(one.call(&op.cx, one::Sleep(50)), two.call(&op.cx, two::Sleep(50)), one.call(&op.cx, one::Boom));
    let fault = fault.unwrap_err();
    assert_eq!(fault.class, Class::Unavailable);
    assert!(fault.message.contains("one generation 1") && fault.message.contains("as asked"), "{fault}");
    assert_eq!(idempotent.unwrap(), 2, "an idempotent call in flight is answered by the next generation");
    assert_eq!(other.unwrap(), 1, "another actor notices nothing");
    assert_eq!(one.call(&op.cx, one::Echo(5)).await.unwrap(), 5, "the next caller is answered by the new generation");
    let info = system.actors().into_iter().find(|a| a.name == "one").unwrap();
    assert_eq!((info.generation, info.restarts, info.state.as_str()), (2, 1, "running"));
    assert!(info.crash_report.contains("supervision.rs") && info.crash_report.contains("one.Boom"), "{}", info.crash_report);
    // The frames' names come later, from a thread that holds nobody up.
    until(|| system.actors().iter().any(|a| a.name == "one" && a.crash_report.contains("tests/common/mod.rs"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_in_flight_that_is_not_idempotent_fails_and_says_why() {
    let system = testing::system(&[testing::spec("one", 1)]).unwrap();
    let one = system.start::<one::Worker>(Default::default()).await.unwrap();
    let op = system.root("test", None, None);
    let (nap, boom) = tokio::join!(one.call(&op.cx, one::Nap(10_000)), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        one.call(&op.cx, one::Boom).await
    });
    boom.unwrap_err();
    let fault = nap.unwrap_err();
    assert_eq!(fault.class, Class::Unavailable);
    assert!(fault.message.contains("one generation 1 died while it handled one.Nap"), "{fault}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_in_flight_to_a_child_that_is_stopped_ends() {
    let system = testing::system(&[testing::spec("one", 1)]).unwrap();
    let child = system.spawn_child::<one::Worker>("c", Default::default()).await.unwrap();
    let op = system.root("test", None, None);
    let (asleep, ()) = tokio::join!(child.call(&op.cx, one::Sleep(60_000)), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let began = Instant::now();
        system.stop_child::<one::Proto>("c").await;
        assert!(began.elapsed() < Duration::from_secs(2), "a child does not wait for what it has begun");
    });
    let fault = asleep.unwrap_err();
    assert_eq!(
        (fault.class, fault.message.as_str()),
        (Class::Unavailable, "one/c was stopped"),
        "and it is not waited for a next generation"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_an_operation_is_a_panic_of_the_actor() {
    let system = testing::system(&[testing::spec("one", 1)]).unwrap();
    let one = system.start::<one::Worker>(Default::default()).await.unwrap();
    let op = system.root("test", None, None);
    assert_eq!(one.call(&op.cx, one::BoomOnce).await.unwrap(), 2, "delivered once more, to the next generation");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_restarts_than_the_intensity_put_it_down_and_the_rest_lives() {
    let few = Spec { intensity: (2, Duration::from_secs(60)), ..testing::spec("one", 1) };
    let system = testing::system(&[few, testing::spec("two", 1)]).unwrap();
    let one = system.start::<one::Worker>(Default::default()).await.unwrap();
    let two = system.start::<two::Worker>(Default::default()).await.unwrap();
    let op = system.root("test", None, None);
    assert_eq!(system.health().status, "ok");
    for _ in 0..3 {
        one.call(&op.cx, one::Boom).await.unwrap_err();
    }
    until(|| system.health().status == "degraded").await;
    let began = Instant::now();
    let fault = one.call(&op.cx, one::Echo(1)).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(1), "callers fail at once");
    assert_eq!(fault.class, Class::Unavailable);
    assert!(fault.message.contains("one is down: 3 restarts within 60s; last: as asked"), "{fault}");
    assert!(system.health().reasons[0].contains("one is down"));
    assert_eq!(two.call(&op.cx, two::Echo(2)).await.unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn rest_for_one_restarts_those_that_depend_on_it_after_it() {
    let bottom = Spec { strategy: Strategy::RestForOne, ..testing::spec("one", 1) };
    let middle = Spec { calls: &["one"], ..testing::spec("two", 2) };
    let system = testing::system(&[bottom, middle, testing::spec("three", 3)]).unwrap();
    let starts: std::sync::Arc<parking_lot::Mutex<Vec<&'static str>>> = Default::default();
    let one = system.start::<one::Worker>(one::Outside { starts: starts.clone(), ..Default::default() }).await.unwrap();
    system.start::<two::Worker>(two::Outside { starts: starts.clone(), ..Default::default() }).await.unwrap();
    system.start::<three::Worker>(three::Outside { starts: starts.clone(), ..Default::default() }).await.unwrap();
    starts.lock().clear();
    let op = system.root("test", None, None);
    one.call(&op.cx, one::Boom).await.unwrap_err();
    until(|| starts.lock().len() == 2).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut restarted = starts.lock().clone();
    restarted.sort_unstable();
    assert_eq!(restarted, ["one", "two"], "who does not depend on it goes on");
    assert_eq!(system.actors().iter().find(|a| a.name == "three").unwrap().generation, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_actor_that_is_down_gets_another_chance_after_a_while() {
    let few = Spec { intensity: (1, Duration::from_millis(300)), ..testing::spec("one", 1) };
    let system = testing::system(&[few]).unwrap();
    let one = system.start::<one::Worker>(Default::default()).await.unwrap();
    let op = system.root("test", None, None);
    for _ in 0..2 {
        one.call(&op.cx, one::Boom).await.unwrap_err();
    }
    until(|| system.health().status == "degraded").await;
    until(|| system.health().status == "ok").await;
    assert_eq!(one.call(&op.cx, one::Echo(1)).await.unwrap(), 1);
    one.call(&op.cx, one::Boom).await.unwrap_err();
    until(|| system.health().status == "degraded").await;
    until(|| system.health().status == "ok").await;
    assert_eq!(one.call(&op.cx, one::Echo(2)).await.unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn work_can_tell_that_nobody_waits_for_it_any_more() {
    let system = testing::system(&[testing::spec("one", 1)]).unwrap();
    let op = system.root("test", None, None);
    let cx = op.cx.without_deadline();
    assert!(tokio::time::timeout(Duration::from_millis(50), cx.caller_gone()).await.is_err(), "somebody waits");
    drop(op);
    tokio::time::timeout(Duration::from_secs(1), cx.caller_gone()).await.expect("the caller went away");
}

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_hangs_alone_is_listed_and_holds_no_file_of_the_process() {
    let system = testing::system(&[]).unwrap();
    let op = system.root("test", None, None);
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file);
    let (tell, told) = std::sync::mpsc::channel();
    let hang = move || {
        let own = std::fs::read_dir("/proc/thread-self/fd").unwrap().flatten();
        tell.send(own.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()).collect::<Vec<_>>()).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        Ok(())
    };
    let fault = op.cx.blocking_alone("stat /dead/server", Duration::from_millis(200), hang).await.unwrap_err();
    assert_eq!(fault.class, Class::DeadlineExceeded);
    assert!(fault.message.contains("stat /dead/server"), "{fault}");
    assert!(!told.recv().unwrap().contains(&descriptor), "the thread has a file of the process");
    let listed = system.blocking_calls();
    assert!(listed.iter().any(|c| c.name == "stat /dead/server" && c.abandoned), "{listed:?}");
    assert_eq!(op.cx.blocking_alone("quick", Duration::from_secs(5), || Ok(7)).await.unwrap(), 7);
    // A hundred that hang leave room for others.
    let hang = || {
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    };
    let hung: Vec<_> = (0..100).map(|_| op.cx.blocking_alone("hangs", Duration::from_secs(1), hang)).collect();
    let began = Instant::now();
    let (_, quick) = tokio::join!(futures::future::join_all(hung), async {
        op.cx.blocking("pooled", Duration::from_secs(5), || Ok(())).await.unwrap();
        began.elapsed()
    });
    assert!(quick < Duration::from_millis(500), "{quick:?}");
}

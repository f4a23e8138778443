//! Container events: their order, several readers, and one that never reads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tonic::Streaming;
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::registry::Registry;

type Events = Streaming<ContainerEventResponse>;

async fn listen(cri: &mut Cri) -> Events {
    cri.runtime.get_container_events(GetEventsRequest {}).await.unwrap().into_inner()
}

async fn next(events: &mut Events) -> ContainerEventResponse {
    tokio::time::timeout(Duration::from_secs(20), events.message()).await.expect("no event comes").unwrap().expect("the stream ended")
}

async fn world() -> (Daemon, Cri, String, Registry) {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    (daemon, cri, image, registry)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_life_is_told_in_order_to_every_reader() {
    use ContainerEventType::*;
    let (daemon, mut cri, image, _registry) = world().await;
    let pod = cri.pod("events", true, &daemon.logs());
    // Nobody reads yet: the first two are kept for the first who does.
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let mut first = listen(&mut cri).await;
    assert_eq!((next(&mut first).await.container_id, next(&mut first).await.container_id), (sandbox.clone(), sandbox.clone()));
    let mut second = listen(&mut cri).await;
    let container = cri.run(&sandbox, &cri.container("c", &image, &["sleep", "1000"]), &pod).await.unwrap();
    cri.stop(&container, 0).await.unwrap();
    cri.remove(&container).await.unwrap();
    cri.drop_pod(&sandbox).await.unwrap();
    let expected = [
        (&container, ContainerCreatedEvent, Some(ContainerState::ContainerCreated), true),
        (&container, ContainerStartedEvent, Some(ContainerState::ContainerRunning), true),
        (&container, ContainerStoppedEvent, Some(ContainerState::ContainerExited), true),
        (&container, ContainerDeletedEvent, None, true),
        (&sandbox, ContainerStoppedEvent, None, false),
        (&sandbox, ContainerDeletedEvent, None, false),
    ];
    for events in [&mut first, &mut second] {
        for (id, kind, state, ready) in &expected {
            let event = next(events).await;
            assert_eq!((&event.container_id, event.container_event_type()), (*id, *kind), "{event:?}");
            let status = event.pod_sandbox_status.expect("the pod's status comes with every event, the last one too");
            assert_eq!((status.id == sandbox, status.state == PodSandboxState::SandboxReady as i32), (true, *ready), "{kind:?}");
            let states: Vec<i32> = event.containers_statuses.iter().map(|c| c.state).collect();
            assert_eq!(states, state.iter().map(|s| *s as i32).collect::<Vec<_>>(), "{kind:?}");
        }
    }
}

/// Runs and removes pods until `count` is reached; answers the longest time that one took.
async fn churn(daemon: &Daemon, count: usize) -> Duration {
    let (done, longest) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
    let workers = (0..8).map(|_| {
        let (done, longest, logs, socket, parent) =
            (done.clone(), longest.clone(), daemon.logs(), daemon.socket(), format!("/{}", daemon.tag));
        tokio::spawn(async move {
            let mut cri = troupe_tests::cri::connect(&socket).await.unwrap();
            cri.cgroup_parent = parent;
            loop {
                let n = done.fetch_add(1, Ordering::Relaxed);
                if n >= count {
                    return;
                }
                let began = Instant::now();
                let mut pod = cri.pod(&format!("pod{n}"), true, &logs);
                // So much that no window of a connection holds all events.
                pod.annotations.insert("large".into(), "x".repeat(8000));
                let sandbox = cri.run_pod(&pod).await.unwrap();
                cri.drop_pod(&sandbox).await.unwrap();
                longest.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
    Duration::from_millis(longest.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_never_reads_blocks_nobody_and_is_told_what_it_missed() {
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    // On a connection of its own: what is not read there fills its window.
    let mut idle = listen(&mut daemon.cri().await.unwrap()).await;
    let mut lively = listen(&mut cri).await;
    let counting = tokio::spawn(async move {
        let mut seen = 0;
        while let Ok(Some(_)) = lively.message().await {
            seen += 1;
            if seen == 500 * 4 {
                break;
            }
        }
        seen
    });
    let longest = churn(&daemon, 500).await;
    assert!(longest < Duration::from_secs(15), "a pod's life took {longest:?}");
    let seen = tokio::time::timeout(Duration::from_secs(20), counting).await.expect("the other reader misses events").unwrap();
    assert_eq!(seen, 500 * 4);
    let mut read = 0;
    let end = loop {
        match tokio::time::timeout(Duration::from_secs(10), idle.message()).await.expect("it is told nothing") {
            Ok(Some(_)) => read += 1,
            Ok(None) => panic!("its stream ended without a word"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), tonic::Code::DataLoss, "{end}");
    let missed: usize = end.message().split(' ').next().unwrap().parse().unwrap();
    assert!(read + missed <= 500 * 4 && missed > 500, "{read} read, {missed} missed: {end}");
    // It lists, opens another stream, and goes on.
    let mut again = listen(&mut cri).await;
    let pod = cri.pod("after", true, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    assert_eq!(next(&mut again).await.container_id, sandbox);
    cri.drop_pod(&sandbox).await.unwrap();
}

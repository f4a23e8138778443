//! The daemon is killed and comes back; shims fall silent; actors are killed: containers go on and exits are told rightly.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::time::{Duration, Instant};
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, registry::Registry};

#[tokio::test(flavor = "multi_thread")]
async fn containers_outlive_the_daemon_and_their_exits_are_told() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let mut daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    let pod = cri.pod("survivor", false, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let lasting = cri
        .run(&sandbox, &cri.container("lasting", &image, &["sh", "-c", "while true; do echo alive; sleep 0.1; done"]), &pod)
        .await
        .unwrap();
    let ending = cri.run(&sandbox, &cri.container("ending", &image, &["sh", "-c", "sleep 0.5; exit 42"]), &pod).await.unwrap();

    daemon.kill();
    tokio::time::sleep(Duration::from_millis(1000)).await;
    let log = std::fs::read_to_string(daemon.logs().join("lasting.log")).unwrap();
    let lines = log.lines().count();
    assert!(lines >= 8, "logs went on while the daemon was dead: {lines} lines");
    let took = daemon.spawn().await.unwrap();
    println!("socket served {took:?} after the start");
    let mut cri = daemon.cri().await.unwrap();
    let ended = cri.wait_exit(&ending, 10).await.unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_str()), (42, "Error"));
    assert_eq!(cri.status(&lasting).await.unwrap().state, ContainerState::ContainerRunning as i32);
    assert_eq!(cri.exec(&lasting, &["echo", "back"], 10).await.unwrap().stdout, b"back\n");
    let pods = cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    assert_eq!((pods.len(), pods[0].state), (1, PodSandboxState::SandboxReady as i32));
    cri.drop_pod(&sandbox).await.unwrap();
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_does_not_answer_delays_nobody_else() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    let pod = cri.pod("deaf", true, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    cri.run(&sandbox, &cri.container("c", &image, &["sleep", "1000"]), &pod).await.unwrap();
    let shims: Vec<u32> = daemon.processes().into_iter().filter(|(_, c)| c.contains("containerd-shim-troupe")).map(|(p, _)| p).collect();
    assert!(!shims.is_empty());
    for shim in &shims {
        // SAFETY: kill(2) with a plain pid and signal number touches no memory.
        unsafe { libc::kill(*shim as i32, libc::SIGSTOP) };
    }
    let mut stuck = cri.clone();
    let stopping = sandbox.clone();
    let stop = tokio::spawn(async move { stuck.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: stopping }).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let began = Instant::now();
    let other = cri.pod("lively", true, &daemon.logs());
    let lively = cri.run_pod(&other).await.unwrap();
    let container = cri.run(&lively, &cri.container("c", &image, &["sleep", "1000"]), &other).await.unwrap();
    cri.exec(&container, &["true"], 10).await.unwrap();
    cri.runtime.list_containers(ListContainersRequest::default()).await.unwrap();
    cri.drop_pod(&lively).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "another pod took {:?}", began.elapsed());
    let ops = daemon.cli(&["ops"]).unwrap();
    assert!(ops.contains("StopPodSandbox"), "the stuck operation is listed:\n{ops}");
    for shim in &shims {
        // SAFETY: kill(2) with a plain pid and signal number touches no memory.
        unsafe { libc::kill(*shim as i32, libc::SIGCONT) };
    }
    tokio::time::timeout(Duration::from_secs(30), stop).await.expect("the stuck stop ends once the shim answers").unwrap().unwrap();
    cri.drop_pod(&sandbox).await.unwrap();
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_actor_may_die_in_the_middle() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options { chaos: true, ..Default::default() }).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    for (number, actor) in
        ["store", "events", "content", "snapshot", "network", "image", "task", "task.shim", "sandbox", "sandbox.pod", "stats", "gc"]
            .iter()
            .enumerate()
    {
        daemon.cli(&["chaos", "add", "--actor", actor, "--fault", "panic", "--nth", "2"]).unwrap();
        let pod = cri.pod(&format!("killed{number}"), false, &daemon.logs());
        // As a kubelet would: try again until it works.
        let sandbox = retry(|| async { cri.clone().run_pod(&pod).await }, actor).await;
        let config = cri.container("c", &image, &["sleep", "1000"]);
        let id = retry(|| async { cri.clone().create(&sandbox, &config, &pod).await }, actor).await;
        retry(
            || async {
                let mut cri = cri.clone();
                match cri.status(&id).await {
                    Ok(s) if s.state == ContainerState::ContainerRunning as i32 => Ok(()),
                    _ => cri.start(&id).await,
                }
            },
            actor,
        )
        .await;
        retry(|| async { cri.clone().stop(&id, 0).await }, actor).await;
        retry(|| async { cri.clone().drop_pod(&sandbox).await }, actor).await;
        daemon.cli(&["chaos", "clear"]).unwrap();
        settle(&daemon, &before).await;
    }
    let actors = daemon.cli(&["actors"]).unwrap();
    assert!(!actors.contains("down"), "{actors}");
}

async fn retry<T, F: Future<Output = anyhow::Result<T>>>(mut call: impl FnMut() -> F, actor: &str) -> T {
    let mut last = None;
    for _ in 0..20 {
        match call().await {
            Ok(value) => return value,
            Err(e) => last = Some(e),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("with {actor} killed, no retry worked: {last:?}");
}

/// Pods of every kind, each by a few clients at once; answers their ids.
async fn populate(cri: &troupe_tests::cri::Cri, daemon: &Daemon, image: &str, pods: usize) -> Vec<(usize, String, String)> {
    let mut lanes = tokio::task::JoinSet::new();
    for lane in 0..6 {
        let (mut cri, image, logs) = (cri.clone(), image.to_owned(), daemon.logs());
        lanes.spawn(async move {
            let mut made = Vec::new();
            for number in (lane..pods).step_by(6) {
                // Some with a network, some with a container that runs, has ended, or was never started; most are bare.
                let pod = cri.pod(&format!("stale{number}"), number % 20 != 0, &logs);
                let sandbox = cri.run_pod(&pod).await.unwrap();
                let command: &[&str] = if number % 10 == 1 { &["sh", "-c", "exit 3"] } else { &["sleep", "1000"] };
                let config = cri.container(&format!("c{number}"), &image, command);
                let container = match number % 10 {
                    0 | 1 => cri.run(&sandbox, &config, &pod).await.unwrap(),
                    2 => cri.create(&sandbox, &config, &pod).await.unwrap(),
                    _ => String::new(),
                };
                if number % 10 == 1 {
                    cri.wait_exit(&container, 10).await.unwrap();
                }
                made.push((number, sandbox, container));
            }
            made
        });
    }
    let mut all = Vec::new();
    while let Some(made) = lanes.join_next().await {
        all.extend(made.unwrap());
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_reboot_with_three_hundred_stale_pods_it_serves_at_once_and_all_can_go() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let mut daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    let began = Instant::now();
    let pods = populate(&cri, &daemon, &image, 300).await;
    println!("300 pods made in {:?}", began.elapsed());
    assert_eq!(census::take(&daemon).addresses.len(), 15 + before.addresses.len());
    daemon.reboot().unwrap();
    let served = daemon.spawn().await.unwrap();
    let began = Instant::now();
    let mut cri = daemon.cri().await.unwrap();
    let listed = cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    println!("served after {served:?}, listed after {:?}", began.elapsed());
    let limit = Duration::from_secs(if troupe_tests::daemon::binaries().ends_with("release") { 1 } else { 4 });
    assert!(served < limit, "served after {served:?}");
    assert_eq!(listed.len(), 300);
    assert!(listed.iter().all(|p| p.state == PodSandboxState::SandboxNotready as i32 && p.created_at > 0));
    for (number, _, container) in pods.iter().filter(|p| !p.2.is_empty()) {
        let status = cri.status(container).await.unwrap();
        let expected = match number % 10 {
            0 => (ContainerState::ContainerExited, 255, "Unknown"),
            1 => (ContainerState::ContainerExited, 3, "Error"),
            _ => (ContainerState::ContainerCreated, 0, ""),
        };
        assert_eq!((status.state, status.exit_code, status.reason.as_str()), (expected.0 as i32, expected.1, expected.2), "{status:?}");
    }
    let fresh = cri.pod("fresh", false, &daemon.logs());
    let fresh_pod = cri.run_pod(&fresh).await.unwrap();
    cri.run(&fresh_pod, &cri.container("c", &image, &["sleep", "1000"]), &fresh).await.unwrap();
    let began = Instant::now();
    let mut lanes = tokio::task::JoinSet::new();
    for lane in 0..6 {
        let (mut cri, mine) = (cri.clone(), pods.iter().skip(lane).step_by(6).map(|p| p.1.clone()).collect::<Vec<_>>());
        lanes.spawn(async move {
            for sandbox in mine {
                cri.drop_pod(&sandbox).await.unwrap();
            }
        });
    }
    while let Some(done) = lanes.join_next().await {
        done.unwrap();
    }
    println!("300 stale pods removed in {:?}", began.elapsed());
    cri.drop_pod(&fresh_pod).await.unwrap();
    settle(&daemon, &before).await;
    let left: Vec<_> = std::fs::read_dir(daemon.dir.join("state/netns")).into_iter().flatten().flatten().collect();
    assert!(left.is_empty(), "network namespaces left: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_what_is_new_and_lets_everything_go() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let mut daemon = Daemon::start(&Options { snapshotter: "native".into(), ..Default::default() }).await.unwrap();
    // The root on a small file system of its own.
    daemon.kill();
    let root = daemon.dir.join("root");
    let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"]).arg(&root).status().unwrap();
    assert!(mounted.success());
    daemon.spawn().await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    let pod = cri.pod("before", false, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let id = cri.run(&sandbox, &cri.container("c", &image, &["sleep", "1000"]), &pod).await.unwrap();
    let other = cri.run(&sandbox, &cri.container("d", &image, &["sh", "-c", "sleep 3; exit 9"]), &pod).await.unwrap();

    let filler = root.join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write(&mut file, &[0x55; 4096]).is_ok_and(|n| n > 0) {}
    // The database has pages to spare at first; then it says no, and says why.
    let mut refused = None;
    let mut made = Vec::new();
    for number in 0..200 {
        let pod = cri.pod(&format!("full{number}"), true, &daemon.logs());
        match cri.run_pod(&pod).await {
            Ok(id) => made.push(id),
            Err(e) => {
                refused = Some(e);
                break;
            }
        }
    }
    let refused = refused.expect("a full disk refuses new pods");
    let status = refused.downcast_ref::<tonic::Status>().unwrap();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status:?}");
    println!("after {} pods: {}", made.len(), status.message());
    // Exits are seen, and all that there is can go.
    let status = cri.wait_exit(&other, 10).await.unwrap();
    assert_eq!(status.exit_code, 9);
    cri.stop(&id, 0).await.unwrap();
    cri.remove(&id).await.unwrap();
    for sandbox in made.iter().chain([&sandbox]) {
        cri.drop_pod(sandbox).await.unwrap();
    }
    settle(&daemon, &before).await;
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    let pod = cri.pod("after", false, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    cri.run(&sandbox, &cri.container("c", &image, &["sleep", "1000"]), &pod).await.unwrap();
    // And what was written then is there for the next daemon.
    daemon.kill();
    daemon.spawn().await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let pods = cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    assert_eq!(pods.iter().map(|p| p.id.as_str()).collect::<Vec<_>>(), [sandbox.as_str()]);
    cri.drop_pod(&sandbox).await.unwrap();
    settle(&daemon, &before).await;
}

async fn settle(daemon: &Daemon, before: &census::Census) {
    census::settle(daemon, before, Duration::from_secs(5), "what is left").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chaos_is_refused_unless_the_configuration_allows_it() {
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let refused = daemon.cli(&["chaos", "add", "--actor", "store", "--fault", "panic"]).unwrap_err().to_string();
    assert!(refused.contains("enabled"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_waterfall_names_every_hop_and_joins_the_callers_trace() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let pod = cri.pod("traced", false, &daemon.logs());
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let mut request = tonic::Request::new(RunPodSandboxRequest { config: Some(pod), ..Default::default() });
    request.metadata_mut().insert("traceparent", format!("00-{trace}-00f067aa0ba902b7-01").parse().unwrap());
    let sandbox = cri.runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
    let waterfall = daemon.cli(&["trace", trace]).unwrap();
    println!("{waterfall}");
    for hop in ["RunPodSandbox", "sandbox.RunPod", "network.Prepare", "network.Attach", "bridge", "task.StartSandbox", "store.Commit"] {
        assert!(waterfall.contains(hop), "{hop} is missing in\n{waterfall}");
    }
    cri.drop_pod(&sandbox).await.unwrap();
}

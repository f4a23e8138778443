//! Clients as they are: they lose patience, go away in the middle of a call, and try again; they stop what does not want to stop.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::time::{Duration, Instant};
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, eventually, registry::Registry};

async fn bed(chaos: bool) -> (Daemon, Cri, String, census::Census) {
    bed_with(Options { chaos, ..Default::default() }).await
}

async fn bed_with(options: Options) -> (Daemon, Cri, String, census::Census) {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&options).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    (daemon, cri, image, before)
}

async fn settle(daemon: &Daemon, before: &census::Census) {
    census::settle(daemon, before, Duration::from_secs(10), "what is left").await;
}

/// xorshift: the seed is printed, so that a failure can be had again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// Begins a call and drops it at a random moment, a few times; then goes through with it, trying again as a kubelet does. Counts the calls dropped.
async fn fickle<T, F: Future<Output = anyhow::Result<T>>>(
    dice: &mut Dice,
    dropped: &mut u32,
    what: &str,
    mut call: impl FnMut() -> F,
) -> T {
    for _ in 0..dice.roll(3) {
        let patience = Duration::from_micros(dice.roll(60_000));
        match tokio::time::timeout(patience, call()).await {
            Ok(Ok(value)) => return value,
            Ok(Err(_)) => {}
            Err(_) => *dropped += 1,
        }
    }
    let mut last = None;
    for _ in 0..40 {
        match call().await {
            Ok(value) => return value,
            Err(e) => last = Some(e),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{what} does not work any more: {last:?}");
}

async fn fickle_life(mut cri: Cri, image: String, logs: std::path::PathBuf, name: String, dice: &mut Dice) -> u32 {
    let mut dropped = 0;
    let pod = cri.pod(&name, false, &logs);
    let sandbox = fickle(dice, &mut dropped, "RunPodSandbox", || async { cri.clone().run_pod(&pod).await }).await;
    let config = cri.container("c", &image, &["sleep", "1000"]);
    let id = fickle(dice, &mut dropped, "CreateContainer", || async { cri.clone().create(&sandbox, &config, &pod).await }).await;
    let start = || async {
        let mut cri = cri.clone();
        match cri.status(&id).await? {
            s if s.state == ContainerState::ContainerRunning as i32 => Ok(()),
            s => cri.start(&id).await.map_err(|e| e.context(format!("{s:?}"))),
        }
    };
    fickle(dice, &mut dropped, "StartContainer", start).await;
    let again = fickle(dice, &mut dropped, "RunPodSandbox again", || async { cri.clone().run_pod(&pod).await }).await;
    assert_eq!(again, sandbox, "the same pod");
    fickle(dice, &mut dropped, "ExecSync", || async { cri.clone().exec(&id, &["true"], 10).await }).await;
    if dice.roll(2) == 0 {
        fickle(dice, &mut dropped, "StopContainer", || async { cri.clone().stop(&id, 0).await }).await;
        fickle(dice, &mut dropped, "RemoveContainer", || async { cri.clone().remove(&id).await }).await;
    }
    fickle(dice, &mut dropped, "StopPodSandbox, RemovePodSandbox", || async { cri.clone().drop_pod(&sandbox).await }).await;
    let listed = cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    assert!(!listed.iter().any(|p| p.id == sandbox), "removed");
    dropped
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_cancel_at_random_and_try_again_end_well() {
    let (daemon, cri, image, before) = bed(false).await;
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| u64::from(std::process::id()) * 7919 + 1);
    println!("SEED={seed}");
    let end = Instant::now() + Duration::from_secs(15);
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..8u64 {
        let (cri, image, logs) = (cri.clone(), image.clone(), daemon.logs());
        clients.spawn(async move {
            let mut dice = Dice(seed.wrapping_mul(client * 2 + 1) | 1);
            let (mut lives, mut dropped) = (0, 0);
            while Instant::now() < end {
                dropped += fickle_life(cri.clone(), image.clone(), logs.clone(), format!("c{client}n{lives}"), &mut dice).await;
                lives += 1;
            }
            (lives, dropped)
        });
    }
    let (mut lives, mut dropped) = (0, 0);
    while let Some(done) = clients.join_next().await {
        let done = done.unwrap();
        (lives, dropped) = (lives + done.0, dropped + done.1);
    }
    println!("{lives} lives, {dropped} calls dropped");
    assert!(lives >= 8 && dropped >= 8, "{lives} lives, {dropped} calls dropped: nothing was tried");
    settle(&daemon, &before).await;
    let ops: serde_json::Value = serde_json::from_str(&daemon.cli(&["--json", "ops"]).unwrap()).unwrap();
    let outside: Vec<_> = ops.as_array().unwrap().iter().filter(|o| o["actor"] == "-").collect();
    assert!(outside.is_empty(), "operations that nobody ends: {outside:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_of_a_creation_in_flight_joins_it() {
    let (daemon, mut cri, image, before) = bed(true).await;
    daemon.cli(&["chaos", "add", "--message", "network.Attach", "--fault", "delay", "--delay-ms", "1500", "--nth", "1"]).unwrap();
    daemon.cli(&["chaos", "add", "--message", "snapshot.Prepare", "--fault", "delay", "--delay-ms", "1500", "--nth", "1"]).unwrap();
    let pod = cri.pod("joined", false, &daemon.logs());
    let began = Instant::now();
    let lost = tokio::time::timeout(Duration::from_millis(300), cri.clone().run_pod(&pod)).await;
    assert!(lost.is_err(), "the first client has gone away");
    // Two that try again, at once.
    let (mut one, mut other) = (cri.clone(), cri.clone());
    let (one, other) = tokio::join!(one.run_pod(&pod), other.run_pod(&pod));
    let sandbox = one.unwrap();
    assert_eq!(sandbox, other.unwrap());
    assert!(began.elapsed() < Duration::from_millis(2800), "joined, not begun again: {:?}", began.elapsed());
    let config = cri.container("c", &image, &["sleep", "1000"]);
    let lost = tokio::time::timeout(Duration::from_millis(300), cri.clone().create(&sandbox, &config, &pod)).await;
    assert!(lost.is_err(), "the first client has gone away");
    let began = Instant::now();
    let id = cri.create(&sandbox, &config, &pod).await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(2200), "joined, not begun again: {:?}", began.elapsed());
    let pods = cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    let containers = cri.runtime.list_containers(ListContainersRequest::default()).await.unwrap().into_inner().containers;
    assert_eq!((pods.len(), containers.len()), (1, 1));
    let addresses = census::take(&daemon).addresses.len() - before.addresses.len();
    assert_eq!(addresses, 1, "one creation, one address");
    // Of two starts at once, both succeed: one start, one result.
    let (mut one, mut other) = (cri.clone(), cri.clone());
    let (one, other) = tokio::join!(one.start(&id), other.start(&id));
    one.unwrap();
    other.unwrap();
    assert!(cri.start(&id).await.unwrap_err().to_string().contains("not created"), "later it is an error");
    cri.drop_pod(&sandbox).await.unwrap();
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_holds_up_nobody_and_never_escalates_by_itself() {
    let (daemon, mut cri, image, before) = bed(false).await;
    let pod = cri.pod("stubborn", false, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let stubborn = ["sh", "-c", "trap 'echo asked' TERM; echo ready; while true; do sleep 0.05; done"];
    let id = cri.run(&sandbox, &cri.container("c", &image, &stubborn), &pod).await.unwrap();
    let log = || std::fs::read_to_string(daemon.logs().join("c.log")).unwrap_or_default();
    let asked = || log().matches("asked").count();
    // Before its trap it would not hear the signal.
    eventually("the trap is set", || log().contains("ready")).await;
    // A client that goes away has not asked for SIGKILL.
    let lost = tokio::time::timeout(Duration::from_millis(400), cri.clone().stop(&id, 1)).await;
    assert!(lost.is_err(), "the client has gone away");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(cri.status(&id).await.unwrap().state, ContainerState::ContainerRunning as i32, "no escalation without a client");
    eventually("the signal was sent", || asked() == 1).await;
    // A patient one waits, and others get their answers meanwhile.
    let patient = {
        let (mut cri, id) = (cri.clone(), id.clone());
        tokio::spawn(async move { cri.stop(&id, 600).await })
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    let began = Instant::now();
    assert_eq!(cri.exec(&id, &["echo", "hi"], 10).await.unwrap().stdout, b"hi\n");
    cri.status(&id).await.unwrap();
    let other = cri.run(&sandbox, &cri.container("other", &image, &["sleep", "1000"]), &pod).await.unwrap();
    cri.stop(&other, 0).await.unwrap();
    cri.remove(&other).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "other calls took {:?}", began.elapsed());
    // An impatient one ends it, for both.
    let began = Instant::now();
    cri.stop(&id, 1).await.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(900) && began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    tokio::time::timeout(Duration::from_secs(2), patient).await.expect("the patient stop ends, too").unwrap().unwrap();
    assert_eq!(cri.status(&id).await.unwrap().exit_code, 137);
    assert_eq!(asked(), 1, "the stop signal is sent once");
    cri.stop(&id, 10).await.unwrap();
    // Removing what runs kills it; stopping what is unknown is no error.
    let running = cri.run(&sandbox, &cri.container("r", &image, &stubborn), &pod).await.unwrap();
    let (mut one, mut two) = (cri.clone(), cri.clone());
    let (one, two) = tokio::join!(one.remove(&running), two.remove(&running));
    one.unwrap();
    two.unwrap();
    assert!(cri.status(&running).await.is_err());
    cri.stop(&running, 5).await.unwrap();
    cri.drop_pod(&sandbox).await.unwrap();
    settle(&daemon, &before).await;
}

/// Directories of the freezer with processes of this daemon's containers.
fn freezers(daemon: &Daemon) -> Vec<std::path::PathBuf> {
    let all = census::cgroups_of(&daemon.tag);
    all.into_iter().filter(|d| d.join("freezer.state").exists() || d.join("cgroup.freeze").exists()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_container_can_be_stopped() {
    let (daemon, mut cri, image, before) = bed(false).await;
    let pod = cri.pod("frozen", true, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let id = cri.run(&sandbox, &cri.container("c", &image, &["sleep", "1000"]), &pod).await.unwrap();
    let own: Vec<_> = freezers(&daemon).into_iter().filter(|d| d.display().to_string().contains(&id)).collect();
    assert!(!own.is_empty(), "no freezer of the container");
    for dir in own {
        let (file, word) = if dir.join("freezer.state").exists() { ("freezer.state", "FROZEN") } else { ("cgroup.freeze", "1") };
        std::fs::write(dir.join(file), word).unwrap();
    }
    let began = Instant::now();
    cri.stop(&id, 1).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(cri.status(&id).await.unwrap().exit_code, 137);
    cri.drop_pod(&sandbox).await.unwrap();
    settle(&daemon, &before).await;
}

/// Descriptors, threads and resident KiB of the daemon.
fn weight(daemon: &Daemon) -> (usize, usize, u64) {
    let count = |dir: &str| std::fs::read_dir(format!("/proc/{}/{dir}", daemon.pid())).unwrap().count();
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap().trim().trim_end_matches(" kB").trim().parse().unwrap();
    (count("fd"), count("task"), rss)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_pods_leave_the_daemon_as_it_was() {
    // A short flight recorder, which is full when the measuring begins.
    let extra = "[plugins.\"io.troupe.kernel.v1.kernel\"]\nrecorder_spans = 1024".to_owned();
    let (daemon, cri, image, before) = bed_with(Options { extra, ..Default::default() }).await;
    let churn = |from: u32, pods: u32| {
        let (cri, image, logs) = (cri.clone(), image.clone(), daemon.logs());
        async move {
            let mut lanes = tokio::task::JoinSet::new();
            for lane in 0..4 {
                let (mut cri, image, logs) = (cri.clone(), image.clone(), logs.clone());
                lanes.spawn(async move {
                    for number in (from..from + pods).filter(|n| n % 4 == lane) {
                        let pod = cri.pod(&format!("churn{number}"), true, &logs);
                        let sandbox = cri.run_pod(&pod).await.unwrap();
                        cri.run(&sandbox, &cri.container("c", &image, &["true"]), &pod).await.unwrap();
                        cri.drop_pod(&sandbox).await.unwrap();
                    }
                });
            }
            while let Some(done) = lanes.join_next().await {
                done.unwrap();
            }
        }
    };
    churn(0, 40).await;
    settle(&daemon, &before).await;
    // Threads that idle end after ten seconds.
    tokio::time::sleep(Duration::from_secs(11)).await;
    let warm = weight(&daemon);
    churn(40, 200).await;
    settle(&daemon, &before).await;
    tokio::time::sleep(Duration::from_secs(11)).await;
    let after = weight(&daemon);
    println!("fds, threads, RSS KiB: {warm:?} before, {after:?} after 200 pods");
    assert!(after.0 <= warm.0 + 4, "descriptors: {warm:?} {after:?}");
    assert!(after.1 <= warm.1 + 4, "threads: {warm:?} {after:?}");
    assert!(after.2 <= warm.2 + 4096, "memory: {warm:?} {after:?}");
}

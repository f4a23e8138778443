//! Every hop of every call of a pod's life is killed once, and once goes wrong in another way, and the caller tries again as a kubelet would: the call ends
//! well, and in the end nothing is left. The hops are not listed here: a first life without faults is traced, and its trace says what there is to kill.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, registry::Registry};

/// The calls of a life, in order.
const CALLS: [&str; 9] = [
    "PullImage",
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "ContainerStats",
    "StopContainer",
    "RemoveContainer",
    "StopPodSandbox",
    "RemovePodSandbox",
];

/// What a life knows of its pod.
struct Life {
    cri: Cri,
    image: String,
    pod: PodSandboxConfig,
    config: ContainerConfig,
    sandbox: String,
    container: String,
    /// How long an attempt may take.
    patience: Duration,
}

/// A place where a message is delivered.
#[derive(Clone, Debug)]
struct Hop {
    call: &'static str,
    /// Actor, or the template of its kind.
    actor: String,
    message: String,
    /// Delivery of this message to this kind of actor within the call.
    nth: usize,
}

fn traced<T>(body: T, trace: &str, patience: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(body);
    request.metadata_mut().insert("traceparent", format!("00-{trace}-00f067aa0ba902b7-01").parse().unwrap());
    request.set_timeout(patience);
    request
}

impl Life {
    fn new(cri: &Cri, image: &str, name: &str, daemon: &Daemon) -> Life {
        let pod = cri.pod(name, false, &daemon.logs());
        let config = cri.container("c", image, &["sleep", "1000"]);
        let (sandbox, container) = (String::new(), String::new());
        Life { cri: cri.clone(), image: image.into(), pod, config, sandbox, container, patience: Duration::from_secs(20) }
    }

    /// One attempt at a call.
    async fn attempt(&mut self, call: &str, trace: &str) -> Result<(), tonic::Status> {
        match call {
            "PullImage" => {
                let image = Some(ImageSpec { image: self.image.clone(), ..Default::default() });
                self.cri.image.pull_image(traced(PullImageRequest { image, ..Default::default() }, trace, self.patience)).await?;
            }
            "RunPodSandbox" => {
                let request = RunPodSandboxRequest { config: Some(self.pod.clone()), ..Default::default() };
                self.sandbox = self.cri.runtime.run_pod_sandbox(traced(request, trace, self.patience)).await?.into_inner().pod_sandbox_id;
            }
            "CreateContainer" => {
                let request = CreateContainerRequest {
                    pod_sandbox_id: self.sandbox.clone(),
                    config: Some(self.config.clone()),
                    sandbox_config: Some(self.pod.clone()),
                };
                self.container = self.cri.runtime.create_container(traced(request, trace, self.patience)).await?.into_inner().container_id;
            }
            "StartContainer" => {
                // A kubelet looks before it tries again: the start may have worked although its answer was lost.
                if let Ok(status) = self.cri.status(&self.container).await
                    && status.state == ContainerState::ContainerRunning as i32
                {
                    return Ok(());
                }
                self.cri
                    .runtime
                    .start_container(traced(StartContainerRequest { container_id: self.container.clone() }, trace, self.patience))
                    .await?;
            }
            "ContainerStats" => {
                let request = ContainerStatsRequest { container_id: self.container.clone() };
                self.cri.runtime.container_stats(traced(request, trace, self.patience)).await?;
            }
            "RemoveContainer" => {
                let request = RemoveContainerRequest { container_id: self.container.clone() };
                self.cri.runtime.remove_container(traced(request, trace, self.patience)).await?;
            }
            "StopContainer" => {
                let request = StopContainerRequest { container_id: self.container.clone(), timeout: 0 };
                self.cri.runtime.stop_container(traced(request, trace, self.patience)).await?;
            }
            "StopPodSandbox" => {
                let request = StopPodSandboxRequest { pod_sandbox_id: self.sandbox.clone() };
                self.cri.runtime.stop_pod_sandbox(traced(request, trace, self.patience)).await?;
            }
            _ => {
                let request = RemovePodSandboxRequest { pod_sandbox_id: self.sandbox.clone() };
                self.cri.runtime.remove_pod_sandbox(traced(request, trace, self.patience)).await?;
            }
        }
        Ok(())
    }

    /// Attempts until one works; answers how many failed.
    async fn call(&mut self, call: &str, trace: &str, what: &str) -> usize {
        let mut last = None;
        for failed in 0..30 {
            match self.attempt(call, trace).await {
                Ok(()) => return failed,
                Err(e) => last = Some(e),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{what}: {call} does not work any more: {last:?}");
    }
}

/// Kinds of actors and messages of a trace, in order.
fn hops(daemon: &Daemon, trace: &str) -> Vec<(String, String)> {
    let spans: serde_json::Value = serde_json::from_str(&daemon.cli(&["--json", "trace", trace]).unwrap()).unwrap();
    let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
    let hop =
        |s: &serde_json::Value| (s["kind"] == "hop").then(|| (text(&s["actor"]).split('/').next().unwrap().to_owned(), text(&s["name"])));
    spans.as_array().unwrap().iter().filter_map(hop).collect()
}

async fn settle(daemon: &Daemon, before: &census::Census, what: &str) {
    census::settle(daemon, before, Duration::from_secs(10), what).await;
}

/// The calls of a life in which `calls` are tried: where a pod's end is, its container still runs.
fn life_of(calls: &[&str]) -> impl Iterator<Item = &'static str> {
    let running = calls.contains(&"StopPodSandbox");
    CALLS.into_iter().filter(move |c| !(running && matches!(*c, "StopContainer" | "RemoveContainer")))
}

/// A first life, and what its calls consist of.
async fn trace_a_life(daemon: &Daemon, cri: &Cri, image: &str, calls: &[&str]) -> Vec<Hop> {
    let mut first = Life::new(cri, image, "first", daemon);
    let mut found = Vec::new();
    for (number, call) in life_of(calls).enumerate() {
        let trace = format!("{:032x}", 0xfeed_0000 + number);
        first.call(call, &trace, "the first life").await;
        let mut seen: BTreeMap<(String, String), usize> = BTreeMap::new();
        for (actor, message) in hops(daemon, &trace) {
            let nth = seen.entry((actor.clone(), message.clone())).or_default();
            *nth += 1;
            if calls.contains(&call) {
                found.push(Hop { call, actor, message, nth: *nth });
            }
        }
    }
    found
}

/// Faults of a kind that fits the hop and its place in the list.
type Choose = fn(&Hop, usize) -> &'static str;

async fn every_hop(calls: &[&str], actors: &[&str], choose: Choose) {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let extra = "[plugins.\"io.troupe.kernel.v1.kernel\"]\nmax_restarts = 100000".to_owned();
    let daemon = Daemon::start(&Options { chaos: true, extra, ..Default::default() }).await.unwrap();
    let cri = daemon.cri().await.unwrap();
    let before = census::take(&daemon);
    let hops = trace_a_life(&daemon, &cri, &image, calls).await;
    settle(&daemon, &before, "the first life").await;
    for actor in actors {
        assert!(hops.iter().any(|h| h.actor == *actor), "{actor} has no part in {calls:?}: {hops:?}");
    }
    let (mut failures, total) = (0, hops.len());
    let began = Instant::now();
    for (number, hop) in hops.into_iter().enumerate() {
        let fault = choose(&hop, number);
        let what = format!("{fault} at {} #{} for {} in {}", hop.message, hop.nth, hop.actor, hop.call);
        let mut life = Life::new(&cri, &image, &format!("p{number}"), &daemon);
        if hop.call == "PullImage" {
            let image = Some(ImageSpec { image: image.clone(), ..Default::default() });
            life.cri.image.remove_image(RemoveImageRequest { image }).await.unwrap();
        }
        for (at, call) in life_of(calls).enumerate() {
            if call == hop.call {
                let nth = hop.nth.to_string();
                let rule = ["chaos", "add", "--actor", &hop.actor, "--message", &hop.message, "--fault", fault, "--nth", &nth];
                daemon.cli(&[&rule[..], &["--delay-ms", "200"]].concat()).unwrap();
                // What is never answered ends with the caller's deadline.
                life.patience = Duration::from_secs(if matches!(fault, "drop" | "hang") { 1 } else { 20 });
            }
            failures += life.call(call, &format!("{:032x}", 0xdead_0000 + number * 16 + at), &what).await;
            if call == hop.call {
                daemon.cli(&["chaos", "clear"]).unwrap();
                life.patience = Duration::from_secs(20);
            }
        }
        settle(&daemon, &before, &what).await;
    }
    println!("{total} hops of {calls:?}, {failures} attempts failed on the way, {:?}", began.elapsed());
    assert_eq!(serde_json::from_str::<serde_json::Value>(&daemon.cli(&["--json", "health"]).unwrap()).unwrap()["status"], "ok");
}

fn panics(_: &Hop, _: usize) -> &'static str {
    "panic"
}

/// Each hop gets one. A creation outlives its caller's deadline, so that a retry can join it, and so does a task's record of its removal: what is never
/// answered would last as long as those may.
fn otherwise(hop: &Hop, number: usize) -> &'static str {
    let lasting = ["PullImage", "RunPodSandbox", "CreateContainer", "RemoveContainer"].contains(&hop.call);
    let kinds: &[&str] = if lasting { &["error", "duplicate", "delay"] } else { &["error", "duplicate", "drop", "hang"] };
    kinds[number % kinds.len()]
}

const MAKING: [&str; 1] = ["RunPodSandbox"];
const LIVING: [&str; 5] = ["CreateContainer", "StartContainer", "ContainerStats", "StopContainer", "RemoveContainer"];
const ENDING: [&str; 2] = ["StopPodSandbox", "RemovePodSandbox"];

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_making_a_pod_may_die() {
    every_hop(&MAKING, &["sandbox", "sandbox.pod", "store", "network", "task", "task.shim", "events"], panics).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_a_container_s_life_may_die() {
    every_hop(&LIVING, &["sandbox", "sandbox.pod", "store", "image", "snapshot", "task", "task.shim", "events", "stats"], panics).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_the_end_may_die() {
    every_hop(&ENDING, &["sandbox", "sandbox.pod", "store", "network", "task", "task.shim", "events"], panics).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_a_pull_may_die() {
    every_hop(&["PullImage"], &["image", "content", "snapshot", "store"], panics).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_making_and_ending_may_fail_otherwise() {
    every_hop(&[&MAKING[..], &ENDING[..]].concat(), &[], otherwise).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_pulling_and_living_may_fail_otherwise() {
    every_hop(&[&["PullImage"], &LIVING[..]].concat(), &[], otherwise).await;
}

/// Waits until a rule has hit.
async fn hit(daemon: &Daemon) {
    loop {
        let rules: serde_json::Value = serde_json::from_str(&daemon.cli(&["--json", "chaos", "list"]).unwrap()).unwrap();
        if rules.to_string().contains("\"hits\":1") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The daemon dies at each hop: it hangs there, so that the moment is exact, and is killed. The next daemon finds everything.
async fn killed_at_every_hop(calls: &[&str]) {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let mut daemon = Daemon::start(&Options { chaos: true, ..Default::default() }).await.unwrap();
    let cri = daemon.cri().await.unwrap();
    let before = census::take(&daemon);
    // Those that only pass messages on have no state that differs from their children's.
    let hops = trace_a_life(&daemon, &cri, &image, calls).await.into_iter().filter(|h| h.actor != "sandbox" && h.actor != "task");
    settle(&daemon, &before, "the first life").await;
    let (mut total, mut missed, began) = (0, 0, Instant::now());
    for (number, hop) in hops.enumerate() {
        let what = format!("the daemon killed at {} #{} for {} in {}", hop.message, hop.nth, hop.actor, hop.call);
        let mut life = Life::new(&daemon.cri().await.unwrap(), &image, &format!("p{number}"), &daemon);
        for (at, call) in life_of(calls).enumerate() {
            let trace = format!("{:032x}", 0xbeef_0000 + number * 16 + at);
            if call == hop.call {
                let nth = hop.nth.to_string();
                let rule = ["chaos", "add", "--actor", &hop.actor, "--message", &hop.message, "--fault", "hang", "--nth", &nth];
                daemon.cli(&rule).unwrap();
                tokio::select! {
                    biased;
                    // What goes on beside the call delivers the same messages, so the n-th is not always the same one.
                    _ = life.attempt(call, &trace) => missed += 1,
                    () = hit(&daemon) => {}
                }
                daemon.kill();
                daemon.spawn().await.unwrap();
                life.cri = daemon.cri().await.unwrap();
            }
            life.call(call, &trace, &what).await;
        }
        settle(&daemon, &before, &what).await;
        total += 1;
    }
    assert!(total > 5 && missed * 4 <= total, "{total} hops of {calls:?}, {missed} missed: too few");
    println!("the daemon was killed at {total} hops of {calls:?} in {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_may_be_killed_at_every_hop_of_making_a_pod() {
    killed_at_every_hop(&["RunPodSandbox"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_may_be_killed_at_every_hop_of_a_container_s_life() {
    killed_at_every_hop(&["CreateContainer", "StartContainer", "StopContainer", "RemoveContainer"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_may_be_killed_at_every_hop_of_the_end() {
    killed_at_every_hop(&ENDING).await;
}

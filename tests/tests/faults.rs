//! Every hop of every call of a pod's life is killed once, and the caller tries again as a kubelet would: the call ends well, and in the end nothing is
//! left. The hops are not listed here: a first life without faults is traced, and its trace says what there is to kill.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, registry::Registry};

/// The calls of a life, in order.
const CALLS: [&str; 7] =
    ["PullImage", "RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer", "StopPodSandbox", "RemovePodSandbox"];

/// What a life knows of its pod.
struct Life {
    cri: Cri,
    image: String,
    pod: PodSandboxConfig,
    config: ContainerConfig,
    sandbox: String,
    container: String,
}

fn traced<T>(body: T, trace: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(body);
    request.metadata_mut().insert("traceparent", format!("00-{trace}-00f067aa0ba902b7-01").parse().unwrap());
    request.set_timeout(Duration::from_secs(20));
    request
}

impl Life {
    fn new(cri: &Cri, image: &str, name: &str, daemon: &Daemon) -> Life {
        let pod = cri.pod(name, false, &daemon.logs());
        let config = cri.container("c", image, &["sleep", "1000"]);
        Life { cri: cri.clone(), image: image.into(), pod, config, sandbox: String::new(), container: String::new() }
    }

    /// One attempt at a call.
    async fn attempt(&mut self, call: &str, trace: &str) -> Result<(), tonic::Status> {
        match call {
            "PullImage" => {
                let image = Some(ImageSpec { image: self.image.clone(), ..Default::default() });
                self.cri.image.pull_image(traced(PullImageRequest { image, ..Default::default() }, trace)).await?;
            }
            "RunPodSandbox" => {
                let request = RunPodSandboxRequest { config: Some(self.pod.clone()), ..Default::default() };
                self.sandbox = self.cri.runtime.run_pod_sandbox(traced(request, trace)).await?.into_inner().pod_sandbox_id;
            }
            "CreateContainer" => {
                let request = CreateContainerRequest {
                    pod_sandbox_id: self.sandbox.clone(),
                    config: Some(self.config.clone()),
                    sandbox_config: Some(self.pod.clone()),
                };
                self.container = self.cri.runtime.create_container(traced(request, trace)).await?.into_inner().container_id;
            }
            "StartContainer" => {
                // A kubelet looks before it tries again: the start may have worked although its answer was lost.
                if let Ok(status) = self.cri.status(&self.container).await
                    && status.state == ContainerState::ContainerRunning as i32
                {
                    return Ok(());
                }
                self.cri.runtime.start_container(traced(StartContainerRequest { container_id: self.container.clone() }, trace)).await?;
            }
            "StopContainer" => {
                let request = StopContainerRequest { container_id: self.container.clone(), timeout: 0 };
                self.cri.runtime.stop_container(traced(request, trace)).await?;
            }
            "StopPodSandbox" => {
                let request = StopPodSandboxRequest { pod_sandbox_id: self.sandbox.clone() };
                self.cri.runtime.stop_pod_sandbox(traced(request, trace)).await?;
            }
            _ => {
                let request = RemovePodSandboxRequest { pod_sandbox_id: self.sandbox.clone() };
                self.cri.runtime.remove_pod_sandbox(traced(request, trace)).await?;
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

/// Messages of a trace, in order.
fn hops(daemon: &Daemon, trace: &str) -> Vec<String> {
    let spans: serde_json::Value = serde_json::from_str(&daemon.cli(&["--json", "trace", trace]).unwrap()).unwrap();
    let hop = |s: &serde_json::Value| (s["kind"] == "hop").then(|| s["name"].as_str().unwrap().to_owned());
    spans.as_array().unwrap().iter().filter_map(hop).collect()
}

async fn settle(daemon: &Daemon, before: &census::Census, what: &str) {
    let end = Instant::now() + Duration::from_secs(10);
    while census::take(daemon) != *before && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(census::take(daemon), *before, "{what}");
}

async fn kill_every_hop(calls: &[&str]) {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let extra = "[plugins.\"io.troupe.kernel.v1.kernel\"]\nmax_restarts = 100000".to_owned();
    let daemon = Daemon::start(&Options { chaos: true, extra, ..Default::default() }).await.unwrap();
    let cri = daemon.cri().await.unwrap();
    let before = census::take(&daemon);

    let mut first = Life::new(&cri, &image, "first", &daemon);
    let mut kills: Vec<(&str, String, usize)> = Vec::new();
    for (number, call) in CALLS.iter().enumerate() {
        let trace = format!("{:032x}", 0xfeed_0000 + number);
        first.call(call, &trace, "the first life").await;
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for hop in hops(&daemon, &trace) {
            let nth = seen.entry(hop.clone()).or_default();
            *nth += 1;
            if calls.contains(call) {
                kills.push((call, hop, *nth));
            }
        }
    }
    settle(&daemon, &before, "the first life").await;
    assert!(kills.len() >= calls.len() * 2, "the traces name too few hops: {kills:?}");

    let (mut failures, total) = (0, kills.len());
    for (number, (victim, hop, nth)) in kills.into_iter().enumerate() {
        let what = format!("{hop} #{nth} killed in {victim}");
        let mut life = Life::new(&cri, &image, &format!("p{number}"), &daemon);
        if victim == "PullImage" {
            let image = Some(ImageSpec { image: image.clone(), ..Default::default() });
            life.cri.image.remove_image(RemoveImageRequest { image }).await.unwrap();
        }
        for (at, call) in CALLS.iter().enumerate() {
            if call == &victim {
                let actor = hop.rsplit_once('.').unwrap().0;
                daemon.cli(&["chaos", "add", "--actor", actor, "--message", &hop, "--fault", "panic", "--nth", &nth.to_string()]).unwrap();
            }
            failures += life.call(call, &format!("{:032x}", 0xdead_0000 + number * 16 + at), &what).await;
            if call == &victim {
                daemon.cli(&["chaos", "clear"]).unwrap();
            }
        }
        settle(&daemon, &before, &what).await;
    }
    println!("{total} hops of {calls:?} killed, {failures} attempts failed on the way");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&daemon.cli(&["--json", "health"]).unwrap()).unwrap()["status"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_making_a_pod_may_die() {
    kill_every_hop(&["RunPodSandbox"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_a_container_s_life_may_die() {
    kill_every_hop(&["CreateContainer", "StartContainer", "StopContainer"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_the_end_may_die() {
    kill_every_hop(&["StopPodSandbox", "RemovePodSandbox"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hop_of_a_pull_may_die() {
    kill_every_hop(&["PullImage"]).await;
}

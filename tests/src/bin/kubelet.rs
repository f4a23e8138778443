//! A real kubelet in standalone mode on a private Troupe: static pods with probes of all kinds, init and sidecar containers, volumes, crash loops and
//! graceful ends, kept for as long as wanted; then everything is given back.
//!
//! `kubelet KUBELET [--minutes 60] [--kill-every 0] [--gates A=true,B=true]`, as root. The kubelet keeps its device plugins in `/var/lib/kubelet` and sets a
//! few sysctls when it starts; the latter are put back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a trial ends with the first thing that fails, and says which")]
use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, registry::Registry};

#[path = "kubelet/node.rs"]
mod node;
use node::Node;

/// Static pods, a document each.
const PODS: &str = include_str!("kubelet/pods.yaml");
/// Pods whose containers are ready all the time and never restart.
const STEADY: [&str; 4] = ["probes", "volumes", "shared", "host"];

/// Command line.
#[derive(Parser)]
struct Args {
    /// The kubelet's binary.
    kubelet: PathBuf,
    /// How long to keep the pods.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Kill the daemon this often, in seconds; 0 = never.
    #[arg(long, default_value_t = 0)]
    kill_every: u64,
    /// Feature gates of the kubelet, such as EventedPLEG=true,PodAndContainerStatsFromCRI=true.
    #[arg(long, default_value = "")]
    gates: String,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let args = Args::parse();
    let registry = Registry::start().await;
    let image = registry.add_busybox()?;
    let mut daemon = Daemon::start(&Options::default()).await?;
    daemon.cri().await?.pull(&image).await?;
    let mut node = Node::start(&args.kubelet, &args.gates, &daemon)?;
    until("the kubelet answers", 60, || node.pods().is_ok()).await?;
    // It makes its own cgroups a while after it answers, and keeps them.
    tokio::time::sleep(Duration::from_secs(15)).await;
    let before = census::take(&daemon);
    for (number, pod) in PODS.split("\n---\n").enumerate() {
        let pod = pod.replace("IMAGE", &image).replace("DIR", &daemon.dir.display().to_string());
        node.add(&format!("{number}.yaml"), &pod)?;
    }
    until("the steady pods are ready", 120, || STEADY.iter().all(|p| node.is_ready(p))).await?;
    println!("ready; at the start: {}", usage(&daemon));
    keep(&args, &mut daemon, &node).await?;
    println!("at the end: {}", usage(&daemon));
    verdict(&node)?;
    node.remove_all()?;
    until("all is given back", 180, || census::take(&daemon) == before)
        .await
        .with_context(|| format!("left: {:#?}", census::take(&daemon)))?;
    println!("everything is given back");
    println!("the kubelet's errors:\n{}", node.errors()?);
    node.stop();
    Ok(())
}

/// Watches until the time is up; a steady pod that restarts ends the trial at once.
async fn keep(args: &Args, daemon: &mut Daemon, node: &Node) -> Result<()> {
    let (began, mut killed, mut kills, mut unready) = (Instant::now(), Instant::now(), 0, 0);
    while began.elapsed() < Duration::from_secs(args.minutes * 60) {
        tokio::time::sleep(Duration::from_secs(5)).await;
        if args.kill_every > 0 && killed.elapsed() > Duration::from_secs(args.kill_every) {
            daemon.kill();
            daemon.spawn().await?;
            (killed, kills) = (Instant::now(), kills + 1);
        }
        for pod in STEADY {
            let restarts = node.restarts(pod)?;
            ensure!(restarts.values().all(|n| *n == 0), "pod {pod} restarted: {restarts:?}\n{}", daemon.log_tail());
            unready += usize::from(!node.is_ready(pod));
        }
    }
    println!("{} minutes; daemon killed {kills} times; steady pods seen not ready {unready} times", args.minutes);
    Ok(())
}

/// What must have happened meanwhile.
fn verdict(node: &Node) -> Result<()> {
    for (pod, container, reasons) in [
        ("failing", "exits", &["Error"][..]),
        ("failing", "eats", &["OOMKilled"]),
        ("failing", "absent", &["StartError", "ContainerCannotRun"]),
        ("unhealthy", "deaf", &["Error"]),
    ] {
        let (restarts, reason) = node.last_end(pod, container)?;
        println!("{pod}/{container}: {restarts} restarts, last {reason}");
        ensure!(restarts > 0 && reasons.contains(&reason.as_str()), "{pod}/{container}: expected restarts, last end one of {reasons:?}");
    }
    ensure!(node.phase("done")? == "Succeeded", "the pod with an end has not succeeded");
    ensure!(STEADY.iter().all(|p| node.is_ready(p)), "a steady pod is not ready in the end");
    Ok(())
}

async fn until(what: &str, seconds: u64, mut so: impl FnMut() -> bool) -> Result<()> {
    let began = Instant::now();
    while !so() {
        if began.elapsed() > Duration::from_secs(seconds) {
            bail!("{what}: not after {seconds} s");
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}

/// The daemon's memory, threads and descriptors.
fn usage(daemon: &Daemon) -> String {
    let proc = PathBuf::from(format!("/proc/{}", daemon.pid()));
    let status = std::fs::read_to_string(proc.join("status")).unwrap_or_default();
    let fields: BTreeMap<&str, &str> = status.lines().filter_map(|l| l.split_once(':')).map(|(k, v)| (k, v.trim())).collect();
    let open = std::fs::read_dir(proc.join("fd")).map(Iterator::count).unwrap_or(0);
    let field = |name: &str| fields.get(name).copied().unwrap_or("?");
    format!("VmRSS {}, RssAnon {}, {} threads, {open} descriptors", field("VmRSS"), field("RssAnon"), field("Threads"))
}

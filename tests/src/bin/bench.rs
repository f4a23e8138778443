//! Measures any CRI endpoint with the same code, so that Troupe and another runtime stand side by side in one run.
//!
//! `bench` alone starts a private Troupe (and, with `--with-containerd`, a private containerd of this machine) and prints one column for each;
//! `--endpoint NAME=SOCKET` measures a daemon that runs already.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a measuring tool fails by panicking")]
use anyhow::{Context, Result};
use clap::Parser;
use proto::cri::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use troupe_tests::cri::{self, Cri};
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::registry::Registry;

#[path = "bench/containerd.rs"]
mod containerd;

/// Command line.
#[derive(Parser)]
struct Args {
    /// NAME=SOCKET of a daemon that runs already; may be repeated.
    #[arg(long)]
    endpoint: Vec<String>,
    /// Also start this machine's containerd on private directories.
    #[arg(long)]
    with_containerd: bool,
    /// Only measure containerd or the endpoints, no private Troupe.
    #[arg(long)]
    without_troupe: bool,
    /// Troupe with this runc-compatible binary instead of the embedded engine.
    #[arg(long, default_value = "")]
    binary_name: String,
    /// Image to run; by default busybox from a registry of the bench's own.
    #[arg(long)]
    image: Option<String>,
    /// Images to pull cold; by default one of `--pull-mib` MiB made of this machine's /usr/lib, gzip and zstd.
    #[arg(long)]
    pull: Vec<String>,
    /// Size of the made image, 0 = no pull measured.
    #[arg(long, default_value_t = 256)]
    pull_mib: usize,
    /// Lifecycles in sequence.
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// Pods for the memory figures.
    #[arg(long, default_value_t = 40)]
    pods: usize,
    /// Containers for the list figures.
    #[arg(long, default_value_t = 200)]
    containers: usize,
    /// Pods on the pod network instead of the node's.
    #[arg(long)]
    pod_network: bool,
}

type Column = BTreeMap<&'static str, String>;

const ROWS: &[&str] = &[
    "pod to running p50",
    "pod to running p99",
    "RunPodSandbox p50",
    "CreateContainer p50",
    "StartContainer p50",
    "StopContainer p50",
    "RemoveContainer p50",
    "StopPodSandbox p50",
    "RemovePodSandbox p50",
    "ExecSync p50",
    "lifecycles/s, 1 at a time",
    "lifecycles/s, 8 at a time",
    "ListContainers p50",
    "ListPodSandbox p50",
    "PSS daemon",
    "PSS shims per pod",
    "cold pull gzip",
    "cold pull zstd",
    "cold pull",
];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let args = Args::parse();
    let registry = Registry::start().await;
    let image = match &args.image {
        Some(image) => image.clone(),
        None => registry.add_busybox()?,
    };
    let mut pulls: Vec<(&'static str, String)> = args.pull.iter().map(|p| ("cold pull", p.clone())).collect();
    if pulls.is_empty() && args.pull_mib > 0 {
        pulls = registry.add_big(args.pull_mib << 20)?;
    }
    let mut columns: Vec<(String, Column)> = Vec::new();
    if !args.without_troupe {
        let options = Options { binary_name: args.binary_name.clone(), ..Default::default() };
        let daemon = Daemon::start(&options).await?;
        let column = measure(&args, daemon.cri().await?, Some(daemon.pid()), &daemon.dir, "containerd-shim-troupe", &image, &pulls).await;
        columns.push(("troupe".into(), column.with_context(|| daemon.log_tail())?));
    }
    if args.with_containerd {
        let daemon = containerd::Containerd::start().await?;
        let column = measure(&args, daemon.cri().await?, Some(daemon.pid()), &daemon.dir, "containerd-shim", &image, &pulls).await?;
        columns.push(("containerd".into(), column));
    }
    for endpoint in &args.endpoint {
        let (name, socket) = endpoint.split_once('=').context("--endpoint wants NAME=SOCKET")?;
        let mut client = cri::connect(Path::new(socket)).await?;
        client.cgroup_parent = format!("/bench-{name}");
        let dir = tempfile::tempdir()?;
        let column = measure(&args, client, None, dir.path(), "containerd-shim", &image, &pulls).await?;
        columns.push((name.into(), column));
    }
    print(&columns);
    Ok(())
}

fn print(columns: &[(String, Column)]) {
    println!("| | {} |", columns.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(" | "));
    println!("|---|{}", "---|".repeat(columns.len()));
    for row in ROWS {
        if columns.iter().any(|(_, c)| c.contains_key(row)) {
            let cells: Vec<&str> = columns.iter().map(|(_, c)| c.get(row).map(String::as_str).unwrap_or("-")).collect();
            println!("| {row} | {} |", cells.join(" | "));
        }
    }
}

#[derive(Default)]
struct Times(BTreeMap<&'static str, Vec<f64>>);

impl Times {
    fn add(&mut self, name: &'static str, since: Instant) {
        self.0.entry(name).or_default().push(since.elapsed().as_secs_f64() * 1e3);
    }
    fn quantile(&self, name: &str, q: f64) -> f64 {
        let mut all = self.0.get(name).cloned().unwrap_or_default();
        all.sort_by(f64::total_cmp);
        all.get(((all.len() as f64 * q) as usize).min(all.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
    }
}

async fn measure(
    args: &Args,
    mut cri: Cri,
    pid: Option<u32>,
    dir: &Path,
    shim: &str,
    image: &str,
    pulls: &[(&'static str, String)],
) -> Result<Column> {
    let mut column = Column::new();
    cri.pull(image).await?;
    let bench = Bench { image: image.into(), logs: dir.join("logs"), host_network: !args.pod_network };
    bench.lifecycle(&mut cri, "warm", &mut Times::default()).await?;

    let mut times = Times::default();
    let began = Instant::now();
    for round in 0..args.rounds {
        bench.lifecycle(&mut cri, &format!("seq{round}"), &mut times).await?;
    }
    column.insert("lifecycles/s, 1 at a time", format!("{:.1}", args.rounds as f64 / began.elapsed().as_secs_f64()));
    for (row, name, q) in [
        ("pod to running p50", "running", 0.5),
        ("pod to running p99", "running", 0.99),
        ("RunPodSandbox p50", "runp", 0.5),
        ("CreateContainer p50", "create", 0.5),
        ("StartContainer p50", "start", 0.5),
        ("StopContainer p50", "stop", 0.5),
        ("RemoveContainer p50", "rm", 0.5),
        ("StopPodSandbox p50", "stopp", 0.5),
        ("RemovePodSandbox p50", "rmp", 0.5),
        ("ExecSync p50", "exec", 0.5),
    ] {
        column.insert(row, format!("{:.1} ms", times.quantile(name, q)));
    }
    column.insert("lifecycles/s, 8 at a time", format!("{:.1}", bench.parallel(&cri, 8, args.rounds.div_ceil(4)).await?));
    bench.crowd(&mut cri, args, pid, dir, shim, &mut column).await?;
    for (row, image) in pulls {
        let began = Instant::now();
        cri.pull(image).await?;
        column.insert(row, format!("{:.2} s", began.elapsed().as_secs_f64()));
    }
    Ok(column)
}

struct Bench {
    image: String,
    logs: PathBuf,
    host_network: bool,
}

impl Bench {
    async fn lifecycle(&self, cri: &mut Cri, name: &str, times: &mut Times) -> Result<()> {
        let pod = cri.pod(name, self.host_network, &self.logs);
        let began = Instant::now();
        let id = cri.run_pod(&pod).await?;
        times.add("runp", began);
        let step = Instant::now();
        let config = cri.container("main", &self.image, &["sleep", "1000"]);
        let container = cri.create(&id, &config, &pod).await?;
        times.add("create", step);
        let step = Instant::now();
        cri.start(&container).await?;
        times.add("start", step);
        times.add("running", began);
        let step = Instant::now();
        anyhow::ensure!(cri.exec(&container, &["true"], 10).await?.exit_code == 0, "exec failed");
        times.add("exec", step);
        let step = Instant::now();
        cri.stop(&container, 0).await?;
        times.add("stop", step);
        let step = Instant::now();
        cri.remove(&container).await?;
        times.add("rm", step);
        let step = Instant::now();
        cri.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.clone() }).await?;
        times.add("stopp", step);
        let step = Instant::now();
        cri.runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id }).await?;
        times.add("rmp", step);
        Ok(())
    }

    async fn parallel(&self, cri: &Cri, width: usize, each: usize) -> Result<f64> {
        let began = Instant::now();
        let mut all = Vec::new();
        for worker in 0..width {
            let (mut cri, bench) =
                (cri.clone(), Bench { image: self.image.clone(), logs: self.logs.clone(), host_network: self.host_network });
            all.push(tokio::spawn(async move {
                for round in 0..each {
                    bench.lifecycle(&mut cri, &format!("par{worker}-{round}"), &mut Times::default()).await?;
                }
                anyhow::Ok(())
            }));
        }
        for task in all {
            task.await??;
        }
        Ok((width * each) as f64 / began.elapsed().as_secs_f64())
    }

    /// Many pods at once: lists and memory.
    async fn crowd(&self, cri: &mut Cri, args: &Args, pid: Option<u32>, dir: &Path, shim: &str, column: &mut Column) -> Result<()> {
        let mut pods = Vec::new();
        let mut left = args.containers;
        for number in 0..args.pods {
            let pod = cri.pod(&format!("crowd{number}"), self.host_network, &self.logs);
            let id = cri.run_pod(&pod).await?;
            let share = left.div_ceil(args.pods - number);
            for container in 0..share {
                let config = cri.container(&format!("c{container}"), &self.image, &["sleep", "1000"]);
                let made = cri.create(&id, &config, &pod).await?;
                if container == 0 {
                    cri.start(&made).await?;
                }
            }
            left -= share;
            pods.push(id);
        }
        let mut times = Times::default();
        for _ in 0..50 {
            let step = Instant::now();
            cri.runtime.list_containers(ListContainersRequest::default()).await?;
            times.add("list", step);
            let step = Instant::now();
            cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await?;
            times.add("pods", step);
        }
        column.insert("ListContainers p50", format!("{:.2} ms", times.quantile("list", 0.5)));
        column.insert("ListPodSandbox p50", format!("{:.2} ms", times.quantile("pods", 0.5)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        if let Some(pid) = pid {
            column.insert("PSS daemon", format!("{:.1} MiB", pss_kib(pid) as f64 / 1024.0));
            let shims = troupe_tests::census::processes_of(dir, "no-such-cgroup").into_iter().filter(|(_, cmd)| cmd.contains(shim));
            let total: u64 = shims.map(|(pid, _)| pss_kib(pid)).sum();
            column.insert("PSS shims per pod", format!("{:.2} MiB", total as f64 / 1024.0 / args.pods as f64));
        }
        for id in pods {
            cri.drop_pod(&id).await?;
        }
        Ok(())
    }
}

fn pss_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("Pss:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

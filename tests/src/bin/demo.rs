//! The main job in one run: a private daemon, an image pulled through the real pull path, a pod, its log, an exec, an actor killed in the middle
//! and seen to recover, the waterfall of RunPodSandbox; then everything is given back.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a demonstration ends with the first thing that fails, and says which"
)]
use anyhow::{Context, Result, ensure};
use clap::Parser;
use std::time::{Duration, Instant};
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, registry::Registry};

/// Command line.
#[derive(Parser)]
struct Args {
    /// Image to pull and run (it must have a shell); by default busybox, served by this command itself.
    image: Option<String>,
    /// Directory of hosts.toml files (containerd's certs.d layout) for the pull.
    #[arg(long)]
    hosts: Option<std::path::PathBuf>,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let began = Instant::now();
    let args = Args::parse();
    preflight()?;
    let registry = Registry::start().await;
    let image = match &args.image {
        Some(image) => image.clone(),
        None => registry.add_busybox()?,
    };
    say("1/8 start the daemon on private directories");
    let daemon = Daemon::start(&Options { chaos: true, ..Default::default() }).await?;
    if let Some(hosts) = &args.hosts {
        copy(hosts, &daemon.dir.join("certs"))?;
    }
    let outcome = walk(&daemon, &image).await;
    if outcome.is_err() {
        eprintln!("--- last lines of the daemon's log\n{}", daemon.log_tail());
    }
    drop(daemon);
    outcome?;
    println!("\nAll of it took {:.1} s.", began.elapsed().as_secs_f64());
    Ok(())
}

async fn walk(daemon: &Daemon, image: &str) -> Result<()> {
    let mut cri = daemon.cri().await?;
    say(&format!("2/8 pull {image}"));
    let step = Instant::now();
    let id = cri.pull(image).await.context("pull")?;
    println!("    {id} in {:.2} s", step.elapsed().as_secs_f64());
    let before = census::take(daemon);

    say("3/8 run a pod on a network of its own, and a container in it");
    let step = Instant::now();
    let pod = cri.pod("demo", false, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.context("RunPodSandbox")?;
    let command = ["sh", "-c", "echo hello from the pod; ip -4 addr show eth0 | grep inet; while true; do sleep 1; done"];
    let container = cri.run(&sandbox, &cri.container("main", image, &command), &pod).await.context("container")?;
    println!("    pod {} runs after {:.0} ms", &sandbox[..12], step.elapsed().as_secs_f64() * 1e3);

    say("4/8 its log");
    let log = wait_for_log(daemon).await?;
    print!("{}", indent(&log));

    say("5/8 an exec");
    let said = cri.exec(&container, &["sh", "-c", "echo I am pid $$ on $(hostname)"], 10).await.context("ExecSync")?;
    ensure!(said.exit_code == 0, "the exec ended with {}", said.exit_code);
    print!("{}", indent(&String::from_utf8_lossy(&said.stdout)));

    say("6/8 kill the snapshot actor in the middle of a CreateContainer");
    daemon.cli(&["chaos", "add", "--actor", "snapshot", "--message", "snapshot.Prepare", "--fault", "panic", "--nth", "1"])?;
    let second = cri.container("second", image, &["sh", "-c", "echo second"]);
    let first_try = cri.create(&sandbox, &second, &pod).await;
    println!("    first try:  {}", first_try.as_ref().map(|_| "created".to_owned()).unwrap_or_else(|e| format!("{e:#}")));
    let id = match first_try {
        Ok(id) => id,
        Err(_) => cri.create(&sandbox, &second, &pod).await.context("second try")?,
    };
    cri.start(&id).await.context("start the second container")?;
    ensure!(cri.wait_exit(&id, 10).await?.exit_code == 0, "the second container failed");
    println!("    then:       created, started, exited 0; the first container never noticed");
    print!("{}", indent(&daemon.cli(&["actors"])?));

    say("7/8 the waterfall of RunPodSandbox");
    print!("{}", indent(&daemon.cli(&["trace", "--last", "RunPodSandbox"])?));

    say("8/8 remove the pod; nothing of it may be left");
    cri.drop_pod(&sandbox).await?;
    let end = Instant::now() + Duration::from_secs(5);
    while census::take(daemon) != before && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let after = census::take(daemon);
    ensure!(after == before, "left behind: {after:?}");
    println!("    no process, mount, cgroup, address, FIFO or directory of it is left");
    Ok(())
}

async fn wait_for_log(daemon: &Daemon) -> Result<String> {
    let path = daemon.logs().join("main.log");
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let log = std::fs::read_to_string(&path).unwrap_or_default();
        if log.contains("hello from the pod") && log.lines().count() > 1 || (log.contains("hello") && Instant::now() > end) {
            return Ok(log);
        }
        ensure!(Instant::now() < end, "the container wrote no log to {}", path.display());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn preflight() -> Result<()> {
    // SAFETY: geteuid(2) has no arguments and cannot fail.
    ensure!(unsafe { libc::geteuid() } == 0, "root is needed: namespaces, mounts and cgroups are made");
    for name in ["troupe", "containerd-shim-troupe-v2"] {
        let path = troupe_tests::daemon::binaries().join(name);
        ensure!(path.exists(), "{} is missing: cargo build --release", path.display());
    }
    let cni = ["/usr/lib/cni/bridge", "/opt/cni/bin/bridge"].iter().any(|p| std::path::Path::new(p).exists());
    ensure!(cni, "CNI's bridge plugin is missing: apt-get install containernetworking-plugins");
    Ok(())
}

fn copy(from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    let status = std::process::Command::new("cp").arg("-rT").arg(from).arg(to).status()?;
    ensure!(status.success(), "cannot copy {}", from.display());
    Ok(())
}

fn say(line: &str) {
    println!("\n==> {line}");
}

fn indent(text: &str) -> String {
    text.lines().map(|l| format!("    {l}\n")).collect()
}

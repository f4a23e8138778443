//! What holds where systemd is PID 1: the daemon as a unit, and the bus.
use crate::world::{World, pid, run};
use anyhow::{Context, Result, ensure};
use proto::cri::*;
use std::time::{Duration, Instant};

/// Whoever asks the bus and hears nothing waits for ten seconds at the least.
const PATIENCE: Duration = Duration::from_secs(9);

fn show(property: &str) -> Result<String> {
    run("systemctl", &["show", "--value", "-p", property, "troupe"])
}

async fn lives(w: &mut World, id: &str, init: u32) -> Result<()> {
    ensure!(pid(&mut w.cri, id).await? == init, "another init");
    let status = w.cri.status(id).await?;
    ensure!(status.state == ContainerState::ContainerRunning as i32, "{status:?}");
    ensure!(w.exec(id, "echo still here").await? == "still here", "exec");
    Ok(())
}

/// Restart, stop and start of the unit, and a kill: the containers and their shims go on, and are adopted; an end meanwhile is told.
pub async fn containers_outlive_the_unit(w: &mut World) -> Result<()> {
    let pod = w.pod().await?;
    let id = w.container(&pod, "sleep 1000", |_| {}).await?;
    let signal = tempfile::tempdir()?;
    let mounted = |c: &mut ContainerConfig| {
        let host_path = signal.path().to_string_lossy().into_owned();
        c.mounts = vec![Mount { container_path: "/signal".into(), host_path, ..Default::default() }];
    };
    let short = w.container(&pod, "until [ -e /signal/end ]; do sleep 0.1; done; exit 7", mounted).await?;
    let init = pid(&mut w.cri, &id).await?;
    ensure!(show("Type")? == "notify" && show("ActiveState")? == "active", "{:?}", show("ActiveState"));
    ensure!(show("OOMScoreAdjust")? == "-999", "OOMScoreAdjust");
    let shim = run("sh", &["-c", "ps -o pid,args | grep '[c]ontainerd-shim.* serve' | awk '{print $1}' | head -1"])?;
    let score = std::fs::read_to_string(format!("/proc/{shim}/oom_score_adj")).with_context(|| format!("shim {shim:?}"))?;
    ensure!(score.trim().parse::<i32>()? < -900, "the shim's OOM score is {score}");
    let score = std::fs::read_to_string(format!("/proc/{init}/oom_score_adj"))?;
    ensure!(score.trim() == "0", "the container's OOM score is {score}");

    run("systemctl", &["restart", "troupe"])?;
    w.reconnect().await?;
    lives(w, &id, init).await.context("after a restart")?;
    run("systemctl", &["stop", "troupe"])?;
    ensure!(std::path::Path::new(&format!("/proc/{init}")).exists(), "a stop of the unit ended the container");
    // It ends while no daemon looks.
    std::fs::write(signal.path().join("end"), "")?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    run("systemctl", &["start", "troupe"])?;
    w.reconnect().await?;
    lives(w, &id, init).await.context("after a stop and a start")?;
    let ended = w.cri.wait_exit(&short, 10).await?;
    ensure!(ended.exit_code == 7, "{ended:?}");
    let daemon = show("MainPID")?;
    run("kill", &["-9", &daemon])?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    w.reconnect().await?;
    ensure!(show("MainPID")? != daemon, "systemd has not started another");
    lives(w, &id, init).await.context("after a kill")
}

/// While dbus-daemon is stopped: what runs is served as ever, and a new container is made all the same or fails within its deadline.
pub async fn a_deaf_bus_holds_up_nobody(w: &mut World) -> Result<()> {
    let pod = w.pod().await?;
    let id = w.container(&pod, "sleep 1000", |_| {}).await?;
    let bus = run("pidof", &["dbus-daemon"])?;
    run("kill", &["-STOP", &bus])?;
    let done = deaf(w, &pod, &id).await;
    run("kill", &["-CONT", &bus])?;
    done?;
    let after = w.container(&pod, "sleep 1000", |_| {}).await.context("after the bus is back")?;
    w.exec(&after, "true").await?;
    Ok(())
}

async fn deaf(w: &mut World, pod: &crate::world::Pod, id: &str) -> Result<()> {
    let (mut cri, image) = (w.cri.clone(), w.image.clone());
    let (pod, config) = (pod.id.clone(), pod.config.clone());
    let creating = tokio::spawn(async move {
        let began = Instant::now();
        let made = cri.run(&pod, &cri.container("deaf", &image, &["sleep", "1000"]), &config).await;
        (made, began.elapsed())
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..3 {
        let began = Instant::now();
        w.exec(id, "true").await.context("exec with a deaf bus")?;
        w.cri.runtime.list_containers(ListContainersRequest::default()).await?;
        w.cri.runtime.container_stats(ContainerStatsRequest { container_id: id.into() }).await?;
        ensure!(began.elapsed() < PATIENCE, "a running container is served after {:?}", began.elapsed());
    }
    let began = Instant::now();
    w.cri.stop(id, 0).await.context("stop with a deaf bus")?;
    ensure!(began.elapsed() < PATIENCE, "a container is stopped after {:?}", began.elapsed());
    let (made, took) = tokio::time::timeout(Duration::from_secs(60), creating).await.context("the creation does not end")??;
    println!("    a container made while the bus is deaf: {} after {took:.1?}", made.map_or_else(|e| format!("{e:#}"), |_| "well".into()));
    Ok(())
}

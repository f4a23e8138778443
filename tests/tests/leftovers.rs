//! What a killed daemon or a killed shim leaves behind is found and ended: nothing runs on with nobody to end it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, cri::namespaces, eventually, registry::Registry};

fn lives(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

fn kill(pid: u32) {
    // SAFETY: kill(2) with a plain pid and signal number touches no memory.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_that_ran_when_the_daemon_was_killed_is_ended() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let mut daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    let pod = cri.pod("probed", true, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let id = cri.run(&sandbox, &cri.container("c", &image, &["sleep", "1000"]), &pod).await.unwrap();
    let quiet = census::take(&daemon);
    let (mut probe, probed) = (cri.clone(), id.clone());
    let probe = tokio::spawn(async move { probe.exec(&probed, &["sleep", "987"], 600).await });
    let running = |d: &Daemon| d.processes().iter().any(|(_, c)| c.contains("sleep 987"));
    eventually("the probe runs", || running(&daemon)).await;
    assert_ne!(census::take(&daemon).fifos, quiet.fifos, "the probe has FIFOs");

    daemon.kill();
    assert!(probe.await.unwrap().is_err(), "the call has ended with the daemon");
    assert!(running(&daemon), "the probe is still there");
    daemon.spawn().await.unwrap();
    eventually("the probe is killed", || !running(&daemon)).await;
    eventually("its FIFOs are removed", || census::take(&daemon).fifos == quiet.fifos).await;
    let mut cri = daemon.cri().await.unwrap();
    assert_eq!(cri.exec(&id, &["echo", "well"], 10).await.unwrap().stdout, b"well\n");
    assert_eq!(cri.status(&id).await.unwrap().state, ContainerState::ContainerRunning as i32);
    cri.drop_pod(&sandbox).await.unwrap();
    eventually("all is given back", || census::take(&daemon) == before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shim_takes_its_pods_processes_with_it() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    let mut pod = cri.pod("shared", true, &daemon.logs());
    let security = pod.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    security.namespace_options = Some(namespaces(true, true));
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let mut container = cri.container("c", &image, &["sh", "-c", "sleep 986 & exec sleep 985"]);
    let linux = container.linux.get_or_insert_default().security_context.get_or_insert_default();
    linux.namespace_options = Some(namespaces(true, true));
    cri.run(&sandbox, &container, &pod).await.unwrap();
    let ask = PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: true };
    let status = cri.runtime.pod_sandbox_status(ask).await.unwrap().into_inner();
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    let init = info["pid"].as_u64().unwrap() as u32;
    let shim = daemon.processes().into_iter().find(|(_, c)| c.contains("containerd-shim-troupe") && c.contains(&sandbox)).unwrap().0;
    assert!(init != shim && lives(init), "the shared PID namespace has an init of its own");
    let of_pod = |d: &Daemon| d.processes().iter().filter(|(_, c)| c.contains("sleep 98")).count();
    eventually("both processes run", || of_pod(&daemon) == 2).await;

    kill(shim);
    eventually("the namespace's init has ended", || !lives(init)).await;
    eventually("the container's processes have ended", || of_pod(&daemon) == 0).await;
    cri.drop_pod(&sandbox).await.unwrap();
    eventually("all is given back", || census::take(&daemon) == before).await;
}

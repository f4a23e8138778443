//! One stuck or crashed thing never blocks another: shims that are silent or dead, a file system that hangs, a pod's actor that panics.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::time::{Duration, Instant};
use troupe_tests::cri::{Cri, namespaces};
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, exposition, fuse::Silent, registry::Registry, socket::Socket};

/// A daemon with an image, and the census of both.
async fn bed(chaos: bool) -> (Daemon, Cri, String, census::Census) {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options { chaos, ..Default::default() }).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    (daemon, cri, image, before)
}

fn signal(pid: u32, signal: i32) {
    // SAFETY: kill(2) with a plain pid and signal number touches no memory.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0, "signal {signal} to {pid}");
}

/// The shim of a pod: its server first, then what it works with.
fn shim(daemon: &Daemon, sandbox: &str) -> Vec<u32> {
    let all = daemon.processes();
    let mut shims: Vec<u32> =
        all.iter().filter(|(_, c)| c.contains("containerd-shim-troupe") && c.contains(sandbox)).map(|(p, _)| *p).collect();
    assert!(!shims.is_empty(), "no shim of {sandbox}: {all:?}");
    let parent = |pid: &u32| -> u32 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().find_map(|l| l.strip_prefix("PPid:")).and_then(|p| p.trim().parse().ok()).unwrap_or(0)
    };
    let known = shims.clone();
    shims.sort_by_key(|p| known.contains(&parent(p)));
    shims
}

fn silence(daemon: &Daemon, sandbox: &str) {
    shim(daemon, sandbox).into_iter().for_each(|p| signal(p, libc::SIGSTOP));
}

async fn settle(daemon: &Daemon, before: &census::Census) {
    census::settle(daemon, before, Duration::from_secs(10), "what is left").await;
}

/// A whole life of another pod, which must not be held up.
async fn others_go_on(cri: &Cri, daemon: &Daemon, image: &str, name: &str) {
    let mut cri = cri.clone();
    let began = Instant::now();
    let pod = cri.pod(name, false, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let id = cri.run(&sandbox, &cri.container("c", image, &["sleep", "1000"]), &pod).await.unwrap();
    assert_eq!(cri.exec(&id, &["echo", "hi"], 10).await.unwrap().stdout, b"hi\n");
    cri.drop_pod(&sandbox).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(8), "another pod's life took {:?}", began.elapsed());
}

async fn pod_state(cri: &Cri, sandbox: &str) -> i32 {
    let request = PodSandboxStatusRequest { pod_sandbox_id: sandbox.into(), verbose: false };
    cri.clone().runtime.pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap().state
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_shim_at_each_stage_costs_its_own_pod_only_which_can_be_removed() {
    let (daemon, mut cri, image, before) = bed(false).await;
    let mut pods = Vec::new();
    for stage in ["made", "created", "running"] {
        let pod = cri.pod(stage, false, &daemon.logs());
        let sandbox = cri.run_pod(&pod).await.unwrap();
        let config = cri.container("c", &image, &["sleep", "1000"]);
        let id = if stage == "made" { String::new() } else { cri.create(&sandbox, &config, &pod).await.unwrap() };
        if stage == "running" {
            cri.start(&id).await.unwrap();
        }
        silence(&daemon, &sandbox);
        pods.push((stage, pod, sandbox, id));
    }
    let started = {
        let (mut cri, id) = (cri.clone(), pods[1].3.clone());
        tokio::spawn(async move { cri.start(&id).await })
    };
    others_go_on(&cri, &daemon, &image, "lively").await;
    let fault = started.await.unwrap().unwrap_err().to_string();
    assert!(fault.contains("shim"), "a start in a silent shim says what is wrong: {fault}");
    // Status is answered all the same, and says what was last known.
    assert_eq!(cri.status(&pods[2].3).await.unwrap().state, ContainerState::ContainerRunning as i32);
    let began = Instant::now();
    let ends = pods.iter().map(|(stage, _, sandbox, id)| {
        let mut cri = cri.clone();
        async move {
            let stop = StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
            cri.runtime.stop_pod_sandbox(stop).await.unwrap_or_else(|e| panic!("stop of the pod that was {stage}: {e}"));
            if *stage == "running" {
                let status = cri.status(id).await.unwrap();
                assert_eq!((status.state, status.exit_code), (ContainerState::ContainerExited as i32, 137), "{status:?}");
            }
            let remove = RemovePodSandboxRequest { pod_sandbox_id: sandbox.clone() };
            cri.runtime.remove_pod_sandbox(remove).await.unwrap_or_else(|e| panic!("removal of the pod that was {stage}: {e}"));
        }
    });
    let all = futures(ends.collect());
    all.await;
    println!("three pods with silent shims were stopped and removed in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    settle(&daemon, &before).await;
}

/// All at once.
async fn futures<F: Future<Output = ()>>(mut all: Vec<F>) {
    let mut pinned: Vec<_> = all.drain(..).map(Box::pin).collect();
    std::future::poll_fn(|cx| {
        pinned.retain_mut(|f| f.as_mut().poll(cx).is_pending());
        if pinned.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_a_killed_shim_are_killed_and_reported() {
    let (daemon, mut cri, image, before) = bed(false).await;
    let mut events = cri.runtime.get_container_events(GetEventsRequest {}).await.unwrap().into_inner();
    let mut pod = cri.pod("orphaned", false, &daemon.logs());
    // One PID namespace for the pod: a container's processes do not end with its init by themselves.
    pod.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = Some(namespaces(false, true));
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let command = ["sh", "-c", "sleep 1001 & sleep 1002 & sleep 1003"];
    let id = cri.run(&sandbox, &cri.container("c", &image, &command), &pod).await.unwrap();
    signal(shim(&daemon, &sandbox)[0], libc::SIGKILL);
    let status = cri.wait_exit(&id, 10).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Unknown"), "{status:?}");
    let end = Instant::now() + Duration::from_secs(5);
    while pod_state(&cri, &sandbox).await != PodSandboxState::SandboxNotready as i32 {
        assert!(Instant::now() < end, "the pod is still shown as ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let stopped = async {
        loop {
            let event = events.message().await.unwrap().unwrap();
            if event.container_id == sandbox && event.container_event_type == ContainerEventType::ContainerStoppedEvent as i32 {
                return event;
            }
        }
    };
    let event = tokio::time::timeout(Duration::from_secs(5), stopped).await.expect("an event that the pod stopped");
    assert_eq!(event.pod_sandbox_status.unwrap().state, PodSandboxState::SandboxNotready as i32);
    let left: Vec<_> = daemon.processes().into_iter().filter(|(_, c)| c.contains("sleep 100")).collect();
    assert!(left.is_empty(), "{left:?}");
    let again = cri.create(&sandbox, &cri.container("d", &image, &["true"]), &pod).await.unwrap_err();
    assert!(again.to_string().contains("not ready"), "{again}");
    others_go_on(&cri, &daemon, &image, "lively").await;
    cri.drop_pod(&sandbox).await.unwrap();
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_does_not_wait_for_one_silent_shim_among_twenty() {
    let (mut daemon, mut cri, image, before) = bed(false).await;
    let mut pods = Vec::new();
    for number in 0..20 {
        let pod = cri.pod(&format!("n{number}"), true, &daemon.logs());
        let sandbox = cri.run_pod(&pod).await.unwrap();
        let id = cri.run(&sandbox, &cri.container(&format!("c{number}"), &image, &["sleep", "1000"]), &pod).await.unwrap();
        pods.push((sandbox, id));
    }
    silence(&daemon, &pods[7].0);
    // And one that dies while the daemon is away.
    let dead = shim(&daemon, &pods[11].0)[0];
    daemon.kill();
    signal(dead, libc::SIGKILL);
    let served = daemon.spawn().await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let began = Instant::now();
    for (number, (_, id)) in pods.iter().enumerate().filter(|(n, _)| *n != 7 && *n != 11) {
        let answer = cri.exec(id, &["echo", "back"], 10).await.unwrap_or_else(|e| panic!("exec in pod {number}: {e}"));
        assert_eq!(answer.stdout, b"back\n");
    }
    println!("served after {served:?}, 18 execs after {:?}", began.elapsed());
    assert!(served < Duration::from_secs(2), "the socket served after {served:?}");
    assert!(began.elapsed() < Duration::from_secs(5), "18 execs took {:?}", began.elapsed());
    let status = cri.wait_exit(&pods[11].1, 10).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Unknown"), "{status:?}");
    assert_eq!(pod_state(&cri, &pods[11].0).await, PodSandboxState::SandboxNotready as i32);
    assert_eq!(pod_state(&cri, &pods[7].0).await, PodSandboxState::SandboxReady as i32, "silent is not dead");
    for (sandbox, _) in &pods {
        cri.drop_pod(sandbox).await.unwrap();
    }
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_source_that_hangs_holds_up_its_own_container_only() {
    let (mut daemon, mut cri, image, before) = bed(false).await;
    let silent = Silent::mount(&daemon.dir.join("silent")).unwrap();
    let source = silent.path.display().to_string();
    let steady = cri.pod("steady", true, &daemon.logs());
    let steady_pod = cri.run_pod(&steady).await.unwrap();
    let steady_id = cri.run(&steady_pod, &cri.container("s", &image, &["sleep", "1000"]), &steady).await.unwrap();
    let pod = cri.pod("hangs", false, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let mut config = cri.container("c", &image, &["true"]);
    config.mounts.push(Mount { container_path: "/data".into(), host_path: source.clone(), ..Default::default() });
    let request = || {
        let body =
            CreateContainerRequest { pod_sandbox_id: sandbox.clone(), config: Some(config.clone()), sandbox_config: Some(pod.clone()) };
        let mut request = tonic::Request::new(body);
        request.set_timeout(Duration::from_secs(3));
        request
    };
    let began = Instant::now();
    let create = {
        let (mut cri, request) = (cri.clone(), request());
        tokio::spawn(async move { cri.runtime.create_container(request).await })
    };
    tokio::time::sleep(Duration::from_millis(500)).await;
    let ops = daemon.cli(&["ops"]).unwrap();
    assert!(ops.contains(&source) && ops.contains("CreateContainer"), "the operation is listed with its path:\n{ops}");
    others_go_on(&cri, &daemon, &image, "lively").await;
    let fault = create.await.unwrap().unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(5), "the deadline is kept: {:?}", began.elapsed());
    assert_eq!(fault.code(), tonic::Code::DeadlineExceeded);
    assert!(fault.message().contains(&source), "the error names the path: {}", fault.message());
    // A retry joins what hangs, and hangs as long as it may.
    let fault = cri.runtime.create_container(request()).await.unwrap_err();
    assert_eq!(fault.code(), tonic::Code::DeadlineExceeded, "{fault}");
    // The pod can go at once, although the call will never return; the thread is listed.
    let began = Instant::now();
    cri.drop_pod(&sandbox).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "the removal took {:?}", began.elapsed());
    let ops = daemon.cli(&["ops"]).unwrap();
    assert!(ops.contains("given up") && ops.contains(&source), "the thread is listed:\n{ops}");
    // Not even SIGKILL ends such a thread; the next daemon starts all the same.
    let old = daemon.kill_without_waiting();
    let took = daemon.spawn().await.unwrap();
    println!("with a thread of its predecessor stuck in the kernel, the daemon served after {took:?}");
    let mut cri = daemon.cri().await.unwrap();
    assert_eq!(cri.exec(&steady_id, &["echo", "on"], 10).await.unwrap().stdout, b"on\n");
    others_go_on(&cri, &daemon, &image, "lively").await;
    cri.drop_pod(&steady_pod).await.unwrap();
    drop(silent);
    old.wait();
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_whose_file_system_hangs_holds_up_its_own_container_only() {
    let (daemon, mut cri, image, before) = bed(false).await;
    let silent = Silent::mount(&daemon.dir.join("silent")).unwrap();
    let path = silent.path.display().to_string();
    let pod = cri.pod("hangs", false, &silent.path);
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let mut quiet = cri.container("quiet", &image, &["sleep", "1000"]);
    quiet.log_path.clear();
    let quiet = cri.run(&sandbox, &quiet, &pod).await.unwrap();
    let id = cri.create(&sandbox, &cri.container("c", &image, &["sleep", "1000"]), &pod).await.unwrap();
    let start = {
        let (mut cri, id) = (cri.clone(), id.clone());
        let mut request = tonic::Request::new(StartContainerRequest { container_id: id });
        request.set_timeout(Duration::from_secs(3));
        tokio::spawn(async move { cri.runtime.start_container(request).await })
    };
    tokio::time::sleep(Duration::from_millis(300)).await;
    // In the same pod, and beside it.
    assert_eq!(cri.exec(&quiet, &["echo", "on"], 10).await.unwrap().stdout, b"on\n");
    others_go_on(&cri, &daemon, &image, "lively").await;
    let fault = start.await.unwrap().unwrap_err();
    assert_eq!(fault.code(), tonic::Code::DeadlineExceeded, "{fault}");
    assert!(fault.message().contains(&path) && fault.message().contains("did not answer"), "the error names the log: {fault}");
    let began = Instant::now();
    cri.drop_pod(&sandbox).await.unwrap();
    println!("the pod was removed in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(12), "the removal took {:?}", began.elapsed());
    let left = census::take(&daemon);
    assert_eq!((&left.addresses, &left.cgroups, &left.directories), (&before.addresses, &before.cgroups, &before.directories));
    // Only the thread that waits for it is left until then.
    drop(silent);
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_without_room_costs_lines_that_are_counted_and_never_the_container() {
    let (daemon, mut cri, image, before) = bed(false).await;
    let small = daemon.dir.join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "none"]).arg(&small).status().unwrap();
    assert!(mounted.success());
    let pod = cri.pod("full", true, &small);
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let command = "i=0; while [ $i -lt 5000 ]; do echo the line with the number $i; i=$((i+1)); done; touch /tmp/through; sleep 1000";
    let id = cri.run(&sandbox, &cri.container("c", &image, &["sh", "-c", command]), &pod).await.unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while cri.exec(&id, &["test", "-e", "/tmp/through"], 10).await.unwrap().exit_code != 0 {
        assert!(Instant::now() < end, "the container is held up by its log");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let value = |name: &str| -> u64 {
        let page = exposition::check(&daemon.http("/metrics").unwrap());
        page.iter().filter(|(n, ..)| n == name).map(|(.., v)| *v as u64).sum()
    };
    let end = Instant::now() + Duration::from_secs(10);
    while value("containerd_cri_input_entries_total") < 5000 {
        assert!(Instant::now() < end, "the log is behind");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let log = std::fs::read_to_string(small.join("c.log")).unwrap();
    let lost = value("troupe_log_lost_entries_total");
    assert!(lost > 1000 && value("troupe_log_lost_bytes_total") > lost * 30, "{lost}");
    assert_eq!(log.lines().count() as u64 + lost, 5000, "each line was written or is counted");
    assert!(log.lines().all(|l| l.contains("stdout F the line with the number")), "only whole lines");
    cri.drop_pod(&sandbox).await.unwrap();
    let freed = std::process::Command::new("umount").arg(&small).status().unwrap();
    assert!(freed.success(), "nobody holds the log any more");
    settle(&daemon, &before).await;
}

/// How a stream's connection ends, which it does within `limit`.
async fn outcome(url: String, limit: Duration) -> String {
    let ended = async { Socket::dial(&url, "v5.channel.k8s.io").await.finish().await.status.to_string() };
    tokio::time::timeout(limit, ended).await.expect("the stream's connection does not end")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stopped_shim_or_container_is_asked_has_an_end_and_leaves_nothing() {
    let (daemon, mut cri, image, before) = bed(false).await;
    let pod = cri.pod("stopped", true, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let ticks = ["sh", "-c", "while true; do echo tick; sleep 0.2; done"];
    let id = cri.run(&sandbox, &cri.container("c", &image, &ticks), &pod).await.unwrap();
    let [frozen, stopped] = ["frozen", "stopped"].map(|name| cri.container(name, &image, &["sleep", "1000"]));
    let frozen = cri.run(&sandbox, &frozen, &pod).await.unwrap();
    let stopped = cri.run(&sandbox, &stopped, &pod).await.unwrap();
    let whole = census::take(&daemon);
    let lasting = |census: &census::Census| (census.fifos.clone(), census.directories.clone(), census.cgroups.clone());

    // An init that is stopped holds up nobody else in its container.
    let own = |id: &str| cgroup_processes(&daemon.tag, id);
    own(&stopped).into_iter().for_each(|pid| signal(pid, libc::SIGSTOP));
    assert_eq!(cri.exec(&stopped, &["echo", "on"], 10).await.unwrap().stdout, b"on\n");

    // Nothing runs in a frozen container, and nothing of what was tried is left when it goes.
    freeze(&daemon.tag, &frozen);
    let began = Instant::now();
    let fault = cri.exec(&frozen, &["sleep", "778"], 1).await.unwrap_err();
    assert!(fault.to_string().contains("timeout 1s exceeded"), "{fault}");
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    let reopen = ReopenContainerLogRequest { container_id: frozen.clone() };
    cri.runtime.reopen_container_log(reopen).await.unwrap();
    cri.stop(&frozen, 1).await.unwrap();
    cri.remove(&frozen).await.unwrap();
    cri.remove(&stopped).await.unwrap();

    silence(&daemon, &sandbox);
    let exec = ExecRequest { container_id: id.clone(), cmd: vec!["sleep".into(), "777".into()], stdout: true, ..Default::default() };
    let exec = cri.runtime.exec(exec).await.unwrap().into_inner().url;
    let attach = AttachRequest { container_id: id.clone(), stdout: true, ..Default::default() };
    let attach = cri.runtime.attach(attach).await.unwrap().into_inner().url;
    let began = Instant::now();
    let sync = {
        let (mut cri, id) = (cri.clone(), id.clone());
        async move {
            let fault = cri.exec(&id, &["sleep", "777"], 1).await.unwrap_err();
            assert!(began.elapsed() < Duration::from_secs(12), "{:?}: {fault}", began.elapsed());
        }
    };
    let reopen = {
        let (mut cri, id) = (cri.clone(), id.clone());
        async move {
            let mut request = tonic::Request::new(ReopenContainerLogRequest { container_id: id });
            request.set_timeout(Duration::from_secs(2));
            let fault = cri.runtime.reopen_container_log(request).await.unwrap_err();
            assert!(began.elapsed() < Duration::from_secs(4), "{:?}: {fault}", began.elapsed());
        }
    };
    let limit = Duration::from_secs(20);
    let ((), (), exec, attach) = tokio::join!(sync, reopen, outcome(exec, limit), outcome(attach, limit));
    println!("after {:?}: exec {exec}, attach {attach}", began.elapsed());
    assert!(exec.contains("the shim") && attach.contains("the shim"), "exec {exec}, attach {attach}");
    shim(&daemon, &sandbox).into_iter().for_each(|p| signal(p, libc::SIGCONT));
    let end = Instant::now() + Duration::from_secs(20);
    while cri.exec(&id, &["echo", "back"], 5).await.map_or(true, |done| done.stdout != b"back\n") {
        assert!(Instant::now() < end, "the shim is not taken back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let gone = |c: &str| !c.contains(&frozen) && !c.contains(&stopped);
    let expected = {
        let (fifos, mut directories, mut cgroups) = lasting(&whole);
        directories.retain(|c| gone(c));
        cgroups.retain(|c| gone(c));
        (fifos, directories, cgroups)
    };
    let end = Instant::now() + Duration::from_secs(10);
    while lasting(&census::take(&daemon)) != expected && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(lasting(&census::take(&daemon)), expected, "what is left of the calls");
    let left: Vec<_> = daemon.processes().into_iter().filter(|(_, c)| c.contains("sleep 77")).collect();
    assert!(left.is_empty(), "{left:?}");
    cri.drop_pod(&sandbox).await.unwrap();
    settle(&daemon, &before).await;
}

/// Processes of a container.
fn cgroup_processes(tag: &str, id: &str) -> Vec<u32> {
    let dir = census::cgroups_of(tag).into_iter().find(|d| d.ends_with(id)).unwrap();
    let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap();
    text.lines().map(|l| l.parse().unwrap()).collect()
}

/// As an administrator does it, behind everybody's back.
fn freeze(tag: &str, id: &str) {
    let dirs: Vec<_> = census::cgroups_of(tag).into_iter().filter(|d| d.ends_with(id)).collect();
    let file = |name: &str| dirs.iter().map(|d| d.join(name)).find(|f| f.exists());
    match (file("freezer.state"), file("cgroup.freeze")) {
        (Some(v1), _) => std::fs::write(v1, "FROZEN").unwrap(),
        (None, v2) => std::fs::write(v2.unwrap(), "1").unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_s_crash_costs_no_call_of_another_pod() {
    let (daemon, mut cri, image, before) = bed(true).await;
    let (a, b) = (cri.pod("a", false, &daemon.logs()), cri.pod("b", false, &daemon.logs()));
    let (pod_a, pod_b) = (cri.run_pod(&a).await.unwrap(), cri.run_pod(&b).await.unwrap());
    let trap = ["sh", "-c", "trap 'sleep 2; exit 7' TERM; touch /tmp/trap; while true; do sleep 0.1; done"];
    let in_b = cri.run(&pod_b, &cri.container("b", &image, &trap), &b).await.unwrap();
    // The first process of a PID namespace does not hear a signal that it has no handler for.
    while cri.exec(&in_b, &["test", "-e", "/tmp/trap"], 10).await.unwrap().exit_code != 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // In flight in pod b: a command that may not be run twice, and a graceful stop.
    let exec = {
        let (mut cri, id) = (cri.clone(), in_b.clone());
        tokio::spawn(async move { cri.exec(&id, &["sh", "-c", "sleep 1; echo done"], 10).await })
    };
    let stop = {
        let (mut cri, id) = (cri.clone(), in_b.clone());
        tokio::spawn(async move { cri.stop(&id, 20).await })
    };
    tokio::time::sleep(Duration::from_millis(300)).await;
    daemon.cli(&["chaos", "add", "--actor", "sandbox.pod", "--message", "sandbox.CreateContainer", "--fault", "panic"]).unwrap();
    let config = cri.container("a", &image, &["sleep", "1000"]);
    let fault = cri.create(&pod_a, &config, &a).await.unwrap_err().to_string();
    assert!(fault.contains("sandbox.pod/"), "the error names the actor that died: {fault}");
    daemon.cli(&["chaos", "clear"]).unwrap();
    assert_eq!(exec.await.unwrap().unwrap().stdout, b"done\n");
    stop.await.unwrap().unwrap();
    assert_eq!(cri.status(&in_b).await.unwrap().exit_code, 7);
    let in_a = cri.run(&pod_a, &config, &a).await.unwrap();
    assert_eq!(cri.status(&in_a).await.unwrap().state, ContainerState::ContainerRunning as i32);
    let actors: serde_json::Value = serde_json::from_str(&daemon.cli(&["--json", "actors"]).unwrap()).unwrap();
    let restarts = |id: &str| {
        let name = format!("sandbox.pod/{id}");
        actors.as_array().unwrap().iter().find(|a| a["name"] == name.as_str()).unwrap_or_else(|| panic!("{actors}"))["restarts"].as_u64()
    };
    assert_eq!((restarts(&pod_a), restarts(&pod_b)), (Some(2), Some(0)));
    cri.drop_pod(&pod_a).await.unwrap();
    cri.drop_pod(&pod_b).await.unwrap();
    settle(&daemon, &before).await;
    let actors = daemon.cli(&["actors"]).unwrap();
    assert!(!actors.contains("sandbox.pod/"), "the actors of removed pods are gone:\n{actors}");
}

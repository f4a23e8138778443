//! One real pod through all layers: pull, run, logs, exec, stop, remove; and nothing is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use troupe_tests::cri::namespaces;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, registry::Registry};

async fn world(options: Options) -> (Daemon, Registry, String) {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    (Daemon::start(&options).await.unwrap(), registry, image)
}

async fn whole_life(options: Options, host_network: bool) {
    let (daemon, _registry, image) = world(options).await;
    let mut cri = daemon.cri().await.unwrap();
    let version = cri.runtime.version(VersionRequest::default()).await.unwrap().into_inner();
    assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("troupe", "v1"));
    let id = cri.pull(&image).await.unwrap();
    let images = cri.image.list_images(ListImagesRequest::default()).await.unwrap().into_inner().images;
    assert_eq!(images.len(), 1);
    assert!(id == images[0].id || images[0].repo_digests.contains(&id), "{id} {images:?}");
    let before = census::take(&daemon);

    let pod = cri.pod("life", host_network, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let status = cri
        .runtime
        .pod_sandbox_status(PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: false })
        .await
        .unwrap()
        .into_inner();
    let status = status.status.unwrap();
    assert_eq!(status.state, PodSandboxState::SandboxReady as i32);
    assert_eq!(status.network.unwrap().ip.is_empty(), host_network);

    let talker = cri.container("talker", &image, &["sh", "-c", "echo out; echo err >&2; printf partial; exit 3"]);
    let talker = cri.run(&sandbox, &talker, &pod).await.unwrap();
    let ended = cri.wait_exit(&talker, 10).await.unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
    let log = std::fs::read_to_string(daemon.logs().join("talker.log")).unwrap();
    assert!(log.contains(" stdout F out\n") && log.contains(" stderr F err\n") && log.contains(" stdout P partial"), "{log}");

    let server = cri.run(&sandbox, &cri.container("server", &image, &["sleep", "1000"]), &pod).await.unwrap();
    let said = cri.exec(&server, &["sh", "-c", "echo hi; echo oops >&2; exit 7"], 10).await.unwrap();
    assert_eq!((said.exit_code, &said.stdout[..], &said.stderr[..]), (7, &b"hi\n"[..], &b"oops\n"[..]));
    let hostname = cri.exec(&server, &["hostname"], 10).await.unwrap();
    if !host_network {
        assert_eq!(hostname.stdout, b"life\n");
        let addresses = cri.exec(&server, &["ip", "addr"], 10).await.unwrap();
        assert!(String::from_utf8_lossy(&addresses.stdout).contains("eth0"));
    }
    let late = cri.exec(&server, &["sleep", "100"], 1).await.unwrap_err().to_string();
    assert!(late.to_lowercase().contains("deadline") || late.contains("timed out"), "{late}");
    let left = cri.exec(&server, &["sh", "-c", "ps | grep -c '[s]leep 100$' || true"], 10).await.unwrap();
    assert_eq!(left.stdout, b"0\n", "the timed-out exec was killed");

    cri.stop(&server, 1).await.unwrap();
    let stopped = cri.status(&server).await.unwrap();
    assert_eq!((stopped.state, stopped.exit_code), (ContainerState::ContainerExited as i32, 137));
    cri.remove(&server).await.unwrap();
    cri.drop_pod(&sandbox).await.unwrap();
    let lists = cri.runtime.list_containers(ListContainersRequest::default()).await.unwrap().into_inner().containers;
    assert!(lists.is_empty(), "{lists:?}");
    settle(&daemon, &before).await;
}

/// Gives background removal a moment, then the census must be what it was.
async fn settle(daemon: &Daemon, before: &census::Census) {
    census::settle(daemon, before, std::time::Duration::from_secs(5), "what is left").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_on_the_pod_network() {
    whole_life(Options::default(), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_on_the_node_network() {
    whole_life(Options::default(), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_through_runc() {
    whole_life(Options { binary_name: "runc".into(), ..Default::default() }, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_on_native_snapshots() {
    whole_life(Options { snapshotter: "native".into(), ..Default::default() }, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_pod_asks_for_is_what_the_container_gets() {
    let (daemon, _registry, image) = world(Options::default()).await;
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let mut pod = cri.pod("asks", false, &daemon.logs());
    pod.dns_config =
        Some(DnsConfig { servers: vec!["10.0.0.53".into()], searches: vec!["svc.local".into()], options: vec!["ndots:5".into()] });
    let linux = pod.linux.as_mut().unwrap();
    linux.sysctls.insert("net.ipv4.ip_forward".into(), "1".into());
    linux.security_context.as_mut().unwrap().namespace_options = Some(namespaces(false, true));
    let sandbox = cri.run_pod(&pod).await.unwrap();

    let volume = daemon.dir.join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("file"), "from the host").unwrap();
    let mut config = cri.container("asks", &image, &["sleep", "1000"]);
    config.envs = vec![KeyValue { key: "COLOUR".into(), value: "green".into() }];
    config.working_dir = "/tmp".into();
    config.mounts =
        vec![Mount { container_path: "/data".into(), host_path: volume.to_string_lossy().into(), readonly: true, ..Default::default() }];
    let linux = config.linux.as_mut().unwrap();
    linux.resources = Some(LinuxContainerResources { cpu_shares: 512, memory_limit_in_bytes: 64 << 20, ..Default::default() });
    let security = linux.security_context.as_mut().unwrap();
    security.readonly_rootfs = true;
    security.run_as_user = Some(Int64Value { value: 1000 });
    security.supplemental_groups = vec![3000];
    security.capabilities = Some(Capability { drop_capabilities: vec!["ALL".into()], ..Default::default() });
    let id = cri.run(&sandbox, &config, &pod).await.unwrap();
    let other = cri.run(&sandbox, &cri.container("other", &image, &["sleep", "2000"]), &pod).await.unwrap();

    for (command, want) in [
        ("echo $COLOUR", "green"),
        ("pwd", "/tmp"),
        ("id -u", "1000"),
        ("id -G", "1000 2000 3000"),
        ("cat /data/file", "from the host"),
        ("touch /data/x 2>&1 | grep -c Read-only", "1"),
        ("touch /x 2>&1 | grep -c Read-only", "1"),
        ("grep CapEff /proc/self/status | tr -d '\\t'", "CapEff:0000000000000000"),
        ("grep Seccomp: /proc/self/status | tr -d '\\t'", "Seccomp:0"),
        ("cat /proc/sys/net/ipv4/ip_forward", "1"),
        ("cat /etc/resolv.conf | tr '\\n' ' '", "search svc.local nameserver 10.0.0.53 options ndots:5 "),
        ("hostname", "asks"),
        ("ps -o args | grep -c '^sleep'", "2"),
    ] {
        let said = cri.exec(&id, &["sh", "-c", command], 10).await.unwrap();
        assert_eq!(
            String::from_utf8_lossy(&said.stdout).trim_end_matches('\n'),
            want,
            "{command}: {}",
            String::from_utf8_lossy(&said.stderr)
        );
    }
    let limit = cri
        .exec(&id, &["sh", "-c", "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null"], 10)
        .await
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&limit.stdout).trim(), (64 << 20).to_string());

    let linux = LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() };
    let update = UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
    cri.runtime.update_container_resources(update).await.unwrap();
    let limit = cri
        .exec(&id, &["sh", "-c", "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null"], 10)
        .await
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&limit.stdout).trim(), (96 << 20).to_string());

    let seccomp = |profile: i32| SecurityProfile { profile_type: profile, ..Default::default() };
    let mut guarded = cri.container("guarded", &image, &["sh", "-c", "grep Seccomp: /proc/self/status"]);
    let security = guarded.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    security.seccomp = Some(seccomp(security_profile::ProfileType::RuntimeDefault as i32));
    let guarded = cri.run(&sandbox, &guarded, &pod).await.unwrap();
    assert_eq!(cri.wait_exit(&guarded, 10).await.unwrap().exit_code, 0);
    assert!(std::fs::read_to_string(daemon.logs().join("guarded.log")).unwrap().contains("Seccomp:\t2"));

    let mut mighty =
        cri.container("mighty", &image, &["sh", "-c", "grep CapEff /proc/self/status; test -w /proc/sys/kernel/hostname && echo may"]);
    mighty.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let refused = cri.run(&sandbox, &mighty, &pod).await.unwrap_err().to_string();
    assert!(refused.contains("privileged"), "a privileged container in a pod that is not: {refused}");
    cri.remove(&other).await.unwrap();
    cri.drop_pod(&sandbox).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_reopened_after_rotation() {
    let (daemon, _registry, image) = world(Options::default()).await;
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let pod = cri.pod("rotate", true, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let ticker = cri.container("ticker", &image, &["sh", "-c", "while true; do echo tick; sleep 0.05; done"]);
    let id = cri.run(&sandbox, &ticker, &pod).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let log = daemon.logs().join("ticker.log");
    std::fs::rename(&log, daemon.logs().join("ticker.log.1")).unwrap();
    cri.runtime.reopen_container_log(ReopenContainerLogRequest { container_id: id }).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(std::fs::read_to_string(&log).unwrap().contains("tick"));
    cri.drop_pod(&sandbox).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_named_and_leaves_nothing() {
    let (daemon, _registry, image) = world(Options::default()).await;
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    let mut nameless = cri.pod("x", false, &daemon.logs());
    nameless.metadata = None;
    assert!(cri.run_pod(&nameless).await.unwrap_err().to_string().contains("metadata"));
    let request = RunPodSandboxRequest { config: Some(cri.pod("x", false, &daemon.logs())), runtime_handler: "nope".into() };
    assert!(cri.runtime.run_pod_sandbox(request).await.unwrap_err().to_string().contains("nope"));
    let pod = cri.pod("bad", false, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let missing = cri.create(&sandbox, &cri.container("c", "127.0.0.1:1/no/such:image", &["x"]), &pod).await.unwrap_err().to_string();
    assert!(missing.contains("no/such"), "{missing}");
    let no_command = cri.run(&sandbox, &cri.container("c", &image, &["/no/such/command"]), &pod).await.unwrap_err().to_string();
    assert!(no_command.contains("/no/such/command"), "{no_command}");
    let unknown = cri.status("0123456789abcdef").await.unwrap_err();
    assert!(unknown.to_string().contains("0123456789abcdef") && unknown.to_string().contains("trace="), "{unknown}");
    cri.drop_pod(&sandbox).await.unwrap();
    cri.drop_pod(&sandbox).await.unwrap();
    settle(&daemon, &before).await;
}

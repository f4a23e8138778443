//! Pods with users of their own: who they are inside, who they are outside, what they may touch, and that nothing of them is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, registry::Registry};

/// First id outside, and how many.
const HOST: u32 = 200_000;
const SIZE: u32 = 65_536;

struct World {
    daemon: Daemon,
    _registry: Registry,
    image: String,
    cri: Cri,
}

/// A daemon that says it can do it: these tests would be worth nothing on a machine that cannot.
async fn world(options: Options) -> World {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&options).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let status = cri.runtime.status(StatusRequest { verbose: true }).await.unwrap().into_inner();
        let config: serde_json::Value = serde_json::from_str(&status.info["config"]).unwrap();
        assert_eq!(config["stateDir"], daemon.dir.join("state").to_string_lossy().as_ref());
        let can = |name: &str| status.runtime_handlers.iter().any(|h| h.name == name && h.features.unwrap().user_namespaces);
        if can("") && can("runc") && status.features.unwrap().user_namespaces_host_network {
            break;
        }
        assert!(Instant::now() < end, "user namespaces are not offered here: {status:?}\n{}", daemon.log_tail());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    World { daemon, _registry: registry, image, cri }
}

fn mapping() -> Vec<IdMapping> {
    vec![IdMapping { host_id: HOST, container_id: 0, length: SIZE }]
}

fn userns(mode: NamespaceMode, uids: Vec<IdMapping>, gids: Vec<IdMapping>) -> Option<UserNamespace> {
    Some(UserNamespace { mode: mode as i32, uids, gids })
}

impl World {
    fn pod(&self, name: &str, host_network: bool, pid: NamespaceMode) -> PodSandboxConfig {
        let mut pod = self.cri.pod(name, host_network, &self.daemon.logs());
        let options = options(&mut pod);
        options.pid = pid as i32;
        options.userns_options = userns(NamespaceMode::Pod, mapping(), mapping());
        pod
    }
    /// Runs a shell command in a container; answers what it prints.
    async fn sh(&mut self, id: &str, command: &str) -> String {
        let said = self.cri.exec(id, &["sh", "-c", command], 10).await.unwrap();
        String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).trim_end().to_owned()
    }
    async fn expect(&mut self, id: &str, rows: &[(&str, &str)]) {
        for (command, want) in rows {
            assert_eq!(self.sh(id, command).await, *want, "{command}");
        }
    }
    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.daemon.logs().join(format!("{name}.log"))).unwrap_or_default()
    }
    /// Gives background removal a moment, then the census must be what it was.
    async fn settle(&self, before: &census::Census) {
        let end = Instant::now() + Duration::from_secs(5);
        while census::take(&self.daemon) != *before && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(census::take(&self.daemon), *before);
    }
}

fn options(pod: &mut PodSandboxConfig) -> &mut NamespaceOption {
    pod.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut().unwrap()
}

fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

/// A volume that only the host's root reaches, as a kubelet's are; with a file of user 0 and one of user 1000.
fn volume(dir: &Path) -> Mount {
    let secret = dir.join("secret");
    let volume = secret.join("volume");
    std::fs::create_dir_all(&volume).unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::write(volume.join("root"), "of root").unwrap();
    std::fs::write(volume.join("user"), "of 1000").unwrap();
    std::os::unix::fs::chown(volume.join("user"), Some(1000), Some(1000)).unwrap();
    Mount {
        container_path: "/data".into(),
        host_path: volume.to_string_lossy().into(),
        uid_mappings: mapping(),
        gid_mappings: mapping(),
        ..Default::default()
    }
}

async fn whole_life(options: Options, host_network: bool, pid: NamespaceMode) {
    let mut world = world(options).await;
    let before = census::take(&world.daemon);
    let mut pod = world.pod("mapped", host_network, pid);
    let sysctls = &mut pod.linux.as_mut().unwrap().sysctls;
    sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
    if !host_network {
        sysctls.insert("net.ipv4.ip_forward".into(), "1".into());
    }
    let sandbox = world.cri.run_pod(&pod).await.unwrap();
    let volume = volume(&world.daemon.dir);
    let on_host = Path::new(&volume.host_path).to_owned();
    let said = "echo to the log > /dev/stdout; echo and errors > /dev/stderr; exec sleep 1000";
    let mut config = world.cri.container("main", &world.image, &["sh", "-c", said]);
    config.mounts = vec![volume];
    security(&mut config).seccomp =
        Some(SecurityProfile { profile_type: security_profile::ProfileType::RuntimeDefault as i32, ..Default::default() });
    let id = world.cri.run(&sandbox, &config, &pod).await.unwrap();
    let map = format!("0 {HOST} {SIZE}");
    world
        .expect(
            &id,
            &[
                ("tr -s ' ' < /proc/self/uid_map | sed 's/^ //'", map.as_str()),
                ("tr -s ' ' < /proc/self/gid_map | sed 's/^ //'", map.as_str()),
                ("id -u; id -g", "0\n0"),
                (
                    "stat -c %u:%g / /bin /bin/busybox /etc/hosts /dev/shm /data /data/root /data/user | tr '\\n' ' '",
                    "0:0 0:0 0:0 0:0 65534:65534 0:0 0:0 1000:1000",
                ),
                ("touch /made && chown 7:8 /made && stat -c %u:%g /made", "7:8"),
                ("echo x > /data/made && stat -c %u /data/made", "0"),
                ("cat /data/root /data/user", "of rootof 1000"),
                ("echo 10.0.0.1 friend >> /etc/hosts && tail -1 /etc/hosts", "10.0.0.1 friend"),
                ("echo x > /dev/shm/x && stat -c %u /dev/shm/x", "0"),
                ("grep Seccomp: /proc/self/status | tr -d '\\t'", "Seccomp:2"),
                ("cat /proc/sys/kernel/shm_rmid_forced", "1"),
                ("echo x > /dev/null && head -c 2 /dev/zero | wc -c", "2"),
                ("mknod /node c 1 3 2>&1 | grep -c 'not permitted'", "1"),
                ("test -d /sys/class/net && touch /sys/kernel/x 2>&1 | grep -ci read-only", "1"),
                ("ls /sys/fs/cgroup | wc -l | grep -vc '^0$'", "1"),
                ("mkdir /sys/fs/cgroup/memory/x 2>&1 | grep -ci 'read-only\\|no such'", "1"),
            ],
        )
        .await;
    let entry = |name: &str| std::fs::metadata(on_host.join(name)).unwrap();
    assert_eq!((entry("made").uid(), entry("made").gid()), (0, 0), "the volume's files belong to whom they belong inside");
    if !host_network {
        world
            .expect(
                &id,
                &[
                    ("hostname", "mapped"),
                    ("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/ip_unprivileged_port_start", "1\n0"),
                    ("grep -c ' /sys sysfs ' /proc/mounts", "1"),
                    ("ip addr | grep -c 'eth0'", "2"),
                ],
            )
            .await;
    }
    if pid == NamespaceMode::Pod {
        world.expect(&id, &[("ps -o args | grep -c '[s]him-troupe-v2 init$'", "1")]).await;
    }
    let log = world.log("main");
    assert!(log.contains(" stdout F to the log\n") && log.contains(" stderr F and errors\n"), "{log}");
    let seen = census::processes_of(&world.daemon.dir, &world.daemon.tag);
    let sleeper = seen.iter().find(|(_, c)| c.starts_with("sleep 1000")).unwrap_or_else(|| panic!("{seen:?}"));
    assert_eq!(std::fs::metadata(format!("/proc/{}", sleeper.0)).unwrap().uid(), HOST, "root of the pod is nobody outside");

    let mut plain = world.cri.container("plain", &world.image, &["sh", "-c", "id -u; id -G; echo mine > /dev/stdout; exit 4"]);
    security(&mut plain).run_as_user = Some(Int64Value { value: 1000 });
    security(&mut plain).supplemental_groups = vec![3000];
    let plain = world.cri.run(&sandbox, &plain, &pod).await.unwrap();
    assert_eq!(world.cri.wait_exit(&plain, 10).await.unwrap().exit_code, 4);
    let log = world.log("plain");
    assert!(log.contains(" F 1000\n") && log.contains(" 3000\n") && log.contains(" F mine\n"), "{log}");

    let mut terminal = world.cri.container("terminal", &world.image, &["sh", "-c", "test -t 0 && tty; echo seen > /dev/tty; exit 5"]);
    terminal.tty = true;
    let terminal = world.cri.run(&sandbox, &terminal, &pod).await.unwrap();
    assert_eq!(world.cri.wait_exit(&terminal, 10).await.unwrap().exit_code, 5);
    let log = world.log("terminal");
    assert!(log.contains("/dev/") && log.contains("seen"), "{log}");

    world.cri.drop_pod(&sandbox).await.unwrap();
    world.settle(&before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_pod_network() {
    whole_life(Options::default(), false, NamespaceMode::Container).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_node_network_with_shared_processes() {
    whole_life(Options::default(), true, NamespaceMode::Pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_native_snapshots_with_shared_processes() {
    whole_life(Options { snapshotter: "native".into(), ..Default::default() }, false, NamespaceMode::Pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_and_privileges_stay_within_the_pod() {
    let mut world = world(Options::default()).await;
    let before = census::take(&world.daemon);
    let mut pod = world.pod("mighty", false, NamespaceMode::Container);
    pod.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let sandbox = world.cri.run_pod(&pod).await.unwrap();
    let mut config = world.cri.container("device", &world.image, &["sleep", "1000"]);
    config.devices = vec![Device { container_path: "/dev/other".into(), host_path: "/dev/zero".into(), permissions: "rw".into() }];
    let id = world.cri.run(&sandbox, &config, &pod).await.unwrap();
    world.expect(&id, &[("head -c 3 /dev/other | wc -c", "3"), ("stat -c '%t %T' /dev/other", "1 5")]).await;
    let mut config = world.cri.container("mighty", &world.image, &["sleep", "1000"]);
    security(&mut config).privileged = true;
    let id = world.cri.run(&sandbox, &config, &pod).await.unwrap();
    world
        .expect(
            &id,
            &[
                ("mount -t tmpfs x /tmp && touch /tmp/x && umount /tmp && echo may", "may"),
                ("ip link add dummy7 type dummy 2>/dev/null; hostname other && hostname", "other"),
                ("mknod /tmp/disk b 8 0 2>&1 | grep -ci 'not permitted'", "1"),
            ],
        )
        .await;
    world.cri.drop_pod(&sandbox).await.unwrap();
    world.settle(&before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_named_and_leaves_nothing() {
    let mut world = world(Options::default()).await;
    let before = census::take(&world.daemon);
    let one = |c: u32, h: u32, n: u32| vec![IdMapping { container_id: c, host_id: h, length: n }];
    for (asked, text) in [
        (userns(NamespaceMode::Container, mapping(), mapping()), "unsupported user namespace mode CONTAINER"),
        (userns(NamespaceMode::Target, mapping(), mapping()), "unsupported user namespace mode TARGET"),
        (userns(NamespaceMode::Pod, vec![], mapping()), "exactly one mapping"),
        (userns(NamespaceMode::Pod, [mapping(), one(70_000, 1, 1)].concat(), mapping()), "exactly one mapping"),
        (userns(NamespaceMode::Pod, one(0, 1, 0), mapping()), "length 0"),
        (userns(NamespaceMode::Pod, one(1, HOST, 10), mapping()), "id 0"),
        (userns(NamespaceMode::Node, mapping(), vec![]), "no mappings"),
    ] {
        let mut pod = world.pod("bad", false, NamespaceMode::Container);
        options(&mut pod).userns_options = asked;
        let refused = world.cri.run_pod(&pod).await.unwrap_err().to_string();
        assert!(refused.contains(text), "{refused} lacks {text}");
    }
    world.settle(&before).await;

    let pod = world.pod("strict", false, NamespaceMode::Container);
    let sandbox = world.cri.run_pod(&pod).await.unwrap();
    let mut other = pod.clone();
    for asked in [None, userns(NamespaceMode::Pod, one(0, HOST + 1, SIZE), mapping())] {
        options(&mut other).userns_options = asked;
        let config = world.cri.container("other", &world.image, &["true"]);
        let refused = world.cri.create(&sandbox, &config, &other).await.unwrap_err().to_string();
        assert!(refused.contains("must be the same"), "{refused}");
    }
    let mut config = world.cri.container("unmappable", &world.image, &["true"]);
    config.mounts = vec![Mount {
        container_path: "/data".into(),
        host_path: "/sys/kernel".into(),
        uid_mappings: mapping(),
        gid_mappings: mapping(),
        ..Default::default()
    }];
    let refused = world.cri.run(&sandbox, &config, &pod).await.unwrap_err().to_string();
    assert!(refused.contains("/data") && refused.contains("sysfs") && refused.contains("does not support idmapped mounts"), "{refused}");
    world.cri.drop_pod(&sandbox).await.unwrap();
    world.settle(&before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_finds_the_pod_and_its_users_again() {
    let mut world = world(Options::default()).await;
    let before = census::take(&world.daemon);
    let pod = world.pod("survivor", false, NamespaceMode::Pod);
    let sandbox = world.cri.run_pod(&pod).await.unwrap();
    let id = world.cri.run(&sandbox, &world.cri.container("first", &world.image, &["sleep", "1000"]), &pod).await.unwrap();
    world.daemon.kill();
    world.daemon.spawn().await.unwrap();
    world.cri = world.daemon.cri().await.unwrap();
    world.expect(&id, &[("tr -s ' ' < /proc/self/uid_map | cut -d' ' -f3", &HOST.to_string())]).await;
    let mut config = world.cri.container("second", &world.image, &["sleep", "1000"]);
    config.mounts = vec![volume(&world.daemon.dir)];
    let second = world.cri.run(&sandbox, &config, &pod).await.unwrap();
    world.expect(&second, &[("stat -c %u /data/user", "1000"), ("ps -o args | grep -c '^sleep 1000'", "2")]).await;
    world.cri.drop_pod(&sandbox).await.unwrap();
    world.settle(&before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_debugger_sees_its_targets_processes() {
    let mut world = world(Options::default()).await;
    for users in [None, userns(NamespaceMode::Pod, mapping(), mapping())] {
        let mut pod = world.pod("debugged", true, NamespaceMode::Container);
        options(&mut pod).userns_options = users;
        let sandbox = world.cri.run_pod(&pod).await.unwrap();
        let target = world.cri.run(&sandbox, &world.cri.container("target", &world.image, &["sleep", "4321"]), &pod).await.unwrap();
        let mut debugging = pod.clone();
        options(&mut debugging).pid = NamespaceMode::Target as i32;
        options(&mut debugging).target_id = target.clone();
        let config = world.cri.container("debugger", &world.image, &["sleep", "1000"]);
        let debugger = world.cri.run(&sandbox, &config, &debugging).await.unwrap();
        world.expect(&debugger, &[("ps -o pid,args | grep '[s]leep 4321' | tr -s ' ' | sed 's/^ //'", "1 sleep 4321")]).await;
        // It ends with its namespace; another one for it cannot begin, whether created before or after the target's end.
        let late = world.cri.create(&sandbox, &world.cri.container("late", &world.image, &["true"]), &debugging).await.unwrap();
        world.cri.stop(&target, 0).await.unwrap();
        world.cri.wait_exit(&debugger, 10).await.unwrap();
        let refused = world.cri.start(&late).await.unwrap_err().to_string();
        assert!(refused.contains("is not running"), "{refused}");
        let refused = world.cri.create(&sandbox, &world.cri.container("later", &world.image, &["true"]), &debugging).await.unwrap_err();
        assert!(refused.to_string().contains("is not running"), "{refused}");
        options(&mut debugging).target_id = "nobody".into();
        let refused = world.cri.create(&sandbox, &world.cri.container("lost", &world.image, &["true"]), &debugging).await.unwrap_err();
        assert!(refused.to_string().contains("nobody"), "{refused}");
        world.cri.drop_pod(&sandbox).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_cannot_is_not_advertised_and_says_why() {
    let daemon = Daemon::start(&Options { binary_name: "/bin/false".into(), ..Default::default() }).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let mut pod = cri.pod("refused", true, &daemon.logs());
    options(&mut pod).userns_options = userns(NamespaceMode::Pod, mapping(), mapping());
    let end = Instant::now() + Duration::from_secs(10);
    // Until it has been tried nothing is known, and nothing is refused.
    let refused = loop {
        match cri.run_pod(&pod).await {
            Ok(id) => cri.drop_pod(&id).await.unwrap(),
            Err(e) => break e.to_string(),
        }
        assert!(Instant::now() < end, "the pod is not refused");
    };
    assert!(refused.contains("cannot have user namespaces on this node: /bin/false"), "{refused}");
    let status = cri.runtime.status(StatusRequest::default()).await.unwrap().into_inner();
    assert!(status.runtime_handlers.iter().all(|h| !h.features.unwrap().user_namespaces), "{status:?}");
    assert!(!status.features.unwrap().user_namespaces_host_network);
}

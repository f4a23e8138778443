//! What a container gets is what was asked for: users, capabilities, seccomp, paths, devices, CDI, resources, annotations, handlers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use serde_json::Value;
use std::path::PathBuf;
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::registry::{Registry, busybox_layer};

/// A daemon with one pod, and the image of busybox.
struct Bed {
    daemon: Daemon,
    _registry: Registry,
    image: String,
    cri: Cri,
    pod: PodSandboxConfig,
    sandbox: String,
}

async fn bed(options: Options, change: impl FnOnce(&mut PodSandboxConfig)) -> Bed {
    let registry = Registry::start().await;
    let config = serde_json::json!({"Env": ["COLOUR=image", "SHAPE=image"], "StopSignal": "SIGUSR1"});
    let image = registry.add("spec/busybox:1", vec![busybox_layer().unwrap()], config);
    let daemon = Daemon::start(&options).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let mut pod = cri.pod("spec", true, &daemon.logs());
    change(&mut pod);
    let sandbox = cri.run_pod(&pod).await.unwrap();
    Bed { daemon, _registry: registry, image, cri, pod, sandbox }
}

impl Bed {
    fn container(&self, name: &str, change: impl FnOnce(&mut ContainerConfig, &mut LinuxContainerSecurityContext)) -> ContainerConfig {
        let mut config = self.cri.container(name, &self.image, &["sleep", "1000"]);
        let mut context = config.linux.as_mut().unwrap().security_context.take().unwrap();
        change(&mut config, &mut context);
        config.linux.as_mut().unwrap().security_context = Some(context);
        config
    }
    async fn run(&mut self, name: &str, change: impl FnOnce(&mut ContainerConfig, &mut LinuxContainerSecurityContext)) -> String {
        let config = self.container(name, change);
        self.cri.run(&self.sandbox, &config, &self.pod).await.unwrap()
    }
    async fn refused(&mut self, name: &str, change: impl FnOnce(&mut ContainerConfig, &mut LinuxContainerSecurityContext)) -> String {
        let config = self.container(name, change);
        self.cri.create(&self.sandbox, &config, &self.pod).await.unwrap_err().to_string()
    }
    async fn said(&mut self, id: &str, command: &str) -> String {
        let said = self.cri.exec(id, &["sh", "-c", command], 10).await.unwrap();
        (String::from_utf8_lossy(&said.stdout) + String::from_utf8_lossy(&said.stderr)).trim_end().to_owned()
    }
    async fn info(&mut self, id: &str) -> Value {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: true };
        let answer = self.cri.runtime.container_status(request).await.unwrap().into_inner();
        serde_json::from_str(&answer.info["info"]).unwrap()
    }
    async fn end(mut self) {
        self.cri.drop_pod(&self.sandbox).await.unwrap();
    }
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| s.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn masked_and_read_only_paths_are_the_clients() {
    let mut bed = bed(Options::default(), |_| {}).await;
    let masked = bed.run("masked", |_, s| (s.masked_paths, s.readonly_paths) = (strings(&["/proc/keys"]), strings(&["/proc/sys"]))).await;
    assert_eq!(bed.said(&masked, "wc -c < /proc/keys").await, "0");
    assert!(bed.said(&masked, "echo 5 > /proc/sys/vm/swappiness").await.contains("Read-only"));
    let open = bed.run("open", |_, _| {}).await;
    assert_eq!(bed.said(&open, "grep -c ' /proc/' /proc/mounts").await, "0", "no list sent: nothing is masked");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_groups_environment_and_the_requests_pod() {
    let mut bed = bed(Options::default(), |_| {}).await;
    // The request repeats the pod's configuration, and what it says counts.
    let logs = bed.daemon.dir.join("otherlogs");
    std::fs::create_dir(&logs).unwrap();
    (bed.pod.hostname, bed.pod.log_directory) = ("asked".into(), logs.to_string_lossy().into());
    let id = bed
        .run("user", |c, s| {
            s.run_as_user = Some(Int64Value { value: 4711 });
            s.run_as_group = Some(Int64Value { value: 30 });
            s.supplemental_groups = vec![500, 20, 500];
            let pair = |k: &str, v: &str| KeyValue { key: k.into(), value: v.into() };
            c.envs = vec![pair("COLOUR", "client"), pair("HOSTNAME", "client"), pair("LAST", "1")];
        })
        .await;
    assert_eq!(bed.said(&id, "id -u; id -g; id -G").await, "4711\n30\n30 20 500");
    let info = bed.info(&id).await;
    let environment: Vec<&str> = info["runtimeSpec"]["process"]["env"].as_array().unwrap().iter().map(|e| e.as_str().unwrap()).collect();
    assert!(environment[0].starts_with("PATH="));
    assert_eq!(environment[1..], ["HOSTNAME=client", "COLOUR=client", "SHAPE=image", "LAST=1"]);
    assert!(logs.join("user.log").exists());
    let plain = bed.run("plain", |_, _| {}).await;
    assert_eq!(bed.said(&plain, "echo $HOSTNAME").await, "asked");
    for (name, change, part) in [
        ("a", (|s| s.run_as_group = Some(Int64Value { value: 1 })) as fn(&mut LinuxContainerSecurityContext), "without user"),
        ("b", |s| s.run_as_username = "nobody-here".into(), "nobody-here"),
        ("c", |s| s.run_as_user = Some(Int64Value { value: -1 }), "-1"),
    ] {
        let said = bed.refused(name, |_, s| change(s)).await;
        assert!(said.contains(part), "{said}");
    }
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_ambient_and_all() {
    let mut bed = bed(Options::default(), |_| {}).await;
    let caps = |add: &[&str], drop: &[&str], ambient: &[&str]| Capability {
        add_capabilities: strings(add),
        drop_capabilities: strings(drop),
        add_ambient_capabilities: strings(ambient),
    };
    let ambient = bed
        .run("ambient", |_, s| {
            s.run_as_user = Some(Int64Value { value: 1000 });
            s.capabilities = Some(caps(&[], &["ALL"], &["NET_BIND_SERVICE"]));
        })
        .await;
    assert_eq!(bed.said(&ambient, "grep CapEff /proc/self/status").await, "CapEff:\t0000000000000400", "a user that is not root keeps it");
    let user = bed
        .run("user", |_, s| {
            s.run_as_user = Some(Int64Value { value: 1000 });
            s.capabilities = Some(caps(&["NET_ADMIN"], &[], &[]));
        })
        .await;
    assert_eq!(bed.said(&user, "grep CapEff /proc/self/status").await, "CapEff:\t0000000000000000");
    let few = bed.run("few", |_, s| s.capabilities = Some(caps(&["all", "KILL"], &["ALL", "CAP_CHOWN"], &[]))).await;
    assert_eq!(bed.said(&few, "grep CapEff /proc/self/status").await, "CapEff:\t0000000000000020");
    let said = bed.refused("typo", |_, s| s.capabilities = Some(caps(&["NET_AMDIN"], &[], &[]))).await;
    assert!(said.contains("NET_AMDIN"), "{said}");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn seccomp_profiles_by_both_fields() {
    let mut bed = bed(Options::default(), |_| {}).await;
    let profile =
        |kind: security_profile::ProfileType, file: &str| SecurityProfile { profile_type: kind as i32, localhost_ref: file.into() };
    let default = bed.run("default", |_, s| s.seccomp = Some(profile(security_profile::ProfileType::RuntimeDefault, ""))).await;
    assert_eq!(bed.said(&default, "grep Seccomp: /proc/1/status /proc/self/status | cut -f2 | uniq").await, "2");
    let refused = bed.said(&default, "unshare -m true; echo $?").await;
    assert!(refused.contains("not permitted") && refused.starts_with("1\n"), "{refused}");
    #[allow(deprecated)]
    let old = bed.run("old", |_, s| s.seccomp_profile_path = "runtime/default".into()).await;
    assert_eq!(bed.said(&old, "grep Seccomp: /proc/self/status").await, "Seccomp:\t2");
    let file = bed.daemon.dir.join("no-chmod.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod","fchmodat"],"action":"SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(&file, text).unwrap();
    let local = file.to_string_lossy().into_owned();
    let own = bed.run("own", |_, s| s.seccomp = Some(profile(security_profile::ProfileType::Localhost, &local))).await;
    assert!(bed.said(&own, "touch /x; chmod 1 /x").await.contains("not permitted"));
    let said = bed.refused("gone", |_, s| s.seccomp = Some(profile(security_profile::ProfileType::Localhost, "/no/such"))).await;
    assert!(said.contains("/no/such"), "{said}");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn profiles_of_a_node_without_apparmor_and_levels_of_one_without_selinux() {
    assert!(!std::path::Path::new("/sys/kernel/security/apparmor").exists(), "this test is for nodes without AppArmor");
    let mut bed = bed(Options::default(), |_| {}).await;
    let local = SecurityProfile { profile_type: security_profile::ProfileType::Localhost as i32, localhost_ref: "mine".into() };
    let said = bed.refused("a", |_, s| s.apparmor = Some(local)).await;
    assert!(said.contains("apparmor is not supported"), "{said}");
    let level = SeLinuxOption { level: "c1".into(), ..Default::default() };
    let said = bed.refused("b", |_, s| s.selinux_options = Some(level)).await;
    assert!(said.contains("level"), "{said}");
    bed.run("c", |_, _| {}).await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_by_name_by_directory_and_by_cdi() {
    let cdi: PathBuf = std::env::temp_dir().join(format!("spec-cdi-{}", std::process::id()));
    std::fs::create_dir_all(&cdi).unwrap();
    let text = "cdiVersion: 0.6.0\nkind: test.com/thing\ncontainerEdits:\n  env:\n  - ALL_THINGS=1\ndevices:\n- name: one\n  containerEdits:\n    \
                env: [THING=one]\n    deviceNodes:\n    - path: /dev/thing\n      hostPath: /dev/zero\n    mounts:\n    - hostPath: /proc\n      \
                containerPath: /things\n      options: [ro, rbind]\n- name: two\n  containerEdits:\n    env: [TWO=2]\n";
    std::fs::write(cdi.join("thing.yaml"), text).unwrap();
    let keys = format!("cdi_spec_dirs = [{:?}]\ndevice_ownership_from_security_context = true", cdi);
    let mut bed = bed(Options { runtime: keys, ..Default::default() }, |_| {}).await;
    let id = bed
        .run("cdi", |c, s| {
            s.run_as_user = Some(Int64Value { value: 1000 });
            c.cdi_devices = vec![CdiDevice { name: "test.com/thing=one".into() }];
            c.annotations.insert("cdi.k8s.io/plugin".into(), "test.com/thing=two,test.com/thing=one".into());
            c.devices = vec![Device { host_path: "/dev/null".into(), container_path: "/dev/hole".into(), permissions: "rw".into() }];
        })
        .await;
    assert_eq!(bed.said(&id, "echo $ALL_THINGS $THING $TWO").await, "1 one 2");
    assert_eq!(
        bed.said(&id, "head -c 3 /dev/thing | wc -c; test -e /things/self && echo mounted; stat -c %u /dev/hole").await,
        "3\nmounted\n1000"
    );
    let said = bed.refused("gone", |c, _| c.cdi_devices = vec![CdiDevice { name: "test.com/thing=ten".into() }]).await;
    assert!(said.contains("unresolvable CDI devices test.com/thing=ten"), "{said}");
    let said = bed.refused("none", |c, _| c.devices = vec![Device { host_path: "/etc/hostname".into(), ..Default::default() }]).await;
    assert!(said.contains("not a device"), "{said}");
    std::fs::remove_dir_all(&cdi).unwrap();
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_changes_what_it_names_and_a_refused_one_changes_nothing() {
    let mut bed = bed(Options::default(), |_| {}).await;
    let first = LinuxContainerResources {
        cpu_shares: 512,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    };
    let id = bed.run("update", |c, _| c.linux.as_mut().unwrap().resources = Some(first.clone())).await;
    let update = async |bed: &mut Bed, linux: LinuxContainerResources| {
        let request = UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
        bed.cri.runtime.update_container_resources(request).await
    };
    update(&mut bed, LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() }).await.unwrap();
    update(&mut bed, LinuxContainerResources { cpu_quota: 70_000, ..Default::default() }).await.unwrap();
    let want = LinuxContainerResources { memory_limit_in_bytes: 96 << 20, cpu_quota: 70_000, ..first };
    let resources = |s: ContainerStatus| s.resources.unwrap().linux.unwrap();
    assert_eq!(resources(bed.cri.status(&id).await.unwrap()), want);
    let files =
        "cd /sys/fs/cgroup; cat cpu/cpu.cfs_quota_us memory/memory.limit_in_bytes cpu/cpu.shares 2>/dev/null || cat cpu.max memory.max";
    let limits = bed.said(&id, files).await;
    assert!(limits.starts_with("70000") && limits.contains(&(96 << 20).to_string()), "{limits}");
    let said = update(&mut bed, LinuxContainerResources { cpuset_cpus: "9999".into(), cpu_quota: 80_000, ..Default::default() }).await;
    assert!(said.is_err());
    assert_eq!(resources(bed.cri.status(&id).await.unwrap()), want, "what the runtime refuses is not shown");
    bed.cri.stop(&id, 0).await.unwrap();
    update(&mut bed, LinuxContainerResources { cpu_shares: 100, ..Default::default() }).await.unwrap();
    assert_eq!(resources(bed.cri.status(&id).await.unwrap()).cpu_shares, 100);
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_tell_what_tools_look_for() {
    let handler = r#"[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
pod_annotations = ["io.test.*"]
container_annotations = ["c.test/*"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.second]
runtime_type = "io.containerd.runc.v2"
"#;
    let mut bed = bed(Options { extra: handler.into(), ..Default::default() }, |pod| {
        pod.annotations = [("io.test.x", "1"), ("io.other", "2"), ("io.kubernetes.cri.sandbox-id", "forged")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
    })
    .await;
    let id = bed
        .run("told", |c, _| c.annotations = [("c.test/a".to_owned(), "yes".to_owned()), ("c.test/a/b".to_owned(), "no".to_owned())].into())
        .await;
    let info = bed.info(&id).await;
    for key in ["sandboxID", "pid", "removing", "snapshotKey", "snapshotter", "runtimeType", "runtimeOptions", "config", "runtimeSpec"] {
        assert!(info.get(key).is_some(), "{key}: {info}");
    }
    assert_eq!((info["runtimeType"].as_str(), info["config"]["metadata"]["name"].as_str()), (Some("io.containerd.runc.v2"), Some("told")));
    let notes = &info["runtimeSpec"]["annotations"];
    assert_eq!(
        (notes["io.test.x"].as_str(), notes.get("io.other"), notes["c.test/a"].as_str(), notes.get("c.test/a/b")),
        (Some("1"), None, Some("yes"), None)
    );
    assert_eq!(
        (notes["io.kubernetes.cri.sandbox-id"].as_str(), notes["io.kubernetes.cri.container-name"].as_str()),
        (Some(bed.sandbox.as_str()), Some("told"))
    );
    let status = bed.cri.status(&id).await.unwrap();
    assert_eq!(status.image.unwrap().image, bed.image);
    assert_eq!(status.stop_signal, Signal::Sigusr1 as i32, "the image's");

    let request = PodSandboxStatusRequest { pod_sandbox_id: bed.sandbox.clone(), verbose: true };
    let answer = bed.cri.runtime.pod_sandbox_status(request).await.unwrap().into_inner();
    let info: Value = serde_json::from_str(&answer.info["info"]).unwrap();
    for key in [
        "pid",
        "processStatus",
        "netNamespaceClosed",
        "image",
        "snapshotKey",
        "snapshotter",
        "runtimeType",
        "runtimeOptions",
        "config",
        "runtimeSpec",
        "cniResult",
        "sandboxMetadata",
    ] {
        assert!(info.get(key).is_some(), "{key}: {info}");
    }
    assert_eq!(info["config"]["metadata"]["name"], "spec");

    let answer = bed.cri.runtime.status(StatusRequest { verbose: true }).await.unwrap().into_inner();
    let config: Value = serde_json::from_str(&answer.info["config"]).unwrap();
    assert_eq!(config["stateDir"], bed.daemon.dir.join("state").to_str().unwrap());
    assert_eq!(answer.info["lastCNILoadStatus"], "OK");
    assert!(answer.info.contains_key("golang") && answer.info.contains_key("cniconfig"));
    let mut names: Vec<String> = answer.runtime_handlers.into_iter().map(|h| h.name).collect();
    names.sort();
    assert_eq!(names, ["", "runc", "second"]);
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handlers_untrusted_pods_and_a_base_specification() {
    let base = std::env::temp_dir().join(format!("spec-base-{}.json", std::process::id()));
    let text = serde_json::json!({"ociVersion": "1.1.0",
        "process": {"env": ["FROM_BASE=1"], "cwd": "/", "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/extra", "type": "tmpfs", "source": "tmpfs"}]});
    std::fs::write(&base, text.to_string()).unwrap();
    let handler = format!(
        "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.untrusted]\nruntime_type = \"io.containerd.runc.v2\"\nbase_runtime_spec = {base:?}\n"
    );
    let mut bed = bed(Options { extra: handler, ..Default::default() }, |_| {}).await;
    let mut pod = bed.cri.pod("untrusted", false, &bed.daemon.logs());
    pod.annotations.insert("io.kubernetes.cri.untrusted-workload".into(), "true".into());
    let request =
        |pod: &PodSandboxConfig, handler: &str| RunPodSandboxRequest { config: Some(pod.clone()), runtime_handler: handler.into() };
    let explicit = bed.cri.runtime.run_pod_sandbox(request(&pod, "runc")).await.unwrap_err().to_string();
    assert!(explicit.contains("explicit runtime handler"), "{explicit}");
    let mut host = bed.cri.pod("host", true, &bed.daemon.logs());
    host.annotations.clone_from(&pod.annotations);
    let host = bed.cri.run_pod(&host).await.unwrap_err().to_string();
    assert!(host.contains("host access"), "{host}");
    let sandbox = bed.cri.run_pod(&pod).await.unwrap();
    let answer =
        bed.cri.runtime.pod_sandbox_status(PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: false }).await.unwrap();
    assert_eq!(answer.into_inner().status.unwrap().runtime_handler, "untrusted");
    let id = bed.cri.run(&sandbox, &bed.cri.container("based", &bed.image, &["sleep", "1000"]), &pod).await.unwrap();
    assert_eq!(bed.said(&id, "ulimit -n; echo $FROM_BASE; grep -c ' /extra ' /proc/mounts").await, "77\n1\n1");
    bed.cri.drop_pod(&sandbox).await.unwrap();
    std::fs::remove_file(&base).unwrap();
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_sees_the_processes_of_its_target() {
    let mut bed = bed(Options::default(), |_| {}).await;
    let target = bed.run("target", |c, _| c.command = strings(&["sleep", "4321"])).await;
    let looking = |target: &str| {
        let options = NamespaceOption { network: 2, pid: NamespaceMode::Target as i32, target_id: target.into(), ..Default::default() };
        move |_: &mut ContainerConfig, s: &mut LinuxContainerSecurityContext| s.namespace_options = Some(options)
    };
    let raw = |bed: &Bed, config: ContainerConfig| CreateContainerRequest {
        pod_sandbox_id: bed.sandbox.clone(),
        config: Some(config),
        sandbox_config: Some(bed.pod.clone()),
    };
    let config = bed.container("looker", looking(&target));
    let request = raw(&bed, config);
    let looker = bed.cri.runtime.create_container(request).await.unwrap().into_inner().container_id;
    bed.cri.start(&looker).await.unwrap();
    assert!(bed.said(&looker, "ps -o args").await.contains("sleep 4321"));
    let late = bed.container("late", looking(&target));
    let request = raw(&bed, late);
    let late = bed.cri.runtime.create_container(request).await.unwrap().into_inner().container_id;
    bed.cri.stop(&target, 0).await.unwrap();
    let said = bed.cri.start(&late).await.unwrap_err().to_string();
    assert!(said.contains("target_id"), "{said}");
    let gone = bed.container("gone", looking("0123"));
    let request = raw(&bed, gone);
    assert!(bed.cri.runtime.create_container(request).await.unwrap_err().to_string().contains("target_id"));
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_cannot_work_is_refused_with_the_keys_name() {
    for (runtime, extra, part) in [
        ("stats_collect_period = \"often\"", "", "stats_collect_period"),
        ("unset_seccomp_profile = \"x\"", "", "unset_seccomp_profile"),
        ("", "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.x]\nbase_runtime_spec = \"/no/such\"\n", "base_runtime_spec"),
        ("", "[plugins.\"io.containerd.grpc.v1.cri\"]\nstream_server_port = \"x\"\n", "stream_server_port"),
    ] {
        let options = Options { runtime: runtime.into(), extra: extra.into(), ..Default::default() };
        let said = format!("{:#}", Daemon::start(&options).await.err().expect("it must not start"));
        assert!(said.contains(part), "{said}");
    }
    let odd = Options { runtime: "enable_everything = true".into(), ..Default::default() };
    let daemon = Daemon::start(&odd).await.unwrap();
    let log = std::fs::read_to_string(daemon.log_path()).unwrap();
    assert!(log.contains("enable_everything is unknown"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_one_private_archive_and_the_container_goes_on() {
    // CRIU itself needs a kernel that lets it; what is tried here is all around it.
    let runtime = std::env::temp_dir().join(format!("spec-runtime-{}", std::process::id()));
    let script = "#!/bin/sh\nfor a in \"$@\"; do case $p in --image-path) echo images > \"$a/pages-1.img\"; exit 0;; esac; p=$a; done\nexec runc \"$@\"\n";
    std::fs::write(&runtime, script).unwrap();
    std::fs::set_permissions(&runtime, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut bed = bed(Options { binary_name: runtime.to_string_lossy().into(), ..Default::default() }, |_| {}).await;
    let id = bed.run("kept", |_, _| {}).await;
    bed.said(&id, "echo x > /tmp/made; rm /etc/passwd").await;
    let to = bed.daemon.dir.join("kept.tar");
    let request = |id: &str| CheckpointContainerRequest { container_id: id.into(), location: to.to_string_lossy().into(), timeout: 30 };
    bed.cri.runtime.checkpoint_container(request(&id)).await.unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&to.metadata().unwrap().permissions()) & 0o777, 0o600);
    let list = |args: &[&str]| String::from_utf8(std::process::Command::new("tar").args(args).output().unwrap().stdout).unwrap();
    let all = list(&["-tf", to.to_str().unwrap()]);
    for name in ["checkpoint/pages-1.img", "config.dump", "spec.dump", "status.dump", "status", "rootfs-diff.tar", "container.log"] {
        assert!(all.lines().any(|l| l == name), "{name}: {all}");
    }
    let config: Value = serde_json::from_str(&list(&["-xOf", to.to_str().unwrap(), "config.dump"])).unwrap();
    assert_eq!(
        (config["id"].as_str(), config["name"].as_str(), config["rootfsImage"].as_str()),
        (Some(id.as_str()), Some("kept"), Some(bed.image.as_str()))
    );
    let inner =
        std::process::Command::new("sh").arg("-c").arg(format!("tar -xOf {} rootfs-diff.tar | tar -tf -", to.display())).output().unwrap();
    let inner = String::from_utf8(inner.stdout).unwrap();
    assert!(inner.lines().any(|l| l == "tmp/made") && inner.lines().any(|l| l == "etc/.wh.passwd"), "{inner}");
    assert_eq!(bed.said(&id, "cat /tmp/made").await, "x", "it goes on");
    let left = std::fs::read_dir(bed.daemon.dir.join("root/sandboxes").join(&bed.sandbox)).unwrap();
    let left: Vec<_> = left.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name.contains("checkpoint")), "{left:?}");
    bed.cri.stop(&id, 0).await.unwrap();
    let said = bed.cri.runtime.checkpoint_container(request(&id)).await.unwrap_err().to_string();
    assert!(said.contains("only running containers"), "{said}");
    bed.end().await;
    std::fs::remove_file(&runtime).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_cannot_be_made_says_why_and_leaves_nothing() {
    let mut bed = bed(Options { runtime: "enable_criu = false".into(), ..Default::default() }, |_| {}).await;
    let id = bed.run("kept", |_, _| {}).await;
    let to = bed.daemon.dir.join("kept.tar");
    let request = CheckpointContainerRequest { container_id: id, location: to.to_string_lossy().into(), timeout: 0 };
    let said = bed.cri.runtime.checkpoint_container(request).await.unwrap_err().to_string();
    assert!(said.contains("enable_criu") && !to.exists(), "{said}");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_pod_can_be_is_refused() {
    let mut bed = bed(Options::default(), |_| {}).await;
    let mut named = bed.cri.pod("named", true, &bed.daemon.logs());
    named.hostname = "mine".into();
    let mut grouped = bed.cri.pod("grouped", false, &bed.daemon.logs());
    let context = grouped.linux.get_or_insert_default().security_context.get_or_insert_default();
    context.run_as_group = Some(Int64Value { value: 1 });
    for (config, part) in [(named, "hostname"), (grouped, "without user")] {
        let request = RunPodSandboxRequest { config: Some(config), ..Default::default() };
        let said = bed.cri.runtime.run_pod_sandbox(request).await.unwrap_err();
        assert!(said.code() == tonic::Code::InvalidArgument && said.message().contains(part), "{said}");
    }
    bed.end().await;
}

//! Pod networks with plugins that behave and plugins that do not: a hung one costs its own pod, DEL is repeated until it is acknowledged, and in the end no
//! address, namespace, interface, cached result or row is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, registry::Registry};

/// Hands on what the plugin before it gave.
const PASS: &str = r#"[ $CNI_COMMAND = ADD ] && printf '%s' "$input" | sed 's/.*"prevResult":\({.*}\),"type".*/\1/'; exit 0"#;

async fn start(options: Options) -> (Daemon, Cri) {
    let daemon = Daemon::start(&options).await.unwrap();
    let cri = daemon.cri().await.unwrap();
    (daemon, cri)
}

/// The daemon's bridge, and behind it a plugin of the test's.
async fn behind_the_bridge(daemon: &Daemon, cri: &mut Cri, name: &str, script: &str) {
    daemon.plugin(name, script);
    let bridge = daemon.bridge_plugin(&[&format!("{}.0/24", daemon.subnet())]);
    daemon.set_network(&serde_json::json!([bridge, {"type": name}]));
    until(cri, "the chain is loaded", |s| s.info["cniconfig"].contains(&format!("{name:?}"))).await;
}

async fn status(cri: &mut Cri) -> StatusResponse {
    cri.runtime.status(StatusRequest { verbose: true }).await.unwrap().into_inner()
}

fn network_ready(status: &StatusResponse) -> RuntimeCondition {
    status.status.as_ref().unwrap().conditions.iter().find(|c| c.r#type == "NetworkReady").unwrap().clone()
}

async fn until(cri: &mut Cri, what: &str, holds: impl Fn(&StatusResponse) -> bool) {
    let end = Instant::now() + Duration::from_secs(15);
    loop {
        let status = status(cri).await;
        if holds(&status) {
            return;
        }
        assert!(Instant::now() < end, "{what}: {status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn pod_status(cri: &mut Cri, id: &str) -> PodSandboxStatus {
    let request = PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: false };
    cri.runtime.pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap()
}

async fn stop(cri: &mut Cri, id: &str) -> Result<(), tonic::Status> {
    cri.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.into() }).await.map(drop)
}

async fn settle(daemon: &Daemon, before: &census::Census) {
    census::settle(daemon, before, Duration::from_secs(20), "what is left").await;
}

fn metrics(daemon: &Daemon) -> String {
    let mut stream = std::os::unix::net::UnixStream::connect(daemon.dir.join("state/control.sock")).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_hangs_in_one_pod_while_20_others_start() {
    let (daemon, mut cri) = start(Options { plugin_timeout: "30s".into(), ..Default::default() }).await;
    let hang = format!("case $CNI_ARGS in *K8S_POD_NAME=stuck*) [ $CNI_COMMAND = ADD ] && sleep 1000;; esac; {PASS}");
    behind_the_bridge(&daemon, &mut cri, "hang", &hang).await;
    let before = census::take(&daemon);
    let mut stuck = cri.clone();
    let config = cri.pod("stuck", false, &daemon.logs());
    let hanging = tokio::spawn(async move {
        let mut request = tonic::Request::new(RunPodSandboxRequest { config: Some(config), ..Default::default() });
        request.set_timeout(Duration::from_secs(25));
        stuck.runtime.run_pod_sandbox(request).await
    });
    let end = Instant::now() + Duration::from_secs(20);
    while !daemon.cli(&["ops"]).unwrap().contains("cni ADD hang") {
        assert!(Instant::now() < end, "{}", daemon.cli(&["ops"]).unwrap());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let began = Instant::now();
    let others = (0..20).map(|n| {
        let mut cri = cri.clone();
        let pod = cri.pod(&format!("p{n}"), false, &daemon.logs());
        tokio::spawn(async move { cri.run_pod(&pod).await.unwrap() })
    });
    let others: Vec<String> = futures_join(others).await;
    println!("20 pods beside a hung one: {:?}", began.elapsed());
    assert!(!hanging.is_finished(), "the hung plugin was still hanging while the others started");
    let asked = Instant::now();
    assert!(network_ready(&status(&mut cri).await).status);
    assert!(asked.elapsed() < Duration::from_secs(1), "Status waits for no plugin: {:?}", asked.elapsed());
    let mut ips = std::collections::BTreeSet::new();
    for id in &others {
        ips.insert(pod_status(&mut cri, id).await.network.unwrap().ip);
    }
    assert_eq!(ips.len(), 20, "each has an address of its own: {ips:?}");
    let refused = hanging.await.unwrap().unwrap_err();
    assert_eq!(refused.code(), tonic::Code::DeadlineExceeded, "{refused}");
    assert!(refused.message().contains("cni ADD"), "the shim was started long ago, the plugin hangs: {refused}");
    for id in &others {
        cri.drop_pod(id).await.unwrap();
    }
    settle(&daemon, &before).await;
    let text = metrics(&daemon);
    let line = |name: &str| text.lines().find(|l| l.starts_with(name)).unwrap_or_default().to_owned();
    assert!(line("containerd_cri_network_plugin_operations_total_total{operation_type=\"set_up_pod\"}").ends_with(" 21"), "{text}");
    assert!(line("containerd_cri_network_plugin_operations_errors_total_total{operation_type=\"set_up_pod\"}").ends_with(" 1"), "{text}");
    assert!(text.contains("containerd_cri_network_plugin_operations_duration_seconds_seconds_bucket"), "{text}");
}

async fn futures_join<T>(tasks: impl Iterator<Item = tokio::task::JoinHandle<T>>) -> Vec<T> {
    let mut all = vec![];
    for task in tasks.collect::<Vec<_>>() {
        all.push(task.await.unwrap());
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn del_is_repeated_until_it_is_acknowledged_also_after_a_restart() {
    let (mut daemon, mut cri) = start(Options::default()).await;
    let count = daemon.dir.join("count");
    let late = format!(
        "if [ $CNI_COMMAND = DEL ]; then echo x >> {0}; [ $(wc -l < {0}) -gt 5 ] || {{ echo the router sleeps >&2; exit 1; }}; fi; {PASS}",
        count.display()
    );
    behind_the_bridge(&daemon, &mut cri, "late", &late).await;
    let before = census::take(&daemon);
    let id = cri.run_pod(&cri.pod("a", false, &daemon.logs())).await.unwrap();
    assert_eq!(census::take(&daemon).addresses.len(), 1);
    let refused = stop(&mut cri, &id).await.unwrap_err();
    assert!(refused.message().contains("late") && refused.message().contains("the router sleeps"), "{refused}");
    let shown = pod_status(&mut cri, &id).await;
    assert_eq!((shown.state, shown.network.unwrap().ip.as_str()), (PodSandboxState::SandboxNotready as i32, ""));
    let removal = cri.runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.clone() }).await;
    assert!(removal.is_err(), "a pod whose address is not given back is not forgotten");
    assert_eq!(census::take(&daemon).addresses.len(), 1, "the address is not free while rules may lead to it");
    daemon.kill();
    daemon.spawn().await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while !census::take(&daemon).addresses.is_empty() {
        assert!(Instant::now() < end, "DEL is repeated by the daemon itself: {}", std::fs::read_to_string(&count).unwrap());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cri.drop_pod(&id).await.unwrap();
    settle(&daemon, &before).await;
    assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 6, "five failures and the one that was acknowledged");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_cannot_be_undone_is_shown_and_another_one_takes_its_place() {
    let (daemon, mut cri) = start(Options { chaos: true, ..Default::default() }).await;
    let flag = daemon.dir.join("flag");
    behind_the_bridge(&daemon, &mut cri, "deaf", &format!("[ $CNI_COMMAND = DEL ] && {{ [ -e {} ]; exit $?; }}; {PASS}", flag.display()))
        .await;
    let before = census::take(&daemon);
    let mut pod = cri.pod("a", false, &daemon.logs());
    // ADD works, then the shim does not (a sysctl of the network makes it wait for ADD), and then DEL does not.
    pod.linux.as_mut().unwrap().sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "1".into());
    daemon.cli(&["chaos", "add", "--actor", "task", "--message", "task.StartSandbox", "--fault", "error", "--nth", "1"]).unwrap();
    let refused = cri.run_pod(&pod).await.unwrap_err();
    assert!(format!("{refused:#}").contains("undoing it failed"), "{refused:#}");
    let listed = cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    assert_eq!(listed.iter().map(|p| p.state).collect::<Vec<_>>(), [PodSandboxState::SandboxNotready as i32]);
    std::fs::write(&flag, "").unwrap();
    let id = cri.run_pod(&pod).await.unwrap();
    assert_eq!(pod_status(&mut cri, &id).await.state, PodSandboxState::SandboxReady as i32);
    // The release that was to be tried again in the background finds the pod alive, and leaves it its network.
    let end = Instant::now() + Duration::from_secs(20);
    while daemon.cli(&["ops"]).unwrap().contains("release a pod's network") {
        assert!(Instant::now() < end, "the release goes on without end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(census::take(&daemon).addresses.len(), 1, "the pod has its address");
    cri.drop_pod(&id).await.unwrap();
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_families_and_several_networks() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let (daemon, mut cri) = start(Options { cni: "max_conf_num = 0".into(), ..Default::default() }).await;
    cri.pull(&image).await.unwrap();
    let v6 = format!("fd00:{:x}:{:x}::/64", std::process::id() % 65_536, 7);
    daemon.set_network(&serde_json::json!([daemon.bridge_plugin(&[&v6, &format!("{}.0/25", daemon.subnet())])]));
    let second = serde_json::json!({"cniVersion": "0.4.0", "name": format!("{}b", daemon.tag), "type": "bridge", "bridge": daemon.bridge(),
        "ipam": {"type": "host-local", "dataDir": daemon.dir.join("ipam"), "ranges": [[{"subnet": format!("{}.128/25", daemon.subnet())}]]}});
    std::fs::write(daemon.dir.join("cni/20-second.conf"), second.to_string()).unwrap();
    until(&mut cri, "both are loaded", |s| s.info["cniconfig"].contains("eth1") && s.info["cniconfig"].contains(&v6)).await;
    let before = census::take(&daemon);
    let pod = cri.pod("two", false, &daemon.logs());
    let id = cri.run_pod(&pod).await.unwrap();
    let network = pod_status(&mut cri, &id).await.network.unwrap();
    assert!(network.ip.starts_with(&daemon.subnet()), "IPv4 is preferred: {network:?}");
    assert!(network.additional_ips.len() == 1 && network.additional_ips[0].ip.starts_with("fd00:"), "{network:?}");
    let request = PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: true };
    let info = cri.runtime.pod_sandbox_status(request).await.unwrap().into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    let (eth0, eth1) = (&info["cniResult"]["Interfaces"]["eth0"], &info["cniResult"]["Interfaces"]["eth1"]);
    assert!(eth0["IPConfigs"].as_array().unwrap().len() == 2 && eth0["Mac"].as_str().unwrap().len() == 17, "{info}");
    assert!(eth0["IPConfigs"].as_array().unwrap().iter().any(|ip| ip["IP"] == network.ip.as_str()), "{info}");
    assert_eq!(eth1["IPConfigs"].as_array().unwrap().len(), 1, "{info}");
    let container = cri.run(&id, &cri.container("c", &image, &["sleep", "1000"]), &pod).await.unwrap();
    let shown = cri.exec(&container, &["ip", "addr"], 10).await.unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("eth0") && shown.contains("eth1") && shown.contains("127.0.0.1/8") && shown.contains(&network.ip), "{shown}");
    assert_eq!(census::take(&daemon).addresses.len(), 3);
    assert_eq!(census::take(&daemon).results.len(), 2);
    // Somebody takes the namespace's name away.
    let netns: Vec<String> = census::mounts_below(&daemon.dir).into_iter().filter(|m| m.contains("/netns/cni-")).collect();
    assert_eq!(netns.len(), 1, "{netns:?}");
    assert!(std::process::Command::new("umount").args(["-l", &netns[0]]).status().unwrap().success());
    std::fs::remove_file(PathBuf::from(&netns[0])).unwrap();
    cri.drop_pod(&id).await.unwrap();
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_reach_their_plugins_and_wrong_ones_are_refused() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let (daemon, mut cri) = start(Options::default()).await;
    cri.pull(&image).await.unwrap();
    let bridge = daemon.bridge_plugin(&[&format!("{}.0/24", daemon.subnet())]);
    daemon.set_network(&serde_json::json!([bridge, {"type": "portmap", "capabilities": {"portMappings": true}}]));
    until(&mut cri, "portmap is loaded", |s| s.info["cniconfig"].contains("portmap")).await;
    let before = census::take(&daemon);

    let mut wrong = cri.pod("wrong", false, &daemon.logs());
    wrong.annotations.insert("kubernetes.io/ingress-bandwidth".into(), "7".into());
    let refused = cri.run_pod(&wrong).await.unwrap_err().downcast::<tonic::Status>().unwrap();
    assert!(refused.code() == tonic::Code::InvalidArgument && refused.message().contains("unreasonably small"), "{refused}");
    settle(&daemon, &before).await;

    let mut pod = cri.pod("served", false, &daemon.logs());
    let port = 20_000 + (std::process::id() % 20_000) as i32;
    pod.port_mappings.push(PortMapping { protocol: Protocol::Tcp as i32, container_port: 8080, host_port: port, host_ip: String::new() });
    let id = cri.run_pod(&pod).await.unwrap();
    let serve = ["sh", "-c", "while true; do echo from the pod | nc -l -p 8080; done"];
    cri.run(&id, &cri.container("c", &image, &serve), &pod).await.unwrap();
    let address = format!("{}.1:{port}", daemon.subnet());
    let said = tokio::task::spawn_blocking(move || {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let mut text = String::new();
            if let Ok(mut stream) = std::net::TcpStream::connect(&address) {
                let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
                let _ = stream.read_to_string(&mut text);
            }
            if !text.is_empty() || Instant::now() > end {
                return text;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    assert_eq!(said.await.unwrap(), "from the pod\n");
    cri.drop_pod(&id).await.unwrap();
    settle(&daemon, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_follows_the_files_and_the_kubelet_may_bring_the_addresses() {
    let templates = tempfile::tempdir().unwrap();
    let template = templates.path().join("template");
    let (daemon, mut cri) =
        start(Options { cni: format!("conf_template = {:?}", template.display().to_string()), ..Default::default() }).await;
    assert!(network_ready(&status(&mut cri).await).status);
    std::fs::write(daemon.dir.join("cni/00-broken.conflist"), "{").unwrap();
    until(&mut cri, "a broken file", |s| !network_ready(s).status).await;
    let condition = network_ready(&status(&mut cri).await);
    assert!(condition.reason == "NetworkPluginNotReady" && condition.message.contains("00-broken.conflist"), "{condition:?}");
    let host = cri.run_pod(&cri.pod("host", true, &daemon.logs())).await.unwrap();
    assert_eq!(pod_status(&mut cri, &host).await.network.unwrap_or_default().ip, "");
    cri.drop_pod(&host).await.unwrap();
    let refused = cri.run_pod(&cri.pod("early", false, &daemon.logs())).await.unwrap_err();
    assert!(format!("{refused:#}").contains("00-broken.conflist"), "{refused:#}");
    std::fs::remove_dir_all(daemon.dir.join("cni")).unwrap();
    until(&mut cri, "no directory", |s| network_ready(s).message.contains("no network configuration")).await;

    let text =
        serde_json::json!({"cniVersion": "1.0.0", "name": daemon.tag, "plugins": [daemon.bridge_plugin(&["{{.PodCIDR}}"])]}).to_string();
    std::fs::write(&template, text).unwrap();
    let network_config = Some(NetworkConfig { pod_cidr: format!("{}.0/24", daemon.subnet()) });
    let request = UpdateRuntimeConfigRequest { runtime_config: Some(RuntimeConfig { network_config }) };
    cri.runtime.update_runtime_config(request).await.unwrap();
    until(&mut cri, "rendered", |s| network_ready(s).status).await;
    let id = cri.run_pod(&cri.pod("a", false, &daemon.logs())).await.unwrap();
    assert!(pod_status(&mut cri, &id).await.network.unwrap().ip.starts_with(&daemon.subnet()));
    cri.drop_pod(&id).await.unwrap();
}

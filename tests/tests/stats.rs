//! Statistics, metrics, and lists as streams.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;
use tonic::Code;
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::exposition;
use troupe_tests::registry::Registry;

async fn world() -> (Daemon, Cri, String, Registry) {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    (daemon, cri, image, registry)
}

async fn listed(cri: &mut Cri, filter: Option<ContainerStatsFilter>) -> Vec<ContainerStats> {
    cri.runtime.list_container_stats(ListContainerStatsRequest { filter }).await.unwrap().into_inner().stats
}

fn of<'a>(all: &'a [ContainerStats], id: &str) -> &'a ContainerStats {
    all.iter().find(|s| s.attributes.as_ref().unwrap().id == id).unwrap_or_else(|| panic!("{id} is not among them"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_is_measured_and_what_does_not_is_listed() {
    let (daemon, mut cri, image, _registry) = world().await;
    let mut pod = cri.pod("stats", false, &daemon.logs());
    pod.linux.as_mut().unwrap().cgroup_parent = format!("/{}/pod-stats", daemon.tag);
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let script = "head -c 3000000 /dev/zero > /data; ping -c 2 127.0.0.1 >/dev/null; while true; do :; done";
    let busy = cri.run(&sandbox, &cri.container("busy", &image, &["sh", "-c", script]), &pod).await.unwrap();
    let ended = cri.run(&sandbox, &cri.container("ended", &image, &["true"]), &pod).await.unwrap();
    let created = cri.create(&sandbox, &cri.container("created", &image, &["sleep", "9"]), &pod).await.unwrap();
    cri.wait_exit(&ended, 10).await.unwrap();
    let first = listed(&mut cri, None).await;
    assert_eq!(first.len(), 3);
    for id in [&ended, &created] {
        let stats = of(&first, id);
        assert!(stats.cpu.is_none() && stats.memory.is_none() && stats.writable_layer.is_some(), "{stats:?}");
        let error = cri.runtime.container_stats(ContainerStatsRequest { container_id: id.clone() }).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    }
    // Two samples of the collector make a rate; a loop takes what it can get of a core.
    let end = std::time::Instant::now() + Duration::from_secs(30);
    let stats = loop {
        let stats =
            cri.runtime.container_stats(ContainerStatsRequest { container_id: busy.clone() }).await.unwrap().into_inner().stats.unwrap();
        let settled = stats.cpu.as_ref().is_some_and(|c| c.usage_nano_cores.as_ref().is_some_and(|n| n.value > 10_000_000));
        if settled && stats.writable_layer.as_ref().is_some_and(|w| w.used_bytes.is_some_and(|b| b.value >= 3_000_000)) {
            break stats;
        }
        assert!(std::time::Instant::now() < end, "{stats:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let memory = stats.memory.unwrap();
    let number = |v: Option<UInt64Value>| v.unwrap().value;
    assert!(number(memory.working_set_bytes) <= number(memory.usage_bytes) && number(memory.usage_bytes) > 0, "{memory:?}");
    assert_eq!(number(memory.available_bytes), 0, "there is no limit");
    assert!(stats.cpu.unwrap().timestamp > 1_600_000_000_000_000_000);

    let pods = cri.runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest { filter: None }).await.unwrap().into_inner().stats;
    let linux = pods[0].linux.clone().unwrap();
    // Absent until the pod has two samples.
    assert!(linux.cpu.unwrap().usage_nano_cores.is_none_or(|n| n.value > 10_000_000));
    assert_eq!((linux.containers.len(), linux.process.unwrap().process_count.unwrap().value), (3, 1));
    let network = linux.network.unwrap();
    assert_eq!(network.default_interface.unwrap().name, "eth0");
    assert!(network.interfaces.iter().any(|i| i.name == "eth0") && network.interfaces.iter().all(|i| i.name != "lo"));

    let prefix = ContainerStatsFilter { id: busy[..16].into(), ..Default::default() };
    assert_eq!(listed(&mut cri, Some(prefix)).await.len(), 1);
    let other = ContainerStatsFilter { pod_sandbox_id: "none".into(), ..Default::default() };
    assert!(listed(&mut cri, Some(other)).await.is_empty());
    let unknown = cri.runtime.pod_sandbox_stats(PodSandboxStatsRequest { pod_sandbox_id: "none".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    cri.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() }).await.unwrap();
    let stopped = cri.runtime.pod_sandbox_stats(PodSandboxStatsRequest { pod_sandbox_id: sandbox.clone() }).await.unwrap_err();
    assert_eq!(stopped.code(), Code::Unavailable);
    cri.drop_pod(&sandbox).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_of_pods_are_cadvisors_and_all_described() {
    let (daemon, mut cri, image, _registry) = world().await;
    let pod = cri.pod("metrics", false, &daemon.logs());
    let sandbox = cri.run_pod(&pod).await.unwrap();
    let init = cri.run(&sandbox, &cri.container("init", &image, &["true"]), &pod).await.unwrap();
    cri.wait_exit(&init, 10).await.unwrap();
    let main = cri.run(&sandbox, &cri.container("main", &image, &["sleep", "1000"]), &pod).await.unwrap();
    let host = cri.pod("hostnet", true, &daemon.logs());
    let on_host = cri.run_pod(&host).await.unwrap();
    let described = cri.runtime.list_metric_descriptors(ListMetricDescriptorsRequest {}).await.unwrap().into_inner().descriptors;
    let keys: HashMap<String, Vec<String>> = described.into_iter().map(|d| (d.name, d.label_keys)).collect();
    let all = cri.runtime.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {}).await.unwrap().into_inner().pod_metrics;
    assert_eq!(all.len(), 2, "a finished init container hides nothing");
    for metric in all.iter().flat_map(|p| p.metrics.iter().chain(p.container_metrics.iter().flat_map(|c| &c.metrics))) {
        assert_eq!(keys.get(&metric.name).map(Vec::len), Some(metric.label_values.len()), "{metric:?}");
    }
    let mine = all.iter().find(|p| p.pod_sandbox_id == sandbox).unwrap();
    let interfaces: BTreeSet<&String> = mine.metrics.iter().map(|m| m.label_values.last().unwrap()).collect();
    assert!(interfaces.iter().any(|i| *i == "eth0"), "{interfaces:?}");
    assert!(all.iter().find(|p| p.pod_sandbox_id == on_host).unwrap().metrics.is_empty(), "the node's network is not the pod's");
    let main = mine.container_metrics.iter().find(|c| c.container_id == main).unwrap();
    let value = |name: &str| main.metrics.iter().find(|m| m.name == name).unwrap_or_else(|| panic!("no {name}")).value.unwrap().value;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(now - value("container_start_time_seconds") < 600, "seconds");
    assert!(value("container_fs_inodes_total") > value("container_fs_inodes_free"));
    assert_eq!(value("container_processes"), 1);
    for pod in [sandbox, on_host] {
        cri.drop_pod(&pod).await.unwrap();
    }
}

macro_rules! whole {
    ($call:expr, $field:ident) => {{
        let mut stream = $call.await.unwrap().into_inner();
        let mut all = vec![];
        while let Some(part) = stream.message().await.unwrap() {
            assert!(!part.$field.is_empty(), "a part has something in it");
            all.extend(part.$field);
        }
        all
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_as_streams_too_however_large() {
    let (daemon, mut cri, image, _registry) = world().await;
    // Each pod brings 200 KB of annotations: 100 of them do not fit into one message of a kubelet.
    for n in 0..100 {
        let mut pod = cri.pod(&format!("pod{n}"), true, &daemon.logs());
        pod.annotations.insert("large".into(), "x".repeat(200_000));
        let sandbox = cri.run_pod(&pod).await.unwrap();
        if n == 0 {
            cri.run(&sandbox, &cri.container("c", &image, &["sleep", "1000"]), &pod).await.unwrap();
        }
    }
    let mut kubelet = cri.clone();
    kubelet.runtime = kubelet.runtime.max_decoding_message_size(16 << 20);
    let unary = kubelet.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap_err();
    assert!(matches!(unary.code(), Code::OutOfRange | Code::ResourceExhausted | Code::Internal), "the test's own premise: {unary}");
    let pods = whole!(kubelet.runtime.stream_pod_sandboxes(StreamPodSandboxesRequest::default()), pod_sandboxes);
    let ids: BTreeSet<&String> = pods.iter().map(|p| &p.id).collect();
    assert_eq!((pods.len(), ids.len()), (100, 100));
    assert!(pods.iter().all(|p| p.annotations["large"].len() == 200_000));
    let one = PodSandboxFilter { id: pods[7].id.clone(), ..Default::default() };
    assert_eq!(whole!(kubelet.runtime.stream_pod_sandboxes(StreamPodSandboxesRequest { filter: Some(one) }), pod_sandboxes).len(), 1);
    assert_eq!(whole!(kubelet.runtime.stream_containers(StreamContainersRequest::default()), containers).len(), 1);
    assert_eq!(whole!(kubelet.runtime.stream_container_stats(StreamContainerStatsRequest::default()), container_stats).len(), 1);
    assert_eq!(whole!(kubelet.runtime.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest::default()), pod_sandbox_stats).len(), 100);
    assert_eq!(
        whole!(kubelet.runtime.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest::default()), pod_sandbox_metrics).len(),
        100
    );
    assert_eq!(whole!(kubelet.image.stream_images(StreamImagesRequest::default()), images).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_page_is_valid_and_does_not_grow_with_pods() {
    let (daemon, mut cri, image, _registry) = world().await;
    let page = || exposition::check(&daemon.http("/metrics").unwrap());
    let life = async |cri: &mut Cri, n: usize| {
        let pod = cri.pod(&format!("pod{n}"), false, &daemon.logs());
        let sandbox = cri.run_pod(&pod).await.unwrap();
        let id = cri.run(&sandbox, &cri.container("c", &image, &["sh", "-c", "echo one; printf two"]), &pod).await.unwrap();
        cri.wait_exit(&id, 10).await.unwrap();
        cri.stop(&id, 0).await.unwrap();
        cri.remove(&id).await.unwrap();
        cri.drop_pod(&sandbox).await.unwrap();
        cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap();
        cri.runtime.list_containers(ListContainersRequest::default()).await.unwrap();
    };
    life(&mut cri, 0).await;
    let before = page();
    for n in 1..6 {
        life(&mut cri, n).await;
    }
    let after = page();
    let series = |all: &[exposition::Sample]| all.iter().map(|(n, l, _)| (n.clone(), l.clone())).collect::<BTreeSet<_>>();
    let new: Vec<_> = series(&after).difference(&series(&before)).cloned().collect();
    assert!(new.len() < 20, "more pods, more series: {new:?}");
    let value = |name: &str| after.iter().filter(|(n, ..)| n == name).map(|(.., v)| v).sum::<f64>();
    for name in [
        "sandbox_create_network",
        "sandbox_delete_network",
        "sandbox_runtime_create",
        "sandbox_remove",
        "container_create",
        "container_start",
        "container_stop",
        "container_remove",
    ] {
        // At least: what is given back is asked for again, for certainty.
        assert!(value(&format!("containerd_cri_{name}_seconds_count")) >= 6.0, "{name}");
    }
    for (name, expected) in [
        ("containerd_cri_network_plugin_operations_errors_total_total", 0.0),
        ("containerd_cri_sandboxed_image_pulls_total", 1.0),
        ("containerd_cri_sandboxed_in_progress_image_pulls_total", 0.0),
        ("containerd_cri_input_entries_total", 12.0),
        ("containerd_cri_output_entries_total", 12.0),
        ("containerd_cri_input_bytes_total", 42.0),
        ("containerd_cri_split_entries_total", 6.0),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    assert!(value("containerd_cri_network_plugin_operations_total_total") >= 12.0);
    for name in ["troupe_actor_mailbox_depth", "troupe_actor_queue_wait_seconds_count", "troupe_operations_in_flight"] {
        assert!(after.iter().any(|(n, ..)| n == name), "{name}");
    }
}

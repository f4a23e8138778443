//! ListPodSandboxMetrics: the table of [`crate::descriptors`], filled in. A container that does not run costs its own numbers only, not its pod's.
use crate::descriptors::{BASE, CONTAINER, NETWORK, Subject};
use crate::{ReadPod, World, cgroup};
use kernel::{Cx, Result};
use messages::sandbox::{Container, Pod};
use proto::cri::{self, Metric, MetricType, UInt64Value};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Filling in looks into /proc of every process.
const FILL: Duration = Duration::from_secs(10);

/// The file system that holds the layers of a snapshotter.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FileSystem {
    pub bytes: u64,
    pub inodes: u64,
    pub free_inodes: u64,
}

fn file_system(_: &str, path: &std::path::PathBuf) -> Option<FileSystem> {
    let s = nix::sys::statvfs::statvfs(Path::new(path)).ok()?;
    Some(FileSystem { bytes: s.blocks() * s.fragment_size(), inodes: s.files(), free_inodes: s.files_free() })
}

impl World {
    pub(crate) async fn metrics(&self, cx: &Cx, read: Vec<ReadPod>) -> Result<Vec<cri::PodSandboxMetrics>> {
        let kinds: BTreeSet<&String> = read.iter().flat_map(|p| &p.containers).map(|(c, _)| &c.snapshotter).collect();
        let paths = kinds.into_iter().map(|s| (s.clone(), self.layers(s))).collect();
        let systems: HashMap<String, Option<FileSystem>> = self.gather.all(cx, paths, file_system).await;
        let disks: HashMap<String, _> =
            read.iter().flat_map(|p| &p.containers).map(|(c, _)| (c.status.id.clone(), self.disk(&c.status.id).1)).collect();
        let read = Arc::new(read);
        let fill = move || {
            let disk = |id: &str| disks.get(id).copied().unwrap_or_default();
            let system = |s: &str| systems.get(s).copied().flatten();
            Ok(read.iter().map(|pod| of_pod(pod, &disk, &system)).collect())
        };
        cx.blocking("fill in metrics", FILL, fill).await
    }
}

/// Labels by which cAdvisor names a pod or container, in the order of [`BASE`].
fn base(pod: &Pod, container: Option<&Container>) -> [String; BASE.len()] {
    let m = pod.status.metadata.clone().unwrap_or_default();
    let Some(c) = container else { return [m.name, m.namespace, String::new(), pod.status.id.clone(), String::new()] };
    let image = c.status.image.clone().unwrap_or_default();
    let image = if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image };
    [m.name, m.namespace, c.status.metadata.clone().unwrap_or_default().name, c.status.id.clone(), image]
}

fn of_pod(
    ReadPod { pod, interfaces, containers, .. }: &ReadPod,
    disk: &dyn Fn(&str) -> messages::snapshot::Usage,
    system: &dyn Fn(&str) -> Option<FileSystem>,
) -> cri::PodSandboxMetrics {
    let metric = |name: &str, kind: MetricType, timestamp: i64, labels: &[String], more: Vec<String>, value| Metric {
        name: name.into(),
        timestamp,
        metric_type: kind as i32,
        label_values: labels.iter().cloned().chain(more).collect(),
        value: Some(UInt64Value { value }),
    };
    let (own, now) = (base(pod, None), cgroup::now_ns());
    let network = NETWORK.iter().flat_map(|(name, _, received, at)| {
        let own = &own;
        interfaces.iter().map(move |i| {
            let value = if *received { i.received[*at] } else { i.sent[*at] };
            metric(name, MetricType::Counter, now, own, vec![i.name.clone()], value)
        })
    });
    let container_metrics = containers.iter().map(|(c, figures)| {
        let labels = base(pod, Some(c));
        let subject = Subject { container: c, figures: figures.as_ref(), disk: disk(&c.status.id), system: system(&c.snapshotter) };
        let at = figures.as_ref().map_or(now, |f| f.at_ns);
        let rows = CONTAINER.iter().flat_map(|row| {
            let values = (row.values)(&subject).into_iter();
            values.map(|(more, value)| metric(row.name, row.kind, at, &labels, more, value)).collect::<Vec<_>>()
        });
        cri::ContainerMetrics { container_id: c.status.id.clone(), metrics: rows.collect() }
    });
    cri::PodSandboxMetrics {
        pod_sandbox_id: pod.status.id.clone(),
        metrics: network.collect(),
        container_metrics: container_metrics.collect(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cgroup::{Cpu, Disk, Figures, Memory};
    use crate::network::Interface;

    fn container(id: &str) -> Arc<Container> {
        let metadata = Some(cri::ContainerMetadata { name: format!("name-{id}"), attempt: 0 });
        let image = Some(cri::ImageSpec { image: "sha256:1".into(), user_specified_image: "nginx".into(), ..Default::default() });
        let status = cri::ContainerStatus { id: id.into(), metadata, image, started_at: 1_700_000_000_500_000_000, ..Default::default() };
        Arc::new(Container { sandbox_id: "p".into(), status, snapshotter: "s".into(), ..Default::default() })
    }

    fn pod() -> cri::PodSandboxMetrics {
        let metadata = Some(cri::PodSandboxMetadata { name: "pod".into(), namespace: "ns".into(), ..Default::default() });
        let status = cri::PodSandboxStatus { id: "p".into(), metadata, ..Default::default() };
        let pod = Arc::new(Pod { status, ..Default::default() });
        let bytes = ["Read", "Write"].map(|k| (k.to_owned(), 4096)).into();
        let figures = Figures {
            at_ns: 1_700_000_100_000_000_000,
            cpu: Some(Cpu { usage_ns: 7_900_000_000, ..Default::default() }),
            memory: Some(Memory { usage: 100, inactive_file: 30, limit: Some(1000), swap: Some(5), ..Default::default() }),
            pressure: [Some([(3_000_000_000, 0.0, 0.0, 0.0), (1_000_000_000, 0.0, 0.0, 0.0)]); 3],
            disks: vec![Disk { device: "8:1".into(), read_bytes: 4096, bytes, ..Default::default() }],
            threads: 4,
            ..Default::default()
        };
        let interfaces = ["eth0", "net1"].map(|n| Interface { name: n.into(), received: [9, 8, 7, 6], sent: [5, 4, 3, 2] }).into();
        let containers = vec![(container("runs"), Some(figures)), (container("ended"), None)];
        let usage = messages::snapshot::Usage { bytes: 500, inodes: 12 };
        let system = FileSystem { bytes: 1 << 30, inodes: 1000, free_inodes: 400 };
        of_pod(&ReadPod { pod, own: None, interfaces, containers }, &|_| usage, &|_| Some(system))
    }

    fn value(m: &[Metric], name: &str, more: &[&str]) -> Option<u64> {
        let found = m.iter().find(|m| m.name == name && m.label_values[BASE.len()..] == *more);
        found.map(|m| m.value.unwrap().value)
    }

    #[test]
    fn every_metric_has_its_descriptor_and_its_labels() {
        let all = crate::descriptors::descriptors();
        let keys: HashMap<&str, usize> = all.iter().map(|d| (d.name.as_str(), d.label_keys.len())).collect();
        assert_eq!(keys.len(), all.len(), "no name comes twice");
        let pod = pod();
        for m in pod.metrics.iter().chain(pod.container_metrics.iter().flat_map(|c| &c.metrics)) {
            assert_eq!(keys.get(m.name.as_str()), Some(&m.label_values.len()), "{m:?}");
            assert_eq!(m.label_values[..2], ["pod", "ns"]);
        }
        // Every row has a value somewhere, but those that need living processes.
        let told: BTreeSet<&str> =
            pod.container_metrics.iter().flat_map(|c| &c.metrics).chain(&pod.metrics).map(|m| m.name.as_str()).collect();
        let silent: Vec<&&str> = keys.keys().filter(|k| !told.contains(**k)).collect();
        assert!(silent.iter().all(|k| **k == "container_ulimits_soft" || **k == "container_memory_max_usage_bytes"), "{silent:?}");
    }

    #[test]
    fn units_are_those_of_the_names() {
        let pod = pod();
        let m = &pod.container_metrics[0].metrics;
        for (name, more, expected) in [
            ("container_start_time_seconds", &[][..], 1_700_000_000),
            ("container_last_seen", &[], 1_700_000_100),
            ("container_cpu_usage_seconds_total", &[], 7),
            ("container_memory_working_set_bytes", &[], 70),
            ("container_memory_swap", &[], 5),
            ("container_pressure_cpu_waiting_seconds_total", &[], 3),
            ("container_pressure_io_stalled_seconds_total", &[], 1),
            ("container_fs_usage_bytes", &["/"], 500),
            ("container_fs_limit_bytes", &["/"], 1 << 30),
            ("container_fs_inodes_total", &["/"], 1000),
            ("container_fs_inodes_free", &["/"], 400),
            ("container_fs_reads_bytes_total", &["8:1"], 4096),
            ("container_threads", &[], 4),
            ("container_spec_memory_limit_bytes", &[], 1000),
        ] {
            assert_eq!(value(m, name, more), Some(expected), "{name}");
        }
        assert_eq!(value(&pod.metrics, "container_network_transmit_bytes_total", &["net1"]), Some(5), "all interfaces");
        assert_eq!(m[0].label_values, ["pod", "ns", "name-runs", "runs", "nginx"]);
    }

    #[test]
    fn one_that_has_ended_does_not_hide_its_pod() {
        let pod = pod();
        assert_eq!(pod.container_metrics.len(), 2);
        let ended = &pod.container_metrics[1];
        assert_eq!(ended.container_id, "ended");
        assert!(value(&ended.metrics, "container_fs_usage_bytes", &["/"]).is_some());
        assert!(value(&ended.metrics, "container_cpu_usage_seconds_total", &[]).is_none());
    }
}

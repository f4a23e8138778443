//! ListPodSandboxMetrics: the table of [`crate::descriptors`], filled in. A container that does not run costs its own numbers only, not its pod's.
use crate::cgroup::now_ns;
use crate::descriptors::{BASE, CONTAINER, NETWORK, Subject};
use crate::{ReadPod, names};
use messages::snapshot::Usage;
use proto::cri::{self, Metric, MetricType, UInt64Value};
use std::collections::{BTreeMap, HashMap};

pub(crate) fn of_pod((pod, _, interfaces, containers): &ReadPod, disk: &HashMap<String, (i64, Usage)>) -> cri::PodSandboxMetrics {
    let labels = |names: &BTreeMap<&str, String>, more: &[String]| {
        BASE.iter().map(|l| names.get(l).cloned().unwrap_or_default()).chain(more.iter().cloned()).collect::<Vec<_>>()
    };
    let metric = |name: &str, kind: MetricType, timestamp: i64, label_values, value| Metric {
        name: name.into(),
        timestamp,
        metric_type: kind as i32,
        label_values,
        value: Some(UInt64Value { value }),
    };
    let mut own = names(pod, None);
    own.insert("id", pod.status.id.clone());
    let now = now_ns();
    let network = NETWORK.iter().flat_map(|(name, _, received, at)| {
        let own = &own;
        interfaces.iter().map(move |i| {
            let value = if *received { i.received[*at] } else { i.sent[*at] };
            metric(name, MetricType::Counter, now, labels(own, std::slice::from_ref(&i.name)), value)
        })
    });
    let container_metrics = containers.iter().map(|(c, figures)| {
        let names = names(pod, Some(c));
        let subject = Subject { container: c, figures: figures.as_ref(), disk: disk.get(&c.status.id).map(|d| d.1).unwrap_or_default() };
        let at = figures.as_ref().map_or(now, |f| f.at_ns);
        let rows = CONTAINER.iter().flat_map(|row| {
            let values = (row.values)(&subject).into_iter();
            values.map(|(more, value)| metric(row.name, row.kind, at, labels(&names, &more), value)).collect::<Vec<_>>()
        });
        cri::ContainerMetrics { container_id: c.status.id.clone(), metrics: rows.collect() }
    });
    cri::PodSandboxMetrics {
        pod_sandbox_id: pod.status.id.clone(),
        metrics: network.collect(),
        container_metrics: container_metrics.collect(),
    }
}

//! `stats`: what containers and pods use, read from cgroupfs.
use kernel::Protocol;
use proto::cri;

/// The stats actor's protocol.
pub struct Stats;
impl Protocol for Stats {
    const ACTOR: &'static str = "stats";
}

/// Statistics of containers. One that does not run has attributes and its writable layer only; one that is gone is left out.
#[derive(Clone, Debug)]
pub struct Containers {
    /// Ids.
    pub ids: Vec<String>,
}
/// Statistics of ready pods with their containers. Others are left out.
#[derive(Clone, Debug)]
pub struct Pods {
    /// Ids.
    pub ids: Vec<String>,
}
/// Names, help and labels of [`Metrics`].
#[derive(Clone, Debug)]
pub struct Descriptors;
/// cAdvisor's metrics of all ready pods.
#[derive(Clone, Debug)]
pub struct Metrics;

kernel::messages! { Stats = "stats" => {
    Containers -> Vec<cri::ContainerStats> as idempotent,
    Pods -> Vec<cri::PodSandboxStats> as idempotent,
    Descriptors -> Vec<cri::MetricDescriptor> as idempotent,
    Metrics -> Vec<cri::PodSandboxMetrics> as idempotent,
} }

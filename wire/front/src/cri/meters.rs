//! containerd's own names for what its dashboards show of CRI (`containerd_cri_*`), where Troupe has the same thing to tell. Nothing is measured twice:
//! the kernel times every hop and call, and these are told of some of them. As containerd's, the timers have successful work only. They lack the label
//! `runtime`, which would be one value on almost every node.
use kernel::{Fault, Result, System};
use messages::feed::Feed;
use messages::sandbox::View;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, CounterVec, Gauge, Histogram, HistogramOpts, HistogramVec, Opts};
use std::sync::Arc;
use std::time::Duration;

/// Calls and hops by containerd's name.
const TIMERS: [(&str, &str, &str); 12] = [
    ("sandbox_list", "runtime.v1.RuntimeService/ListPodSandbox", "Time to list pods."),
    ("sandbox_create_network", "network.Attach", "Time to give a pod its networks."),
    ("sandbox_delete_network", "network.Detach", "Time to take a pod's networks away."),
    ("sandbox_runtime_create", "task.StartSandbox", "Time to start a pod's shim."),
    ("sandbox_runtime_stop", "task.StopSandbox", "Time to stop a pod's shim."),
    ("sandbox_remove", "runtime.v1.RuntimeService/RemovePodSandbox", "Time to remove a pod."),
    ("container_list", "runtime.v1.RuntimeService/ListContainers", "Time to list containers."),
    ("container_create", "runtime.v1.RuntimeService/CreateContainer", "Time to create a container."),
    ("container_start", "runtime.v1.RuntimeService/StartContainer", "Time to start a container."),
    ("container_stop", "runtime.v1.RuntimeService/StopContainer", "Time to stop a container."),
    ("container_remove", "runtime.v1.RuntimeService/RemoveContainer", "Time to remove a container."),
    ("container_checkpoint", "runtime.v1.RuntimeService/CheckpointContainer", "Time to checkpoint a container."),
];
/// Hops that are operations of network plugins.
const NETWORK: [(&str, &str); 3] =
    [("set_up_pod", "network.Attach"), ("tear_down_pod", "network.Detach"), ("get_pod_network_status", "network.Check")];
const PULL: &str = "runtime.v1.ImageService/PullImage";
/// Seconds, and megabytes a second: Prometheus' own.
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What pulls are counted by.
#[derive(Clone)]
pub(super) struct Pulls {
    under_way: Gauge,
    throughput: Histogram,
}

impl Pulls {
    /// One more is under way while the answer lives.
    pub(super) fn begin(&self) -> UnderWay {
        self.under_way.inc();
        UnderWay(self.under_way.clone())
    }
    /// A pull of an image of this size has ended.
    pub(super) fn ended(&self, bytes: u64, took: Duration) {
        self.throughput.observe(bytes as f64 / 1e6 / took.as_secs_f64().max(1e-3));
    }
}

/// See [`Pulls::begin`].
pub(super) struct UnderWay(Gauge);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Events that no reader saw, looked up when somebody asks.
struct Dropped {
    view: Arc<View>,
    counter: Counter,
}

impl Collector for Dropped {
    fn desc(&self) -> Vec<&Desc> {
        self.counter.desc()
    }
    fn collect(&self) -> Vec<MetricFamily> {
        let feed: &Feed = &self.view.1;
        self.counter.reset();
        self.counter.inc_by(feed.dropped() as f64);
        self.counter.collect()
    }
}

/// Registers all of them; once for a system.
pub(super) fn register(system: &System, view: Arc<View>) -> Result<Pulls> {
    let wrong = |e: prometheus::Error| Fault::internal(format!("register CRI's metrics: {e}"));
    let mut watches: Vec<(&'static str, kernel::SpanWatch)> = vec![];
    let registry = system.metrics();
    for (name, span, help) in TIMERS {
        let opts = HistogramOpts::new(format!("containerd_cri_{name}_seconds"), help).buckets(BUCKETS.into());
        let timer = Histogram::with_opts(opts).map_err(wrong)?;
        registry.register(Box::new(timer.clone())).map_err(wrong)?;
        watches.push((
            span,
            Box::new(move |took: Duration, ok: bool| {
                if ok {
                    timer.observe(took.as_secs_f64());
                }
            }),
        ));
    }
    network(system, &mut watches).map_err(wrong)?;
    let pulls = CounterVec::new(Opts::new("containerd_cri_sandboxed_image_pulls_total", "Pulls of images."), &["status"]).map_err(wrong)?;
    let under_way = Gauge::new("containerd_cri_sandboxed_in_progress_image_pulls_total", "Pulls under way.").map_err(wrong)?;
    let speed = HistogramOpts::new("containerd_cri_sandboxed_image_pulling_throughput", "Megabytes of image a second.");
    let throughput = Histogram::with_opts(speed.buckets(BUCKETS.map(|b| b * 10.0).into())).map_err(wrong)?;
    let dropped = Counter::new("containerd_cri_container_events_dropped_total", "Container events that no reader saw.").map_err(wrong)?;
    let looked_up = Dropped { view, counter: dropped };
    let all: [Box<dyn Collector>; 4] =
        [Box::new(pulls.clone()), Box::new(under_way.clone()), Box::new(throughput.clone()), Box::new(looked_up)];
    for collector in all {
        registry.register(collector).map_err(wrong)?;
    }
    watches.push((PULL, Box::new(move |_: Duration, ok: bool| pulls.with_label_values(&[if ok { "success" } else { "failure" }]).inc())));
    system.watch_spans(watches);
    Ok(Pulls { under_way, throughput })
}

/// The doubled endings are containerd's: its library puts the unit behind a name that has it already.
fn network(system: &System, watches: &mut Vec<(&'static str, kernel::SpanWatch)>) -> prometheus::Result<()> {
    let (label, prefix) = (["operation_type"], "containerd_cri_network_plugin_operations");
    let done = CounterVec::new(Opts::new(format!("{prefix}_total_total"), "Operations of network plugins."), &label)?;
    let failed = CounterVec::new(Opts::new(format!("{prefix}_errors_total_total"), "Operations of network plugins that failed."), &label)?;
    let opts = HistogramOpts::new(format!("{prefix}_duration_seconds_seconds"), "Time of operations of network plugins.");
    let seconds = HistogramVec::new(opts.buckets(BUCKETS.into()), &label)?;
    let all: [Box<dyn Collector>; 3] = [Box::new(done.clone()), Box::new(failed.clone()), Box::new(seconds.clone())];
    all.into_iter().try_for_each(|c| system.metrics().register(c))?;
    for (kind, hop) in NETWORK {
        let (done, failed, seconds) =
            (done.with_label_values(&[kind]), failed.with_label_values(&[kind]), seconds.with_label_values(&[kind]));
        let watch = move |took: Duration, ok: bool| {
            done.inc();
            seconds.observe(took.as_secs_f64());
            if !ok {
                failed.inc();
            }
        };
        watches.push((hop, Box::new(watch)));
    }
    Ok(())
}

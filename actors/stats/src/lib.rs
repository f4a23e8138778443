//! `stats`: what containers and pods use.
//!
//! Owns: two samples of CPU time and the last disk usage of each container. Talks to: `snapshot` for disk usage; reads cgroupfs and the published
//! picture of pods directly, so that neither a shim nor another actor can hold an answer up. States: none to keep. On a crash: the next generation
//! samples anew; until it has two samples, `UsageNanoCores` is absent (never 0, which the kubelet would take for an idle container). Spans: one for
//! each batch of files. Limits: one batch of reads at a time for each request, samples of living containers only.
mod cgroup;
mod descriptors;
mod metrics;
mod network;
mod report;

use kernel::{Actor, Addr, Cx, Handle, Reply, Result, Routes};
use messages::sandbox::{Container, Picture, Pod, View};
use messages::snapshot::{GetUsage, Snapshots, Usage};
use messages::stats::{Containers, Descriptors, Metrics, Pods, Stats};
use proto::cri;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Reading one batch of cgroup files.
const READ: Duration = Duration::from_secs(10);
/// Two samples must be this far apart, or their quotient is noise.
const APART_NS: i64 = 500_000_000;

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// Pods and containers.
    pub view: Arc<View>,
    /// Snapshots.
    pub snapshots: Addr<Snapshots>,
    /// Daemon's root, for the identity of file systems.
    pub root: PathBuf,
    /// Time between samples.
    pub period: Duration,
}

/// CPU time at a moment.
#[derive(Clone, Copy, Default)]
struct Sample {
    at_ns: i64,
    usage_ns: u64,
}

/// What the operations of a generation share.
struct World {
    args: Args,
    /// By container or pod id: the last sample, and the one before.
    samples: RefCell<HashMap<String, (Sample, Sample)>>,
    disk: RefCell<HashMap<String, (i64, Usage)>>,
}

/// The actor.
pub struct StatsActor(Rc<World>);

impl Actor for StatsActor {
    type Proto = Stats;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        let world = Rc::new(World { args, samples: RefCell::default(), disk: RefCell::default() });
        let sampling = world.clone();
        cx.spawn("sample", move |cx| async move {
            loop {
                if let Err(error) = sampling.sample(&cx.with_timeout(READ)).await {
                    tracing::warn!(%error, "containers could not be sampled");
                }
                tokio::time::sleep(sampling.args.period).await;
            }
        });
        Ok(StatsActor(world))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Containers>().on::<Pods>().on::<Descriptors>().on::<Metrics>()
    }
}

/// One container's figures; none when it does not run.
type Read = (Arc<Container>, Option<cgroup::Figures>);
/// One pod's: its own, those of its network, its containers'.
type ReadPod = (Arc<Pod>, Option<cgroup::Figures>, Vec<network::Interface>, Vec<Read>);

fn read(container: Arc<Container>) -> Read {
    let figures = (container.pid > 0).then(|| cgroup::of_process(container.pid)).flatten();
    (container, figures)
}

fn read_pod(picture: &Picture, pod: Arc<Pod>) -> ReadPod {
    let id = &pod.status.id;
    let containers: Vec<Read> = picture.containers.values().filter(|c| c.sandbox_id == *id).map(|c| read(c.clone())).collect();
    let parent = pod.config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default();
    // A pod without a cgroup of its own uses what its containers use.
    let own = cgroup::of_parent(&parent).or_else(|| cgroup::sum(containers.iter().filter_map(|(_, f)| f.as_ref())));
    let interfaces = if pod.netns.is_empty() { vec![] } else { network::interfaces(&pod.netns) };
    (pod, own, interfaces, containers)
}

impl World {
    async fn containers(&self, cx: &Cx, wanted: Vec<Arc<Container>>) -> Result<Vec<Read>> {
        cx.blocking("read cgroups", READ, move || Ok(wanted.into_iter().map(read).collect())).await
    }

    async fn pods(&self, cx: &Cx, wanted: impl Fn(&str) -> bool) -> Result<Vec<ReadPod>> {
        let picture = self.args.view.0.load_full();
        let ready = picture.pods.values().filter(|p| p.status.state == cri::PodSandboxState::SandboxReady as i32);
        let ready: Vec<Arc<Pod>> = ready.filter(|p| wanted(&p.status.id)).cloned().collect();
        let all = cx.blocking("read cgroups", READ, move || Ok(ready.into_iter().map(|p| read_pod(&picture, p)).collect::<Vec<_>>()));
        let all = all.await?;
        for (_, _, _, containers) in &all {
            self.measure_disks(cx, containers.iter().map(|(c, _)| c)).await;
        }
        Ok(all)
    }

    /// Takes a sample of every running container and forgets those that are gone.
    async fn sample(&self, cx: &Cx) -> Result<()> {
        let picture = self.args.view.0.load_full();
        let running = picture.containers.values().filter(|c| c.pid > 0).cloned().collect();
        for (container, figures) in self.containers(cx, running).await? {
            if let Some(f) = figures {
                self.rate(&container.status.id, f.at_ns, f.cpu.usage_ns);
            }
        }
        let lives = |id: &String| picture.containers.contains_key(id) || picture.pods.contains_key(id);
        self.samples.borrow_mut().retain(|id, _| lives(id));
        self.disk.borrow_mut().retain(|id, _| lives(id));
        Ok(())
    }

    /// Notes a sample; answers nanoseconds of CPU a second since an earlier one, if there is one.
    fn rate(&self, id: &str, at_ns: i64, usage_ns: u64) -> Option<u64> {
        let mut samples = self.samples.borrow_mut();
        let now = Sample { at_ns, usage_ns };
        let Some((last, before)) = samples.get_mut(id) else {
            samples.insert(id.to_owned(), (now, Sample::default()));
            return None;
        };
        if usage_ns < last.usage_ns {
            // The counter began anew.
            (*last, *before) = (now, Sample::default());
            return None;
        }
        if at_ns - last.at_ns >= APART_NS {
            (*before, *last) = (*last, now);
        }
        if before.at_ns == 0 {
            return None;
        }
        let (spent, passed) = (usage_ns.saturating_sub(before.usage_ns), (at_ns - before.at_ns).max(1));
        u64::try_from(u128::from(spent) * 1_000_000_000 / passed as u128).ok()
    }

    /// Refreshes what is older than the period. A snapshot that cannot be measured keeps its last figure.
    async fn measure_disks(&self, cx: &Cx, containers: impl Iterator<Item = &Arc<Container>>) {
        let now = cgroup::now_ns();
        let fresh = |id: &str| self.disk.borrow().get(id).is_some_and(|(at, _)| now - at < self.args.period.as_nanos() as i64);
        let stale: Vec<_> = containers.filter(|c| !fresh(&c.status.id)).collect();
        let all = stale.iter().map(|c| async {
            let ask = GetUsage { snapshotter: c.snapshotter.clone(), key: c.status.id.clone() };
            (c.status.id.clone(), self.args.snapshots.call(cx, ask).await)
        });
        for (id, usage) in futures::future::join_all(all).await {
            if let Ok(usage) = usage {
                self.disk.borrow_mut().insert(id, (now, usage));
            }
        }
    }
}

impl Handle<Containers> for StatsActor {
    fn handle(&mut self, m: Containers, cx: Cx) -> Reply<Vec<cri::ContainerStats>> {
        let world = self.0.clone();
        Reply::op(async move {
            let picture = world.args.view.0.load_full();
            let wanted: Vec<_> = m.ids.iter().filter_map(|id| picture.containers.get(id).cloned()).collect();
            world.measure_disks(&cx, wanted.iter()).await;
            Ok(world.containers(&cx, wanted).await?.iter().map(|(c, f)| world.container(c, f.as_ref())).collect())
        })
    }
}

impl Handle<Pods> for StatsActor {
    fn handle(&mut self, m: Pods, cx: Cx) -> Reply<Vec<cri::PodSandboxStats>> {
        let world = self.0.clone();
        Reply::op(async move {
            let read = world.pods(&cx, |id| m.ids.iter().any(|i| i == id)).await?;
            Ok(read.iter().map(|pod| world.pod(pod)).collect())
        })
    }
}

impl Handle<Descriptors> for StatsActor {
    fn handle(&mut self, _: Descriptors, _: Cx) -> Reply<Vec<cri::MetricDescriptor>> {
        Reply::ok(descriptors::descriptors())
    }
}

impl Handle<Metrics> for StatsActor {
    fn handle(&mut self, _: Metrics, cx: Cx) -> Reply<Vec<cri::PodSandboxMetrics>> {
        let world = self.0.clone();
        Reply::op(async move {
            let read = world.pods(&cx, |_| true).await?;
            let disk = world.disk.borrow();
            Ok(read.iter().map(|pod| metrics::of_pod(pod, &disk)).collect())
        })
    }
}

/// Labels by which cAdvisor names a container.
fn names(pod: &Pod, container: Option<&Container>) -> BTreeMap<&'static str, String> {
    let m = pod.status.metadata.clone().unwrap_or_default();
    let (name, id, image) = container.map_or_else(Default::default, |c| {
        let s = &c.status;
        (
            s.metadata.clone().unwrap_or_default().name,
            s.id.clone(),
            s.image.clone().map(|i| if i.user_specified_image.is_empty() { i.image } else { i.user_specified_image }).unwrap_or_default(),
        )
    });
    BTreeMap::from([("pod", m.name), ("namespace", m.namespace), ("container", name), ("id", id), ("image", image)])
}

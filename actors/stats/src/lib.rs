//! `stats`: what containers and pods use.
//!
//! Owns: samples of CPU time, and the last known figures and disk usage of each container. Talks to: `snapshot` for disk usage; reads cgroupfs and the
//! published picture of pods directly, so that neither a shim nor another actor can hold an answer up. States: none to keep. On a crash: the next
//! generation samples anew; until it has two samples, `UsageNanoCores` is absent (never 0, which the kubelet would take for an idle container). Spans:
//! one for each batch of files. Limits: a file that hangs costs its own container ([`gather`]), which is answered with its last figures and their time.
mod cgroup;
mod descriptors;
mod disks;
mod gather;
mod metrics;
mod network;
mod report;
mod samples;

use cgroup::{Figures, Host, Want};
use kernel::{Actor, Addr, Cx, Handle, Reply, Result, Routes};
use messages::sandbox::{Container, Picture, Pod, View};
use messages::snapshot::{Snapshots, Usage};
use messages::stats::{Containers, Descriptors, Metrics, Pods, Stats};
use network::Interface;
use proto::cri;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// Pods and containers.
    pub view: Arc<View>,
    /// Snapshots.
    pub snapshots: Addr<Snapshots>,
    /// Daemon's root, for the identity of file systems.
    pub root: PathBuf,
    /// Time between samples of CPU time (`stats_collect_period` of the runtime table).
    pub period: Duration,
    /// How long a sample is worth something (`stats_retention_period`).
    pub retention: Duration,
    /// Time between walks of writable layers (`stats_collect_period` of the image table).
    pub disk_period: Duration,
}

/// What the operations of a generation share.
struct World {
    args: Args,
    gather: gather::Gather,
    samples: RefCell<samples::Samples>,
    disks: RefCell<HashMap<String, (i64, Usage)>>,
    /// For what cannot be read just now: cores and bytes of the last time.
    last: RefCell<HashMap<String, Figures>>,
    /// When somebody was last interested.
    asked: Cell<Option<Instant>>,
}

/// The actor.
pub struct StatsActor(Rc<World>);

impl Actor for StatsActor {
    type Proto = Stats;
    type Args = Args;
    async fn start(args: Args, cx: Cx) -> Result<Self> {
        let samples = RefCell::new(samples::Samples::new(args.retention));
        let world = Rc::new(World {
            args,
            gather: gather::Gather::default(),
            samples,
            disks: RefCell::default(),
            last: RefCell::default(),
            asked: Cell::new(None),
        });
        let (sampling, measuring) = (world.clone(), world.clone());
        cx.spawn("sample", move |cx| async move {
            loop {
                sampling.sample(&cx).await;
                tokio::time::sleep(sampling.args.period).await;
            }
        });
        cx.spawn("measure layers", move |cx| disks::measure(measuring, cx));
        Ok(StatsActor(world))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Containers>().on::<Pods>().on::<Descriptors>().on::<Metrics>()
    }
}

/// One container's figures; none when it does not run.
type Read = (Arc<Container>, Option<Figures>);

/// One pod's.
struct ReadPod {
    pod: Arc<Pod>,
    /// Its own cgroup's, or its containers' sum.
    own: Option<Figures>,
    interfaces: Vec<Interface>,
    containers: Vec<Read>,
}

fn read_container(id: &str, (pid, want): &(u32, Want)) -> Option<Figures> {
    Host::default().of_container(id, *pid, *want)
}

fn read_parent(_: &str, (parent, want): &(String, Want)) -> Option<Figures> {
    Host::default().of_parent(parent, *want)
}

#[allow(clippy::ptr_arg, reason = "it is passed as a function of what is gathered")]
fn read_interfaces(_: &str, netns: &String) -> Vec<Interface> {
    network::interfaces(netns)
}

fn parent(pod: &Pod) -> String {
    pod.config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default()
}

fn is_ready(pod: &Pod) -> bool {
    pod.status.state == cri::PodSandboxState::SandboxReady as i32
}

impl World {
    /// Figures of running containers. What hangs is answered with what it was.
    async fn figures(&self, cx: &Cx, containers: &[Arc<Container>], want: Want) -> HashMap<String, Figures> {
        let running = containers.iter().filter(|c| c.pid > 0);
        let items: Vec<_> = running.map(|c| (c.status.id.clone(), (c.pid, want))).collect();
        let ids: Vec<String> = items.iter().map(|(id, _)| id.clone()).collect();
        let mut read = self.gather.all(cx, items, read_container).await;
        let mut last = self.last.borrow_mut();
        let mut all = HashMap::new();
        for id in ids {
            match read.remove(&id) {
                Some(Some(figures)) => {
                    if want.memory {
                        let kept = Figures { processes: vec![], disks: vec![], ..figures.clone() };
                        last.insert(id.clone(), kept);
                    }
                    all.insert(id, figures);
                }
                // Gone meanwhile.
                Some(None) => {}
                None => drop(last.get(&id).and_then(|f| all.insert(id, f.clone()))),
            }
        }
        all
    }

    async fn containers(&self, cx: &Cx, wanted: Vec<Arc<Container>>, want: Want) -> Vec<Read> {
        let (mut figures, ()) = futures::join!(self.figures(cx, &wanted, want), self.first_look(cx, &wanted));
        wanted.into_iter().map(|c| (c.clone(), figures.remove(&c.status.id))).collect()
    }

    async fn pods(&self, cx: &Cx, wanted: impl Fn(&str) -> bool, want: Want) -> Vec<ReadPod> {
        let picture = self.args.view.0.load_full();
        let ready: Vec<Arc<Pod>> = picture.pods.values().filter(|p| is_ready(p) && wanted(&p.status.id)).cloned().collect();
        let mut by_pod = containers_of(&picture, &ready);
        let parents = ready.iter().map(|p| (p.status.id.clone(), (parent(p), Want::POD))).collect();
        let spaces =
            ready.iter().filter(|p| !p.netns.is_empty()).map(|p| (format!("network of {}", p.status.id), p.netns.clone())).collect();
        let all: Vec<Arc<Container>> = by_pod.values().flatten().cloned().collect();
        let (mut own, mut interfaces, containers) = futures::join!(
            self.gather.all(cx, parents, read_parent),
            self.gather.all(cx, spaces, read_interfaces),
            self.containers(cx, all, want)
        );
        let mut figures: HashMap<String, Figures> = containers.into_iter().filter_map(|(c, f)| Some((c.status.id.clone(), f?))).collect();
        let pod = |pod: Arc<Pod>| {
            let id = &pod.status.id;
            let containers = by_pod.remove(id).unwrap_or_default().into_iter();
            let containers: Vec<Read> = containers.map(|c| (c.clone(), figures.remove(&c.status.id))).collect();
            let own = own.remove(id).flatten().or_else(|| cgroup::sum(containers.iter().filter_map(|(_, f)| f.as_ref())));
            let interfaces = interfaces.remove(&format!("network of {id}")).unwrap_or_default();
            ReadPod { own, interfaces, containers, pod }
        };
        ready.into_iter().map(pod).collect()
    }

    /// Takes a sample of every running container and ready pod, and forgets those that are gone.
    async fn sample(&self, cx: &Cx) {
        let picture = self.args.view.0.load_full();
        let running: Vec<_> = picture.containers.values().filter(|c| c.pid > 0).cloned().collect();
        let parents = picture.pods.values().filter(|p| is_ready(p)).map(|p| (p.status.id.clone(), (parent(p), Want::CPU))).collect();
        let (containers, mut pods) = futures::join!(self.figures(cx, &running, Want::CPU), self.gather.all(cx, parents, read_parent));
        // A pod without a cgroup of its own.
        for (id, own) in pods.iter_mut().filter(|(_, own)| own.is_none()) {
            let mine = running.iter().filter(|c| c.sandbox_id == *id).filter_map(|c| containers.get(&c.status.id));
            *own = cgroup::sum(mine);
        }
        let mut samples = self.samples.borrow_mut();
        let all = containers.into_iter().chain(pods.into_iter().filter_map(|(id, f)| Some((id, f?))));
        for (id, f) in all {
            if let Some(cpu) = f.cpu {
                samples.rate(&id, f.at_ns, cpu.usage_ns);
            }
        }
        samples.retain(|id| picture.containers.contains_key(id) || picture.pods.contains_key(id));
        self.last.borrow_mut().retain(|id, _| picture.containers.contains_key(id));
    }
}

/// Containers by pod.
fn containers_of(picture: &Picture, pods: &[Arc<Pod>]) -> HashMap<String, Vec<Arc<Container>>> {
    let mut by_pod: HashMap<String, Vec<Arc<Container>>> = pods.iter().map(|p| (p.status.id.clone(), vec![])).collect();
    for container in picture.containers.values() {
        if let Some(place) = by_pod.get_mut(&container.sandbox_id) {
            place.push(container.clone());
        }
    }
    by_pod
}

impl Handle<Containers> for StatsActor {
    fn handle(&mut self, m: Containers, cx: Cx) -> Reply<Vec<cri::ContainerStats>> {
        let world = self.0.clone();
        Reply::op(async move {
            let picture = world.args.view.0.load_full();
            let wanted: Vec<_> = m.ids.iter().filter_map(|id| picture.containers.get(id).cloned()).collect();
            let want = Want { processes: false, ..Want::CONTAINER };
            Ok(world.containers(&cx, wanted, want).await.iter().map(|(c, f)| world.container(c, f.as_ref())).collect())
        })
    }
}

impl Handle<Pods> for StatsActor {
    fn handle(&mut self, m: Pods, cx: Cx) -> Reply<Vec<cri::PodSandboxStats>> {
        let world = self.0.clone();
        Reply::op(async move {
            let wanted: std::collections::HashSet<String> = m.ids.into_iter().collect();
            let read = world.pods(&cx, |id| wanted.contains(id), Want::CONTAINER).await;
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
            let read = world.pods(&cx, |_| true, Want::ALL).await;
            world.metrics(&cx, read).await
        })
    }
}

//! What writable layers use. Walking them is dear, so it is done in the background, while somebody is interested, and never takes more than a tenth of
//! the time; answers come from what is known.
use crate::World;
use crate::cgroup::now_ns;
use kernel::Cx;
use messages::sandbox::Container;
use messages::snapshot::{GetUsage, Usage};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A layer that nobody has measured yet is waited for so long by the one who asks.
const FIRST: Duration = Duration::from_millis(500);
/// One walk.
const WALK: Duration = Duration::from_secs(60);
/// Nobody has asked for so long: nobody is interested.
const INTEREST: Duration = Duration::from_secs(300);
/// Looking whether somebody is.
const LOOK: Duration = Duration::from_secs(1);

/// Measures as long as the generation lives.
pub(crate) async fn measure(world: Rc<World>, cx: Cx) {
    loop {
        let began = Instant::now();
        if world.asked.get().is_some_and(|at| at.elapsed() < INTEREST) {
            let picture = world.args.view.0.load_full();
            for container in picture.containers.values() {
                cx.step(format!("container {}", container.status.id));
                world.measure_disk(&cx.with_timeout(WALK), container).await;
            }
            world.disks.borrow_mut().retain(|id, _| picture.containers.contains_key(id));
        }
        cx.step("waiting");
        let until = began + world.args.disk_period.max(began.elapsed() * 10);
        while Instant::now() < until {
            tokio::time::sleep(LOOK.min(until.saturating_duration_since(Instant::now()))).await;
        }
    }
}

impl World {
    async fn measure_disk(&self, cx: &Cx, c: &Container) {
        let ask = GetUsage { snapshotter: c.snapshotter.clone(), key: c.status.id.clone() };
        // A layer that cannot be measured keeps its last figure.
        if let Ok(usage) = self.args.snapshots.call(cx, ask).await {
            self.disks.borrow_mut().insert(c.status.id.clone(), (now_ns(), usage));
        }
    }
    /// Has all that nobody knows measured, and notes the interest.
    pub(crate) async fn first_look(&self, cx: &Cx, containers: &[Arc<Container>]) {
        self.asked.set(Some(Instant::now()));
        let unknown = containers.iter().filter(|c| !self.disks.borrow().contains_key(&c.status.id));
        let cx = cx.with_timeout(FIRST);
        futures::future::join_all(unknown.map(|c| self.measure_disk(&cx, c))).await;
    }
    pub(crate) fn disk(&self, id: &str) -> (i64, Usage) {
        self.disks.borrow().get(id).copied().unwrap_or_else(|| (now_ns(), Usage::default()))
    }
}

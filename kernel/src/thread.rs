//! Actor threads: each a current-thread runtime with a LocalSet, a heartbeat, and a list of who lives there.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use tokio::sync::mpsc;

type Job = Box<dyn FnOnce() + Send>;

/// A thread that hosts actors.
pub(crate) struct Home {
    pub name: String,
    jobs: mpsc::UnboundedSender<Job>,
    /// Milliseconds since `born` at the last heartbeat.
    beat: Arc<AtomicU64>,
    asked: AtomicBool,
    born: Instant,
    pub leaked: AtomicBool,
}

impl Home {
    pub fn start(name: String) -> std::io::Result<Arc<Home>> {
        let (jobs, mut inbox) = mpsc::unbounded_channel::<Job>();
        let beat = Arc::new(AtomicU64::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name(name.clone()).stack_size(2 << 20).spawn(move || {
            crate::crash::caught_here();
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async move {
                while let Some(job) = inbox.recv().await {
                    job();
                }
            });
        })?;
        Ok(Arc::new(Home { name, jobs, beat, asked: AtomicBool::new(false), born: Instant::now(), leaked: AtomicBool::new(false) }))
    }
    /// Runs `job` on the thread.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) -> bool {
        self.jobs.send(Box::new(job)).is_ok()
    }
    fn now(&self) -> u64 {
        self.born.elapsed().as_millis() as u64
    }
    /// Milliseconds that the thread has not answered; asks again.
    pub fn silence_ms(self: &Arc<Self>) -> u64 {
        if !self.asked.swap(true, Ordering::AcqRel) {
            let me = self.clone();
            self.beat.store(self.now(), Ordering::Release);
            self.run(move || {
                me.beat.store(me.now(), Ordering::Release);
                me.asked.store(false, Ordering::Release);
            });
            return 0;
        }
        self.now().saturating_sub(self.beat.load(Ordering::Acquire))
    }
}

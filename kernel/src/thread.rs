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
    /// Kernel's number of the thread, 0 until it runs.
    number: Arc<AtomicU64>,
    /// Milliseconds that it had run, and had waited for a CPU, when it was asked.
    ran: AtomicU64,
    waited: AtomicU64,
    born: Instant,
    pub leaked: AtomicBool,
}

impl Home {
    pub fn start(name: String) -> std::io::Result<Arc<Home>> {
        let (jobs, mut inbox) = mpsc::unbounded_channel::<Job>();
        let beat = Arc::new(AtomicU64::new(0));
        let number = Arc::new(AtomicU64::new(0));
        let told = number.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name(name.clone()).stack_size(2 << 20).spawn(move || {
            crate::crash::caught_here();
            told.store(own_number(), Ordering::Release);
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async move {
                while let Some(job) = inbox.recv().await {
                    job();
                }
            });
        })?;
        let (asked, leaked) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Arc::new(Home {
            name,
            jobs,
            beat,
            asked,
            number,
            ran: AtomicU64::new(0),
            waited: AtomicU64::new(0),
            born: Instant::now(),
            leaked,
        }))
    }
    /// Runs `job` on the thread.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) -> bool {
        self.jobs.send(Box::new(job)).is_ok()
    }
    fn now(&self) -> u64 {
        self.born.elapsed().as_millis() as u64
    }
    /// Milliseconds that the thread has not answered although it had a CPU, or sleeps in the kernel; asks again. Where more is to be run than there
    /// are CPUs, a thread that waits for its turn is not stuck, and giving it up would make another that waits as long.
    pub fn silence_ms(self: &Arc<Self>) -> u64 {
        if !self.asked.swap(true, Ordering::AcqRel) {
            let me = self.clone();
            self.beat.store(self.now(), Ordering::Release);
            let (ran, waited) = self.scheduled_ms();
            self.ran.store(ran, Ordering::Release);
            self.waited.store(waited, Ordering::Release);
            self.run(move || {
                me.beat.store(me.now(), Ordering::Release);
                me.asked.store(false, Ordering::Release);
            });
            return 0;
        }
        let silent = self.now().saturating_sub(self.beat.load(Ordering::Acquire));
        let (ran, waited) = self.scheduled_ms();
        // What it waits right now is not counted by the kernel before it runs again; so of a thread that is ready, what it ran counts.
        let lost = if ran > 0 && self.ready() {
            silent.saturating_sub(ran.saturating_sub(self.ran.load(Ordering::Acquire)))
        } else {
            waited.saturating_sub(self.waited.load(Ordering::Acquire))
        };
        silent.saturating_sub(lost)
    }
    fn proc(&self, file: &str) -> String {
        let number = self.number.load(Ordering::Acquire);
        std::fs::read_to_string(format!("/proc/self/task/{number}/{file}")).unwrap_or_default()
    }
    /// Runs, or waits for a CPU.
    fn ready(&self) -> bool {
        self.proc("stat").rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('R'))
    }
    /// Milliseconds that the thread ran, and that it was ready to while another ran instead.
    fn scheduled_ms(&self) -> (u64, u64) {
        let text = self.proc("schedstat");
        let mut times = text.split_whitespace().map(|ns| ns.parse::<u64>().map_or(0, |ns| ns / 1_000_000));
        (times.next().unwrap_or(0), times.next().unwrap_or(0))
    }
}

fn own_number() -> u64 {
    let path = std::fs::read_link("/proc/thread-self").unwrap_or_default();
    path.file_name().and_then(|n| n.to_str()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn silence(home: &Arc<Home>, after: Duration) -> u64 {
        assert_eq!(home.silence_ms(), 0);
        std::thread::sleep(after);
        home.silence_ms()
    }

    #[test]
    fn a_thread_that_sleeps_is_silent_and_one_that_is_kept_from_its_cpu_is_not() {
        let home = Home::start("sleeps".into()).unwrap();
        home.run(|| std::thread::sleep(Duration::from_millis(600)));
        assert!(silence(&home, Duration::from_millis(300)) >= 290);

        // The lowest of classes, on a CPU that never rests.
        let home = Home::start("starves".into()).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        home.run(move || {
            let policy = std::process::Command::new("chrt").args(["--idle", "--pid", "0", &own_number().to_string()]).status();
            let pinned = std::process::Command::new("taskset").args(["-cp", "0", &own_number().to_string()]).status();
            tell.send(policy.is_ok_and(|s| s.success()) && pinned.is_ok_and(|s| s.success())).unwrap();
        });
        assert!(told.recv().unwrap(), "chrt and taskset (util-linux) are needed");
        let mut busy = std::process::Command::new("taskset").args(["-c", "0", "sh", "-c", "while :; do :; done"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        home.run(|| {
            let began = Instant::now();
            while began.elapsed() < Duration::from_secs(5) {}
        });
        let silent = silence(&home, Duration::from_millis(1000));
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(silent < 500, "silent for {silent} ms, most of which it waited for a CPU");
    }
}

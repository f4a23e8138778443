//! The kernel's metrics: what is counted as it happens, and what is looked up when somebody asks.
use crate::{Fault, Result, System};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};

/// Counted as it happens.
pub(crate) struct Metrics {
    pub registry: Registry,
    pub queue_wait: HistogramVec,
    pub handle: HistogramVec,
    pub restarts: IntCounterVec,
}

fn fault(e: prometheus::Error) -> Fault {
    Fault::internal(e.to_string())
}

impl Metrics {
    pub fn new() -> Result<Metrics> {
        let buckets = vec![1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0];
        let registry = Registry::new();
        let histogram = |name: &str, help: &str| HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.clone()), &["actor"]);
        let queue_wait = histogram("troupe_actor_queue_wait_seconds", "Time of messages in mailboxes.").map_err(fault)?;
        let handle = histogram("troupe_actor_handle_seconds", "Time from taking a message to its answer.").map_err(fault)?;
        let restarts =
            IntCounterVec::new(Opts::new("troupe_actor_restarts_total", "Restarts of actors."), &["actor", "reason"]).map_err(fault)?;
        for collector in [Box::new(queue_wait.clone()) as Box<dyn Collector>, Box::new(handle.clone()), Box::new(restarts.clone())] {
            registry.register(collector).map_err(fault)?;
        }
        Ok(Metrics { registry, queue_wait, handle, restarts })
    }

    /// Adds what is looked up.
    pub fn watch(&self, system: &System) -> Result<()> {
        self.registry.register(Box::new(Live::new(system)?)).map_err(fault)
    }
}

/// A counter that is counted elsewhere.
fn count(counter: &Counter, n: u64) {
    counter.reset();
    counter.inc_by(n as f64);
}

/// Looked up when somebody asks. Children of a template are counted together.
struct Live {
    system: Box<dyn Fn() -> Option<System> + Send + Sync>,
    mailbox: GaugeVec,
    oldest_message: GaugeVec,
    up: GaugeVec,
    operations: Gauge,
    oldest_operation: Gauge,
    dropped: Counter,
    leaked: Counter,
    blocking: Gauge,
    abandoned: Counter,
}

impl Live {
    fn new(system: &System) -> Result<Live> {
        let by_actor = |name: &str, help: &str| GaugeVec::new(Opts::new(name, help), &["actor"]).map_err(fault);
        let plain = |name: &str, help: &str| Gauge::with_opts(Opts::new(name, help)).map_err(fault);
        let counter = |name: &str, help: &str| Counter::with_opts(Opts::new(name, help)).map_err(fault);
        Ok(Live {
            system: Box::new(system.downgrade()),
            mailbox: by_actor("troupe_actor_mailbox_depth", "Messages waiting in mailboxes.")?,
            oldest_message: by_actor("troupe_actor_oldest_message_seconds", "Age of the oldest waiting message.")?,
            up: by_actor("troupe_actor_up", "Actors that run.")?,
            operations: plain("troupe_operations_in_flight", "Operations under way.")?,
            oldest_operation: plain("troupe_operation_oldest_seconds", "Age of the oldest outside request under way.")?,
            dropped: counter("troupe_telemetry_dropped_total", "Spans that the exporter had no room for.")?,
            leaked: counter("troupe_threads_leaked_total", "Threads given up by the watchdog.")?,
            blocking: plain("troupe_blocking_calls", "Blocking system calls under way.")?,
            abandoned: counter("troupe_blocking_calls_abandoned_total", "Blocking system calls given up past their limit.")?,
        })
    }
    fn all(&self) -> [&dyn Collector; 9] {
        let vectors: [&dyn Collector; 3] = [&self.mailbox, &self.oldest_message, &self.up];
        let plain: [&dyn Collector; 6] =
            [&self.operations, &self.oldest_operation, &self.dropped, &self.leaked, &self.blocking, &self.abandoned];
        let ([a, b, c], [d, e, f, g, h, i]) = (vectors, plain);
        [a, b, c, d, e, f, g, h, i]
    }
}

impl Collector for Live {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }
    fn collect(&self) -> Vec<MetricFamily> {
        let Some(system) = (self.system)() else { return vec![] };
        [&self.mailbox, &self.oldest_message, &self.up].into_iter().for_each(GaugeVec::reset);
        for actor in system.actors() {
            let label = [actor.name.split('/').next().unwrap_or_default()];
            self.mailbox.with_label_values(&label).add(actor.mailbox as f64);
            let oldest = self.oldest_message.with_label_values(&label);
            oldest.set(oldest.get().max(actor.oldest.map_or(0.0, |(_, age)| age.as_secs_f64())));
            self.up.with_label_values(&label).add(if actor.state == "running" { 1.0 } else { 0.0 });
        }
        let operations = system.ops();
        self.operations.set(operations.len() as f64);
        let outside = operations.iter().filter(|o| o.actor == "-").map(|o| o.age.as_secs_f64());
        self.oldest_operation.set(outside.fold(0.0, f64::max));
        count(&self.dropped, system.telemetry_dropped());
        count(&self.leaked, system.leaked_threads().len() as u64);
        self.blocking.set(system.blocking_calls().len() as f64);
        count(&self.abandoned, system.blocking_abandoned());
        self.all().into_iter().flat_map(Collector::collect).collect()
    }
}

//! Counts calls and times them, under the names that containerd's dashboards know (`grpc_server_*`).

use kernel::{Fault, Result};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};
use std::time::Duration;
use tonic::Code;

/// Bounds in seconds: lists take microseconds, pulls take minutes.
const BUCKETS: [f64; 10] = [0.0005, 0.002, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0, 60.0, 300.0];

/// Meters of a gRPC server. All clones count together.
#[derive(Clone)]
pub struct Meter {
    handled: IntCounterVec,
    seconds: HistogramVec,
}

impl Meter {
    /// Registers the meters; once for a registry.
    pub fn new(registry: &Registry) -> Result<Self> {
        let build = || -> prometheus::Result<Self> {
            let labels = ["grpc_service", "grpc_method", "grpc_type"];
            let counted = Opts::new("grpc_server_handled_total", "Calls answered, by method and code.");
            let handled = IntCounterVec::new(counted, &["grpc_service", "grpc_method", "grpc_type", "grpc_code"])?;
            let timed = HistogramOpts::new("grpc_server_handling_seconds", "Time from a call to its answer.").buckets(BUCKETS.to_vec());
            let seconds = HistogramVec::new(timed, &labels)?;
            registry.register(Box::new(handled.clone()))?;
            registry.register(Box::new(seconds.clone()))?;
            Ok(Self { handled, seconds })
        };
        build().map_err(|e| Fault::internal(format!("register the meters of calls: {e}")))
    }

    /// One call of `service/Method`.
    pub fn record(&self, name: &str, code: Code, took: Duration) {
        let (service, method) = name.split_once('/').unwrap_or(("", name));
        self.handled.with_label_values(&[service, method, "unary", &format!("{code:?}")]).inc();
        self.seconds.with_label_values(&[service, method, "unary"]).observe(took.as_secs_f64());
    }
}

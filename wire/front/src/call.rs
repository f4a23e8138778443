//! One outside request as an operation of the kernel.
//!
//! [`run`] opens the operation, holds it to its deadline, turns a panic into `Internal`, and says where a failure happened. When the client goes
//! away, its future is dropped here, and with it the operation: the kernel then counts it as cancelled.

use crate::meter::Meter;
use crate::status::{self, Failure};
use futures::FutureExt as _;
use kernel::{Class, Cx, Fault, Result, System};
use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};
use tonic::Code;
use tonic::metadata::MetadataMap;
use tonic::transport::server::UdsConnectInfo;

/// W3C trace context, in gRPC and ttrpc metadata alike.
pub const TRACEPARENT: &str = "traceparent";

/// Our deadline lies before the client's, so that the answer that names step and trace is there in time: a twentieth of the timeout, at most this.
const ANSWER_MARGIN: Duration = Duration::from_millis(100);

/// What the outside told about a request.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Name of the operation, `rpc.method` as OpenTelemetry has it.
    pub name: &'static str,
    /// The caller's trace, if it sent one.
    pub traceparent: Option<&'a str>,
    /// The caller's patience.
    pub timeout: Option<Duration>,
}

/// Runs `work` as an operation. With the answer comes the operation's own traceparent; with a fault, where it happened.
pub async fn run<T, F, Fut>(system: &System, origin: Origin<'_>, work: F) -> Result<(T, String), Failure>
where
    F: FnOnce(Cx) -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let timeout = origin.timeout.map(|t| t.saturating_sub((t / 20).min(ANSWER_MARGIN)));
    let operation = system.root(origin.name, origin.traceparent, timeout);
    let cx = operation.cx.clone();
    let guarded = cx.clone().scope(AssertUnwindSafe(async { work(cx).await }).catch_unwind());
    let answer = match timeout {
        Some(limit) => tokio::time::timeout(limit, guarded).await.unwrap_or_else(|_| Ok(Err(late(origin.name, limit)))),
        None => guarded.await,
    };
    let answer = answer.unwrap_or_else(|panic| Err(Fault::internal(format!("{} panicked: {}", origin.name, text(&*panic)))));
    let (place, traceparent) = (operation.describe(), operation.cx.traceparent());
    operation.finish(&answer);
    match answer {
        Ok(value) => Ok((value, traceparent)),
        Err(fault) => Err(Failure { fault, place }),
    }
}

/// What the caller brought about is told, but warns nobody: probes time out and images do not exist every minute of a node's life. That something is not
/// there any more is what many a status is asked for.
fn log(rpc: &str, failure: &Failure) {
    let asked = rpc.ends_with("Status") || rpc.ends_with("Stats");
    match failure.fault.class {
        Class::NotFound if asked => tracing::debug!(rpc, %failure, "call failed"),
        Class::DeadlineExceeded if rpc.ends_with("/ExecSync") => tracing::info!(rpc, %failure, "call failed"),
        Class::InvalidArgument | Class::NotFound | Class::AlreadyExists | Class::OutOfRange | Class::Unimplemented | Class::Canceled => {
            tracing::info!(rpc, %failure, "call failed");
        }
        _ => tracing::warn!(rpc, %failure, "call failed"),
    }
}

/// Runs a gRPC request. The answer's metadata carry the trace.
pub async fn grpc<Q, T, F, Fut>(
    system: &System,
    meter: &Meter,
    name: &'static str,
    request: tonic::Request<Q>,
    work: F,
) -> Result<tonic::Response<T>, tonic::Status>
where
    F: FnOnce(Cx, Q) -> Fut + Send,
    Fut: Future<Output = Result<T>> + Send,
{
    let (metadata, extensions, message) = request.into_parts();
    let peer = extensions.get::<UdsConnectInfo>().and_then(|i| i.peer_cred).and_then(|c| c.pid());
    let traceparent = metadata.get(TRACEPARENT).and_then(|v| v.to_str().ok());
    let origin = Origin { name, traceparent, timeout: grpc_timeout(&metadata) };
    let began = Instant::now();
    let outcome = run(system, origin, |cx| {
        if let Some(pid) = peer {
            cx.attr("client.process.pid", pid);
        }
        work(cx, message)
    });
    match outcome.await {
        Ok((answer, traceparent)) => {
            meter.record(name, Code::Ok, began.elapsed());
            let mut response = tonic::Response::new(answer);
            if let Ok(value) = traceparent.parse() {
                response.metadata_mut().insert(TRACEPARENT, value);
            }
            Ok(response)
        }
        Err(failure) => {
            log(name, &failure);
            let status = status::grpc(&failure);
            meter.record(name, status.code(), began.elapsed());
            Err(status)
        }
    }
}

/// The client's patience, from gRPC's `grpc-timeout`: up to eight digits and a unit.
fn grpc_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let n: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

fn late(name: &str, limit: Duration) -> Fault {
    Fault::deadline_exceeded(format!("{name} did not finish within the client's timeout ({} ms)", limit.as_millis()))
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&'static str>().copied();
    literal.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_with_their_units() {
        for (text, expected) in [
            ("2S", Some(Duration::from_secs(2))),
            ("1500m", Some(Duration::from_millis(1500))),
            ("99999999u", Some(Duration::from_micros(99_999_999))),
            ("123456789S", None),
            ("S", None),
            ("5x", None),
            ("", None),
        ] {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            assert_eq!(grpc_timeout(&metadata), expected, "{text:?}");
        }
    }
}

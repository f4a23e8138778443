//! A connection to a shim, and how calls go over it: each a named step with a timeout, the trace in its metadata, its error in our classes.
use crate::NAMESPACE;
use crate::reply::Endpoint;
use kernel::{Class, Cx, Fault, Result};
use proto::ttrpc::r#async::Client;
use proto::ttrpc::{self, Code, context};
use proto::{glue, sandbox, shim, task};
use std::future::Future;
use std::time::{Duration, Instant};

/// A connected shim. Cheap to clone.
#[derive(Clone)]
pub struct Link {
    /// Task service, version 3 or 2.
    pub task: task::Client,
    /// Sandbox service.
    pub sandbox: sandbox::Client,
    /// Troupe's own service.
    pub shim: shim::Client,
    /// Version of the task service.
    pub version: i32,
    /// Is it Troupe's shim?
    pub troupe: bool,
    raw: Client,
}

impl Link {
    /// Connects; a missing or refused socket fails at once.
    pub async fn connect(endpoint: &Endpoint, limit: Duration) -> Result<Link> {
        let address = endpoint.dial()?;
        let connected = tokio::time::timeout(limit, Client::connect(&address)).await;
        let raw = connected
            .map_err(|_| Fault::deadline_exceeded(format!("connect to the shim at {address}: no answer within {limit:?}")))?
            .map_err(|e| Fault::unavailable(format!("connect to the shim at {address}: {e}")))?;
        Ok(Link::over(raw, endpoint.version, endpoint.is_troupe()))
    }
    fn over(raw: Client, version: i32, troupe: bool) -> Link {
        let task = task::client(raw.clone(), version);
        Link { task, sandbox: sandbox::Client::new(raw.clone()), shim: shim::Client::new(raw.clone()), version, troupe, raw }
    }
    /// Asks who it is: its pid, and the container's. A shim that does not know version 3 is spoken to in version 2 from then on.
    pub async fn hello(&mut self, cx: &Cx, id: &str, limit: Duration) -> Result<task::ConnectResponse> {
        let request = task::ConnectRequest { id: id.to_owned() };
        let first = rpc(cx, "Task/Connect", limit, |c| self.task.connect(c, &request)).await;
        match first {
            Err(f) if f.class == Class::Unimplemented && self.version != 2 => {
                *self = Link::over(self.raw.clone(), 2, self.troupe);
                rpc(cx, "Task/Connect", limit, |c| self.task.connect(c, &request)).await
            }
            other => other,
        }
    }
}

/// Text that marks a fault as our own timeout, not the shim's.
const SILENT: &str = "the shim did not answer";

/// Did the shim not answer at all?
pub fn is_silence(fault: &Fault) -> bool {
    fault.class == Class::DeadlineExceeded && fault.message.contains(SILENT)
}

/// One call: a step `ttrpc <method>`, no longer than `limit` and the caller's deadline.
pub async fn rpc<T, F, Fut>(cx: &Cx, method: &str, limit: Duration, call: F) -> Result<T>
where
    F: FnOnce(context::Context) -> Fut,
    Fut: Future<Output = ttrpc::Result<T>>,
{
    let step = |cx: Cx| async move {
        cx.attr("rpc.system", "ttrpc");
        cx.attr("rpc.method", method);
        let limit = cx.remaining().map_or(limit, |r| r.min(limit));
        let mut c = context::with_duration(limit.max(Duration::from_millis(1)));
        c.add("containerd-namespace-ttrpc".into(), NAMESPACE.into());
        c.add("traceparent".into(), cx.traceparent());
        let began = Instant::now();
        // The library's own timeout does not cover a full send queue.
        let silent = || Fault::deadline_exceeded(format!("{method}: {SILENT} within {limit:?}"));
        match tokio::time::timeout(limit, call(c)).await {
            Err(_) => Err(silent()),
            Ok(Err(e)) => {
                let (late, fault) = (began.elapsed() + Duration::from_millis(5) >= limit, fault(method, &e));
                // The library's timer and the shim's may be ahead of ours. Any other status is an answer.
                let unanswered = fault.class == Class::DeadlineExceeded || !matches!(e, ttrpc::Error::RpcStatus(_));
                Err(if late && unanswered { silent() } else { fault })
            }
            Ok(Ok(answer)) => Ok(answer),
        }
    };
    cx.run(format!("ttrpc {method}"), step).await
}

/// A call that lasts as long as a process: no timeout, no step.
pub async fn wait(cx: &Cx, client: &task::Client, id: &str, exec_id: &str) -> Result<task::WaitResponse> {
    let mut c = context::with_timeout(0);
    c.add("containerd-namespace-ttrpc".into(), NAMESPACE.into());
    c.add("traceparent".into(), cx.traceparent());
    let request = task::WaitRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
    client.wait(c, &request).await.map_err(|e| fault("Task/Wait", &e))
}

fn fault(method: &str, error: &ttrpc::Error) -> Fault {
    let (code, text) = glue::status(error);
    Fault::new(class(code), format!("{method}: {text}"))
}

fn class(code: Code) -> Class {
    match code {
        Code::INVALID_ARGUMENT => Class::InvalidArgument,
        Code::NOT_FOUND => Class::NotFound,
        Code::ALREADY_EXISTS => Class::AlreadyExists,
        Code::FAILED_PRECONDITION => Class::FailedPrecondition,
        Code::PERMISSION_DENIED => Class::PermissionDenied,
        Code::UNAUTHENTICATED => Class::Unauthenticated,
        Code::RESOURCE_EXHAUSTED => Class::ResourceExhausted,
        Code::OUT_OF_RANGE => Class::OutOfRange,
        Code::UNIMPLEMENTED => Class::Unimplemented,
        Code::INTERNAL => Class::Internal,
        Code::UNAVAILABLE => Class::Unavailable,
        Code::DATA_LOSS => Class::DataLoss,
        Code::DEADLINE_EXCEEDED => Class::DeadlineExceeded,
        Code::CANCELLED => Class::Canceled,
        Code::ABORTED => Class::Aborted,
        _ => Class::Unknown,
    }
}

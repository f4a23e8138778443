//! No step of a runtime takes longer than its caller waits. Whoever drops a step ends what does it, so a runtime that hangs costs its own call, and the
//! caller hears which step it was.
use super::failed;
use crate::runtime::Runtime;
use proto::glue::{Context, fault};
use proto::ttrpc::{Code, Result};
use std::io;
use std::path::Path;
use std::time::Duration;

/// What is kept of a long wait for undoing a step, and for the answer.
const RESERVE: Duration = Duration::from_secs(5);

/// Longest wait for a step; `None`: the caller waits for ever.
fn limit(cx: &Context) -> Option<Duration> {
    let allowed = Duration::from_nanos(u64::try_from(cx.timeout_nano).ok().filter(|n| *n > 0)?);
    Some(allowed - (allowed / 4).min(RESERVE))
}

/// Does a step, unless it is given up before: because time is up, which `late` tells of, or because of what `given_up` says.
pub async fn step<T>(
    cx: &Context,
    name: &str,
    late: impl FnOnce(Duration) -> String,
    work: impl Future<Output = io::Result<T>>,
    given_up: impl Future<Output = &'static str>,
) -> Result<T> {
    let limit = limit(cx);
    let overdue = async {
        match limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        done = work => done.map_err(failed(name)),
        () = overdue => Err(fault(Code::DEADLINE_EXCEEDED, format!("{name}: {}", late(limit.unwrap_or_default())))),
        why = given_up => Err(fault(Code::ABORTED, format!("{name}: given up, for {why}"))),
    }
}

/// Tells of a runtime that is late.
pub fn hung(runtime: &Runtime, bundle: &Path) -> impl FnOnce(Duration) -> String {
    move |limit| format!("{} did not end within {limit:.1?} and was killed", runtime.last_words(bundle))
}

/// Tells of a log that is late.
pub fn silent(what: &str) -> impl FnOnce(Duration) -> String {
    move |limit| format!("the file system of the log {what} did not answer within {limit:.1?}")
}

//! Stopping a server: what is in flight is finished, but not waited for without end.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;
use tokio::sync::oneshot;

/// How long a server that was asked to stop may finish what is in flight. A pull may take minutes and a follower of events never ends: both are cut off,
/// and nothing is lost, because what must not be left half done is in the store.
pub const GRACE: Duration = Duration::from_secs(3);

/// Runs a server made by `serve`, which gets the future that asks it to stop. `None` when the grace has passed.
pub async fn bounded<S: Future>(stop: impl Future<Output = ()>, serve: impl FnOnce(oneshot::Receiver<()>) -> S) -> Option<S::Output> {
    let (ask, asked) = oneshot::channel();
    let mut server = pin!(serve(asked));
    tokio::select! {
        done = &mut server => return Some(done),
        () = stop => drop(ask),
    }
    tokio::time::timeout(GRACE, server).await.ok()
}

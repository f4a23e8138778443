//! The server process: one thread, ttrpc on the listener that `start` bound.
use crate::bootstrap::Flags;
use crate::{events, reaper, service, sys, whole};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How often everything that is ready runs before the process ends. An answer passes through two tasks; whoever misses it sees the process end.
const ROUNDS: u32 = 64;

/// How long a thread that waits for a log's file system is kept when there is nothing to write.
const IDLE: Duration = Duration::from_secs(1);

/// Serves until it is told to shut down.
pub fn serve(flags: &Flags) -> io::Result<()> {
    sys::prepare();
    let engine = crate::engine::Engine::fork()?;
    let listener = sys::take_listener();
    listener.set_nonblocking(true)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().thread_keep_alive(IDLE).thread_stack_size(256 << 10).build()?;
    let served = runtime.block_on(async {
        let reaper = reaper::Reaper::start()?;
        let events = events::Publisher::start(&flags.namespace, std::env::var("TTRPC_ADDRESS").ok());
        let (stop, mut stopped) = tokio::sync::watch::channel(false);
        let service = Arc::new(service::Service::new(flags, engine, reaper, events, stop));
        let mut routes = proto::task::serve_both(service.clone());
        routes.extend(proto::sandbox::serve(service.clone()));
        routes.extend(proto::shim::serve(service));
        let routes = whole::whole(routes, &["Wait", "WaitSandbox"]);
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let incoming = futures_listener(listener);
        let listener = proto::ttrpc::r#async::transport::Listener::new(incoming);
        let mut server = proto::ttrpc::r#async::Server::new().add_listener(listener).register_service(routes);
        server.start().await.map_err(|e| io::Error::other(e.to_string()))?;
        let _ = stopped.wait_for(|s| *s).await;
        // The answer to the call that stopped us goes out first: its task is ready to run, and a timer would hold up the pod's removal by milliseconds.
        for _ in 0..ROUNDS {
            tokio::task::yield_now().await;
        }
        let _ = std::fs::remove_file(&flags.socket);
        Ok(())
    });
    // Threads that wait for a log's file system are not waited for.
    runtime.shutdown_background();
    served
}

fn futures_listener(listener: tokio::net::UnixListener) -> tokio_stream::wrappers::UnixListenerStream {
    tokio_stream::wrappers::UnixListenerStream::new(listener)
}

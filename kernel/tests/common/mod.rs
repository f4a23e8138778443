//! Actors to treat badly.
#![allow(dead_code, unused_imports, clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
pub use std::time::{Duration, Instant};
pub use troupe_kernel as kernel;

/// Declares an actor `$name` in a module of its own, with messages of every temper.
#[macro_export]
macro_rules! worker {
    ($module:ident, $name:literal) => {
        #[allow(dead_code, clippy::panic)]
        pub mod $module {
            use super::*;
            use kernel::*;
            use std::sync::Arc;
            use std::sync::atomic::{AtomicU64, Ordering};

            pub struct Proto;
            impl Protocol for Proto {
                const ACTOR: &'static str = $name;
            }
            /// What outlives generations.
            #[derive(Clone, Default)]
            pub struct Outside {
                pub handled: Arc<AtomicU64>,
                pub starts: Arc<parking_lot::Mutex<Vec<&'static str>>>,
            }
            #[derive(Clone)]
            pub struct Echo(pub u32);
            pub struct Count;
            pub struct Boom;
            #[derive(Clone)]
            pub struct BoomOnce;
            #[derive(Clone)]
            pub struct Sleep(pub u64);
            pub struct Nap(pub u64);
            #[derive(Clone)]
            pub struct Busy(pub u64);
            pub struct Log;
            kernel::messages! { Proto = $name => {
                Echo -> u32 as idempotent, Count -> u64, Boom -> (), BoomOnce -> u64 as idempotent, Sleep -> u64 as idempotent, Nap -> u64,
                Busy -> u64 as idempotent, Log -> (),
            } }

            pub struct Worker(Outside);
            impl Actor for Worker {
                type Proto = Proto;
                type Args = Outside;
                async fn start(outside: Outside, _: Cx) -> Result<Self> {
                    outside.starts.lock().push($name);
                    Ok(Worker(outside))
                }
                fn routes() -> Routes<Self> {
                    Routes::new()
                        .on::<Echo>()
                        .on::<Count>()
                        .on::<Boom>()
                        .on::<BoomOnce>()
                        .on::<Sleep>()
                        .on::<Nap>()
                        .on::<Busy>()
                        .on::<Log>()
                }
            }
            impl Handle<Echo> for Worker {
                fn handle(&mut self, m: Echo, _: Cx) -> Reply<u32> {
                    self.0.handled.fetch_add(1, Ordering::SeqCst);
                    Reply::ok(m.0)
                }
            }
            impl Handle<Count> for Worker {
                fn handle(&mut self, _: Count, _: Cx) -> Reply<u64> {
                    Reply::ok(self.0.handled.fetch_add(1, Ordering::SeqCst) + 1)
                }
            }
            impl Handle<Boom> for Worker {
                fn handle(&mut self, _: Boom, _: Cx) -> Reply<()> {
                    panic!("as asked");
                }
            }
            impl Handle<BoomOnce> for Worker {
                fn handle(&mut self, _: BoomOnce, cx: Cx) -> Reply<u64> {
                    Reply::op(async move {
                        tokio::task::yield_now().await;
                        assert!(cx.generation() > 1, "only the first generation");
                        Ok(cx.generation())
                    })
                }
            }
            fn sleep(ms: u64, cx: Cx) -> Reply<u64> {
                Reply::op(async move {
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    Ok(cx.generation())
                })
            }
            impl Handle<Sleep> for Worker {
                fn handle(&mut self, m: Sleep, cx: Cx) -> Reply<u64> {
                    sleep(m.0, cx)
                }
            }
            impl Handle<Nap> for Worker {
                fn handle(&mut self, m: Nap, cx: Cx) -> Reply<u64> {
                    sleep(m.0, cx)
                }
            }
            /// Busy for that long in the first generation only.
            impl Handle<Busy> for Worker {
                fn handle(&mut self, m: Busy, cx: Cx) -> Reply<u64> {
                    let until = Instant::now() + Duration::from_millis(if cx.generation() == 1 { m.0 } else { 0 });
                    while Instant::now() < until {
                        std::hint::spin_loop();
                    }
                    Reply::ok(cx.generation())
                }
            }
            impl Handle<Log> for Worker {
                fn handle(&mut self, _: Log, cx: Cx) -> Reply<()> {
                    let (trace, span) = kernel::current().unwrap_or_default();
                    Reply::from(if (trace, span) == (cx.trace_id(), cx.span_id()) {
                        Ok(())
                    } else {
                        Err(Fault::internal("no trace in the thread"))
                    })
                }
            }
        }
    };
}

/// Waits until `what` holds; at most ten seconds.
pub async fn until(mut what: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < end, "what was waited for did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

//! What a hop costs, beside the bare engine: `cargo bench -p troupe-kernel`. The aims are in `kernel/README.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use actix::prelude::{Addr as BareAddr, Arbiter, Context, Handler, Message as Bare};
use std::time::{Duration, Instant};
use troupe_kernel::{self as kernel, Actor, Cx, Handle, Protocol, Reply, Routes, Spec, testing};

const ROUNDS: usize = 20_000;

struct Proto;
impl Protocol for Proto {
    const ACTOR: &'static str = "echo";
}
#[derive(Clone)]
struct Echo(u64);
kernel::messages! { Proto = "echo" => { Echo -> u64 as idempotent, } }
struct Worker;
impl Actor for Worker {
    type Proto = Proto;
    type Args = ();
    async fn start(_: (), _: Cx) -> kernel::Result<Self> {
        Ok(Worker)
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Echo>()
    }
}
impl Handle<Echo> for Worker {
    fn handle(&mut self, m: Echo, _: Cx) -> Reply<u64> {
        Reply::ok(m.0)
    }
}

struct Plain;
impl actix::Actor for Plain {
    type Context = Context<Self>;
}
struct Ask(u64);
impl Bare for Ask {
    type Result = u64;
}
impl Handler<Ask> for Plain {
    type Result = u64;
    fn handle(&mut self, m: Ask, _: &mut Context<Self>) -> u64 {
        m.0
    }
}

fn row(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |p: usize| times[(times.len() - 1) * p / 100].as_nanos() as f64 / 1000.0;
    println!("{name:<44} p50 {:>8.2} µs   p99 {:>8.2} µs", at(50), at(99));
}

fn main() {
    // A thread of its own for the caller, as a connection has; the actor's thread is the kernel's.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::spawn(async {
            let rows: Vec<Spec> = vec![testing::spec("echo", 1)];
            let system = testing::system(&rows).unwrap();
            let echo = system.start::<Worker>(()).await.unwrap();
            let op = system.root("bench", None, None);
            let mut times = Vec::with_capacity(ROUNDS);
            for n in 0..ROUNDS {
                let began = Instant::now();
                assert_eq!(echo.call(&op.cx, Echo(n as u64)).await.unwrap(), n as u64);
                times.push(began.elapsed());
            }
            row("kernel: request and answer, two threads", times);

            let began = Instant::now();
            for _ in 0..ROUNDS {
                op.cx.record_span(String::new(), std::time::UNIX_EPOCH, std::time::UNIX_EPOCH, true, Vec::new());
            }
            println!("{:<44}      {:>8.2} µs", "flight recorder: one span", began.elapsed().as_nanos() as f64 / 1000.0 / ROUNDS as f64);
        })
        .await
        .unwrap();
    });
    let system = actix::System::new();
    system.block_on(async {
        let addr: BareAddr<Plain> = actix::Actor::start_in_arbiter(&Arbiter::new().handle(), |_| Plain);
        let mut times = Vec::with_capacity(ROUNDS);
        for n in 0..ROUNDS {
            let began = Instant::now();
            assert_eq!(addr.send(Ask(n as u64)).await.unwrap(), n as u64);
            times.push(began.elapsed());
        }
        row("bare actix: request and answer, two threads", times);
    });
}

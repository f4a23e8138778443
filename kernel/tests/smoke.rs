//! The thinnest path: a call, a slow call, a crash in the middle, what callers see.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use kernel::*;
use troupe_kernel as kernel;

struct Counter;
impl Protocol for Counter {
    const ACTOR: &'static str = "counter";
}
#[derive(Clone)]
struct Add(u32);
struct Boom;
#[derive(Clone)]
struct Slow;
#[derive(Clone)]
struct BoomOnce;
kernel::messages! { Counter = "counter" => { Add -> u32 as idempotent, Boom -> (), Slow -> u64 as idempotent, BoomOnce -> u64 as idempotent, } }

struct Count(u32);
impl Actor for Count {
    type Proto = Counter;
    type Args = ();
    async fn start(_: (), _: Cx) -> Result<Self> {
        Ok(Count(0))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Add>().on::<Boom>().on::<Slow>().on::<BoomOnce>()
    }
}
impl Handle<Add> for Count {
    fn handle(&mut self, m: Add, _: Cx) -> Reply<u32> {
        self.0 += m.0;
        Reply::ok(self.0)
    }
}
impl Handle<Boom> for Count {
    fn handle(&mut self, _: Boom, _: Cx) -> Reply<()> {
        panic!("as asked");
    }
}
impl Handle<BoomOnce> for Count {
    fn handle(&mut self, _: BoomOnce, cx: Cx) -> Reply<u64> {
        Reply::op(async move {
            tokio::task::yield_now().await;
            assert!(cx.generation() > 1, "only the first generation");
            Ok(cx.generation())
        })
    }
}
impl Handle<Slow> for Count {
    fn handle(&mut self, _: Slow, cx: Cx) -> Reply<u64> {
        Reply::op(async move {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            cx.blocking("nap", std::time::Duration::from_secs(1), || Ok(())).await?;
            Ok(cx.generation())
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_costs_its_caller_only() {
    let system = testing::system(&[testing::spec("counter", 1)]).unwrap();
    let counter = system.start::<Count>(()).await.unwrap();
    let op = system.root("test", None, None);
    assert_eq!(counter.call(&op.cx, Add(2)).await.unwrap(), 2);
    let slow = counter.call(&op.cx, Slow);
    let boom = counter.call(&op.cx, Boom);
    let (slow, boom) = tokio::join!(slow, boom);
    let fault = boom.unwrap_err();
    assert_eq!(fault.class, Class::Unavailable);
    assert!(fault.message.contains("counter generation 1") && fault.message.contains("as asked"), "{fault}");
    assert_eq!(slow.unwrap(), 2, "an idempotent call in flight is answered by the next generation");
    assert_eq!(counter.call(&op.cx, Add(5)).await.unwrap(), 5, "the new generation starts from what is outside");
    assert!(system.trace(&op.cx.trace_id()).len() >= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotent_message_is_delivered_once_more() {
    let system = testing::system(&[testing::spec("counter", 1)]).unwrap();
    let counter = system.start::<Count>(()).await.unwrap();
    let op = system.root("test", None, None);
    assert_eq!(counter.call(&op.cx, BoomOnce).await.unwrap(), 2);
}

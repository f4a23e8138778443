//! A saga that is killed after every single step ends done or undone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
mod common;
use common::*;
use futures::future::{BoxFuture, LocalBoxFuture};
use kernel::saga::Rows;
use kernel::{Cx, Fault, Journal, Outcome, Result, Saga, Step, testing};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

/// A journal and a world of things, both outliving every "process". A kill is a write or an effect after which nothing happens any more.
#[derive(Default)]
struct Outside {
    rows: Mutex<BTreeMap<String, Vec<u8>>>,
    made: Mutex<BTreeSet<&'static str>>,
    /// Actions until the kill.
    fuel: AtomicU64,
}

impl Outside {
    /// Counts an action; pends for ever when the process is dead by now.
    async fn act(&self) {
        if self.fuel.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |f| f.checked_sub(1)).is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Journal for Outside {
    fn put<'a>(&'a self, _: &'a Cx, id: &'a str, bytes: Vec<u8>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            self.act().await;
            self.rows.lock().insert(id.to_owned(), bytes);
            Ok(())
        })
    }
    fn delete<'a>(&'a self, _: &'a Cx, id: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            self.act().await;
            self.rows.lock().remove(id);
            Ok(())
        })
    }
    fn list<'a>(&'a self, _: &'a Cx, prefix: &'a str) -> BoxFuture<'a, Result<Rows>> {
        let rows = self.rows.lock().iter().filter(|(k, _)| k.starts_with(prefix)).map(|(k, v)| (k.clone(), v.clone())).collect();
        Box::pin(async move { Ok(rows) })
    }
}

macro_rules! step {
    ($name:literal) => {
        Step {
            name: $name,
            run: |env: &Outside, log: &mut Vec<String>, _| -> LocalBoxFuture<'_, Result<()>> {
                Box::pin(async move {
                    env.act().await;
                    env.made.lock().insert($name);
                    log.push($name.to_owned());
                    Ok(())
                })
            },
            undo: |env: &Outside, _: &mut Vec<String>, _| -> LocalBoxFuture<'_, Result<()>> {
                Box::pin(async move {
                    env.act().await;
                    env.made.lock().remove($name);
                    Ok(())
                })
            },
        }
    };
}

static STEPS: [Step<Outside, Vec<String>>; 4] = [step!("netns"), step!("address"), step!("shim"), step!("row")];
static SAGA: Saga<Outside, Vec<String>> = Saga { name: "pod", steps: &STEPS };

#[tokio::test(flavor = "multi_thread")]
async fn killed_after_every_single_action_it_ends_done_or_undone() {
    let system = testing::system(&[]).unwrap();
    let op = system.root("test", None, None);
    let (mut done, mut undone) = (0, 0);
    for fuel in 0.. {
        let world = Outside { fuel: AtomicU64::new(fuel), ..Default::default() };
        let run = SAGA.run(&world, "p1", &world, Vec::new(), &op.cx);
        let finished = tokio::time::timeout(Duration::from_millis(20), run).await.is_ok();
        // Killed again at every action of the recovery, too, until one gets through.
        for again in 0.. {
            world.fuel.store(if again > 20 { u64::MAX } else { again }, Ordering::SeqCst);
            let recovery = SAGA.recover(&world, &world, &op.cx);
            if let Ok(outcomes) = tokio::time::timeout(Duration::from_millis(5), recovery).await {
                assert!(outcomes.unwrap().iter().all(|(id, o)| id == "p1" && *o == Outcome::Undone));
                break;
            }
        }
        let made = world.made.lock().len();
        assert!(world.rows.lock().is_empty(), "fuel {fuel}: the journal still holds it");
        assert!(made == 0 || made == STEPS.len(), "fuel {fuel}: half done: {:?}", world.made.lock());
        if made == 0 {
            undone += 1
        } else {
            done += 1
        }
        if finished {
            assert_eq!(made, STEPS.len());
            break;
        }
    }
    assert!(undone >= STEPS.len() * 2 && done >= 1, "{undone} undone, {done} done");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_fails_undoes_those_before_it() {
    static FAILING: [Step<Outside, Vec<String>>; 2] = [
        step!("netns"),
        Step {
            name: "address",
            run: |_, _, _| Box::pin(async { Err(Fault::unavailable("no address left")) }),
            undo: |_, _, _| Box::pin(async { Ok(()) }),
        },
    ];
    let system = testing::system(&[]).unwrap();
    let op = system.root("test", None, None);
    let world = Outside { fuel: AtomicU64::new(u64::MAX), ..Default::default() };
    let fault = Saga { name: "pod", steps: &FAILING }.run(&world, "p", &world, Vec::new(), &op.cx).await.unwrap_err();
    assert!(fault.message.contains("address") && fault.message.contains("no address left"), "{fault}");
    assert!(world.made.lock().is_empty() && world.rows.lock().is_empty());
}

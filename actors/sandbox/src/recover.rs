//! After a start: rows are read again, what was half made is taken down, what runs is watched. Each pod by itself: one's trouble delays no other.
use crate::record::{ContainerRow, Phase, PodPhase, PodRow, after_reboot};
use crate::slots::Rows;
use crate::{Args, World, container, pod};
use kernel::{Cx, Result};
use messages::store::{self, table};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Pauses between attempts in the background, doubled from the first up to the last.
const FIRST: Duration = Duration::from_millis(500);
const LAST: Duration = Duration::from_secs(300);

/// Does something until it works, however long that takes; `troupe ops` shows what it waits for.
pub async fn persist(cx: &Cx, what: &str, mut attempt: impl AsyncFnMut() -> Result<()>) {
    let mut pause = FIRST;
    while let Err(error) = attempt().await {
        tracing::warn!(%error, "{what} failed; the next try is in {pause:?}");
        cx.step(format!("next try in {pause:?}: {error}"));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST);
    }
}

/// A row that cannot be read is left where it is, and costs nobody else.
fn readable<T: DeserializeOwned>(table: &str, rows: Vec<(String, Vec<u8>)>) -> impl Iterator<Item = T> {
    rows.into_iter().filter_map(move |(id, bytes)| match store::decode(&bytes) {
        Ok(row) => Some(row),
        Err(error) => {
            tracing::error!(%error, table, id, "a row is unreadable and is ignored");
            None
        }
    })
}

async fn scan<T: DeserializeOwned>(args: &Args, table: &'static str, cx: &Cx) -> Result<impl Iterator<Item = T>> {
    Ok(readable(table, args.store.call(cx, store::Scan { table, prefix: String::new() }).await?))
}

/// The rows of all pods.
pub async fn read_all(args: &Args, boot: &str, cx: &Cx) -> Result<BTreeMap<String, Rows>> {
    let mut pods: BTreeMap<String, Rows> = BTreeMap::new();
    for row in scan::<PodRow>(args, table::SANDBOXES, cx).await? {
        pods.insert(row.id.clone(), (Some(row), Vec::new()));
    }
    for row in scan::<ContainerRow>(args, table::CONTAINERS, cx).await? {
        pods.entry(row.sandbox_id.clone()).or_default().1.push(row);
    }
    pods.values_mut().for_each(|(pod, containers)| after_reboot(pod, containers, boot));
    Ok(pods)
}

/// The rows of one pod.
pub async fn read(args: &Args, id: &str, boot: &str, cx: &Cx) -> Result<Rows> {
    let row = args.store.call(cx, store::Get { table: table::SANDBOXES, key: id.to_owned() }).await?;
    let mut pod = readable::<PodRow>(table::SANDBOXES, row.into_iter().map(|r| (id.to_owned(), r)).collect()).next();
    let mut containers: Vec<ContainerRow> =
        scan::<ContainerRow>(args, table::CONTAINERS, cx).await?.filter(|c| c.sandbox_id == id).collect();
    after_reboot(&mut pod, &mut containers, boot);
    Ok((pod, containers))
}

/// Puts the pod and each container of it in order, in the background.
pub fn run(world: &Rc<World>, cx: &Cx) {
    for id in world.container_ids() {
        let world = world.clone();
        cx.spawn("recover container", move |cx| async move {
            let _call = world.slot.enter();
            persist(&cx, "recovery of a container", async || one_container(&world, &cx, &id).await).await;
        });
    }
    // Containers of a pod whose row is unreadable are shown, and can be stopped and removed: who knows not what they are must not end them.
    let Some(row) = world.pod() else { return };
    match row.phase {
        PodPhase::Creating | PodPhase::Failed => pod::take_down_later(world, cx),
        PodPhase::Ready => pod::watch(world, cx),
        PodPhase::Stopped => {
            // What a reboot has ended is written down.
            let world = world.clone();
            cx.spawn("recover pod", move |cx| async move {
                let Some(mut row) = world.pod().filter(|p| p.boot != world.boot && p.phase == PodPhase::Stopped) else { return };
                row.boot.clone_from(&world.boot);
                persist(&cx, "recovery of a pod", async || {
                    let _whole = world.whole.write().await;
                    if world.pod().is_none() {
                        return Ok(());
                    }
                    // Its address is free again before the kubelet finds the time to ask for that.
                    let _turn = world.args.turns.acquire().await;
                    pod::release_network(&world, &cx, &row).await?;
                    world.save_pod(&cx, &row).await
                })
                .await;
            });
        }
    }
}

async fn one_container(world: &Rc<World>, cx: &Cx, id: &str) -> Result<()> {
    // A client that tries again may have come first.
    let _guard = world.lock(id).await;
    let Some(mut row) = world.container(id) else { return Ok(()) };
    match row.phase {
        Phase::Creating => container::take_down(world, cx, id).await,
        Phase::Created => Ok(()),
        Phase::Exited if row.boot != world.boot => {
            row.boot.clone_from(&world.boot);
            world.save_container(cx, &row).await
        }
        Phase::Exited => Ok(()),
        Phase::Starting => container::settle_start(world, cx, &mut row).await,
        Phase::Running => {
            container::watch(world, cx, id);
            Ok(())
        }
    }
}

//! After a start: rows are read again, what was half made is taken down, what runs is watched.
use crate::record::{ContainerRow, Phase, PodPhase, PodRow, now_ns};
use crate::{World, container, pod};
use kernel::{Cx, Result};
use messages::store::{self, table};
use messages::task::Exit;
use std::rc::Rc;

/// Networks of an earlier boot's pods that are released side by side.
const TURNS: usize = 4;

/// Reads all rows.
pub async fn load(world: &World, cx: &Cx) -> Result<()> {
    let pods = world.args.store.call(cx, store::Scan { table: table::SANDBOXES, prefix: String::new() }).await?;
    let containers = world.args.store.call(cx, store::Scan { table: table::CONTAINERS, prefix: String::new() }).await?;
    let mut tables = world.tables.borrow_mut();
    for (id, row) in pods {
        tables.pods.insert(id, store::decode::<PodRow>(&row)?);
    }
    for (id, row) in containers {
        tables.containers.insert(id, store::decode::<ContainerRow>(&row)?);
    }
    let labels = tables.pods.values().map(|p| &p.label).chain(tables.containers.values().map(|c| &c.label));
    labels.for_each(|label| world.selinux.reserve(label));
    tables.recovered = true;
    Ok(())
}

/// Every pod and container by itself: one's trouble delays no other.
pub async fn run(world: Rc<World>, cx: Cx) {
    let (pods, containers) = {
        let tables = world.tables.borrow();
        (tables.pods.values().cloned().collect::<Vec<_>>(), tables.containers.values().cloned().collect::<Vec<_>>())
    };
    for row in containers {
        let world = world.clone();
        cx.spawn("recover container", move |cx| async move {
            if let Err(error) = one_container(&world, &cx, &row).await {
                tracing::warn!(%error, id = row.id, "a container could not be recovered");
            }
        });
    }
    let turns = Rc::new(tokio::sync::Semaphore::new(TURNS));
    for row in pods {
        let (world, turns) = (world.clone(), turns.clone());
        cx.spawn("recover pod", move |cx| async move {
            if let Err(error) = one_pod(&world, &cx, row, &turns).await {
                tracing::warn!(%error, "a pod could not be recovered");
            }
        });
    }
}

async fn one_pod(world: &World, cx: &Cx, mut row: PodRow, turns: &tokio::sync::Semaphore) -> Result<()> {
    if row.phase == PodPhase::Creating {
        if let Err(fault) = pod::take_down(world, cx, &row.id).await {
            pod::keep_failed(world, cx, &row.id).await?;
            return Err(fault);
        }
        return Ok(());
    }
    if row.phase == PodPhase::Ready && row.boot != world.boot {
        row.phase = PodPhase::Stopped;
        world.save_pod(cx, &row).await?;
        // Its address is free again before the kubelet finds the time to ask for that.
        let _turn = turns.acquire().await;
        return pod::release_network(world, cx, &row).await;
    }
    Ok(())
}

async fn one_container(world: &Rc<World>, cx: &Cx, row: &ContainerRow) -> Result<()> {
    // A client that tries again may have come first.
    let _guard = world.lock(&row.id).await;
    let Some(mut row) = world.container(&row.id) else { return Ok(()) };
    match row.phase {
        Phase::Creating => return container::take_down(world, cx, &row.id).await,
        Phase::Created | Phase::Exited => return Ok(()),
        Phase::Starting | Phase::Running => {}
    }
    if row.boot != world.boot {
        row.exit = Some(Exit { code: 255, at_ns: now_ns(), oom: false, witness: "reboot".into() });
        row.reason = ("Unknown".into(), "the node was started again".into());
        (row.phase, row.pid) = (Phase::Exited, 0);
        return world.save_container(cx, &row).await;
    }
    match row.phase {
        Phase::Starting => container::settle_start(world, cx, &mut row).await,
        _ => {
            container::watch(world, cx, &row.id);
            Ok(())
        }
    }
}

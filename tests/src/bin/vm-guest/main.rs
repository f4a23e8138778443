//! The part of the virtual machine's test that runs inside of it (`tests/tests/vm.rs`): drives the daemon over CRI and looks at the machine.
//!
//! With systemd as PID 1 the daemon is the unit of `deploy/troupe.service` and makes scopes; otherwise this program starts it, and it makes plain
//! cgroups. Each check is told on a line, `ok NAME` or `FAILED NAME: why`; the last line is the sum. A check has its own pods and removes them.
mod cgroups;
mod pods;
mod unit;
mod world;

use anyhow::Result;
use std::pin::Pin;
use std::time::Instant;
use world::World;

/// A check, by name.
type Check = (&'static str, for<'a> fn(&'a mut World) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>>);

macro_rules! checks {
    ($($module:ident::$name:ident),* $(,)?) => {
        &[$((stringify!($name), |w| Box::pin($module::$name(w)))),*]
    };
}

const EVERYWHERE: &[Check] = checks![
    cgroups::the_driver_is_told,
    cgroups::limits_arrive,
    cgroups::an_update_arrives_and_lasts,
    cgroups::the_container_sees_its_own_cgroup,
    cgroups::a_privileged_container_costs_the_host_no_mount_option,
    cgroups::devices_are_guarded,
    cgroups::an_oom_kill_is_told,
    cgroups::statistics_are_sane,
    cgroups::a_stop_ends_every_process,
    pods::users_of_its_own,
    pods::users_of_its_own_divide_their_cgroup,
    pods::swap_is_told,
    pods::a_pod_s_resources_change,
    cgroups::nothing_is_left,
];
const WITH_SYSTEMD: &[Check] = checks![unit::containers_outlive_the_unit, unit::a_deaf_bus_holds_up_nobody, cgroups::nothing_is_left];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut world = match World::start().await {
        Ok(world) => world,
        Err(e) => {
            println!("FAILED the machine is set up: {e:#}\n{}", world::log());
            return;
        }
    };
    let only = std::env::args().nth(1).unwrap_or_default();
    let all = EVERYWHERE.iter().chain(if world.systemd { WITH_SYSTEMD } else { &[] });
    let (mut passed, mut failed) = (0, 0);
    for (name, check) in all.filter(|(name, _)| name.contains(&only)) {
        let began = Instant::now();
        let done = tokio::time::timeout(std::time::Duration::from_secs(90), check(&mut world)).await;
        match done.unwrap_or_else(|_| Err(anyhow::anyhow!("no end within 90 s"))) {
            Ok(()) => {
                passed += 1;
                println!("ok {name} ({:.1} s)", began.elapsed().as_secs_f64());
            }
            Err(e) => {
                failed += 1;
                println!("FAILED {name}: {e:#}");
            }
        }
        world.forget_pods().await;
    }
    if failed > 0 {
        println!("--- the daemon's log\n{}", world::log());
    }
    println!("sum: {passed} passed, {failed} failed");
}

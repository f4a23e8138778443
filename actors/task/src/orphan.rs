//! What a shim leaves that is gone. Processes, cgroup and mounts of a container belong to its shim, which gives them back at `Delete`; whatever it has not
//! given back by its own end, its binary's `delete` gives back, whether the container had ended before or not, and before the bundle goes that says how.
use crate::bundle;
use crate::exit::UNKNOWN;
use crate::launch;
use crate::pod::{Container, Pod};
use crate::process::Process;
use futures::future::{join_all, try_join_all};
use kernel::{Cx, Result};
use std::rc::Rc;
use std::time::Duration;

/// Longest look at a directory on a memory file system.
const FILES: Duration = Duration::from_secs(10);

impl Pod {
    /// The shim is dead: its containers have ended, whatever they were doing.
    pub async fn lose_all(&self, cx: &Cx) {
        if let Err(e) = self.kill_leftovers().await {
            tracing::error!(sandbox = self.id, error = %e, "a process of a dead shim is left");
        }
        join_all(self.known().into_iter().map(|c| async move {
            let unknown = c.ended().is_none();
            let given = self.give_back_alone(&c).await;
            let code = given.unwrap_or_else(|e| {
                tracing::warn!(container = c.id, error = %e, "clean-up after a dead shim failed; it is tried again when the container is deleted");
                UNKNOWN
            });
            if unknown {
                self.lose(cx, &c, c.lost(code, "lost")).await;
            }
        }))
        .await;
    }

    /// Containers that only their bundles tell of: the daemon ended before their row was durable.
    pub async fn find_stray_containers(&self, cx: &Cx) -> Result<()> {
        let (args, pod) = (self.args.clone(), self.id.clone());
        let found = cx.blocking("bundle.scan", FILES, move || Ok(bundle::of_pod(&args, &pod))).await?;
        for id in found {
            self.containers.borrow_mut().entry(id).or_insert_with_key(|id| Container::new(id, None));
        }
        Ok(())
    }

    /// The shim has ended, and the pod goes: whatever was not deleted before is given back.
    pub async fn give_back_all(&self) -> Result<()> {
        self.kill_leftovers().await?;
        try_join_all(self.known().into_iter().map(|c| async move { self.give_back_alone(&c).await })).await.map(drop)
    }

    async fn give_back_alone(&self, c: &Container) -> Result<u32> {
        let _one = c.deleting.lock().await;
        self.give_back(c).await
    }

    /// Gives back what a container still has, once; answers the exit code that the binary tells. For whoever holds `deleting`, after the shim's end.
    pub async fn give_back(&self, c: &Container) -> Result<u32> {
        let path = self.bundle_of(&c.id);
        let Some(binary) = bundle::read_binary(&path).filter(|_| !c.given_back.get()) else { return Ok(UNKNOWN) };
        match launch::delete(&self.args, &c.id, &binary, &path).await {
            Ok(told) => {
                c.given_back.set(true);
                Ok(if told.exit_status == 0 { UNKNOWN } else { told.exit_status })
            }
            Err(e) if bundle::read_endpoint(&path).is_some_and(|e| e.is_troupe()) => Err(e),
            Err(e) => {
                // What another's shim means by it is not known; its pod must be able to go.
                tracing::warn!(container = c.id, error = %e, "clean-up after a dead shim failed");
                Ok(UNKNOWN)
            }
        }
    }

    /// Ends inits that outlived their shim. One that does not die keeps no other from dying.
    async fn kill_leftovers(&self) -> Result<()> {
        let living = self.known().into_iter().filter(|c| c.ended().is_none() && c.pid.get() != 0);
        let processes: Vec<Process> = living.filter_map(|c| Process::open(c.pid.get()).ok()).collect();
        let ends = processes.iter().map(|p| self.end(p, self.args.timeouts.shutdown));
        join_all(ends).await.into_iter().collect()
    }

    /// Its containers.
    pub fn known(&self) -> Vec<Rc<Container>> {
        self.containers.borrow().values().cloned().collect()
    }
}

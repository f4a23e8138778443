//! The manifest: every actor, declared once.
use crate::{Fault, Result};
use std::time::Duration;

/// When a finished actor is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Restart {
    /// Always.
    Permanent,
    /// After a crash.
    Transient,
    /// Never.
    Temporary,
}

/// Who restarts with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Strategy {
    /// It alone.
    OneForOne,
    /// It and those declared after it that may call it.
    RestForOne,
}

/// Where it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Isolation {
    /// On the shared threads.
    Shared,
    /// On a thread of its own.
    Own,
}

/// One actor, or a template of child actors.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Name; children are `name/id`.
    pub name: &'static str,
    /// Requests go from higher layers to lower ones only.
    pub layer: u8,
    /// Messages in the mailbox at most.
    pub mailbox: usize,
    /// Deadline of a call that has none.
    pub deadline: Duration,
    /// Restart.
    pub restart: Restart,
    /// Strategy.
    pub strategy: Strategy,
    /// At most so many restarts within the period.
    pub intensity: (u32, Duration),
    /// Isolation.
    pub isolation: Isolation,
    /// Whom it may call.
    pub calls: &'static [&'static str],
    /// Template of children of this actor.
    pub child_of: Option<&'static str>,
}

/// The table.
#[derive(Clone, Copy, Debug)]
pub struct Manifest {
    /// Rows.
    pub actors: &'static [Spec],
}

impl Manifest {
    /// A row.
    pub fn find(&self, name: &str) -> Option<&'static Spec> {
        self.actors.iter().find(|s| s.name == name)
    }
    /// Refuses unknown names and calls that do not go downhill, so that no cycle of waiting can exist.
    pub fn check(&self) -> Result<()> {
        for spec in self.actors {
            for callee in spec.calls {
                let target = self
                    .find(callee)
                    .ok_or_else(|| Fault::invalid_argument(format!("{} may call {callee}, which does not exist", spec.name)))?;
                if target.layer >= spec.layer {
                    return Err(Fault::invalid_argument(format!(
                        "{} (layer {}) may not call {callee} (layer {}): uphill",
                        spec.name, spec.layer, target.layer
                    )));
                }
            }
            if let Some(parent) = spec.child_of
                && self.find(parent).is_none()
            {
                return Err(Fault::invalid_argument(format!("{} is a child of {parent}, which does not exist", spec.name)));
            }
        }
        Ok(())
    }
}

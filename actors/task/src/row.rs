//! The row of a pod in table `tasks`. Written before its steps run: one commit for a pod, one for each container. What changes more often (address, pid,
//! what is finished) is in the bundle, which lives exactly as long as a shim can: until the reboot.
use crate::pod::Pod;
use kernel::{Cx, Result};
use messages::store::{Commit, Op, Store, table};
use messages::task::{Exit, Runtime};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Row {
    /// Sandbox id.
    pub id: String,
    /// Runtime.
    pub runtime: Runtime,
    /// Cgroups that did not exist before the pod, deepest first: ours to remove.
    pub cgroups: Vec<PathBuf>,
    /// Containers by id.
    pub containers: BTreeMap<String, ContainerRow>,
}

/// A container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ContainerRow {
    /// Its end, where the shim can no longer tell it.
    pub exit: Option<Exit>,
}

impl Pod {
    /// Changes the row and makes it durable.
    pub async fn save(&self, cx: &Cx, change: impl FnOnce(&mut Row)) -> Result<()> {
        change(&mut self.row.borrow_mut());
        let put = Op::put(table::TASKS, &self.id, &*self.row.borrow())?;
        self.commit(cx, put).await
    }
    /// Removes the row.
    pub async fn forget(&self, cx: &Cx) -> Result<()> {
        self.commit(cx, Op::delete(table::TASKS, &self.id)).await
    }
    async fn commit(&self, cx: &Cx, op: Op) -> Result<()> {
        cx.system().addr::<Store>().call(cx, Commit { ops: vec![op] }).await
    }
}

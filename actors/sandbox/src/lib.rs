//! `sandbox`: pods and their containers.
//!
//! Owns: rows of pods and containers; the pods' files and shm mounts; the published [`View`]. Talks to: `network`, `task`, `image`, `snapshot`,
//! `store`, `events`. Shape: the parent `sandbox` ([`parent`]) routes; a child `sandbox.pod/<id>` ([`child`]) for each pod does the work, so a pod
//! that crashes or hangs costs its own calls only. On a crash: rows in `Creating` are taken down by the next generation, running containers are
//! watched again. Spans: each step of a pod's and a container's making. Limits: see [`child`].
mod checkpoint;
mod child;
mod container;
mod parent;
mod pod;
mod publish;
mod record;
mod recover;
mod settings;
mod slots;
pub mod spec;
mod status;
mod sys;
mod volumes;
mod world;

pub use parent::SandboxActor;
pub use slots::Slots;

use kernel::Addr;
use messages::events::Events;
use messages::image::Images;
use messages::network::Network;
use messages::sandbox::View;
use messages::snapshot::Snapshots;
use messages::store::Store;
use messages::task::Tasks;
pub use settings::{Handler, Settings};
use std::path::PathBuf;
use std::sync::Arc;
pub(crate) use world::World;

/// What every generation needs.
#[derive(Clone)]
pub struct Args {
    /// Directory of the pods' files.
    pub root: PathBuf,
    /// Directory of what a reboot may lose.
    pub state: PathBuf,
    /// Settings.
    pub settings: Arc<Settings>,
    /// Where pods and containers are published.
    pub view: Arc<View>,
    /// The store.
    pub store: Addr<Store>,
    /// The bus.
    pub events: Addr<Events>,
    /// Networks.
    pub network: Addr<Network>,
    /// Images.
    pub images: Addr<Images>,
    /// Snapshots.
    pub snapshots: Addr<Snapshots>,
    /// Tasks.
    pub tasks: Addr<Tasks>,
    /// Which pods there are, for all generations.
    pub slots: Arc<Slots>,
    /// Which handlers can give pods user namespaces, as far as that is known.
    pub userns: Arc<status::Userns>,
    /// SELinux on this node, with the levels that are taken.
    pub selinux: Arc<spec::selinux::SeLinux>,
    /// Turns of those who release networks of an earlier boot's pods, side by side.
    pub turns: Arc<tokio::sync::Semaphore>,
}

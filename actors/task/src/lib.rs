//! `task`: shims and what runs in them.
//!
//! - **Owns**: shim processes, their bundles below `<state>`, FIFOs of execs, the rows of table `tasks`.
//! - **Talks to**: `store` (rows), `events` (exits that shims report; exits that nobody else can report), the shims (ttrpc).
//! - **Shape**: the parent `task` routes; a child `task.shim/<sandbox id>` for each pod owns its shim. All waiting happens in children, so a deaf shim
//!   costs its own pod only: its calls time out, a probe confirms it, and from then on they fail at once until it answers again.
//! - **States** of a child: connecting → up ⇄ deaf → gone. `troupe ops` shows it as the step of the operation `shim.watch`.
//! - **Exits** have three witnesses: the shim's event, the `Wait` call that the child keeps open, and a pidfd of the init for when the shim is dead or deaf.
//!   The first one with a real code wins.
//! - **On a crash** nothing is lost: the row names the pod and its containers, the bundle has the shim's address, and the shim knows the rest. The next
//!   generation connects again (adoption) and undoes what was begun but not finished. Bundles without a row are swept.
//! - **Spans**: `shim.start`, `shim.connect`, `ttrpc Task/Create`, …, and the shim's own spans, fetched after the answer.
//! - **Limits**: a timeout on every call ([`Timeouts`]), bounded bootstrap reply and exec output.

#![deny(unsafe_code)]

mod adopt;
mod bundle;
mod cgroup;
mod child;
mod container;
mod exec;
mod exit;
mod fifos;
mod launch;
mod link;
mod locate;
mod logs;
mod orphan;
mod parent;
mod pod;
mod probe;
mod process;
mod reply;
mod row;
mod sandbox;
mod session;
mod sys;

pub use logs::Logs;
pub use parent::Parent;

use std::path::PathBuf;
use std::time::Duration;

/// containerd's namespace of everything that CRI makes.
pub(crate) const NAMESPACE: &str = "k8s.io";

/// Configuration of the actor, the same for every generation.
#[derive(Clone, Debug)]
pub struct Args {
    /// Directory of what survives a reboot, `/var/lib/troupe`.
    pub root: PathBuf,
    /// Directory of what does not, `/run/troupe`: bundles and FIFOs.
    pub state: PathBuf,
    /// Our own executable: `-publish-binary` of shims, and Troupe's shim is looked for beside it.
    pub exe: PathBuf,
    /// Path of our gRPC socket, told to shims.
    pub grpc_address: String,
    /// Path of our ttrpc socket, where shims deliver events.
    pub ttrpc_address: String,
    /// `[plugins."io.containerd.shim.v1.manager"] socket_dir`; `None` = the shim's default.
    pub socket_dir: Option<PathBuf>,
    /// `[plugins."io.containerd.shim.v1.manager"] env`.
    pub env: Vec<(String, String)>,
    /// Have shims log at debug level.
    pub debug: bool,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// Output of an ExecSync after its end.
    pub drain: Drain,
    /// What containers' logs were given so far.
    pub logs: Logs,
}

/// What is done with an ExecSync whose process has ended while another holds its output open (`drain_exec_sync_io_timeout`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Drain {
    /// Unset or zero. containerd waits for ever then, and a probe that starts something in the background never ends. The exec has ended and has its
    /// code, so it is answered with what was said within two seconds.
    #[default]
    Lenient,
    /// As containerd does when it is set: past it the call fails.
    Strict(Duration),
}

impl Drain {
    fn limit(self) -> Duration {
        match self {
            Drain::Lenient => Duration::from_secs(2),
            Drain::Strict(limit) => limit,
        }
    }
}

/// Time limits. Names and values are containerd's where it has them (`io.containerd.timeout.*`).
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// From running the binary to its reply.
    pub start: Duration,
    /// `shim.load`: the first answer of an adopted shim.
    pub load: Duration,
    /// `shim.cleanup`: the `delete` action of a binary.
    pub cleanup: Duration,
    /// `shim.shutdown`: from the request to the end of the process; past it, it is killed.
    pub shutdown: Duration,
    /// `task.state`.
    pub state: Duration,
    /// `metrics.shimstats`.
    pub stats: Duration,
    /// Every other call. Longer than the slowest honest `Create` on a busy node, shorter than the kubelet's patience (2 min).
    pub call: Duration,
    /// A call that takes longer has its shim probed while it goes on.
    pub suspicion: Duration,
    /// A probe after a call that timed out; no answer means deaf.
    pub probe: Duration,
    /// After an init has ended, the time for its shim to say with which code.
    pub exit_grace: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let s = Duration::from_secs;
        Timeouts {
            start: s(30),
            load: s(5),
            cleanup: s(5),
            shutdown: s(3),
            state: s(2),
            stats: s(2),
            call: s(60),
            suspicion: s(5),
            probe: s(2),
            exit_grace: s(2),
        }
    }
}

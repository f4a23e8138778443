//! `containerd-shim-troupe-v2`: one small process for each pod, between the daemon and the pod's containers.
//!
//! Owns: the pod's namespaces (as descriptors, so that no pause process is needed), its containers' processes, mounts and logs. Talks to: the
//! daemon over ttrpc (task v2 and v3, sandbox, and a private service), an OCI runtime. On a crash of the daemon: it goes on; exits are kept until
//! somebody asks. On its own crash: the daemon runs its `delete` action, which kills and cleans. Limits: one thread, bounded logs and queues.
mod bootstrap;
mod cgroup;
mod clients;
mod console;
mod container;
mod engine;
mod events;
mod family;
mod group;
mod idmap;
mod io;
mod log;
mod mounts;
mod owner;
mod reaper;
mod rootfs;
mod runtime;
mod sandbox;
mod server;
mod service;
mod spans;
mod sys;
mod userns;
mod whole;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flags = bootstrap::Flags::parse(&args);
    let result = match flags.action.as_str() {
        "start" => bootstrap::start(&flags),
        "serve" => server::serve(&flags),
        "delete" => bootstrap::delete(&flags),
        "init" => sys::pod_init(),
        userns::ACTION => userns::helper(),
        "probe" => rootfs::probe().inspect_err(|e| println!("{e}")),
        _ if flags.version => {
            println!("containerd-shim-troupe-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        other => Err(std::io::Error::other(format!("unknown action {other:?}"))),
    };
    if let Err(error) = result {
        eprintln!("containerd-shim-troupe-v2: {error}");
        std::process::exit(1);
    }
}

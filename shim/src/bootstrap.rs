//! `start` and `delete`: what a daemon runs (`contracts/core.md` §5.2–5.4, §5.9).
use crate::sys;
use proto::bootstrap::{BootstrapParams, BootstrapResult};
use proto::prost::Message;
use sha2::{Digest, Sha256};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Go-style flags.
#[derive(Default)]
pub struct Flags {
    /// `-namespace`.
    pub namespace: String,
    /// `-id`.
    pub id: String,
    /// `-address`.
    pub address: String,
    /// `-bundle`.
    pub bundle: String,
    /// `-socket`: path of the listener (server only).
    pub socket: String,
    /// `-v`.
    pub version: bool,
    /// The action.
    pub action: String,
}

impl Flags {
    /// Reads them.
    pub fn parse(args: &[String]) -> Flags {
        let (mut flags, mut rest) = (Flags::default(), args.iter());
        while let Some(arg) = rest.next() {
            let Some(name) = arg.strip_prefix('-') else {
                flags.action.clone_from(arg);
                continue;
            };
            let name = name.trim_start_matches('-');
            let (name, mut value) = name.split_once('=').map_or((name, None), |(n, v)| (n, Some(v.to_owned())));
            let mut take = || value.take().or_else(|| rest.next().cloned()).unwrap_or_default();
            match name {
                "namespace" => flags.namespace = take(),
                "id" => flags.id = take(),
                "address" => flags.address = take(),
                "bundle" => flags.bundle = take(),
                "socket" => flags.socket = take(),
                "publish-binary" | "debug-socket" => drop(take()),
                "v" | "version" => flags.version = true,
                _ => {}
            }
        }
        flags
    }
}

/// Starts the pod's server, or finds it, and answers its address.
pub fn start(flags: &Flags) -> io::Result<()> {
    let mut input = Vec::new();
    io::stdin().take(10 << 20).read_to_end(&mut input)?;
    let params = BootstrapParams::decode(&input[..]).ok().filter(|p| !p.instance_id.is_empty() && p.instance_id == flags.id);
    let group = group(Path::new("config.json")).unwrap_or_else(|| flags.id.clone());
    let dir = params.as_ref().and_then(|p| p.socket_dir.clone()).filter(|d| !d.is_empty()).unwrap_or_else(|| "/run/troupe/s".into());
    let hash: String =
        Sha256::digest(format!("{}/{}/{group}", flags.address, flags.namespace)).iter().map(|b| format!("{b:02x}")).collect();
    let socket = Path::new(&dir).join(hash);
    if UnixStream::connect(&socket).is_err() {
        spawn(flags, params.as_ref(), &group, &socket)?;
    }
    let address = format!("unix://{}", socket.display());
    let reply = if params.is_some() {
        let metadata = [("troupe.shim".to_owned(), "1".to_owned())].into_iter().collect();
        BootstrapResult { version: 3, address, protocol: "ttrpc".into(), metadata, ..Default::default() }.encode_to_vec()
    } else {
        serde_json::json!({"version": 3, "address": address, "protocol": "ttrpc"}).to_string().into_bytes()
    };
    io::stdout().write_all(&reply)
}

/// Containers of a pod share its shim.
fn group(config: &Path) -> Option<String> {
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(config).ok()?).ok()?;
    let annotations = config.get("annotations")?;
    let names = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];
    names.iter().find_map(|n| annotations.get(*n)?.as_str()).map(str::to_owned)
}

/// The listener is bound before the server runs, so that the daemon can connect at once.
fn spawn(flags: &Flags, params: Option<&BootstrapParams>, group: &str, socket: &Path) -> io::Result<()> {
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket)?;
    let events = params.map(|p| p.containerd_ttrpc_address.clone()).filter(|a| !a.is_empty());
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["-namespace", &flags.namespace, "-id", group, "-address", &flags.address, "-socket"])
        .arg(socket)
        .arg("serve")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    if let Some(events) = events {
        command.env("TTRPC_ADDRESS", events);
    }
    sys::pass_listener(&mut command, listener)?;
    let server = command.spawn()?;
    let options = params.and_then(|p| p.extensions.iter().find_map(|e| proto::from_any::<proto::runc_options::Options>(e.value.as_ref()?)));
    match options.map(|o| o.shim_cgroup).filter(|c| !c.is_empty()) {
        Some(cgroup) => crate::cgroup::enter(&cgroup, server.id()),
        None => Ok(()),
    }
}

/// Cleans up after a server that is gone: kills what runs in the bundle's container, unmounts its root.
pub fn delete(flags: &Flags) -> io::Result<()> {
    let bundle = if flags.bundle.is_empty() { std::env::current_dir()? } else { PathBuf::from(&flags.bundle) };
    // What cannot be deleted now shows in the daemon's census; the mount goes in any case.
    let deleted = crate::runtime::delete_orphan(&bundle, &flags.id);
    crate::mounts::unmount(&bundle.join("rootfs"))?;
    let response =
        proto::task::DeleteResponse { exit_status: 137, exited_at: Some(std::time::SystemTime::now().into()), ..Default::default() };
    io::stdout().write_all(&response.encode_to_vec())?;
    deleted
}

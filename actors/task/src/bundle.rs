//! Bundles: a directory for each shim and each container, in containerd's layout below `<state>` (`contracts/core.md` §5.5).
use crate::reply::Endpoint;
use crate::{Args, NAMESPACE};
use kernel::{Result, ResultExt, absent};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{UnmountFlags, unmount};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Directory of containers' bundles.
pub fn tasks(args: &Args) -> PathBuf {
    args.state.join("io.containerd.runtime.v2.task").join(NAMESPACE)
}
/// Directory of pods' bundles.
pub fn sandboxes(args: &Args) -> PathBuf {
    args.state.join("io.containerd.sandbox.controller.v1.shim").join(NAMESPACE)
}
/// Directory of the FIFOs of a pod's execs.
pub fn fifos(args: &Args, sandbox: &str) -> PathBuf {
    args.state.join("fifo").join(sandbox)
}

/// Where containers keep what outlives a reboot.
fn work(args: &Args, id: &str) -> PathBuf {
    args.root.join("io.containerd.runtime.v2.task").join(NAMESPACE).join(id)
}

fn dir(path: &Path, mode: u32) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).with_context(|| format!("make {}", path.display()))
}

/// Writes a file as a whole: nobody ever reads half of it.
pub fn write(path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    let draft = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let _ = fs::remove_file(&draft);
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?.write_all(bytes)?;
        fs::rename(&draft, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// A FIFO of ours.
pub fn fifo(path: &Path, mode: u32) -> Result<()> {
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(mode), 0)
        .map_err(std::io::Error::from)
        .with_context(|| format!("make FIFO {}", path.display()))
}

/// Makes a pod's bundle. A shim of another make finds its group in the annotation.
pub fn make_sandbox(args: &Args, id: &str, binary: &Path) -> Result<PathBuf> {
    let path = sandboxes(args).join(id);
    dir(&sandboxes(args), 0o700)?;
    fs::DirBuilder::new().mode(0o700).create(&path).with_context(|| format!("make the bundle of sandbox {id}"))?;
    let spec = serde_json::json!({ "ociVersion": "1.2.0", "annotations": { "io.kubernetes.cri.sandbox-id": id, "io.kubernetes.cri.container-type": "sandbox" } });
    write(&path.join("config.json"), 0o600, spec.to_string().as_bytes())?;
    write(&path.join("shim-binary-path"), 0o600, binary.as_os_str().as_encoded_bytes())?;
    dir(&path.join("rootfs"), 0o711)?;
    fifo(&path.join("log"), 0o700)?;
    Ok(path)
}

/// Makes a container's bundle within the pod's shim.
pub fn make_container(args: &Args, id: &str, sandbox: &str, endpoint: &Endpoint, binary: &Path, spec: &[u8]) -> Result<PathBuf> {
    let path = tasks(args).join(id);
    // Root of a pod's user namespace is nobody here, and has to pass on the way to its root file system. What it may not see is closed one below.
    dir(&tasks(args), 0o711)?;
    fs::DirBuilder::new().mode(0o700).create(&path).with_context(|| format!("make the bundle of container {id}"))?;
    write(&path.join("config.json"), 0o600, spec)?;
    dir(&path.join("rootfs"), 0o711)?;
    let work = work(args, id);
    dir(&work, 0o711)?;
    std::os::unix::fs::symlink(&work, path.join("work")).context("link the work directory")?;
    write(&path.join("sandbox"), 0o600, sandbox.as_bytes())?;
    write(&path.join("shim-binary-path"), 0o600, binary.as_os_str().as_encoded_bytes())?;
    write_endpoint(&path, endpoint)?;
    Ok(path)
}

/// Containers of a pod, by their bundles.
pub fn of_pod(args: &Args, sandbox: &str) -> Vec<String> {
    let entries = fs::read_dir(tasks(args)).into_iter().flatten().flatten();
    let ours = entries.filter(|e| fs::read_to_string(e.path().join("sandbox")).is_ok_and(|s| s == sandbox));
    ours.filter_map(|e| e.file_name().into_string().ok()).filter(|id| !id.starts_with('.')).collect()
}

/// Writes `bootstrap.json`.
pub fn write_endpoint(bundle: &Path, endpoint: &Endpoint) -> Result<()> {
    let json = serde_json::to_vec(endpoint).class(kernel::Class::Internal, "bootstrap.json")?;
    write(&bundle.join("bootstrap.json"), 0o644, &json)
}

/// Reads `bootstrap.json`, or the `address` file of old shims, taken as it is.
pub fn read_endpoint(bundle: &Path) -> Option<Endpoint> {
    if let Ok(bytes) = fs::read(bundle.join("bootstrap.json")) {
        return serde_json::from_slice(&bytes).ok();
    }
    let address = fs::read_to_string(bundle.join("address")).ok()?;
    Some(Endpoint { version: 2, address, protocol: "ttrpc".into(), ..Default::default() })
}

/// The binary that made the shim of a bundle.
pub fn read_binary(bundle: &Path) -> Option<PathBuf> {
    fs::read_to_string(bundle.join("shim-binary-path")).ok().map(PathBuf::from)
}

/// Removes a bundle whose processes are gone: unmounts what is mounted in it, hides it, deletes it. Succeeds when absent.
pub fn remove(args: &Args, bundle: &Path) -> Result<()> {
    let rootfs = bundle.join("rootfs");
    // Mounts may be stacked; the bound is against a tree that cannot be emptied.
    for _ in 0..64 {
        if unmount(&rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_err() {
            break;
        }
    }
    if let Some(id) = bundle.file_name().and_then(|n| n.to_str()) {
        let hidden = bundle.with_file_name(format!(".{id}"));
        let _ = fs::rename(bundle, &hidden);
        absent(fs::remove_dir_all(&hidden)).with_context(|| format!("remove {}", hidden.display()))?;
        let work = work(args, id);
        absent(fs::remove_dir_all(&work)).with_context(|| format!("remove {}", work.display()))?;
    }
    Ok(())
}

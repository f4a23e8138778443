//! Network namespaces, pinned by a bind mount on a file.
use crate::sys;
use kernel::{Fault, Result, ResultExt, absent};
use messages::userns::UserNs;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use std::collections::BTreeSet;
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Makes a namespace with `lo` up, pinned at `path`. With a user namespace it is owned by that, from its birth: joining later is not enough to mount
/// sysfs. The pin keeps both (the shim asks the one for the other). The daemon's own threads never leave their namespace: a thread is made for it,
/// and ends.
pub(crate) fn make(path: &Path, userns: Option<&UserNs>) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    File::create_new(path).with_context(|| format!("create {}", path.display()))?;
    let pinned = std::thread::scope(|s| {
        let thread = std::thread::Builder::new().name("troupe-netns".into()).stack_size(128 << 10);
        let thread = thread.spawn_scoped(s, || -> Result<()> {
            match userns {
                None => unshare(CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from).context("unshare the network namespace")?,
                Some(userns) => enter_owned(userns)?,
            }
            sys::loopback_up().context("bring lo up")?;
            let none: Option<&str> = None;
            mount(Some("/proc/thread-self/ns/net"), path, none, MsFlags::MS_BIND, none)
                .map_err(std::io::Error::from)
                .with_context(|| format!("pin {}", path.display()))
        });
        thread.map_err(Fault::from).and_then(|t| t.join().unwrap_or_else(|_| Err(Fault::internal("the namespace's thread panicked"))))
    });
    if pinned.is_err() {
        let _ = std::fs::remove_file(path);
    }
    pinned
}

/// Moves this thread into a new network namespace that a new user namespace owns; as a user it stays who it is.
fn enter_owned(userns: &UserNs) -> Result<()> {
    let owner = sys::Owner::spawn().context("make a user namespace")?;
    for (file, map) in [("uid_map", userns.uid), ("gid_map", userns.gid)] {
        std::fs::write(format!("/proc/{}/{file}", owner.pid()), map.line())
            .with_context(|| format!("map ids {} of the user namespace ({file})", map.label()))?;
    }
    let netns = File::open(format!("/proc/{}/ns/net", owner.pid())).context("open the network namespace")?;
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from).context("enter the network namespace")
}

/// Connects to a port on the loopback of a namespace (empty = our own): first over IPv4, then IPv6.
pub(crate) fn dial(netns: &str, port: u16, limit: Duration) -> Result<TcpStream> {
    let connect = || -> Result<TcpStream> {
        if !netns.is_empty() {
            let file = File::open(netns).with_context(|| format!("open {netns}"))?;
            setns(file, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from).with_context(|| format!("enter {netns}"))?;
        }
        let v4 = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), limit);
        let stream = v4.or_else(|e| TcpStream::connect_timeout(&(Ipv6Addr::LOCALHOST, port).into(), limit).map_err(|_| e));
        let refused = |e| Fault::unavailable(format!("failed to connect to localhost:{port} inside the pod: {e}"));
        let stream = stream.map_err(refused)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    // A thread of its own enters the namespace, and ends; its socket stays there.
    std::thread::scope(|s| {
        let thread = std::thread::Builder::new().name("troupe-dial".into()).stack_size(128 << 10).spawn_scoped(s, connect);
        thread.map_err(Fault::from).and_then(|t| t.join().unwrap_or_else(|_| Err(Fault::internal("the dialling thread panicked"))))
    })
}

/// Unpins; succeeds when there is nothing.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(e) => return Err(std::io::Error::from(e)).with_context(|| format!("unpin {}", path.display())),
    }
    absent(std::fs::remove_file(path)).with_context(|| format!("remove {}", path.display()))
}

/// Is a namespace pinned there? After a reboot the file may be left without one, or nothing at all.
pub(crate) fn alive(path: &Path) -> bool {
    /// `NSFS_MAGIC` of the kernel's `magic.h`.
    const NSFS: rustix::fs::FsWord = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|s| s.f_type == NSFS)
}

/// Namespaces of ours that nobody knows. Only in a directory of our own: in a shared one others' namespaces look the same.
pub(crate) fn strays(dir: &Path, known: &BTreeSet<String>) -> Vec<PathBuf> {
    if dir == Path::new("/var/run/netns") || dir == Path::new("/run/netns") {
        return vec![];
    }
    let all = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let ours = all.filter(|e| e.file_name().to_string_lossy().starts_with("cni-")).map(|e| e.path());
    ours.filter(|path| !known.contains(&*path.to_string_lossy())).collect()
}

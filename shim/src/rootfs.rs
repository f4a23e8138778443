//! A container's root with mapped ids: an overlay upon idmapped layers, or an idmapped bind.
//!
//! An overlay keeps copies of its layers' mounts, so the mapped layers need a place only while it is made. That place is a mount namespace of a
//! thread that ends: whatever happens, nothing is left in the machine's mount table.
use crate::idmap::{self, Mapper, Maps, Ranges};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use proto::types::Mount;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The mapping that a mount's options ask for (`uidmap=`, `gidmap=`, as containerd's snapshotters write them).
pub fn wanted(m: &Mount) -> io::Result<Option<Maps>> {
    let option = |name: &str| m.options.iter().find_map(|o| o.strip_prefix(name)).map(Ranges::parse).transpose();
    let maps = Maps { uid: option("uidmap=")?.unwrap_or_default(), gid: option("gidmap=")?.unwrap_or_default() };
    match (maps.uid.is_empty(), maps.gid.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(maps)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "uidmap and gidmap go together")),
    }
}

/// Mounts it on `at`.
pub fn mount_mapped(m: &Mount, maps: &Maps, mapper: &Mapper, at: &Path) -> io::Result<()> {
    let userns = mapper.namespace(maps)?;
    let tree = match m.r#type.as_str() {
        "overlay" => overlay(m, &userns, at)?,
        "bind" => bind(m, &userns)?,
        other => return Err(io::Error::new(io::ErrorKind::Unsupported, format!("a root of type {other:?} cannot have mapped ids"))),
    };
    idmap::attach(&tree, at)
}

fn bind(m: &Mount, userns: &OwnedFd) -> io::Result<OwnedFd> {
    let source = Path::new(&m.source);
    let tree = idmap::clone_tree(source, m.options.iter().any(|o| o == "rbind"))?;
    idmap::map(&tree, userns, false, source)?;
    if m.options.iter().any(|o| o == "ro") {
        idmap::read_only(&tree)?;
    }
    Ok(tree)
}

fn overlay(m: &Mount, userns: &OwnedFd, at: &Path) -> io::Result<OwnedFd> {
    let layers = m.options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap_or_default().to_owned();
    let layers: Vec<&str> = layers.split(':').filter(|l| !l.is_empty()).collect();
    let skip = ["uidmap=", "gidmap=", "lowerdir=", "ro", "rw"];
    let rest: Vec<&str> =
        m.options.iter().map(String::as_str).filter(|o| !skip.iter().any(|s| o == s || (s.ends_with('=') && o.starts_with(s)))).collect();
    let read_only = m.options.iter().any(|o| o == "ro");
    std::thread::scope(|s| {
        let thread = std::thread::Builder::new().name("layers".into()).stack_size(128 << 10);
        let thread = thread.spawn_scoped(s, || made(&layers, &rest, read_only, userns, at))?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the layers' thread died")))
    })
}

/// In a thread of its own. Short relative names of the layers also leave room for many in the options' one page.
fn made(layers: &[&str], rest: &[&str], read_only: bool, userns: &OwnedFd, at: &Path) -> io::Result<OwnedFd> {
    let none: Option<&str> = None;
    let what = |what: &str, e: nix::Error| io::Error::new(io::Error::from(e).kind(), format!("{what}: {e}"));
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| what("a mount namespace for the layers", e))?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(|e| what("make it private", e))?;
    mount(Some("layers"), at, Some("tmpfs"), MsFlags::empty(), Some("mode=700,size=1m")).map_err(|e| what("a place for the layers", e))?;
    std::env::set_current_dir(at)?;
    for (number, layer) in layers.iter().enumerate() {
        let tree = idmap::clone_tree(Path::new(layer), false)?;
        idmap::map(&tree, userns, false, Path::new(layer))?;
        std::fs::create_dir(number.to_string())?;
        idmap::attach(&tree, Path::new(&number.to_string()))?;
    }
    let lower: Vec<String> = (0..layers.len()).map(|n| n.to_string()).collect();
    let lower = format!("lowerdir={}", lower.join(":"));
    let options: Vec<&str> = rest.iter().copied().chain([lower.as_str()]).collect();
    std::fs::create_dir("merged")?;
    mount(Some("overlay"), "merged", Some("overlay"), MsFlags::empty(), Some(options.join(",").as_str()))
        .map_err(|e| what("mount an overlay upon layers with mapped ids", e))?;
    let tree = idmap::clone_tree(Path::new("merged"), false)?;
    if read_only {
        idmap::read_only(&tree)?;
    }
    Ok(tree)
}

/// Can this machine do it? Makes a small root below the working directory and looks at it as the pod would.
pub fn probe() -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let place = std::env::current_dir()?.join(".probe-userns");
    let _ = std::fs::remove_dir_all(&place);
    let mut options = vec!["uidmap=0:100000:10".to_owned(), "gidmap=0:100000:10".to_owned(), "index=off".to_owned()];
    for (name, option) in [("lower", "lowerdir="), ("upper", "upperdir="), ("work", "workdir=")] {
        std::fs::create_dir_all(place.join(name))?;
        options.push(format!("{option}{}", place.join(name).display()));
    }
    let at = place.join("root");
    std::fs::create_dir(&at)?;
    std::fs::write(place.join("lower/file"), "")?;
    let m = Mount { r#type: "overlay".into(), source: "overlay".into(), options, ..Default::default() };
    let maps = wanted(&m)?.unwrap_or_default();
    let tried = Mapper::default().namespace(&maps).and_then(|userns| overlay(&m, &userns, &at));
    let owner = tried.and_then(|tree| {
        use std::os::fd::AsRawFd;
        Ok(std::fs::metadata(format!("/proc/self/fd/{}/file", tree.as_raw_fd()))?.uid())
    });
    let _ = std::fs::remove_dir_all(&place);
    match owner? {
        100_000 => Ok(()),
        other => Err(io::Error::other(format!("a layer's file appears as user {other} instead of 100000"))),
    }
}

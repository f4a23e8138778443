//! What the engine cannot do for containers with users of their own, done before it begins, in the worker's own mount namespace, which ends with it:
//! nothing of this is ever in the machine's mount table, and nothing has to be given back.
//!
//! - libcontainer 0.7 refuses idmapped mounts: they are made here, and it is handed plain binds.
//! - It opens sources of binds as root of the user namespace, who may not pass on the way to, say, `/var/lib/kubelet`: they are put where it may.
//! - It opens the pod's namespaces by `/proc/<shim>/fd`, which that root may not read: they are opened here, and it is handed its own descriptors.
//! - Devices cannot be made within a user namespace: they are made here, and bound.
use crate::idmap::{self, Mapper, Maps};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::{Value, json};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Prepares a bundle, if there is need. What is answered has to stay open until the container is made.
pub fn prepare(bundle: &Path) -> io::Result<Vec<File>> {
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let spaces = config.pointer("/linux/namespaces").and_then(Value::as_array);
    let userns = spaces.is_some_and(|all| all.iter().any(|n| n["type"] == "user"));
    let mapped = config["mounts"].as_array().is_some_and(|all| all.iter().any(|m| wish(m, &Maps::default()).is_some()));
    if !userns && !mapped {
        return Ok(vec![]);
    }
    let held = if userns { open_namespaces(&mut config)? } else { vec![] };
    let place = enter(bundle)?;
    let own = if userns { Maps::of(&config["linux"]) } else { Maps::default() };
    let mapper = Mapper::of(&config)?;
    for (number, m) in config["mounts"].as_array_mut().into_iter().flatten().enumerate() {
        let maps = wish(m, &own);
        let cgroup = m["source"].as_str().is_some_and(super::hierarchies::is_one);
        if is_bind(m) && !cgroup && (userns || maps.is_some()) {
            let to = place.join(number.to_string());
            bind(m, maps, &mapper, &to).map_err(|e| io::Error::new(e.kind(), format!("mount {}: {e}", m["destination"])))?;
        }
    }
    if userns {
        bind_devices(&mut config, &own, &place)?;
    }
    std::fs::write(&path, config.to_string())?;
    Ok(held)
}

fn options(m: &Value) -> impl Iterator<Item = &str> {
    m["options"].as_array().into_iter().flatten().filter_map(Value::as_str)
}

fn is_bind(m: &Value) -> bool {
    m["type"] == "bind" || options(m).any(|o| o == "bind" || o == "rbind")
}

/// The mapping that a mount asks for: its own, or by `idmap` the container's.
fn wish(m: &Value, own: &Maps) -> Option<Maps> {
    let maps = Maps::of(m);
    match maps.is_empty() {
        false => Some(maps),
        true => options(m).any(|o| o == "idmap" || o == "ridmap").then(|| own.clone()),
    }
}

/// A private mount namespace, with a place in it that the container's root can reach. What the host mounts later still arrives.
fn enter(bundle: &Path) -> io::Result<PathBuf> {
    let place = bundle.join("stage");
    std::fs::create_dir_all(&place)?;
    let none: Option<&str> = None;
    let what = |e: nix::Error| io::Error::new(io::Error::from(e).kind(), format!("a mount namespace for the engine: {e}"));
    unshare(CloneFlags::CLONE_NEWNS).map_err(what)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).map_err(what)?;
    mount(Some("stage"), &place, Some("tmpfs"), MsFlags::empty(), Some("mode=755,size=1m")).map_err(what)?;
    Ok(place)
}

/// Copies one source to its place, with mapped ids if wished.
fn bind(m: &mut Value, maps: Option<Maps>, mapper: &Mapper, to: &Path) -> io::Result<()> {
    let source = PathBuf::from(m["source"].as_str().unwrap_or_default());
    let recursive = options(m).any(|o| o == "rbind");
    let all = options(m).any(|o| o == "ridmap");
    let tree = idmap::clone_tree(&source, recursive)?;
    if let Some(maps) = maps {
        idmap::map(&tree, &mapper.namespace(&maps)?, all, &source)?;
    }
    if std::fs::metadata(&source)?.is_dir() {
        std::fs::create_dir(to)?;
    } else {
        File::create(to)?;
    }
    idmap::attach(&tree, to)?;
    m["source"] = to.to_string_lossy().into();
    if let Some(m) = m.as_object_mut() {
        m.remove("uidMappings");
        m.remove("gidMappings");
    }
    if let Some(options) = m["options"].as_array_mut() {
        options.retain(|o| o != "idmap" && o != "ridmap");
    }
    Ok(())
}

fn open_namespaces(config: &mut Value) -> io::Result<Vec<File>> {
    let mut held = vec![];
    for n in config.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(path) = n["path"].as_str().filter(|p| !p.is_empty()) else { continue };
        let file = File::open(path).map_err(|e| io::Error::new(e.kind(), format!("open the {} namespace {path}: {e}", n["type"])))?;
        n["path"] = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        held.push(file);
    }
    Ok(held)
}

/// Devices that the specification adds become binds of nodes with their numbers.
fn bind_devices(config: &mut Value, own: &Maps, place: &Path) -> io::Result<()> {
    let devices = config.pointer_mut("/linux/devices").map(Value::take);
    let mut binds = vec![];
    for (number, device) in devices.as_ref().and_then(Value::as_array).into_iter().flatten().enumerate() {
        let (path, to) = (device["path"].as_str().unwrap_or_default(), place.join(format!("device{number}")));
        let id = |key: &str| device[key].as_u64().and_then(|n| u32::try_from(n).ok());
        let kind = if device["type"] == "b" { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
        let numbers = makedev(device["major"].as_u64().unwrap_or(0), device["minor"].as_u64().unwrap_or(0));
        let mode = Mode::from_bits_truncate(id("fileMode").unwrap_or(0o666));
        let make = || -> io::Result<()> {
            mknod(&to, kind, mode, numbers)?;
            std::fs::set_permissions(&to, std::os::unix::fs::PermissionsExt::from_mode(mode.bits()))?;
            std::os::unix::fs::chown(&to, own.uid.outside(id("uid").unwrap_or(0)), own.gid.outside(id("gid").unwrap_or(0)))
        };
        make().map_err(|e| io::Error::new(e.kind(), format!("make device {path}: {e}")))?;
        binds.push(json!({"destination": path, "type": "bind", "source": to, "options": ["bind"]}));
    }
    if let Some(mounts) = config["mounts"].as_array_mut() {
        mounts.extend(binds);
    }
    if let Some(linux) = config["linux"].as_object_mut() {
        linux.remove("devices");
    }
    Ok(())
}

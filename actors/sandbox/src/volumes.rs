//! Volumes that come from images: CRI's image mounts, and the VOLUMEs that an image's configuration declares.
//!
//! Owns: below the daemon's state `image-volumes/<pod>/<manifest>` (mounts) and snapshots of the same names (read-only views, which keep the image's
//! layers from the collector); below its root `containers/<id>/volumes` (directories). States: an image is mounted once for each pod and kept until the
//! pod stops. On a crash: names are derived from pod and manifest, so that the next generation finds what there is, and a stop gives back what it
//! finds, whoever made it. Spans: the mounting of each image, copying up. Limits: see [`LOOK`] and [`COPY`].
mod copy;

use crate::World;
use crate::record::ContainerRow;
use kernel::{Class, Cx, Fault, Result, ResultExt, absent};
use messages::image::{self, Image};
use messages::snapshot::{self, Mount};
use nix::mount::{MntFlags, MsFlags, umount2};
use proto::cri;
use serde_json::Value;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// What the kubelet looks for in the error of a container whose image volume could not be mounted.
const FAILED: &str = "ImageVolumeMountFailed";
/// Mounting takes milliseconds.
const LOOK: Duration = Duration::from_secs(30);
/// An image may bring gigabytes below a VOLUME.
const COPY: Duration = Duration::from_secs(600);

/// Key of the view that holds an image for a pod, after [`prefix`].
fn prefix(pod: &str) -> String {
    format!("image-volume-{pod}-")
}

/// Where a pod's image volumes are mounted.
pub fn directory(world: &World, pod: &str) -> PathBuf {
    world.args.state.join("image-volumes").join(pod)
}

/// Directory of what a container has for itself.
fn container_dir(world: &World, id: &str) -> PathBuf {
    world.args.root.join("containers").join(id)
}

/// The container's configuration with every image mount and VOLUME made a plain bind of a directory of the host.
pub async fn resolve(world: &World, cx: &Cx, row: &ContainerRow, image: &Image, rootfs: &[Mount]) -> Result<cri::ContainerConfig> {
    let mut config = row.config.0.clone();
    for m in &mut config.mounts {
        let Some(spec) = m.image.take().filter(|i| !i.image.is_empty()) else { continue };
        let what = format!("{FAILED}: mount image {:?} at {:?}", spec.image, m.container_path);
        let made = cx.run("mount an image volume", |cx| async move { image_volume(world, &cx, &row.sandbox_id, m, &spec.image).await });
        made.await.context(what)?;
    }
    if !world.args.settings.ignore_image_volumes {
        let volumes = declared(world, cx, row, image, rootfs).await?;
        config.mounts.extend(volumes);
    }
    Ok(config)
}

async fn image_volume(world: &World, cx: &Cx, pod: &str, m: &mut cri::Mount, wanted: &str) -> Result<()> {
    if !m.host_path.is_empty() {
        return Err(Fault::invalid_argument(format!("host_path must be empty for an image, but is {:?}", m.host_path)));
    }
    if !m.readonly {
        return Err(Fault::invalid_argument("an image can only be mounted readonly"));
    }
    let image = world.args.images.call(cx, image::Resolve { reference: wanted.to_owned() }).await?;
    let image = image.ok_or_else(|| Fault::not_found("the image is not on this node: pull it first"))?;
    let (dir, mappable) = mounted(world, cx, pod, &image).await?;
    if !mappable {
        // The kernel maps no owners of an overlay: in a pod with users of its own its files belong to nobody, and can be read by all who may.
        m.uid_mappings.clear();
        m.gid_mappings.clear();
    }
    let below = std::mem::take(&mut m.image_sub_path);
    m.host_path = cx.blocking("look into an image volume", LOOK, move || sub_path(&dir, &below)).await?;
    Ok(())
}

/// Mounts the image for the pod unless it is there already; answers where, and whether its owners can be mapped.
async fn mounted(world: &World, cx: &Cx, pod: &str, image: &Image) -> Result<(PathBuf, bool)> {
    let hex = image.manifest.trim_start_matches("sha256:").to_owned();
    let (dir, key) = (directory(world, pod).join(&hex), prefix(pod) + &hex);
    let _guard = world.lock(&key).await;
    let snapshotter = world.snapshotter(&world.pod().map(|p| p.handler).unwrap_or_default());
    let stat = snapshot::Mounts { snapshotter: snapshotter.clone(), key: key.clone(), ephemeral: false };
    let mounts = match world.args.snapshots.call(cx, stat).await {
        Err(e) if e.is_not_found() => {
            let prepare = snapshot::Prepare { snapshotter, key, parent: image.chain_id.clone(), view: true, labels: Default::default() };
            prepare_unpacked(world, cx, &image.id, prepare).await?
        }
        other => other?,
    };
    let (at, mappable) = (dir.clone(), mounts.first().is_some_and(|m| m.fs_type == "bind"));
    cx.blocking("mount an image volume", LOOK, move || if is_mounted(&at)? { Ok(()) } else { attach(&mounts, &at, true) }).await?;
    Ok((dir, mappable))
}

/// Makes a snapshot upon an image; unpacks the image first where this snapshotter does not have it yet.
pub async fn prepare_unpacked(world: &World, cx: &Cx, image: &str, prepare: snapshot::Prepare) -> Result<Vec<Mount>> {
    match world.args.snapshots.call(cx, prepare.clone()).await {
        Err(e) if e.is_not_found() && !prepare.parent.is_empty() => {
            let unpack = image::Unpack { id: image.to_owned(), snapshotter: prepare.snapshotter.clone() };
            let parts = cx.run("unpack the image", |cx| async move { world.args.images.call(&cx, unpack).await });
            parts.await.with_context(|| format!("unpack image {image} for snapshotter {:?}", prepare.snapshotter))?;
            world.args.snapshots.call(cx, prepare).await
        }
        other => other,
    }
}

/// Path of a directory within the image that no link leads out of.
fn sub_path(root: &Path, below: &str) -> Result<String> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
    if below.is_empty() {
        return Ok(root.to_string_lossy().into_owned());
    }
    let outside = || Fault::invalid_argument(format!("image_sub_path {below:?} leaves the image"));
    let mut depth = 0i32;
    for part in Path::new(below.trim_start_matches('/')).components() {
        depth += match part {
            Component::Normal(_) => 1,
            Component::ParentDir => -1,
            _ => 0,
        };
        if depth < 0 {
            return Err(outside());
        }
    }
    let io = |e: rustix::io::Errno| Fault::from(std::io::Error::from(e)).context(format!("image_sub_path {below:?}"));
    let base = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(io)?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let found = openat2(&base, below.trim_start_matches('/'), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).map_err(io)?;
    let file = std::fs::File::from(found);
    if !file.metadata()?.is_dir() {
        return Err(Fault::invalid_argument(format!("image_sub_path {below:?}: only directory subpath is supported")));
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)))?;
    if !path.starts_with(root) {
        return Err(outside());
    }
    Ok(path.to_string_lossy().into_owned())
}

fn is_mounted(dir: &Path) -> Result<bool> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let wanted = dir.to_string_lossy().replace(' ', "\\040");
    Ok(table.lines().any(|l| l.split(' ').nth(4) == Some(&wanted)))
}

/// Mounts a snapshot.
fn attach(mounts: &[Mount], at: &Path, read_only: bool) -> Result<()> {
    std::fs::create_dir_all(at).with_context(|| format!("create {}", at.display()))?;
    let mount = mounts.first().ok_or_else(|| Fault::internal("a snapshot without mounts"))?;
    let io = |e: nix::Error| Fault::from(std::io::Error::from(e)).context(format!("mount {} on {}", mount.source, at.display()));
    let none = None::<&str>;
    if mount.fs_type == "bind" {
        nix::mount::mount(Some(mount.source.as_str()), at, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).map_err(io)?;
        if read_only {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            if let Err(e) = nix::mount::mount(none, at, none, flags, none) {
                let _ = umount2(at, MntFlags::MNT_DETACH);
                return Err(io(e));
            }
        }
        return Ok(());
    }
    // Whoever looks into an image here sees the owners as the image has them; mappings are for the container's own mounts.
    let other = |o: &&str| *o != "ro" && *o != "rw" && !o.starts_with("uidmap=") && !o.starts_with("gidmap=");
    let options: Vec<&str> = mount.options.iter().map(String::as_str).filter(other).collect();
    let flags = if read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    let data = options.join(",");
    nix::mount::mount(Some(mount.source.as_str()), at, Some(mount.fs_type.as_str()), flags, Some(data.as_str())).map_err(io)
}

/// Directories for the image's VOLUMEs, filled with what the image has there.
async fn declared(world: &World, cx: &Cx, row: &ContainerRow, image: &Image, rootfs: &[Mount]) -> Result<Vec<cri::Mount>> {
    let Some(volumes) = image.config.pointer("/config/Volumes").and_then(Value::as_object) else { return Ok(vec![]) };
    let mut places: Vec<String> = volumes.keys().map(|place| clean(place)).collect();
    places.sort();
    places.dedup();
    places.retain(|place| place != "/" && !row.config.0.mounts.iter().any(|m| clean(&m.container_path) == *place));
    if places.is_empty() {
        return Ok(vec![]);
    }
    let (mounts, dir, id) = (rootfs.to_vec(), container_dir(world, &row.id), row.id.clone());
    let users = crate::container::namespace_options(&row.config.0).userns_options.unwrap_or_default();
    let fill = move || {
        // Mounts of this thread's own namespace vanish with the thread, whatever happens to the daemon.
        let copying = std::thread::Builder::new().name("copy-up".into()).spawn(move || fill(&mounts, &dir, &places));
        copying?.join().map_err(|_| Fault::internal("copying up panicked"))?
    };
    let made = cx.run("copy up the image's volumes", |cx| async move { cx.blocking("copy up volumes", COPY, fill).await });
    let mut made = made.await.with_context(|| format!("volumes of container {id}"))?;
    for m in &mut made {
        (m.uid_mappings, m.gid_mappings) = (users.uids.clone(), users.gids.clone());
    }
    Ok(made)
}

/// `data/` and `/data` are the same place.
fn clean(place: &str) -> String {
    let mut path = PathBuf::from("/");
    for part in Path::new(place).components() {
        match part {
            Component::Normal(p) => path.push(p),
            Component::ParentDir => _ = path.pop(),
            _ => {}
        }
    }
    path.to_string_lossy().into_owned()
}

fn fill(mounts: &[Mount], dir: &Path, places: &[String]) -> Result<Vec<cri::Mount>> {
    let io = |e: nix::Error| Fault::from(std::io::Error::from(e)).context("a mount namespace to look into the image");
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(io)?;
    nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).map_err(io)?;
    let root = dir.join("image");
    attach(mounts, &root, false)?;
    let result =
        places.iter().enumerate().map(|(number, place)| one(&root, &dir.join("volumes").join(number.to_string()), place)).collect();
    umount2(&root, MntFlags::MNT_DETACH).map_err(io)?;
    std::fs::remove_dir(&root)?;
    result
}

fn one(root: &Path, volume: &Path, place: &str) -> Result<cri::Mount> {
    std::fs::create_dir_all(volume).with_context(|| format!("create {}", volume.display()))?;
    match copy::open_below(root, Path::new(place)) {
        Ok(source) => copy::tree(source, volume).with_context(|| format!("copy {place}"))?,
        Err(e) if e.is_not_found() => {}
        Err(e) if e.class == Class::InvalidArgument => return Err(e.context(format!("the image's VOLUME {place} is not a directory"))),
        Err(e) => return Err(e.context(format!("the image's VOLUME {place}"))),
    }
    let host_path = volume.to_string_lossy().into_owned();
    Ok(cri::Mount { container_path: place.into(), host_path, selinux_relabel: true, ..Default::default() })
}

/// Gives back a container's own volumes.
pub async fn remove(world: &World, cx: &Cx, id: &str) -> Result<()> {
    let dir = container_dir(world, id);
    let remove = move || absent(std::fs::remove_dir_all(&dir)).with_context(|| format!("remove {}", dir.display()));
    cx.blocking("remove volumes", COPY, remove).await
}

/// Unmounts the image volumes below [`directory`]; answers whether there may have been any. Blocking.
pub fn unmount(dir: &Path) -> Result<bool> {
    let list = match std::fs::read_dir(dir) {
        Ok(list) => list,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Fault::from(e).context(dir.display())),
    };
    for entry in list {
        let path = entry?.path();
        match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(e) => return Err(Fault::from(std::io::Error::from(e)).context(format!("unmount {}", path.display()))),
        }
        // Never a tree: if anything is still mounted, this fails instead of emptying an image.
        std::fs::remove_dir(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(true)
}

/// Gives back the snapshots that the pod's image volumes were mounted from, once they are unmounted; then the directory, whose being there says
/// that there is something to give back.
pub async fn release(world: &World, cx: &Cx, pod: &str) -> Result<()> {
    let (prefix, dir) = (prefix(pod), directory(world, pod));
    for s in world.args.snapshots.call(cx, snapshot::List { snapshotter: String::new() }).await? {
        if s.key.starts_with(&prefix) {
            match world.args.snapshots.call(cx, snapshot::Remove { snapshotter: s.snapshotter, key: s.key }).await {
                Err(e) if !e.is_not_found() => return Err(e.context("release an image volume")),
                _ => {}
            }
        }
    }
    let remove = move || absent(std::fs::remove_dir(&dir)).with_context(|| format!("remove {}", dir.display()));
    cx.blocking("remove the directory of image volumes", LOOK, remove).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn places_and_sub_paths_stay_inside() {
        assert_eq!((clean("data/"), clean("/a/../b"), clean("../../x")), ("/data".into(), "/b".into(), "/x".into()));
        let dir = std::env::temp_dir().join(format!("troupe-sub-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("a/b")).unwrap();
        std::fs::write(dir.join("a/file"), "x").unwrap();
        std::os::unix::fs::symlink("/a/b", dir.join("link")).unwrap();
        std::os::unix::fs::symlink("../../../../etc", dir.join("out")).unwrap();
        assert_eq!(sub_path(&dir, "link").unwrap(), dir.join("a/b").to_string_lossy());
        assert!(sub_path(&dir, "a/file").unwrap_err().message.contains("only directory subpath is supported"));
        assert!(sub_path(&dir, "../etc").unwrap_err().message.contains("leaves the image"));
        assert!(sub_path(&dir, "out").is_err(), "the link ends within the image, where there is no etc");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

//! CheckpointContainer: the processes of a running container, by CRIU, with what a restore needs beside them, in one archive.
//!
//! | entry | what |
//! |---|---|
//! | `checkpoint/` | CRIU's images |
//! | `config.dump` | who the container is, which image it runs |
//! | `spec.dump` | its OCI specification |
//! | `status.dump`, `status` | its CRI status, and the daemon's |
//! | `rootfs-diff.tar` | what it changed in its root, as a layer |
//! | `container.log` | its log |
//!
//! The names are checkpointctl's. The container goes on running.
use crate::World;
use crate::record::{ContainerRow, Phase};
use kernel::{Cx, Fault, Result, ResultExt, absent};
use messages::{snapshot, task};
use proto::cri;
use proto::prost_types::Timestamp;
use serde_json::json;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A container of some gigabytes takes a minute or two on a slow disk; the client's own deadline is shorter, as a rule.
const LONGEST: Duration = Duration::from_secs(3600);

/// Reading what is small.
const LOOK: Duration = Duration::from_secs(30);
/// Lines of CRIU's log that an error quotes.
const COMPLAINTS: usize = 3;

/// CRIU, where there is one: the embedded engine runs it. An external runtime looks for its own.
fn criu() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|d| d.join("criu")).find(|p| p.is_file());
    let missing = || Fault::failed_precondition("checkpoints need CRIU, and there is no criu in the daemon's PATH: install it");
    found.map(drop).ok_or_else(missing)
}

/// Writes the archive at the request's location.
pub async fn run(world: &World, cx: &Cx, request: cri::CheckpointContainerRequest) -> Result<()> {
    if !world.args.settings.criu {
        return Err(Fault::failed_precondition("checkpoints are disabled on this node: set enable_criu"));
    }
    if world.pod().is_none_or(|p| p.runtime.binary_name.is_empty()) {
        criu()?;
    }
    let location = PathBuf::from(&request.location);
    if !location.is_absolute() {
        return Err(Fault::invalid_argument(format!("location {:?} is not an absolute path", request.location)));
    }
    // Not the pod's: whoever stops it need not wait for a checkpoint, which ends with its container.
    let _guard = world.lock(&request.container_id).await;
    let row = crate::container::known(world, &request.container_id)?;
    if row.phase != Phase::Running {
        return Err(Fault::failed_precondition(format!(
            "container {} is in state {:?}: only running containers can be checkpointed",
            row.id, row.phase
        )));
    }
    let cx = if request.timeout > 0 { cx.with_timeout(Duration::from_secs(request.timeout as u64)) } else { cx.clone() };
    // Among the pod's files: what a crash leaves goes with the pod, or with the next checkpoint.
    let dir = world.files().join(format!("checkpoint-{}", row.id));
    let made = write(world, &cx, &row, &dir, &location).await;
    let gone = cx.without_deadline().blocking("remove the checkpoint's directory", LONGEST, move || remove(&dir)).await;
    made.with_context(|| format!("checkpointing container {} failed", row.id)).and(gone)
}

fn remove(dir: &Path) -> Result<()> {
    absent(std::fs::remove_dir_all(dir)).with_context(|| format!("remove {}", dir.display()))
}

async fn write(world: &World, cx: &Cx, row: &ContainerRow, dir: &Path, location: &Path) -> Result<()> {
    let fresh = dir.to_owned();
    let make = move || {
        remove(&fresh)?;
        DirBuilder::new().recursive(true).mode(0o700).create(fresh.join("checkpoint"))?;
        Ok(())
    };
    cx.blocking("make the checkpoint's directory", LOOK, make).await?;
    let checkpoint = task::Checkpoint { id: row.id.clone(), images: dir.join("checkpoint"), work: dir.to_owned() };
    let written = cx.run("write the processes down", |cx| async move { world.args.tasks.call(&cx, checkpoint).await }).await;
    if let Err(fault) = written {
        let log = dir.join("dump.log");
        let said = cx.without_deadline().blocking("read CRIU's log", LOOK, move || Ok(complaint(&log))).await?;
        return Err(if said.is_empty() { fault } else { Fault::failed_precondition(format!("CRIU says {said:?}: {fault}")) });
    }
    let mounts = snapshot::Mounts { snapshotter: row.snapshotter.clone(), key: row.id.clone(), ephemeral: false };
    let upper = world.args.snapshots.call(cx, mounts).await?;
    let upper = upper.iter().find_map(|m| m.options.iter().find_map(|o| o.strip_prefix("upperdir="))).map(PathBuf::from);
    let status = world.args.view.0.load().containers.get(&row.id).map(|c| c.status.clone()).unwrap_or_default();
    let files = vec![
        ("config.dump", config(row, &status)),
        ("spec.dump", row.spec.text().to_string()),
        ("status.dump", dump(&status)),
        ("status", own(row)),
    ];
    let (dir, location, log) = (dir.to_owned(), location.to_owned(), row.log_path.clone());
    let archive = move || {
        for (name, text) in files {
            std::fs::write(dir.join(name), text)?;
        }
        if let Some(upper) = upper {
            layer(&upper, File::create(dir.join("rootfs-diff.tar"))?).context("what the container changed in its root")?;
        }
        if Path::new(&log).is_file() {
            std::fs::copy(&log, dir.join("container.log"))?;
        }
        pack(&dir, &location).with_context(|| format!("write {}", location.display()))
    };
    cx.run("write the archive", |cx| async move { cx.blocking("write the archive", LONGEST, archive).await }).await
}

/// The last complaints in CRIU's log.
fn complaint(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let errors: Vec<&str> = text.lines().filter(|l| l.contains("Error")).collect();
    errors[errors.len().saturating_sub(COMPLAINTS)..].join("; ")
}

/// An RFC 3339 time, as Go writes it.
fn time(ns: i64) -> String {
    Timestamp { seconds: ns.div_euclid(1_000_000_000), nanos: ns.rem_euclid(1_000_000_000) as i32 }.to_string()
}

fn config(row: &ContainerRow, status: &cri::ContainerStatus) -> String {
    let image = status.image.as_ref().map_or("", |i| i.image.as_str());
    let name = row.config.0.metadata.clone().unwrap_or_default().name;
    json!({"id": row.id, "name": name, "rootfsImage": image, "rootfsImageName": image, "rootfsImageRef": row.image_ref, "runtime": "io.containerd.runc.v2",
        "createdTime": time(row.created_ns), "checkpointedTime": time(crate::record::now_ns()), "restoredTime": "0001-01-01T00:00:00Z", "restored": false})
    .to_string()
}

/// CRI's status, under its names.
fn dump(s: &cri::ContainerStatus) -> String {
    json!({"id": s.id, "metadata": s.metadata, "state": s.state, "created_at": s.created_at, "started_at": s.started_at, "image": s.image,
        "image_ref": s.image_ref, "image_id": s.image_id, "labels": s.labels, "annotations": s.annotations, "mounts": s.mounts, "log_path": s.log_path})
    .to_string()
}

/// The daemon's own, which checkpointctl reads the pid and the times from.
fn own(row: &ContainerRow) -> String {
    json!({"Version": "v1", "Pid": row.pid, "CreatedAt": row.created_ns, "StartedAt": row.started_ns, "FinishedAt": 0, "ExitCode": 0, "Reason": "", "Message": ""})
        .to_string()
}

/// The directory of overlayfs as a layer: what was deleted becomes a whiteout's name.
fn layer(upper: &Path, to: File) -> Result<()> {
    let mut tar = tar::Builder::new(to);
    tar.follow_symlinks(false);
    add(upper, Path::new(""), &mut tar)?;
    tar.finish().map_err(Fault::from)
}

fn add(upper: &Path, below: &Path, tar: &mut tar::Builder<File>) -> Result<()> {
    let mut entries = std::fs::read_dir(upper.join(below))?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), below.join(entry.file_name()));
        let found = path.symlink_metadata()?;
        if found.file_type().is_char_device() && found.rdev() == 0 {
            let mut whiteout = std::ffi::OsString::from(".wh.");
            whiteout.push(entry.file_name());
            empty(tar, &below.join(whiteout))?;
        } else if found.file_type().is_socket() {
            // A socket is bound again by whoever bound it.
        } else if found.is_file() {
            // It may grow or shrink meanwhile; the archive says how long it is before it is read.
            let (mut header, size) = (tar::Header::new_gnu(), found.len());
            header.set_metadata(&found);
            let data = File::open(&path)?.take(size).chain(std::io::repeat(0)).take(size);
            tar.append_data(&mut header, &name, data)?;
        } else {
            tar.append_path_with_name(&path, &name)?;
        }
        if found.is_dir() {
            let mut value = [0; 2];
            if rustix::fs::lgetxattr(&path, "trusted.overlay.opaque", &mut value).is_ok_and(|n| value[..n] == *b"y") {
                empty(tar, &name.join(".wh..wh..opq"))?;
            }
            add(upper, &name, tar)?;
        }
    }
    Ok(())
}

fn empty(tar: &mut tar::Builder<File>, name: &Path) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(0);
    header.set_mode(0o600);
    tar.append_data(&mut header, name, std::io::empty()).map_err(Fault::from)
}

/// Everything in one file, complete or not there at all.
fn pack(dir: &Path, location: &Path) -> Result<()> {
    let mut partial = location.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let made = (|| {
        let _ = std::fs::remove_file(&partial);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
        let mut tar = tar::Builder::new(file);
        tar.follow_symlinks(false);
        tar.append_dir_all("", dir)?;
        tar.into_inner()?.sync_all()?;
        std::fs::rename(&partial, location)
    })();
    made.map_err(|e| {
        let _ = std::fs::remove_file(&partial);
        Fault::from(e)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_archive_is_private_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (from, upper) = (dir.path().join("from"), dir.path().join("upper"));
        std::fs::create_dir_all(from.join("checkpoint")).unwrap();
        std::fs::create_dir_all(upper.join("etc")).unwrap();
        std::fs::write(upper.join("etc/changed"), "x").unwrap();
        use nix::sys::stat::{Mode, SFlag, mknod};
        mknod(&upper.join("etc/gone"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
        layer(&upper, File::create(from.join("rootfs-diff.tar")).unwrap()).unwrap();
        let to = dir.path().join("c.tar");
        pack(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().mode() & 0o777, 0o600);
        let names = |file: File| {
            let mut tar = tar::Archive::new(file);
            let mut names: Vec<String> =
                tar.entries().unwrap().map(|e| e.unwrap().path().unwrap().to_string_lossy().into_owned()).collect();
            names.sort();
            names
        };
        assert!(names(File::open(&to).unwrap()).iter().any(|n| n.trim_end_matches('/') == "checkpoint"));
        let layer = names(File::open(from.join("rootfs-diff.tar")).unwrap());
        assert_eq!(layer.iter().map(|n| n.trim_end_matches('/')).collect::<Vec<_>>(), ["etc", "etc/.wh.gone", "etc/changed"]);
        assert!(pack(&from, Path::new("/no/such/dir/c.tar")).is_err());
    }
}

//! A container's root file system.
use crate::idmap::Mapper;
use crate::rootfs;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proto::types::Mount;
use std::io;
use std::path::Path;

fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "bind" => (MsFlags::MS_BIND, true),
        "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "nodev" => (MsFlags::MS_NODEV, true),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "relatime" => (MsFlags::MS_RELATIME, true),
        _ => return None,
    })
}

/// Mounts all of them on `target`.
pub fn mount_all(list: &[Mount], target: &Path, mapper: &Mapper) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    for m in list {
        let at = if m.target.is_empty() { target.to_owned() } else { target.join(m.target.trim_start_matches('/')) };
        if let Some(maps) = rootfs::wanted(m)? {
            rootfs::mount_mapped(m, &maps, mapper, &at)?;
            continue;
        }
        let (mut flags, mut data) = (MsFlags::empty(), Vec::new());
        for option in &m.options {
            match flag(option) {
                Some((f, true)) => flags.insert(f),
                Some((f, false)) => flags.remove(f),
                None => data.push(option.as_str()),
            }
        }
        let data = data.join(",");
        let kind = if m.r#type == "bind" { None } else { Some(m.r#type.as_str()) };
        let error =
            |e: nix::Error| io::Error::new(io::Error::from(e).kind(), format!("mount {} {} on {}: {e}", m.r#type, m.source, at.display()));
        mount(Some(m.source.as_str()), &at, kind, flags, (!data.is_empty()).then_some(data.as_str())).map_err(error)?;
        if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
            let none: Option<&str> = None;
            mount(none, &at, none, flags | MsFlags::MS_REMOUNT, none).map_err(error)?;
        }
    }
    Ok(())
}

/// Unmounts everything on `target`.
pub fn unmount(target: &Path) -> io::Result<()> {
    loop {
        match umount2(target, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

//! Users and groups of a container, looked up in its image without mounting it: layers are read from the top down.
use kernel::{Fault, Result};
use messages::snapshot::Mount;
use std::path::{Path, PathBuf};

/// Who the process is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplemental groups.
    pub groups: Vec<u32>,
}

/// Directories of a root file system, the top one first.
pub fn layers(mounts: &[Mount]) -> Vec<PathBuf> {
    let Some(mount) = mounts.first() else { return vec![] };
    if mount.fs_type != "overlay" {
        return vec![mount.source.clone().into()];
    }
    let option = |name: &str| mount.options.iter().find_map(|o| o.strip_prefix(name));
    let upper = option("upperdir=").map(PathBuf::from);
    let lower = option("lowerdir=").unwrap_or_default().split(':').filter(|l| !l.is_empty()).map(PathBuf::from);
    upper.into_iter().chain(lower).collect()
}

/// Reads a small file of the image. Symbolic links are not followed: an image's `/etc/passwd` that points elsewhere is treated as absent.
pub fn read(layers: &[PathBuf], path: &str) -> String {
    for layer in layers {
        let full = layer.join(path.trim_start_matches('/'));
        let dir = full.parent().map(Path::to_owned).unwrap_or_default();
        if dir.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
            return String::new();
        }
        match full.symlink_metadata() {
            Ok(m) if m.is_file() && m.len() < 1 << 20 => return std::fs::read_to_string(full).unwrap_or_default(),
            Ok(_) => return String::new(),
            Err(_) => {}
        }
    }
    String::new()
}

fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|l| l.split(':').collect::<Vec<_>>()).filter(|f| f.len() >= 4)
}

/// Resolves `user[:group]` (names or numbers) by the image's files; `merge` adds the groups that `/etc/group` gives the user.
pub fn resolve(user: &str, passwd: &str, group: &str, merge: bool) -> Result<User> {
    let (name, wanted_group) = user.split_once(':').map_or((user, None), |(u, g)| (u, Some(g)));
    let name = if name.is_empty() { "0" } else { name };
    let number: Option<u32> = name.parse().ok();
    let row = rows(passwd).find(|f| f[0] == name || number.is_some_and(|n| f[2] == n.to_string()));
    let uid = match (number, &row) {
        (Some(n), _) => n,
        (None, Some(f)) => f[2].parse().map_err(|_| Fault::invalid_argument(format!("user {name:?} has a bad number in /etc/passwd")))?,
        (None, None) => return Err(Fault::invalid_argument(format!("user {name:?} is not in the image's /etc/passwd"))),
    };
    let own_group = row.as_ref().and_then(|f| f[3].parse().ok()).unwrap_or(0);
    let gid = match wanted_group {
        None | Some("") => own_group,
        Some(g) => match g.parse() {
            Ok(n) => n,
            Err(_) => rows(group)
                .find(|f| f[0] == g)
                .and_then(|f| f[2].parse().ok())
                .ok_or_else(|| Fault::invalid_argument(format!("group {g:?} is not in the image's /etc/group")))?,
        },
    };
    let mut groups = vec![gid];
    if merge && let Some(f) = &row {
        for g in rows(group).filter(|g| g[3].split(',').any(|m| m == f[0])) {
            if let Ok(n) = g[2].parse()
                && !groups.contains(&n)
            {
                groups.push(n);
            }
        }
    }
    Ok(User { uid, gid, groups })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_numbers_groups_and_strangers() {
        let (passwd, group) = ("root:x:0:0:::\nweb:x:1000:1000:::\n", "root:x:0:\nextra:x:2000:web,x\n");
        assert_eq!(resolve("web", passwd, group, true).unwrap(), User { uid: 1000, gid: 1000, groups: vec![1000, 2000] });
        assert_eq!(resolve("1000", passwd, group, false).unwrap(), User { uid: 1000, gid: 1000, groups: vec![1000] });
        assert_eq!(resolve("77:extra", passwd, group, true).unwrap(), User { uid: 77, gid: 2000, groups: vec![2000] });
        assert_eq!(resolve("", passwd, group, true).unwrap().uid, 0);
        assert!(resolve("ghost", passwd, group, true).unwrap_err().message.contains("ghost"));
    }
}

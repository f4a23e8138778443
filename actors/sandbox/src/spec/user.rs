//! Users and groups of a container, looked up in its image without mounting it: layers are read from the top down, as overlayfs would show them.
//!
//! The image is not trusted: links are followed within its root only, and nothing but regular files of bounded size is read.
use kernel::{Fault, Result};
use messages::snapshot::Mount;
use std::collections::BTreeSet;
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

/// Largest passwd or group file that is read.
const LARGEST: u64 = 10 << 20;
/// Links on the way to a file, as the kernel limits them.
const LINKS: usize = 40;

/// Who the process is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// All groups, the primary one among them, in order.
    pub groups: BTreeSet<u32>,
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

/// Reads a text file of the image; empty when there is none.
pub fn read(layers: &[PathBuf], path: &str) -> Result<String> {
    let Some(found) = locate(layers, path) else { return Ok(String::new()) };
    let refused = |why: &str| Fault::invalid_argument(format!("{path} of the image {why}"));
    // Not blocking: what was a file a moment ago may be a FIFO now.
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC).open(&found);
    let file = file.map_err(|e| Fault::from(e).context(format!("open {path} of the image")))?;
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Err(refused("is not a regular file"));
    }
    let mut text = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut text).map_err(|e| Fault::from(e).context(format!("read {path} of the image")))?;
    if text.len() as u64 > LARGEST {
        return Err(refused("is larger than 10 MiB"));
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Where a path of the merged tree lies. Links are followed within the tree.
fn locate(layers: &[PathBuf], path: &str) -> Option<PathBuf> {
    let names = |path: &Path| path.components().rev().map(|c| c.as_os_str().to_owned()).collect::<Vec<_>>();
    let (mut rest, mut at, mut links) = (names(Path::new(path)), PathBuf::new(), 0);
    while let Some(name) = rest.pop() {
        match Path::new(&name).components().next() {
            Some(Component::Normal(_)) => {}
            Some(Component::ParentDir) => {
                at.pop();
                continue;
            }
            Some(Component::RootDir) => {
                at.clear();
                continue;
            }
            _ => continue,
        }
        let next = at.join(&name);
        let (found, kind) = top(layers, &next)?;
        if kind.is_symlink() {
            links += 1;
            if links > LINKS {
                return None;
            }
            rest.extend(names(&std::fs::read_link(&found).ok()?));
        } else if kind.is_dir() {
            at = next;
        } else {
            return rest.is_empty().then_some(found);
        }
    }
    None
}

/// The topmost thing at a path without links in it.
fn top(layers: &[PathBuf], relative: &Path) -> Option<(PathBuf, Metadata)> {
    for layer in layers {
        let (mut at, mut last, mut opaque) = (layer.clone(), None, false);
        for name in relative.components() {
            // What is not a directory here hides the directories below.
            if last.as_ref().is_some_and(|m: &Metadata| !m.is_dir()) {
                return None;
            }
            at.push(name);
            last = at.symlink_metadata().ok();
            match &last {
                None => break,
                Some(m) if m.file_type().is_char_device() && m.rdev() == 0 => return None,
                Some(m) => opaque |= m.is_dir() && at != *layer && is_opaque(&at),
            }
        }
        match last {
            Some(found) => return Some((at, found)),
            None if opaque => return None,
            None => {}
        }
    }
    None
}

/// overlayfs marks a directory that hides those below it.
fn is_opaque(dir: &Path) -> bool {
    ["trusted.overlay.opaque", "user.overlay.opaque"].iter().any(|name| {
        let mut value = [0; 2];
        rustix::fs::lgetxattr(dir, *name, &mut value).is_ok_and(|n| value[..n] == *b"y")
    })
}

fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|l| l.trim().split(':').collect::<Vec<_>>()).filter(|f| f.len() >= 4)
}

/// A number of a user or a group, in Linux' range.
fn number(text: &str, what: &str) -> Result<Option<u32>> {
    match text.parse::<i64>() {
        Ok(n) if (0..=i64::from(i32::MAX)).contains(&n) => Ok(Some(n as u32)),
        Ok(n) => Err(Fault::invalid_argument(format!("{what} {n} is not between 0 and {}", i32::MAX))),
        Err(_) => Ok(None),
    }
}

/// Resolves `user[:group]` (names or numbers) by the image's files; `merge` adds the groups that `/etc/group` gives the user.
pub fn resolve(user: &str, passwd: &str, group: &str, merge: bool) -> Result<User> {
    let (name, wanted_group) = user.split_once(':').map_or((user, None), |(u, g)| (u, Some(g)));
    let name = if name.is_empty() { "0" } else { name };
    let uid = number(name, "user")?;
    let row = rows(passwd).find(|f| f[0] == name || uid.is_some_and(|n| f[2] == n.to_string()));
    let uid = match (uid, &row) {
        (Some(n), _) => n,
        (None, Some(f)) => f[2].parse().map_err(|_| Fault::invalid_argument(format!("user {name:?} has a bad number in /etc/passwd")))?,
        (None, None) => return Err(Fault::invalid_argument(format!("user {name:?} is not in the image's /etc/passwd"))),
    };
    // A number that the image does not know is a user all the same, of group 0.
    let own_group = row.as_ref().and_then(|f| f[3].parse().ok()).unwrap_or(0);
    let gid = match wanted_group {
        None | Some("") => own_group,
        Some(g) => match number(g, "group")? {
            Some(n) => n,
            None => rows(group)
                .find(|f| f[0] == g)
                .and_then(|f| f[2].parse().ok())
                .ok_or_else(|| Fault::invalid_argument(format!("group {g:?} is not in the image's /etc/group")))?,
        },
    };
    let mut groups = BTreeSet::from([gid]);
    if merge && let Some(f) = &row {
        let of_user = rows(group).filter(|g| g[3].split(',').any(|m| m.trim() == f[0]));
        groups.extend(of_user.filter_map(|g| g[2].parse::<u32>().ok()));
    }
    Ok(User { uid, gid, groups })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn names_numbers_groups_and_strangers() {
        let (passwd, group) = ("root:x:0:0:::\nweb:x:1000:1000:::\n", "root:x:0:\nextra:x:200:web,x\n");
        let user = |uid, gid, groups: &[u32]| User { uid, gid, groups: groups.iter().copied().collect() };
        assert_eq!(resolve("web", passwd, group, true).unwrap(), user(1000, 1000, &[200, 1000]));
        assert_eq!(resolve("1000", passwd, group, true).unwrap(), user(1000, 1000, &[200, 1000]), "groups go by the name");
        assert_eq!(resolve("1000", passwd, group, false).unwrap(), user(1000, 1000, &[1000]));
        assert_eq!(resolve("77:extra", passwd, group, true).unwrap(), user(77, 200, &[200]));
        assert_eq!(resolve("77", passwd, group, true).unwrap(), user(77, 0, &[0]));
        assert_eq!(resolve("", passwd, group, true).unwrap().uid, 0);
        for bad in ["ghost", "0:ghosts", "-1", "2147483648", "0:-5"] {
            assert!(resolve(bad, passwd, group, true).is_err(), "{bad}");
        }
    }

    #[test]
    fn layers_show_what_overlayfs_would() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, lower) = (dir.path().join("u"), dir.path().join("l"));
        std::fs::create_dir_all(upper.join("etc")).unwrap();
        std::fs::create_dir_all(lower.join("etc")).unwrap();
        std::fs::create_dir_all(lower.join("usr/etc")).unwrap();
        std::fs::write(lower.join("etc/group"), "below").unwrap();
        std::fs::write(lower.join("usr/etc/passwd"), "linked").unwrap();
        symlink("/usr/./etc/../etc/passwd", upper.join("etc/passwd")).unwrap();
        symlink("/etc/passwd", upper.join("usr_is_not_a_dir")).unwrap();
        let layers = [upper.clone(), lower.clone()];
        assert_eq!(read(&layers, "/etc/passwd").unwrap(), "linked", "an absolute link stays within the root");
        assert_eq!(read(&layers, "/etc/group").unwrap(), "below");
        assert_eq!(read(&layers, "/etc/shadow").unwrap(), "");
        symlink("loop", upper.join("etc/loop")).unwrap();
        assert_eq!(read(&layers, "/etc/loop").unwrap(), "");
        symlink("../../../../../../etc/hostname", upper.join("etc/escape")).unwrap();
        assert_eq!(read(&layers, "/etc/escape").unwrap(), "", "the host's file is out of reach");
        nix::unistd::mkfifo(&upper.join("etc/fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(read(&layers, "/etc/fifo").unwrap_err().message.contains("not a regular file"));
        File::create(upper.join("etc/huge")).unwrap().set_len(LARGEST + 1).unwrap();
        assert!(read(&layers, "/etc/huge").unwrap_err().message.contains("10 MiB"));
        std::fs::write(upper.join("usr"), "a file hides the directory below").unwrap();
        assert_eq!(read(&layers, "/etc/passwd").unwrap(), "");
    }
}

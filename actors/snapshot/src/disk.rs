//! Directories of snapshots. All of it blocks.
use kernel::{Fault, Result, ResultExt, absent};
use messages::snapshot::{Kind, Mount, SnapshotInfo, Usage};
use messages::userns::{GID_LABEL, UID_LABEL};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Beside `fs`: directories that the layer needed but did not describe.
const IMPLIED: &str = "implied";

/// `<root>/io.containerd.snapshotter.v1.<name>/snapshots`.
pub fn root(root: &Path, snapshotter: &str) -> PathBuf {
    root.join(format!("io.containerd.snapshotter.v1.{snapshotter}")).join("snapshots")
}

/// Highest number in use.
pub fn last_id(root: &Path) -> Result<u64> {
    std::fs::create_dir_all(root).with_context(|| format!("create {}", root.display()))?;
    let names = std::fs::read_dir(root)?.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    Ok(names.filter_map(|n| n.trim_start_matches("rm-").parse().ok()).max().unwrap_or(0))
}

/// Makes the directories; native copies its parent.
pub fn make(dir: &Path, parent: Option<&Path>, native: bool, root: Option<(u32, u32)>) -> Result<()> {
    let (fs, work) = (dir.join("fs"), dir.join("work"));
    std::fs::create_dir_all(&fs).with_context(|| format!("create {}", fs.display()))?;
    std::fs::set_permissions(&fs, std::fs::Permissions::from_mode(0o755))?;
    if let Some(parent) = parent {
        let like = parent.metadata()?;
        std::fs::set_permissions(&fs, like.permissions())?;
        std::os::unix::fs::chown(&fs, Some(like.uid()), Some(like.gid()))?;
    }
    // An overlay writes with the mapped ids; a bind is mapped as a whole.
    if let (Some((uid, gid)), Some(_), false) = (root, parent, native) {
        std::os::unix::fs::chown(&fs, Some(uid), Some(gid))?;
    }
    match (native, parent) {
        (false, _) => std::fs::create_dir_all(&work)?,
        (true, None) => {}
        (true, Some(parent)) => {
            // coreutils' cp keeps everything (links, holes, attributes, devices) and shares blocks where the file system can.
            let output = std::process::Command::new("cp").args(["-a", "--reflink=auto", "-T"]).arg(parent).arg(&fs).output()?;
            if !output.status.success() {
                return Err(Fault::internal(format!("copy {}: {}", parent.display(), String::from_utf8_lossy(&output.stderr))));
            }
        }
    }
    Ok(())
}

/// Who owns the root of a snapshot with mapped ids, by its labels.
pub fn mapped_root(labels: &BTreeMap<String, String>) -> Result<Option<(u32, u32)>> {
    let root = |label: &str| -> Result<Option<u32>> {
        let Some(value) = labels.get(label) else { return Ok(None) };
        let bad = || Fault::invalid_argument(format!("label {label}={value:?} does not map id 0; wanted is <container>:<host>:<size>"));
        let one = |item: &str| {
            let n: Vec<u32> = item.split(':').map(str::parse).collect::<std::result::Result<_, _>>().map_err(|_| bad())?;
            let &[container, host, size] = n.as_slice() else { return Err(bad()) };
            Ok((container == 0 && size > 0).then_some(host))
        };
        let found = value.split(',').map(one).collect::<Result<Vec<_>>>()?;
        found.into_iter().flatten().next().map(Some).ok_or_else(bad)
    };
    match (root(UID_LABEL)?, root(GID_LABEL)?) {
        (Some(uid), Some(gid)) => Ok(Some((uid, gid))),
        (None, None) => Ok(None),
        _ => Err(Fault::invalid_argument(format!("labels {UID_LABEL} and {GID_LABEL} go together"))),
    }
}

/// Mounts of a snapshot (`contracts/core.md` §3.3).
pub fn mounts(s: &SnapshotInfo, dir: &Path, parents: &[PathBuf]) -> Vec<Mount> {
    let mount = |kind: &str, source: &Path, options: Vec<String>| {
        vec![Mount { fs_type: kind.into(), source: source.to_string_lossy().into_owned(), target: String::new(), options }]
    };
    let mapping = [(UID_LABEL, "uidmap="), (GID_LABEL, "gidmap=")];
    let mapping = mapping.iter().filter_map(|(label, option)| Some(format!("{option}{}", s.labels.get(*label)?)));
    let mapping: Vec<String> = mapping.collect();
    let access = if s.kind == Kind::Active { "rw" } else { "ro" };
    let bind = |path: &Path| mount("bind", path, ["rbind".into(), access.into()].into_iter().chain(mapping.clone()).collect());
    if s.snapshotter == "native" || parents.is_empty() {
        return bind(&dir.join("fs"));
    }
    if s.kind != Kind::Active && parents.len() == 1 {
        return bind(&parents[0]);
    }
    let lower: Vec<String> = parents.iter().map(|p| p.to_string_lossy().into_owned()).collect();
    let mut options = [mapping.clone(), vec!["index=off".to_owned()]].concat();
    if s.kind == Kind::Active {
        options.push(format!("workdir={}", dir.join("work").display()));
        options.push(format!("upperdir={}", dir.join("fs").display()));
    }
    options.push(format!("lowerdir={}", lower.join(":")));
    mount("overlay", Path::new("overlay"), options)
}

/// A volatile overlay leaves a mark, and is not mounted again while that is there: after a crash its data may be gone. Here the machine has not
/// crashed since, or nobody has used it yet.
pub fn forget_mount(dir: &Path) -> Result<()> {
    absent(std::fs::remove_dir_all(dir.join("work/work/incompat"))).with_context(|| format!("forget the mount of {}", dir.display()))
}

/// Remembers directories whose owner and mode only the parents know.
pub fn note_implied(fs: &Path, implied: &[PathBuf]) -> Result<()> {
    if implied.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = implied.iter().map(|p| p.to_string_lossy().into_owned()).collect();
    std::fs::write(fs.with_file_name(IMPLIED), list.join("\0")).context("note implied directories")
}

/// Gives implied directories the looks of their namesakes below, then syncs the file system.
pub fn seal(dir: &Path, parents: &[PathBuf]) -> Result<()> {
    let (list, fs) = (dir.join(IMPLIED), dir.join("fs"));
    if let Ok(text) = std::fs::read_to_string(&list) {
        for path in text.split('\0') {
            let own = fs.join(path);
            let like = parents.iter().find_map(|p| p.join(path).symlink_metadata().ok().filter(std::fs::Metadata::is_dir));
            if let (Some(like), true) = (like, own.symlink_metadata().is_ok_and(|m| m.is_dir())) {
                std::os::unix::fs::chown(&own, Some(like.uid()), Some(like.gid()))?;
                std::fs::set_permissions(&own, like.permissions())?;
            }
        }
        std::fs::remove_file(&list)?;
    }
    let file = std::fs::File::open(&fs).with_context(|| format!("open {}", fs.display()))?;
    rustix::fs::syncfs(&file).map_err(std::io::Error::from).with_context(|| format!("sync {}", fs.display()))
}

/// Removes a snapshot's directory: renamed first, so that a half-removed one is never taken for whole.
pub fn remove(dir: &Path) -> Result<()> {
    let name = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let trash = dir.with_file_name(format!("rm-{name}"));
    match std::fs::rename(dir, &trash) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("remove {}", dir.display()))?,
    }
    // An unpacker of an earlier generation may still be putting files there until it notices.
    for _ in 0..20 {
        match std::fs::remove_dir_all(&trash) {
            Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => std::thread::sleep(std::time::Duration::from_millis(50)),
            other => return other.with_context(|| format!("remove {}", trash.display())),
        }
    }
    Err(Fault::unavailable(format!("{} is still being written to; it is removed at the next start", trash.display())))
}

/// Removes directories without a row, of numbers that were in use when this generation started.
pub fn sweep(root: &Path, known: &BTreeSet<u64>, last: u64) -> Result<u64> {
    let mut removed = 0;
    for entry in std::fs::read_dir(root)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let orphan = name.starts_with("rm-") || name.parse::<u64>().is_ok_and(|id| id <= last && !known.contains(&id));
        if orphan {
            match std::fs::remove_dir_all(entry.path()) {
                // A removal that is under way was faster.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                other => other.with_context(|| format!("remove {}", entry.path().display()))?,
            }
            removed += 1;
        }
    }
    Ok(removed)
}

/// Bytes and inodes of a tree; hard links count once.
pub fn usage(fs: &Path) -> Result<Usage> {
    let (mut usage, mut seen, mut todo) = (Usage::default(), BTreeSet::new(), vec![fs.to_owned()]);
    while let Some(path) = todo.pop() {
        let meta = match path.symlink_metadata() {
            Ok(m) => m,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e.into()),
        };
        if meta.nlink() < 2 || meta.is_dir() || seen.insert((meta.dev(), meta.ino())) {
            usage.inodes += 1;
            usage.bytes += meta.blocks() * 512;
        }
        if meta.is_dir() {
            todo.extend(std::fs::read_dir(&path)?.flatten().map(|e| e.path()));
        }
    }
    Ok(usage)
}

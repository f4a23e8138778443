//! Unpacking a tar into a directory, as overlayfs wants its upper layer: nothing ever leaves the root.
//!
//! Every path is resolved below the root by `openat2(RESOLVE_IN_ROOT)`, so that `..`, absolute links and links in the middle cannot lead outside.
//! Whiteouts become character devices 0:0, opaque directories get `trusted.overlay.opaque`; in `plain` mode (native) they delete instead.
use kernel::{Fault, Result, ResultExt};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::fs::{chownat, fsetxattr, linkat, mkdirat, mknodat, openat, openat2, statat, symlinkat, unlinkat, utimensat};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";
/// Directories whose descriptors are kept: neighbours in a tar share theirs.
const OPEN: usize = 64;
/// What one write takes to a file.
const BUFFER: usize = 256 << 10;
/// The disk begins with a file of this size at once, so that little is left for the sync at the end; for smaller ones a call each costs more than it
/// brings.
const EARLY: u64 = 128 << 10;

/// Unpacks one layer. `implied` collects directories that the layer needs but does not describe.
pub struct Unpacker {
    root: OwnedFd,
    plain: bool,
    open: BTreeMap<PathBuf, Rc<OwnedFd>>,
    times: Vec<(PathBuf, u64)>,
    buffer: Vec<u8>,
    /// Mode bits that the process takes away from what it creates.
    umask: u32,
    /// Directories that were made without a description.
    pub implied: Vec<PathBuf>,
}

fn io(e: rustix::io::Errno) -> Fault {
    Fault::from(std::io::Error::from(e))
}

/// A path of the archive below the root: `.`, `/` and `..` never climb.
fn clean(path: &Path) -> Result<PathBuf> {
    let mut all = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(p) => all.push(p),
            Component::ParentDir => return Err(Fault::invalid_argument(format!("{path:?} leaves the root"))),
            _ => {}
        }
    }
    Ok(all)
}

impl Unpacker {
    /// `root` must exist.
    pub fn new(root: &Path, plain: bool) -> Result<Unpacker> {
        let root = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(io)
            .with_context(|| root.display().to_string())?;
        Ok(Unpacker { root, plain, open: BTreeMap::new(), times: vec![], buffer: vec![0; BUFFER], umask: umask(), implied: vec![] })
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }

    /// Opens a directory, making what is missing.
    fn directory(&mut self, path: &Path) -> Result<Rc<OwnedFd>> {
        if let Some(fd) = self.open.get(path) {
            return Ok(fd.clone());
        }
        let fd = match self.resolve(path, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT) => {
                let parent = self.directory(path.parent().unwrap_or(Path::new("")))?;
                let name = path.file_name().unwrap_or_default();
                mkdirat(&*parent, name, Mode::from_raw_mode(0o755)).map_err(io).with_context(|| format!("make {path:?}"))?;
                self.implied.push(path.to_owned());
                self.resolve(path, OFlags::PATH | OFlags::DIRECTORY).map_err(io)?
            }
            Err(e) => return Err(io(e).context(format!("open {path:?}"))),
        };
        if self.open.len() >= OPEN {
            self.open.clear();
        }
        let fd = Rc::new(fd);
        self.open.insert(path.to_owned(), fd.clone());
        Ok(fd)
    }

    /// Takes away what is in the way of an entry. A directory stays if the entry is one, too.
    fn clear(&mut self, dir: &OwnedFd, name: &OsStr, path: &Path, directory: bool) -> Result<bool> {
        let found = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(s) => s,
            Err(rustix::io::Errno::NOENT) => return Ok(false),
            Err(e) => return Err(io(e).context(format!("look at {path:?}"))),
        };
        let is_dir = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
        if is_dir && directory {
            return Ok(true);
        }
        if is_dir {
            self.open.clear();
            remove_tree(dir, name).with_context(|| format!("replace {path:?}"))?;
        } else {
            unlinkat(dir, name, AtFlags::empty()).map_err(io).with_context(|| format!("replace {path:?}"))?;
        }
        Ok(false)
    }

    /// Unpacks all entries.
    pub fn run(&mut self, source: impl Read) -> Result<()> {
        let mut archive = tar::Archive::new(source);
        for entry in archive.entries().context("read the layer's tar")? {
            let mut entry = entry.context("read the layer's tar")?;
            let path = clean(&entry.path().context("read the layer's tar")?)?;
            self.entry(&mut entry, &path).with_context(|| format!("unpack {path:?}"))?;
        }
        // Last, because making files in a directory changes its time.
        for (path, mtime) in std::mem::take(&mut self.times) {
            if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
                let dir = self.directory(parent)?;
                let _ = utimensat(&*dir, name, &times(mtime), AtFlags::SYMLINK_NOFOLLOW);
            }
        }
        Ok(())
    }

    /// A regular file, in as few system calls as it takes: most of an image is small files.
    fn file<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, dir: &OwnedFd, name: &OsStr, path: &Path, mode: u32) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let header = entry.header();
        let (uid, gid, mtime) = (number(header.uid()) as u32, number(header.gid()) as u32, header.mtime().unwrap_or(0));
        // Nobody else can open it meanwhile: the directories above a snapshot are root's.
        let create = || openat(dir, name, flags, Mode::from_raw_mode(mode & 0o777));
        let mut file = std::fs::File::from(match create() {
            Err(rustix::io::Errno::EXIST) => {
                self.clear(dir, name, path, false)?;
                create().map_err(io)?
            }
            other => other.map_err(io)?,
        });
        let mut size = 0;
        loop {
            let n = entry.read(&mut self.buffer)?;
            if n == 0 {
                break;
            }
            file.write_all(&self.buffer[..n])?;
            size += n as u64;
        }
        if (uid, gid) != (0, 0) {
            rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(io)?;
        }
        // After chown, which clears set-id bits.
        if mode & (self.umask | 0o7000) != 0 {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).map_err(io)?;
        }
        self.attributes(entry, dir, name, tar::EntryType::Regular)?;
        rustix::fs::futimens(&file, &times(mtime)).map_err(io)?;
        if size >= EARLY {
            crate::sys::begin_writing(file.as_fd());
        }
        Ok(())
    }

    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, path: &Path) -> Result<()> {
        use tar::EntryType as T;
        let kind = entry.header().entry_type();
        if matches!(kind, T::XGlobalHeader) {
            return Ok(());
        }
        let header = entry.header().clone();
        let mode = header.mode().context("mode")? & 0o7777;
        let (uid, gid) = (number(header.uid()) as u32, number(header.gid()) as u32);
        let mtime = header.mtime().unwrap_or(0);
        let Some(name) = path.file_name() else {
            // The root itself.
            let _ = rustix::fs::chmodat(&self.root, ".", Mode::from_raw_mode(mode), AtFlags::empty());
            chownat(&self.root, ".", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::empty()).map_err(io)?;
            return Ok(());
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        let text = name.to_string_lossy();
        let dir = self.directory(parent)?;
        if text == OPAQUE {
            return self.opaque(&dir, parent);
        }
        if let Some(hidden) = text.strip_prefix(WHITEOUT) {
            // `.wh..wh.` is AUFS' own bookkeeping.
            return if hidden.starts_with(WHITEOUT) || hidden.is_empty() { Ok(()) } else { self.whiteout(&dir, hidden, parent) };
        }
        if matches!(kind, T::Regular | T::Continuous | T::GNUSparse) {
            return self.file(entry, &dir, name, path, mode);
        }
        let dir = &*dir;
        let merged = self.clear(dir, name, path, kind == T::Directory)?;
        let node = |kind: FileType| -> Result<()> {
            let (major, minor) = (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0));
            mknodat(dir, name, kind, Mode::from_raw_mode(mode), rustix::fs::makedev(major, minor)).map_err(io)
        };
        match kind {
            T::Directory => {
                if !merged {
                    mkdirat(dir, name, Mode::from_raw_mode(mode)).map_err(io)?;
                }
                self.implied.retain(|p| p != path);
                self.times.push((path.to_owned(), mtime));
            }
            T::Symlink => {
                let target = entry.link_name_bytes().ok_or_else(|| Fault::invalid_argument("a symbolic link without a target"))?;
                symlinkat(OsStr::from_bytes(&target), dir, name).map_err(io)?;
            }
            T::Link => {
                let target = entry.link_name()?.ok_or_else(|| Fault::invalid_argument("a hard link without a target"))?;
                let target = clean(&target)?;
                let from = self.directory(target.parent().unwrap_or(Path::new("")))?;
                let name_of_target = target.file_name().ok_or_else(|| Fault::invalid_argument("a hard link to the root"))?;
                linkat(&*from, name_of_target, dir, name, AtFlags::empty())
                    .map_err(io)
                    .with_context(|| format!("hard link to {target:?}"))?;
                return Ok(());
            }
            T::Char => node(FileType::CharacterDevice)?,
            T::Block => node(FileType::BlockDevice)?,
            T::Fifo => node(FileType::Fifo)?,
            other => return Err(Fault::unimplemented(format!("entry type {other:?}"))),
        }
        chownat(dir, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW).map_err(io)?;
        if kind != T::Symlink {
            // After chown, which clears set-id bits.
            rustix::fs::chmodat(dir, name, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(io)?;
        }
        self.attributes(entry, dir, name, kind)?;
        if kind != T::Directory {
            utimensat(dir, name, &times(mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(io)?;
        }
        Ok(())
    }

    fn attributes<R: Read>(&self, entry: &mut tar::Entry<'_, R>, dir: &OwnedFd, name: &OsStr, kind: tar::EntryType) -> Result<()> {
        let Some(extensions) = entry.pax_extensions()? else { return Ok(()) };
        for extension in extensions {
            let extension = extension?;
            let Ok(key) = extension.key() else { continue };
            let Some(attribute) = key.strip_prefix("SCHILY.xattr.") else { continue };
            if matches!(kind, tar::EntryType::Regular | tar::EntryType::Directory) {
                let fd =
                    openat(dir, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()).map_err(io)?;
                match fsetxattr(&fd, attribute, extension.value_bytes(), XattrFlags::empty()) {
                    Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
                    Err(e) => return Err(io(e).context(format!("attribute {attribute}"))),
                }
            }
        }
        Ok(())
    }

    fn whiteout(&mut self, dir: &OwnedFd, hidden: &str, parent: &Path) -> Result<()> {
        let name = OsStr::new(hidden);
        self.clear(dir, name, &parent.join(hidden), false)?;
        if self.plain {
            return Ok(());
        }
        mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), 0).map_err(io).context("whiteout")
    }

    fn opaque(&mut self, dir: &OwnedFd, parent: &Path) -> Result<()> {
        let fd = self.resolve(parent, OFlags::RDONLY | OFlags::DIRECTORY).map_err(io)?;
        if !self.plain {
            return fsetxattr(&fd, "trusted.overlay.opaque", b"y", XattrFlags::empty()).map_err(io).context("opaque directory");
        }
        self.open.clear();
        for name in names(fd.as_fd())? {
            remove_tree(dir, &name)?;
        }
        Ok(())
    }
}

/// Empty numeric fields mean zero: some writers leave them so.
fn number(field: std::io::Result<u64>) -> u64 {
    field.unwrap_or(0)
}

fn times(mtime: u64) -> Timestamps {
    let t = Timespec { tv_sec: mtime as i64, tv_nsec: 0 };
    Timestamps { last_access: t, last_modification: t }
}

/// The process' umask; what cannot be read counts as everything.
fn umask() -> u32 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("Umask:"));
    line.and_then(|l| u32::from_str_radix(l.trim(), 8).ok()).unwrap_or(0o777)
}

fn names(dir: std::os::fd::BorrowedFd<'_>) -> Result<Vec<std::ffi::OsString>> {
    let mut all = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            all.push(name.to_owned());
        }
    }
    Ok(all)
}

/// Removes a file or a tree, without following links.
fn remove_tree(dir: &OwnedFd, name: &OsStr) -> Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(rustix::io::Errno::ISDIR | rustix::io::Errno::PERM) => {}
        Err(e) => return Err(io(e)),
    }
    let inner = openat(dir, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).map_err(io)?;
    for child in names(inner.as_fd())? {
        remove_tree(&inner, &child)?;
    }
    unlinkat(dir, name, AtFlags::REMOVEDIR).map_err(io)
}

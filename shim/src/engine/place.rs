//! The cgroup that a container's processes are born in.
//!
//! Moving another process (`cgroup.procs`) takes the kernel's global threadgroup lock and waits for an RCU grace period: 5 to 20 ms on an idle
//! machine, more on a busy one, and it is most of what libcontainer's own way costs. A process of one thread that moves itself by version 1's `tasks`,
//! or is cloned into version 2's cgroup, skips both. A scope of systemd's ([`super::systemd`]) is a directory of version 2 that is there already.
use super::{delegate, devices, kernel};
use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, CgroupSetup, ControllerOpt, create_cgroup_manager, get_cgroup_setup,
};
use libcontainer::oci_spec::runtime::{LinuxResources, Spec};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// Version 1's hierarchies that containers are placed in; named ones are left alone.
const CONTROLLERS: [&str; 12] =
    ["cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "net_cls", "net_prio", "perf_event", "pids", "blkio"];
/// Until a cgroup whose processes were killed is empty, on a busy machine, too.
const EMPTY: Duration = Duration::from_secs(2);
/// Longest pause between two looks.
const PAUSE: Duration = Duration::from_millis(64);
/// How often somebody may remove a parent while it is being made; each time takes the end of another pod.
const OVERTAKEN: u32 = 100;
/// Where cgroups are mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// How a process gets there.
enum Way {
    /// Version 1: the process writes itself into these directories' `tasks`.
    Tasks(Vec<PathBuf>),
    /// Version 2: the process is cloned into this directory.
    Clone(PathBuf),
}

/// A container's cgroup.
pub struct Place {
    way: Way,
    config: CgroupConfig,
}

fn limits(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref().and_then(|l| l.resources().as_ref())
}

fn told(e: impl std::error::Error) -> io::Error {
    io::Error::other(format!("cgroup: {e}"))
}

impl Place {
    /// Finds the cgroup of a container; makes it, with the limits of the specification, where it is a `fresh` container's.
    pub fn of(config: &CgroupConfig, fresh: Option<&Spec>) -> io::Result<Place> {
        // Whoever removes a container kills all in its cgroup.
        if below(Path::new(ROOT), &config.cgroup_path) == Path::new(ROOT) {
            return Err(io::Error::other(format!("cgroup path {:?} is the root of all", config.cgroup_path)));
        }
        let way = match unified()? {
            true => {
                let dir = below(Path::new(ROOT), &config.cgroup_path);
                if fresh.is_some() {
                    make_unified(Path::new(ROOT), &dir)?;
                }
                Way::Clone(dir)
            }
            false => {
                let dirs: Vec<PathBuf> = hierarchies()?.into_iter().map(|root| below(&root, &config.cgroup_path)).collect();
                for dir in dirs.iter().filter(|_| fresh.is_some()) {
                    make(dir)?;
                }
                Way::Tasks(dirs)
            }
        };
        let place = Place { way, config: config.clone() };
        if let Some(resources) = fresh.and_then(limits) {
            place.limit(resources)?;
        }
        Ok(place)
    }

    /// libcgroups' view of it. Costly on version 1: it looks for each controller by itself.
    fn manager(&self) -> io::Result<AnyCgroupManager> {
        create_cgroup_manager(self.config.clone()).map_err(told)
    }

    fn limit(&self, resources: &LinuxResources) -> io::Result<()> {
        let options = ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
        self.manager()?.apply(&options).map_err(told)?;
        match &self.way {
            Way::Tasks(_) => Ok(()),
            Way::Clone(dir) => devices::guard(dir, resources),
        }
    }

    /// The directory that a process is cloned into, where that is the way.
    pub fn cradle(&self) -> io::Result<Option<File>> {
        let Way::Clone(dir) = &self.way else { return Ok(None) };
        File::open(dir).map(Some).map_err(|e| io::Error::new(e.kind(), format!("open cgroup {}: {e}", dir.display())))
    }

    /// Moves this process there, unless it was cloned into it. Never the worker: who fails to make a container kills all that is in its cgroup.
    pub fn enter(&self) -> io::Result<()> {
        match &self.way {
            Way::Clone(_) => Ok(()),
            Way::Tasks(dirs) => {
                for tasks in dirs.iter().map(|d| d.join("tasks")) {
                    std::fs::write(&tasks, "0").map_err(|e| io::Error::new(e.kind(), format!("enter {}: {e}", tasks.display())))?;
                }
                Ok(())
            }
        }
    }

    /// Gives it to the container, where the specification wants that.
    pub fn give(&self, spec: &Spec) -> io::Result<()> {
        match &self.way {
            Way::Clone(dir) => delegate::give(dir, spec),
            Way::Tasks(_) => Ok(()),
        }
    }

    /// Kills what is in it, and removes it with all below it.
    pub fn remove(&self) -> io::Result<()> {
        match &self.way {
            Way::Tasks(dirs) => {
                // Another runtime places its containers in these, too, and its containers may have come to us.
                let elsewhere = mounted(|options| !is_controller(options))?.into_iter().map(|root| below(&root, &self.config.cgroup_path));
                let elsewhere: Vec<PathBuf> = elsewhere.filter(|dir| dir.is_dir()).collect();
                dirs.iter().chain(&elsewhere).try_for_each(|dir| clear(dir))
            }
            Way::Clone(dir) => clear(dir),
        }
    }
}

/// Kills what is in a cgroup, and removes it with those that were made below it.
fn clear(dir: &Path) -> io::Result<()> {
    let (mut pause, end) = (Duration::from_millis(1), Instant::now() + EMPTY);
    loop {
        match tear(dir) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => std::thread::sleep(pause),
            Err(e) => return Err(io::Error::new(e.kind(), format!("remove cgroup {}: {e}", dir.display()))),
            Ok(()) => return Ok(()),
        }
        pause = (pause * 2).min(PAUSE);
    }
}

/// One attempt; busy as long as a killed process is not reaped.
fn tear(dir: &Path) -> io::Result<()> {
    // Version 2 kills the whole tree at once, without a race; version 1 does not know the file.
    if std::fs::OpenOptions::new().write(true).open(dir.join("cgroup.kill")).and_then(|mut f| f.write_all(b"1")).is_err() {
        let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).filter(|p| *p > 0).for_each(kernel::kill);
    }
    match std::fs::remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
        other => return other,
    }
    for inner in std::fs::read_dir(dir)?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        tear(&inner.path())?;
    }
    std::fs::remove_dir(dir)
}

/// Is version 2 all there is?
pub fn unified() -> io::Result<bool> {
    Ok(matches!(get_cgroup_setup().map_err(told)?, CgroupSetup::Unified))
}

/// `path` below `root`, never above it.
pub fn below(root: &Path, path: &Path) -> PathBuf {
    let mut at = root.to_owned();
    for part in path.components() {
        match part {
            Component::Normal(name) => at.push(name),
            Component::ParentDir if at != root => drop(at.pop()),
            _ => {}
        }
    }
    at
}

/// Mount points of version 1's hierarchies; controllers that share one name it once.
pub fn hierarchies() -> io::Result<Vec<PathBuf>> {
    mounted(is_controller)
}

/// Is a hierarchy with these mount options a controller's? Others have a name, or are version 2's beside version 1.
fn is_controller(options: &str) -> bool {
    options.split(',').any(|o| CONTROLLERS.contains(&o))
}

/// Mount points of those hierarchies of cgroups whose options are `wanted`.
fn mounted(wanted: impl Fn(&str) -> bool) -> io::Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = Vec::new();
    for line in std::fs::read_to_string("/proc/self/mountinfo")?.lines() {
        let Some((place, kind)) = line.split_once(" - ") else { continue };
        let (mut kind, Some(at)) = (kind.split(' '), place.split(' ').nth(4)) else { continue };
        let cgroups = matches!(kind.next(), Some("cgroup" | "cgroup2"));
        if cgroups && kind.nth(1).is_some_and(&wanted) && !all.iter().any(|p| p == Path::new(at)) {
            all.push(at.into());
        }
    }
    Ok(all)
}

fn failed(dir: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |e| io::Error::new(e.kind(), format!("make cgroup {}: {e}", dir.display()))
}

/// Makes a directory and those above it. Whoever removes the last other container of a parent removes the parent, perhaps between two steps of ours: then
/// it is made anew. Once `dir` is there, nothing above it can go.
fn pin(dir: &Path) -> io::Result<()> {
    until_not_overtaken(|| std::fs::create_dir_all(dir)).map_err(failed(dir))
}

fn until_not_overtaken(mut make: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for _ in 0..OVERTAKEN {
        match make() {
            // "Exists" is told of a directory above that existed, and was gone when it was looked at.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {}
            other => return other,
        }
    }
    make()
}

/// Makes a directory of version 1. A new cpuset has no processors until it is told some.
fn make(dir: &Path) -> io::Result<()> {
    pin(dir)?;
    if dir.join("cpuset.cpus").exists() {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            inherit(dir, file).map_err(failed(dir))?;
        }
    }
    Ok(())
}

/// The value of `file` in `dir`, taken over from the directories above as far as needed.
fn inherit(dir: &Path, file: &str) -> io::Result<String> {
    let value = std::fs::read_to_string(dir.join(file))?;
    if !value.trim().is_empty() {
        return Ok(value);
    }
    let above = dir.parent().ok_or_else(|| io::Error::other(format!("{file} has no value anywhere")))?;
    let value = inherit(above, file)?;
    std::fs::write(dir.join(file), value.trim())?;
    Ok(value)
}

/// Makes a directory of version 2, with every controller that the directories above can give.
fn make_unified(root: &Path, dir: &Path) -> io::Result<()> {
    // First, so that those above stay while they give.
    pin(dir)?;
    let mut above: Vec<&Path> = dir.ancestors().skip(1).take_while(|a| a.starts_with(root)).collect();
    above.reverse();
    for dir in above {
        let has = std::fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
        let gives = std::fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
        for controller in has.split_whitespace().filter(|c| !gives.split_whitespace().any(|g| g == *c)) {
            // One that cannot be given is missed by the limit that needs it, and told there.
            let _ = std::fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_path_stays_below_its_root() {
        let root = Path::new("/sys/fs/cgroup");
        for (path, at) in
            [("/a/b", "/sys/fs/cgroup/a/b"), ("a/../b", "/sys/fs/cgroup/b"), ("../../etc", "/sys/fs/cgroup/etc"), ("", "/sys/fs/cgroup")]
        {
            assert_eq!(below(root, Path::new(path)), Path::new(at), "{path}");
        }
    }

    #[test]
    fn the_root_is_nobody_s_place() {
        for path in ["/", "", "a/.."] {
            let config = CgroupConfig { cgroup_path: path.into(), systemd_cgroup: false, container_name: "x".into() };
            assert!(Place::of(&config, None).err().unwrap().to_string().contains("root"), "{path}");
        }
    }

    #[test]
    fn a_parent_that_others_remove_meanwhile_is_made_again() {
        use io::ErrorKind::{AlreadyExists, NotFound, PermissionDenied};
        let mut ends = [Err(NotFound), Err(AlreadyExists), Err(NotFound), Ok(())].into_iter();
        until_not_overtaken(|| ends.next().unwrap().map_err(io::Error::from)).unwrap();
        assert_eq!(ends.next(), None);
        let mut tries = 0;
        let hopeless = |kind: io::ErrorKind, tries: &mut u32| {
            until_not_overtaken(|| {
                *tries += 1;
                Err(kind.into())
            })
        };
        assert_eq!(hopeless(PermissionDenied, &mut tries).unwrap_err().kind(), PermissionDenied);
        assert_eq!(tries, 1, "what is no race is told at once");
        assert_eq!(hopeless(NotFound, &mut tries).unwrap_err().kind(), NotFound, "not for ever");
    }

    #[test]
    fn a_new_cpuset_takes_its_processors_from_above() {
        let dir = std::env::temp_dir().join(format!("trpplace{}", std::process::id()));
        let inner = dir.join("a/b");
        std::fs::create_dir_all(&inner).unwrap();
        for (at, value) in [(dir.as_path(), "0-1\n"), (&dir.join("a"), "\n"), (&inner, "")] {
            std::fs::write(at.join("cpuset.cpus"), value).unwrap();
        }
        inherit(&inner, "cpuset.cpus").unwrap();
        let told = [dir.join("a"), inner].map(|d| std::fs::read_to_string(d.join("cpuset.cpus")).unwrap());
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(told, ["0-1", "0-1"]);
    }
}

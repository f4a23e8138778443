//! Makes the processes of a container: places and clones them; what the new process does to itself is libcontainer's `container_init_process`.
//!
//! libcontainer's own way there has a process in between and moves it into the cgroup, which is most of a container's cost (see [`super::place`]).
//! Here the worker enters what only a parent can enter for its child, and clones; the child places itself. Only a container in a user namespace needs
//! the process in between (a worker that had entered it could not write the container's state any more). Rare specifications need libcontainer's
//! parent and go through it as before: see [`fits`].
use super::place::Place;
use super::scope::Scope;
use super::steps::told;
use super::{Request, kernel};
use libcgroups::common::CgroupConfig;
use libcontainer::config::YoukiConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::hooks::run_hooks;
use libcontainer::namespaces::Namespaces;
use libcontainer::notify_socket::{NOTIFY_FILE, NotifyListener, NotifySocket};
use libcontainer::oci_spec::runtime::{
    Linux, LinuxBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxSeccompAction, Spec,
};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::channel::{InitReceiver, InitSender, MainReceiver, MainSender, init_channel, main_channel};
use libcontainer::process::init::container_init_process;
use libcontainer::process::intel_rdt::{cleanup_intel_rdt, setup_intel_rdt};
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::tty::setup_console_socket;
use libcontainer::user_ns::UserNamespaceConfig;
use libcontainer::utils::{get_cgroup_path, validate_mount_options};
use libcontainer::validator::Validator;
use libcontainer::workload::Executor;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Reads and checks the specification of a bundle.
pub fn specification(bundle: &Path) -> io::Result<Spec> {
    let mut spec = Spec::load(bundle.join("config.json")).map_err(told)?;
    if !spec.version().starts_with("1.") {
        return Err(io::Error::other(format!("specification of version {}: 1.x is known", spec.version())));
    }
    Validator::validate_spec(&spec).map_err(told)?;
    if let Some(mounts) = spec.mounts() {
        validate_mount_options(mounts).map_err(told)?;
    }
    spec.canonicalize_rootfs(bundle).map_err(told)?;
    Ok(spec)
}

/// Can this be made here? A new user namespace (its maps), time offsets, network devices and listeners to seccomp need libcontainer's parent.
pub fn fits(spec: &Spec) -> bool {
    let Some(linux) = spec.linux() else { return false };
    let listens = linux.seccomp().as_ref().is_some_and(|s| {
        let rules = s.syscalls().iter().flatten().map(|r| r.action());
        rules.chain([s.default_action()]).any(|a| a == LinuxSeccompAction::ScmpActNotify)
    });
    let plain = linux.time_offsets().as_ref().is_none_or(|t| t.is_empty()) && linux.net_devices().as_ref().is_none_or(|d| d.is_empty());
    plain && !listens && UserNamespaceConfig::new(spec).is_ok_and(|new| new.is_none())
}

fn linux(spec: &Spec) -> io::Result<&Linux> {
    spec.linux().as_ref().ok_or_else(|| io::Error::other("the specification has no linux section"))
}

fn cgroup(request: &Request, spec: &Spec) -> io::Result<CgroupConfig> {
    let cgroup_path = get_cgroup_path(linux(spec)?.cgroups_path(), &request.id);
    Ok(CgroupConfig { cgroup_path, systemd_cgroup: false, container_name: request.id.clone() })
}

/// Creates a container; answers the pid of its init, which waits for the start.
pub fn create(request: &Request, spec: Spec, streams: &[OwnedFd], executor: Box<dyn Executor>) -> io::Result<u32> {
    let dir = request.root.join(&request.id);
    std::fs::create_dir(&dir).map_err(|e| io::Error::new(e.kind(), format!("make {}: {e}", dir.display())))?;
    let config = cgroup(request, &spec)?;
    // The state is written before there is a cgroup: whoever finds what a killed worker left knows by it what to remove.
    let made = beginning(request, spec, &dir, streams, executor, &config).and_then(|(args, container)| {
        let born = Place::of(&config, Some(&args.spec)).and_then(|place| {
            place.give(&args.spec)?;
            first(&args, container, &place)
        });
        born.inspect_err(|_| drop(Place::of(&config, None).and_then(|place| place.remove())))
    });
    made.inspect_err(|_| drop(std::fs::remove_dir_all(&dir)))
}

/// State, listener and terminal of a new container.
fn beginning(
    request: &Request,
    spec: Spec,
    dir: &Path,
    streams: &[OwnedFd],
    executor: Box<dyn Executor>,
    config: &CgroupConfig,
) -> io::Result<(ContainerArgs, Container)> {
    let mut container = Container::new(&request.id, ContainerStatus::Creating, None, &request.bundle, dir).map_err(told)?;
    container.set_systemd(false).set_annotations(spec.annotations().clone());
    container.save().map_err(told)?;
    YoukiConfig::from_spec(&spec, container.id()).and_then(|c| c.save(dir)).map_err(told)?;
    let listener = NotifyListener::new(&dir.join(NOTIFY_FILE)).map_err(told)?;
    let mut args = arguments(request, spec, dir, streams, executor, config, listener)?;
    args.container = Some(container.clone());
    Ok((args, container))
}

fn arguments(
    request: &Request,
    spec: Spec,
    dir: &Path,
    streams: &[OwnedFd],
    executor: Box<dyn Executor>,
    config: &CgroupConfig,
    notify_listener: NotifyListener,
) -> io::Result<ContainerArgs> {
    let root = spec.root().as_ref().ok_or_else(|| io::Error::other("the specification has no root"))?;
    let rootfs = std::fs::canonicalize(root.path())?;
    let name = format!("console-{}.sock", std::process::id());
    let console = request.console.as_ref().map(|socket| setup_console_socket(dir, socket, &name)).transpose().map_err(told)?;
    let stream = |n: usize| streams.get(n).map(AsRawFd::as_raw_fd);
    Ok(ContainerArgs {
        container_type: ContainerType::InitContainer,
        syscall: SyscallType::default(),
        spec: Rc::new(spec),
        rootfs,
        // Lives as long as this worker.
        console_socket: console.map(std::os::fd::IntoRawFd::into_raw_fd),
        notify_listener,
        preserve_fds: 0,
        container: None,
        user_ns_config: None,
        cgroup_config: config.clone(),
        detached: true,
        executor,
        no_pivot: false,
        stdin: stream(0),
        stdout: stream(1),
        stderr: stream(2),
        as_sibling: false,
        pid_file: None,
    })
}

/// The init of a container, up to where it waits for the start.
fn first(args: &ContainerArgs, mut container: Container, place: &Place) -> io::Result<u32> {
    let (pid, mut from_init, mut to_init) = bring_up(args, place)?;
    container.set_pid(pid as i32);
    let rest = || {
        if let Some(hooks) = args.spec.hooks() {
            from_init.wait_for_hook_request().map_err(told)?;
            for hooks in [hooks.prestart(), hooks.create_runtime()] {
                run_hooks(hooks.as_ref(), Some(&container.state), None, container.pid(), None).map_err(told)?;
            }
            to_init.hook_done().map_err(told)?;
        }
        from_init.wait_for_init_ready().map_err(told)?;
        if let (Some(rdt), Some(init)) = (linux(&args.spec)?.intel_rdt(), container.pid()) {
            let (made, monitored) = setup_intel_rdt(Some(container.id()), &init, rdt).map_err(told)?;
            container.set_intel_rdt_dir(made).set_intel_rdt_monitoring_dir(monitored);
        }
        container.set_status(ContainerStatus::Created).set_creator(0).set_pid(pid as i32).save().map_err(told)
    };
    let done = { rest }();
    done.map(|()| pid).inspect_err(|_| kernel::end(pid))
}

/// Runs a further process in a running container; answers its pid.
pub fn exec(request: &Request, process: &Path, streams: &[OwnedFd], executor: Box<dyn Executor>) -> io::Result<u32> {
    let dir = request.root.join(&request.id);
    let container = Container::load(dir.clone()).map_err(told)?;
    let Some(init) = container.pid().filter(|_| container.status() == ContainerStatus::Running) else {
        return Err(io::Error::other(format!("container {} is {}, not running", request.id, container.status())));
    };
    let mut spec = specification(&request.bundle)?;
    let own = linux(&spec)?.clone();
    let joined = own.namespaces().iter().flatten().map(|space| join(space.typ(), init.as_raw())).collect::<io::Result<Vec<_>>>()?;
    // Open until the process is in them.
    let (joined, _held): (Vec<LinuxNamespace>, Vec<File>) = joined.into_iter().unzip();
    let mut within = LinuxBuilder::default().namespaces(joined);
    if let Some(path) = own.cgroups_path() {
        within = within.cgroups_path(path.clone());
    }
    if let Some(personality) = own.personality() {
        within = within.personality(personality.clone());
    }
    let process = serde_json::from_slice(&std::fs::read(process)?)?;
    spec.set_process(Some(process)).set_linux(Some(within.build().map_err(told)?));

    let config = cgroup(request, &spec)?;
    let place = Place::of(&config, None)?;
    let socket = dir.join(format!("exec-{}.sock", std::process::id()));
    let listener = NotifyListener::new(&socket).map_err(told)?;
    let mut args = arguments(request, spec, &dir, streams, executor, &config, listener)?;
    let (mut failures, told_by) = UnixStream::pair()?;
    args.container_type = ContainerType::TenantContainer { exec_notify_fd: told_by.as_raw_fd() };
    let ready = bring_up(&args, &place).and_then(|(pid, mut from_init, _)| {
        let started = from_init.wait_for_init_ready().map_err(told).and_then(|()| {
            NotifySocket::new(&socket).notify_container_start().map_err(told)?;
            drop(told_by);
            // The end of file comes with the new program; until then the process may tell why there is none.
            let mut text = String::new();
            failures.read_to_string(&mut text)?;
            if text.is_empty() { Ok(pid) } else { Err(io::Error::other(text)) }
        });
        started.inspect_err(|_| kernel::end(pid))
    });
    let _ = std::fs::remove_file(&socket);
    ready
}

/// Deletes a container, killing what is left of it. Whoever died may have left any part of it: each is given back by itself. Its hooks run if `hooked`.
pub fn delete(root: &Path, id: &str, bundle: &Path, hooked: bool) -> io::Result<()> {
    let dir = root.join(id);
    let (container, config) = (Container::load(dir.clone()).ok(), YoukiConfig::load(&dir).ok());
    let living = container.iter().filter(|c| c.status() != ContainerStatus::Stopped).filter_map(Container::pid);
    living.for_each(|init| kernel::kill(init.as_raw() as u32));
    // Without its state the specification tells where its cgroup is.
    let at = config.as_ref().map(|c| c.cgroup_path.clone()).or_else(|| place_asked_for(bundle, id));
    let emptied = at.map_or(Ok(()), |cgroup_path| {
        let config = CgroupConfig { cgroup_path, systemd_cgroup: false, container_name: id.to_owned() };
        Place::of(&config, None)?.remove()
    });
    let closed = container.as_ref().map_or(Ok(()), |c| {
        let (made, monitored) = (c.intel_rdt_dir().map(PathBuf::as_path), c.intel_rdt_monitoring_dir().map(PathBuf::as_path));
        cleanup_intel_rdt(made, monitored, c.clean_up_intel_rdt_subdirectory(), c.id()).map_err(told)
    });
    emptied.and(closed)?;
    if let (Some(container), Some(config), true) = (&container, &config, hooked) {
        let hooks = config.hooks.as_ref().and_then(|h| h.poststop().as_ref());
        // The specification wants a failing hook to be no obstacle here.
        let _ = run_hooks(hooks, Some(&container.state), None, None, None);
    }
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Where the specification of a bundle wants the cgroup.
fn place_asked_for(bundle: &Path, id: &str) -> Option<PathBuf> {
    let spec = Spec::load(bundle.join("config.json")).ok()?;
    let wanted = spec.linux().as_ref()?.cgroups_path();
    let scope = wanted.as_ref().and_then(|w| Scope::parse(w.to_str()?).ok()?);
    Some(scope.map_or_else(|| get_cgroup_path(wanted, id), |s| s.path()))
}

/// A namespace of a running process, opened now: whoever has entered its user namespace may not look at a process whose program it cannot read.
fn join(kind: LinuxNamespaceType, of: i32) -> io::Result<(LinuxNamespace, File)> {
    let name = match kind {
        LinuxNamespaceType::Mount => "mnt".to_owned(),
        LinuxNamespaceType::Network => "net".to_owned(),
        other => other.to_string(),
    };
    let path = format!("/proc/{of}/ns/{name}");
    let file = File::open(&path).map_err(|e| io::Error::new(e.kind(), format!("open {path}: {e}")))?;
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok((LinuxNamespaceBuilder::default().typ(kind).path(own).build().map_err(told)?, file))
}

/// Places and clones the process; answers its pid and the lines to it.
fn bring_up(args: &ContainerArgs, place: &Place) -> io::Result<(u32, MainReceiver, InitSender)> {
    if let Some(score) = args.spec.process().as_ref().and_then(|p| p.oom_score_adj()) {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|e| io::Error::new(e.kind(), format!("oom_score_adj {score}: {e}")))?;
    }
    // Nobody in a namespace that is entered may look into this process or take what it holds.
    kernel::hide();
    let (mut to_parent, from_init) = main_channel().map_err(told)?;
    let (to_init, mut from_parent) = init_channel().map_err(told)?;
    let spaces = Namespaces::try_from(linux(&args.spec)?.namespaces().as_ref()).map_err(told)?;
    let user = spaces.get(LinuxNamespaceType::User).map_err(told)?;
    let held = place.cradle()?;
    let cradle = held.as_ref().map(AsRawFd::as_raw_fd);
    let enter = || place.enter();
    let pid = if user.is_none() {
        ready(args, &spaces)?;
        clone(args, cradle, false, enter, &mut to_parent, &mut from_parent)?
    } else {
        between(cradle, || {
            enter()?;
            if let Some(user) = user {
                spaces.unshare_or_setns(user).map_err(told)?;
                kernel::become_root()?;
            }
            ready(args, &spaces)?;
            clone(args, None, true, || Ok(()), &mut to_parent, &mut from_parent)
        })?
    };
    // So that the end of the process is an end of file here.
    to_parent.close().map_err(told)?;
    Ok((pid, from_init, to_init))
}

/// What a child gets from its parent only: limits, and the PID namespace.
fn ready(args: &ContainerArgs, spaces: &Namespaces) -> io::Result<()> {
    let calls = args.syscall.create_syscall();
    for limit in args.spec.process().iter().filter_map(|p| p.rlimits().as_ref()).flatten() {
        calls.set_rlimit(limit).map_err(told)?;
    }
    match spaces.get(LinuxNamespaceType::Pid).map_err(told)? {
        Some(space) => spaces.unshare_or_setns(space).map_err(told),
        None => Ok(()),
    }
}

/// Clones the process of the container, which never comes back from here.
fn clone(
    args: &ContainerArgs,
    cgroup: Option<i32>,
    sibling: bool,
    enter: impl FnOnce() -> io::Result<()>,
    to_parent: &mut MainSender,
    from_parent: &mut InitReceiver,
) -> io::Result<u32> {
    let pid = kernel::clone(cgroup, sibling)?;
    if pid != 0 {
        return Ok(pid);
    }
    let ended = enter().and_then(|()| container_init_process(args, to_parent, from_parent).map_err(told));
    if let Err(error) = &ended {
        let text = error.to_string();
        // Who hears of it depends on how far it came.
        let _ = to_parent.exec_failed(text.clone());
        if let ContainerType::TenantContainer { exec_notify_fd } = args.container_type {
            kernel::tell(exec_notify_fd, &text);
        }
    }
    kernel::exit(i32::from(ended.is_err()))
}

/// Runs `act` in a process in between, which ends after it; answers the pid that it makes.
fn between(cgroup: Option<i32>, act: impl FnOnce() -> io::Result<u32>) -> io::Result<u32> {
    let (answer, mut theirs) = UnixStream::pair()?;
    let pid = kernel::clone(cgroup, false)?;
    if pid == 0 {
        let told = act();
        let line = match &told {
            Ok(pid) => format!("+{pid}\n"),
            Err(e) => format!("-{}\n", e.to_string().replace('\n', " ")),
        };
        let _ = theirs.write_all(line.as_bytes());
        kernel::exit(0);
    }
    drop(theirs);
    let mut line = String::new();
    // A line: the container's process holds this socket, too, until it runs its program.
    let read = BufReader::new(answer).read_line(&mut line);
    kernel::reap(pid);
    read?;
    match (line.strip_prefix('+').and_then(|p| p.trim().parse().ok()), line.strip_prefix('-')) {
        (Some(pid), _) => Ok(pid),
        (None, Some(error)) => Err(io::Error::other(error.trim().to_owned())),
        (None, None) => Err(io::Error::other("the process that enters the user namespace died")),
    }
}

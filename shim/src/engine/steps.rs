//! The steps, each in a worker of the engine's process.
use super::{Request, diary, guard, launch, stage, systemd};
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::Executor;
use std::io;
use std::os::fd::OwnedFd;

/// An error with its causes.
pub fn told(error: impl std::error::Error) -> io::Error {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(s) = source {
        let more = s.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = s.source();
    }
    io::Error::other(text)
}

/// One step, in a worker.
pub fn work(body: &[u8], fds: impl Iterator<Item = OwnedFd>) -> io::Result<u32> {
    let request = Request::decode(body)?;
    let diary = if request.bundle.as_os_str().is_empty() { None } else { diary::open(&request.bundle) };
    step(&request, fds).map_err(|e| match diary.map(|d| diary::read(&d)).filter(|d| !d.is_empty()) {
        Some(told) => io::Error::other(format!("{e} ({told})")),
        None => e,
    })
}

fn step(request: &Request, mut fds: impl Iterator<Item = OwnedFd>) -> io::Result<u32> {
    match request.step.as_str() {
        "create" => {
            guard::normalise(&request.bundle)?;
            let _holder = systemd::prepare(&request.bundle, request.systemd)?;
            let _held = stage::prepare(&request.bundle)?;
            let spec = launch::specification(&request.bundle)?;
            if launch::fits(&spec) {
                return launch::create(request, spec, &streams(request, fds)?, Box::new(guard::Labelled));
            }
            let container =
                builder(request, &mut fds)?.with_executor(guard::Labelled).as_init(&request.bundle).with_systemd(false).with_detach(true);
            let container = container.build().map_err(told)?;
            Ok(container.pid().map_or(0, |p| p.as_raw() as u32))
        }
        "exec" => {
            let file = request.file.clone().ok_or_else(|| io::Error::other("no process"))?;
            let guard = guard::Guard::for_exec(&request.bundle, &file)?;
            let executor = guard.map_or_else(|| Box::new(guard::Labelled) as Box<dyn Executor>, |g| Box::new(g));
            launch::exec(request, &file, &streams(request, fds)?, executor)
        }
        "start" => load(request)?.start().map_err(told).map(|()| 0),
        "pause" => load(request)?.pause().map_err(told).map(|()| 0),
        "resume" => load(request)?.resume().map_err(told).map(|()| 0),
        "delete" => launch::delete(&request.root, &request.id, &request.bundle, true).map(|()| 0),
        "give back" => launch::delete(&request.root, &request.id, &request.bundle, false).map(|()| 0),
        "checkpoint" => checkpoint(request).map(|()| 0),
        "update" => update(request).map(|()| 0),
        other => Err(io::Error::other(format!("the engine knows no step {other:?}"))),
    }
}

/// Standard input, output and error; none where there is a terminal.
fn streams(request: &Request, fds: impl Iterator<Item = OwnedFd>) -> io::Result<Vec<OwnedFd>> {
    let all: Vec<OwnedFd> = fds.take(3).collect();
    if request.console.is_none() && all.len() < 3 { Err(io::Error::other("the streams are missing")) } else { Ok(all) }
}

fn builder(request: &Request, fds: &mut impl Iterator<Item = OwnedFd>) -> io::Result<ContainerBuilder> {
    let builder = ContainerBuilder::new(request.id.clone(), SyscallType::default()).with_root_path(&request.root).map_err(told)?;
    if request.console.is_some() {
        return Ok(builder.with_console_socket(request.console.clone()));
    }
    match (fds.next(), fds.next(), fds.next()) {
        (Some(stdin), Some(stdout), Some(stderr)) => Ok(builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr)),
        _ => Err(io::Error::other("the streams are missing")),
    }
}

fn load(request: &Request) -> io::Result<Container> {
    Container::load(request.root.join(&request.id)).map_err(told)
}

/// Writes the container's processes down with CRIU. The file holds the wish ([`crate::runtime::Checkpoint`]).
fn checkpoint(request: &Request) -> io::Result<()> {
    let file = request.file.as_ref().ok_or_else(|| io::Error::other("no wish"))?;
    let wish: serde_json::Value = serde_json::from_slice(&std::fs::read(file)?)?;
    let yes = |key: &str| wish[key] == true;
    let path = |key: &str| wish[key].as_str().filter(|p| !p.is_empty()).map(std::path::PathBuf::from);
    let options = libcontainer::container::CheckpointOptions {
        ext_unix_sk: yes("external_unix_sockets"),
        file_locks: yes("file_locks"),
        image_path: path("image_path").ok_or_else(|| io::Error::other("no image path"))?,
        leave_running: !yes("exit"),
        shell_job: yes("terminal"),
        tcp_established: yes("open_tcp"),
        work_path: path("work_path"),
        manage_cgroups_mode: rust_criu::CgMode::DEFAULT,
        link_remap: false,
    };
    load(request)?.checkpoint(&options).map_err(told)
}

fn update(request: &Request) -> io::Result<()> {
    let file = request.file.as_ref().ok_or_else(|| io::Error::other("no resources"))?;
    let resources: serde_json::Value = serde_json::from_slice(&std::fs::read(file)?)?;
    systemd::update(file.parent().unwrap_or(file), &resources)?;
    let resources: libcontainer::oci_spec::runtime::LinuxResources = serde_json::from_value(resources)?;
    let config = load(request)?.spec().map_err(told)?;
    let cgroup = libcgroups::common::CgroupConfig {
        cgroup_path: config.cgroup_path.clone(),
        systemd_cgroup: false,
        container_name: request.id.clone(),
    };
    let manager = libcgroups::common::create_cgroup_manager(cgroup).map_err(told)?;
    let options =
        libcgroups::common::ControllerOpt { resources: &resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    libcgroups::common::CgroupManager::apply(&manager, &options).map_err(told)
}

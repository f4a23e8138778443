//! The life of a container within its pod.
use crate::record::{ContainerRow, Json, Phase, PodPhase, PodRow, Proto, container_name, new_id, now_ns};
use crate::{Handler, World, pod, spec, volumes};
use kernel::{Class, Cx, Fault, Result, ResultExt};
use messages::sandbox::{CreateContainer, ExecSync};
use messages::store::{self, Op, table};
use messages::task::{self, Exit, Stdio};
use messages::{image, snapshot};
use proto::cri;
use serde_json::{Value, json};
use std::rc::Rc;
use std::time::Duration;

/// Looking at files of the host for a specification; a file system that hangs costs this container only.
const LOOK: Duration = Duration::from_secs(20);
/// Bytes of each stream that ExecSync keeps, as containerd.
const EXEC_OUTPUT: usize = (16 << 20) - (16 << 10);

/// Completes an id from its unique beginning.
pub fn find(world: &World, id: &str) -> Option<ContainerRow> {
    let tables = world.tables.borrow();
    let mut hits = tables.containers.range(id.to_owned()..).take_while(|(k, _)| k.starts_with(id) && !id.is_empty());
    let first = hits.next()?;
    (first.0 == id || hits.next().is_none()).then(|| first.1.clone())
}

fn known(world: &World, id: &str) -> Result<ContainerRow> {
    find(world, id).ok_or_else(|| Fault::not_found(format!("container {id:?} not found")))
}

/// CreateContainer.
pub async fn create(world: &World, cx: &Cx, m: CreateContainer) -> Result<String> {
    let pod_id = pod::full_id(world, &m.sandbox_id).ok_or_else(|| Fault::not_found(format!("sandbox {:?} not found", m.sandbox_id)))?;
    let pod = world.pod(&pod_id).ok_or_else(|| Fault::not_found(format!("sandbox {pod_id} not found")))?;
    if pod.phase != PodPhase::Ready {
        return Err(Fault::failed_precondition(format!("sandbox {pod_id} is not ready")));
    }
    let options = namespace_options(&m.config);
    spec::userns::fits(&options, &pod)?;
    let sandbox = if m.sandbox_config.metadata.is_some() { m.sandbox_config } else { pod.config.0.clone() };
    let name = container_name(&m.config, &pod)?;
    let _guard = world.lock(&name).await;
    if let Some(holder) = world.args.store.call(cx, store::Get { table: table::NAMES, key: name.clone() }).await? {
        let id: String = store::decode(&holder)?;
        match world.container(&id) {
            Some(row) if row.phase == Phase::Creating => take_down(world, &cx.without_deadline(), &id).await?,
            Some(row) if row.phase == Phase::Created && row.config.0 == m.config => return Ok(id),
            Some(_) => {
                return Err(Fault::already_exists(format!(
                    "container name {:?} is reserved for {id}",
                    name.trim_start_matches("container/")
                )));
            }
            None => {}
        }
    }
    let wanted = m.config.image.clone().unwrap_or_default().image;
    let image = world.args.images.call(cx, image::Resolve { reference: wanted.clone() }).await?;
    let image = image.ok_or_else(|| Fault::not_found(format!("image {wanted:?} is not on this node: pull it first")))?;
    let id = new_id();
    let log_path = if m.config.log_path.is_empty() || sandbox.log_directory.is_empty() {
        String::new()
    } else {
        std::path::Path::new(&sandbox.log_directory).join(&m.config.log_path).to_string_lossy().into_owned()
    };
    let mut row = ContainerRow {
        id: id.clone(),
        sandbox_id: pod_id,
        stop_signal: stop_signal(&m.config, &image)?,
        config: Proto(m.config),
        spec: Json::default(),
        image_id: image.id.clone(),
        image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.clone()),
        snapshotter: world.snapshotter(&pod.handler),
        log_path,
        phase: Phase::Creating,
        pid: 0,
        created_ns: now_ns(),
        started_ns: 0,
        exit: None,
        reason: Default::default(),
        boot: world.boot.clone(),
        label: String::new(),
    };
    world.commit(cx, vec![Op::put(table::NAMES, &name, &id)?, Op::put(table::CONTAINERS, &id, &row)?]).await?;
    world.tables.borrow_mut().containers.insert(id.clone(), row.clone());
    if let Err(fault) = make(world, cx, &mut row, &pod, sandbox, &image).await {
        take_down(world, &cx.without_deadline(), &id).await?;
        return Err(fault);
    }
    Ok(id)
}

async fn make(
    world: &World,
    cx: &Cx,
    row: &mut ContainerRow,
    pod: &PodRow,
    sandbox: cri::PodSandboxConfig,
    image: &image::Image,
) -> Result<()> {
    let context = row.config.0.linux.as_ref().and_then(|l| l.security_context.clone()).unwrap_or_default();
    let labels = world.selinux.labels(context.selinux_options.as_ref(), Some(&pod.label))?;
    row.label.clone_from(&labels.process);
    // Known before anything else can fail, so that it is given back.
    world.tables.borrow_mut().containers.insert(row.id.clone(), row.clone());
    let prepare = snapshot::Prepare {
        snapshotter: row.snapshotter.clone(),
        key: row.id.clone(),
        parent: image.chain_id.clone(),
        view: false,
        labels: spec::userns::labels(pod),
    };
    let rootfs =
        cx.run("prepare the root file system", |cx| async move { volumes::prepare_unpacked(world, &cx, &image.id, prepare).await }).await?;
    let config = volumes::resolve(world, cx, row, image, &rootfs).await?;
    let (id, pod, image, settings) = (row.id.clone(), pod.clone(), image.clone(), world.args.settings.clone());
    let files = world.files(&pod.id);
    let target = spec::target::pid(world, &namespace_options(&config), &pod.id)?;
    let ipc = pod.handle.namespaces.contains_key("ipc");
    let shm = if ipc { world.volatile(&pod.id).join("shm") } else { "/dev/shm".into() };
    let handler = Handler { runtime: pod.runtime.clone(), ..world.handler(&pod.handler) };
    let build = move || {
        let input = spec::Input {
            id: &id,
            config: &config,
            pod: &pod,
            sandbox: &sandbox,
            image: &image,
            rootfs: &rootfs,
            files,
            shm,
            target,
            labels: &labels,
            handler: &handler,
            settings: &settings,
        };
        spec::build(&input).map(|spec| Json::of(&spec))
    };
    row.spec = cx.run("build the specification", |cx| async move { cx.blocking("build the specification", LOOK, build).await }).await?;
    row.phase = Phase::Created;
    world.save_container(cx, row).await?;
    world.announce_now(cri::ContainerEventType::ContainerCreatedEvent, &row.id, &row.sandbox_id);
    world.tell(cx, "/containers/create", &row.id).await;
    Ok(())
}

/// What a container asks of its namespaces.
pub fn namespace_options(config: &cri::ContainerConfig) -> cri::NamespaceOption {
    config.linux.as_ref().and_then(|l| l.security_context.as_ref()).and_then(|s| s.namespace_options.clone()).unwrap_or_default()
}

fn stop_signal(config: &cri::ContainerConfig, image: &image::Image) -> Result<u32> {
    let asked = cri::Signal::try_from(config.stop_signal);
    let asked = asked.map_err(|_| Fault::invalid_argument(format!("stop_signal {} is not known", config.stop_signal)))?;
    let named = (asked as i32 != 0).then(|| asked.as_str_name().to_owned());
    let of_image = image.config.pointer("/config/StopSignal").and_then(Value::as_str).unwrap_or_default().to_owned();
    let name = named.unwrap_or(of_image);
    if name.is_empty() {
        return Ok(libc::SIGTERM as u32);
    }
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let upper = name.to_uppercase();
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let offset = |rest: &str, sign: &[char], word: &str| {
        let digits = rest.trim_start_matches(word).trim_start_matches(sign);
        if rest.is_empty() { Some(0) } else { digits.parse::<i32>().ok() }
    };
    let of_min = full.strip_prefix("SIGRTMIN").and_then(|r| offset(r, &['+'], "PLUS")).map(|n| libc::SIGRTMIN() + n);
    let of_max = full.strip_prefix("SIGRTMAX").and_then(|r| offset(r, &['-'], "MINUS")).map(|n| libc::SIGRTMAX() - n);
    if let Some(number) = of_min.or(of_max).filter(|n| (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(n)) {
        return Ok(number as u32);
    }
    full.parse::<nix::sys::signal::Signal>()
        .map(|s| s as u32)
        .map_err(|_| Fault::invalid_argument(format!("stop signal {name:?} is not known")))
}

/// StartContainer.
pub async fn start(world: &Rc<World>, cx: &Cx, id: &str) -> Result<()> {
    let id = known(world, id)?.id;
    let _guard = world.lock(&id).await;
    let mut row = known(world, &id)?;
    if row.phase == Phase::Starting {
        // We hold the lock, so this is what an attempt left that could not write its end down.
        settle_start(world, cx, &mut row).await?;
        if row.phase == Phase::Running {
            return Ok(());
        }
    }
    if row.phase != Phase::Created {
        return Err(Fault::failed_precondition(format!("container {id} is in state {:?}, not created", row.phase)));
    }
    let pod = world.pod(&row.sandbox_id).filter(|p| p.phase == PodPhase::Ready);
    if pod.is_none() {
        return Err(Fault::failed_precondition(format!("sandbox {} is not ready", row.sandbox_id)));
    }
    row.phase = Phase::Starting;
    world.save_container(cx, &row).await?;
    match launch(world, cx, &row).await {
        Ok(pid) => {
            (row.phase, row.pid, row.started_ns) = (Phase::Running, pid, now_ns());
            world.save_container(cx, &row).await?;
            world.announce_now(cri::ContainerEventType::ContainerStartedEvent, &id, &row.sandbox_id);
            world.tell(cx, "/tasks/start", &id).await;
            watch(world, cx, &id);
            Ok(())
        }
        Err(fault) => {
            let cx = cx.without_deadline();
            let deleted = world.args.tasks.call(&cx, task::Delete { id: id.clone() }).await;
            if fault.class == Class::Unavailable && deleted.is_ok() {
                // Not the container's fault: a retry may start it.
                row.phase = Phase::Created;
                world.save_container(&cx, &row).await?;
                return Err(fault.context(format!("failed to start container {id}; try again")));
            }
            row.phase = Phase::Exited;
            row.reason = ("StartError".into(), fault.message.clone());
            row.exit = Some(Exit { code: 128, at_ns: now_ns(), oom: false, witness: "start".into() });
            world.save_container(&cx, &row).await?;
            Err(fault.context(format!("failed to start container {id}")))
        }
    }
}

/// Ends an interrupted start: nobody was told that it started, so it begins again from where it was created, or goes on if it runs.
pub async fn settle_start(world: &Rc<World>, cx: &Cx, row: &mut ContainerRow) -> Result<()> {
    match world.args.tasks.call(cx, task::State { id: row.id.clone() }).await? {
        Some(task::TaskState::Running { pid }) => (row.phase, row.pid, row.started_ns) = (Phase::Running, pid, now_ns()),
        _ => {
            world.args.tasks.call(cx, task::Delete { id: row.id.clone() }).await?;
            row.phase = Phase::Created;
        }
    }
    world.save_container(cx, row).await?;
    if row.phase == Phase::Running {
        watch(world, cx, &row.id);
    }
    Ok(())
}

async fn launch(world: &World, cx: &Cx, row: &ContainerRow) -> Result<u32> {
    spec::target::check(world, row)?;
    let mounts = snapshot::Mounts { snapshotter: row.snapshotter.clone(), key: row.id.clone() };
    let mut rootfs = world.args.snapshots.call(cx, mounts).await?;
    label_root(&mut rootfs, row)?;
    // Without a path nothing is written, but clients can attach.
    let log = format!("cri-log://{}?max_line={}", row.log_path, world.args.settings.max_log_line);
    let config = &row.config.0;
    let stdin = match (config.stdin, config.stdin_once) {
        (true, true) => "hold://?once",
        (true, false) => "hold://",
        (false, _) => "",
    };
    let stdio = Stdio {
        stdin: stdin.into(),
        stdout: log.clone(),
        stderr: if row.config.0.tty { String::new() } else { log },
        terminal: row.config.0.tty,
    };
    let spec = row.spec.text().as_bytes().to_vec();
    let create = task::Create { id: row.id.clone(), sandbox_id: row.sandbox_id.clone(), spec, rootfs, stdio };
    cx.run("create the task", |cx| async move { world.args.tasks.call(&cx, create).await }).await?;
    cx.run("start the task", |cx| async move { world.args.tasks.call(&cx, task::Start { id: row.id.clone() }).await }).await
}

/// Files of the root get their label by the mount: they are too many to be labelled one by one.
fn label_root(rootfs: &mut [snapshot::Mount], row: &ContainerRow) -> Result<()> {
    if row.label.is_empty() {
        return Ok(());
    }
    let spec = row.spec.value()?;
    let label = spec.pointer("/linux/mountLabel").and_then(Value::as_str).unwrap_or_default();
    let mounts = rootfs.iter_mut().filter(|m| m.fs_type != "bind" && !label.is_empty());
    mounts.for_each(|m| m.options.push(format!("context=\"{label}\"")));
    Ok(())
}

/// Waits for the container's end in the background, and writes it down.
pub fn watch(world: &Rc<World>, cx: &Cx, id: &str) {
    let (world, id) = (world.clone(), id.to_owned());
    cx.spawn("watch container", move |cx| async move {
        let mut pause = Duration::from_millis(50);
        loop {
            let wait = cx.with_timeout(Duration::from_secs(24 * 3600));
            match world.args.tasks.call(&wait, task::Wait { id: id.clone() }).await {
                Ok(exit) => return ended(&world, &cx, &id, exit).await,
                Err(e) if e.is_not_found() => {
                    let lost = Exit { code: 255, at_ns: now_ns(), oom: false, witness: "lost".into() };
                    return ended(&world, &cx, &id, lost).await;
                }
                Err(error) => tracing::debug!(%error, id, "waiting for a container goes on"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    });
}

/// Writes an end down; once.
async fn ended(world: &World, cx: &Cx, id: &str, exit: Exit) {
    let Some(mut row) = world.container(id).filter(|r| r.phase == Phase::Running || r.phase == Phase::Starting) else { return };
    row.reason = match &exit {
        e if e.oom => ("OOMKilled".into(), String::new()),
        e if e.witness == "lost" => ("Unknown".into(), "the container's end was not seen".into()),
        e if e.code == 0 => ("Completed".into(), String::new()),
        _ => ("Error".into(), String::new()),
    };
    (row.phase, row.pid, row.exit) = (Phase::Exited, 0, Some(exit));
    if let Err(error) = world.save_container(cx, &row).await {
        tracing::error!(%error, id, "a container's end could not be written down");
    }
    world.announce_now(cri::ContainerEventType::ContainerStoppedEvent, id, &row.sandbox_id);
    if let Err(error) = world.args.tasks.call(cx, task::Delete { id: id.into() }).await {
        tracing::warn!(%error, id, "an ended task could not be deleted yet");
    }
    world.tell(cx, "/tasks/exit", id).await;
}

/// StopContainer.
pub async fn stop(world: &World, cx: &Cx, id: &str, grace_s: i64) -> Result<()> {
    let Some(row) = find(world, id) else { return Ok(()) };
    let id = row.id.clone();
    if row.phase == Phase::Starting {
        // Once the start that is under way has ended, it either runs or it does not.
        drop(world.lock(&id).await);
    }
    match world.container(&id).map(|r| r.phase) {
        Some(Phase::Running) => {}
        Some(Phase::Starting) => return abandon_start(world, cx, &id).await,
        _ => return Ok(()),
    }
    if grace_s > 0 {
        signal(world, cx, &id, row.stop_signal, false).await?;
        let grace = Duration::from_secs(grace_s.min(1 << 31) as u64);
        let over = cx.run("grace period", |_| async { Ok(gone(world, &id, grace).await) }).await?;
        if over {
            return Ok(());
        }
    }
    signal(world, cx, &id, libc::SIGKILL as u32, true).await?;
    // The exit of a killed process takes milliseconds; a process in uninterruptible sleep takes for ever, and the client hears of it.
    if cx.run("wait for the end", |_| async { Ok(gone(world, &id, Duration::from_secs(30)).await) }).await? {
        return Ok(());
    }
    Err(Fault::deadline_exceeded(format!("container {id} does not end after SIGKILL")))
}

/// Ends what a start left that could not write its end down.
async fn abandon_start(world: &World, cx: &Cx, id: &str) -> Result<()> {
    let _guard = world.lock(id).await;
    let Some(mut row) = world.container(id).filter(|r| r.phase == Phase::Starting) else { return Ok(()) };
    signal(world, cx, id, libc::SIGKILL as u32, true).await?;
    world.args.tasks.call(cx, task::Delete { id: id.into() }).await?;
    row.phase = Phase::Exited;
    row.exit = Some(Exit { code: 137, at_ns: now_ns(), oom: false, witness: "stop".into() });
    row.reason = ("Error".into(), "stopped while it was being started".into());
    world.save_container(cx, &row).await
}

async fn signal(world: &World, cx: &Cx, id: &str, signal: u32, all: bool) -> Result<()> {
    let kill = task::Kill { id: id.into(), exec_id: String::new(), signal, all };
    match world.args.tasks.call(cx, kill).await {
        Err(e) if e.is_not_found() => Ok(()),
        other => other.with_context(|| format!("signal {signal} to container {id}")),
    }
}

/// Whether the container ended within `limit`.
async fn gone(world: &World, id: &str, limit: Duration) -> bool {
    let end = tokio::time::Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    while world.container(id).is_some_and(|r| r.phase == Phase::Running) {
        if tokio::time::Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    true
}

/// RemoveContainer.
pub async fn remove(world: &World, cx: &Cx, id: &str) -> Result<()> {
    let Some(row) = find(world, id) else { return Ok(()) };
    stop(world, cx, &row.id, 0).await?;
    let _guard = world.lock(&row.id).await;
    take_down(world, cx, &row.id).await
}

/// Gives back all that a container may own; the row and the name go last.
pub async fn take_down(world: &World, cx: &Cx, id: &str) -> Result<()> {
    let Some(row) = world.container(id) else { return Ok(()) };
    cx.run("delete the task", |cx| async move { world.args.tasks.call(&cx, task::Delete { id: id.into() }).await }).await?;
    let remove = snapshot::Remove { snapshotter: row.snapshotter.clone(), key: id.into() };
    match cx.run("remove the root file system", |cx| async move { world.args.snapshots.call(&cx, remove).await }).await {
        Err(e) if !e.is_not_found() => return Err(e),
        _ => {}
    }
    volumes::remove(world, cx, id).await?;
    let mut ops = vec![Op::delete(table::CONTAINERS, id)];
    if let Some(pod) = world.pod(&row.sandbox_id) {
        ops.push(Op::delete(table::NAMES, container_name(&row.config.0, &pod)?));
    }
    world.commit(cx, ops).await?;
    world.tables.borrow_mut().containers.remove(id);
    world.selinux.release(&row.label);
    world.publish_container(id);
    world.announce_now(cri::ContainerEventType::ContainerDeletedEvent, id, &row.sandbox_id);
    world.tell(cx, "/containers/delete", id).await;
    Ok(())
}

/// UpdateContainerResources: what is set replaces, what is not stays. The specification is written down first, and put back if the runtime refuses.
pub async fn update(world: &World, cx: &Cx, request: cri::UpdateContainerResourcesRequest) -> Result<()> {
    let id = known(world, &request.container_id)?.id;
    let _guard = world.lock(&id).await;
    let before = known(world, &id)?;
    let asked = request.linux.unwrap_or_default();
    let new = spec::resources::linux(&asked, &world.args.settings.controllers)?;
    let (mut row, mut spec) = (before.clone(), before.spec.value()?);
    let resources = &mut spec["linux"]["resources"];
    spec::resources::merge(resources, &new);
    // Parts that nothing was said about need not be written again; those that change go whole, for their values depend on each other.
    let keys = new.as_object().into_iter().flat_map(|o| o.keys());
    let changed: serde_json::Map<String, Value> = keys.map(|k| (k.clone(), resources[k].clone())).collect();
    row.spec = Json::of(&spec);
    spec::resources::merge_cri(row.config.0.linux.get_or_insert_default().resources.get_or_insert_default(), &asked);
    world.save_container(cx, &row).await?;
    if row.phase != Phase::Running || changed.is_empty() {
        return Ok(());
    }
    let resources = serde_json::to_vec(&changed).class(Class::Internal, "encode resources")?;
    match world.args.tasks.call(cx, task::Update { id: row.id.clone(), resources }).await {
        // It has just ended.
        Err(e) if e.is_not_found() => Ok(()),
        Err(fault) => {
            let cx = cx.without_deadline();
            if let Some(mut row) = world.container(&id) {
                (row.spec, row.config) = (before.spec, before.config);
                world.save_container(&cx, &row).await?;
            }
            Err(fault.context(format!("failed to update resources of container {id}")))
        }
        Ok(()) => Ok(()),
    }
}

/// ReopenContainerLog.
pub async fn reopen_log(world: &World, cx: &Cx, id: String) -> Result<()> {
    let row = known(world, &id)?;
    if row.phase != Phase::Running {
        return Err(Fault::failed_precondition(format!("container {} is not running", row.id)));
    }
    world.args.tasks.call(cx, task::ReopenLog { id: row.id }).await
}

/// The process of a command in a running container.
pub fn exec_process(world: &World, id: &str, cmd: &[String], terminal: bool) -> Result<(String, Vec<u8>)> {
    let row = known(world, id)?;
    if row.phase != Phase::Running {
        return Err(Fault::failed_precondition(format!("container {} is in state {:?}, not running", row.id, row.phase)));
    }
    if cmd.is_empty() {
        return Err(Fault::invalid_argument("cmd is empty"));
    }
    let mut process = row.spec.value()?.get("process").cloned().unwrap_or_default();
    process["args"] = json!(cmd);
    process["terminal"] = terminal.into();
    if let Some(env) = process["env"].as_array_mut().filter(|_| terminal)
        && !env.iter().any(|e| e.as_str().is_some_and(|e| e.starts_with("TERM=")))
    {
        env.push("TERM=xterm".into());
    }
    Ok((row.id, serde_json::to_vec(&process).class(Class::Internal, "encode the process")?))
}

/// ExecSync.
pub async fn exec(world: &World, cx: &Cx, m: ExecSync) -> Result<cri::ExecSyncResponse> {
    let (id, process) = exec_process(world, &m.id, &m.cmd, false)?;
    let timeout_ms = m.timeout_s.max(0) as u64 * 1000;
    let exec = task::ExecSync { id, process, timeout_ms, max_output: EXEC_OUTPUT };
    let done = world.args.tasks.call(cx, exec).await?;
    Ok(cri::ExecSyncResponse { stdout: done.stdout, stderr: done.stderr, exit_code: done.code })
}

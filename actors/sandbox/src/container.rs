//! The life of a container within its pod.
use crate::record::{ContainerRow, Json, Phase, PodPhase, PodRow, Proto, container_name, new_id, now_ns};
use crate::{Handler, World, spec, volumes};
use kernel::{Class, Cx, Fault, Result, ResultExt};
use messages::sandbox::{CreateContainer, ExecSync};
use messages::store::{Op, table};
use messages::task::{self, Exit, Stdio};
use messages::{image, snapshot};
use proto::cri;
use serde_json::{Value, json};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Looking at files of the host for a specification; a file system that hangs costs this container only.
const LOOK: Duration = Duration::from_secs(20);
/// Until a process that does not die of SIGKILL is reported.
const UNKILLABLE: Duration = Duration::from_secs(30);
/// Bytes of each stream that ExecSync keeps, as containerd.
const EXEC_OUTPUT: usize = (16 << 20) - (16 << 10);

/// Completes an id from its unique beginning.
pub fn find(world: &World, id: &str) -> Option<ContainerRow> {
    let tables = world.tables.borrow();
    let mut hits = tables.containers.range(id.to_owned()..).take_while(|(k, _)| k.starts_with(id) && !id.is_empty());
    let first = hits.next()?;
    (first.0 == id || hits.next().is_none()).then(|| first.1.clone())
}

/// A container by its id; `NotFound`.
pub fn known(world: &World, id: &str) -> Result<ContainerRow> {
    world.container(id).ok_or_else(|| Fault::not_found(format!("container {id:?} not found")))
}

/// CreateContainer.
pub async fn create(world: &World, cx: &Cx, m: CreateContainer) -> Result<String> {
    let _shared = world.whole.read().await;
    let pod = world.known_pod()?;
    if pod.phase != PodPhase::Ready {
        return Err(Fault::failed_precondition(format!("sandbox {} is not ready", pod.id)));
    }
    let options = namespace_options(&m.config);
    spec::userns::fits(&options, &pod)?;
    let sandbox = if m.sandbox_config.metadata.is_some() { m.sandbox_config } else { pod.config.0.clone() };
    let name = container_name(&m.config, &pod)?;
    let _guard = world.lock(&name).await;
    let holder = world.tables.borrow().containers.values().find(|c| container_name(&c.config.0, &pod).is_ok_and(|n| n == name)).cloned();
    match holder {
        Some(row) if row.phase == Phase::Creating => take_down(world, &cx.without_deadline(), &row.id).await?,
        Some(row) if row.phase == Phase::Created && row.config.0 == m.config => return Ok(row.id),
        Some(row) => return Err(Fault::already_exists(format!("container name {name:?} is reserved for {}", row.id))),
        None => {}
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
        sandbox_id: pod.id.clone(),
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
    world.save_container(cx, &row).await?;
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
    let labels = world.args.selinux.labels(context.selinux_options.as_ref(), Some(&pod.label))?;
    row.label.clone_from(&labels.process);
    // Known before anything else can fail, so that it is given back.
    world.set_container(row.clone());
    let prepare = snapshot::Prepare {
        snapshotter: row.snapshotter.clone(),
        key: row.id.clone(),
        parent: image.chain_id.clone(),
        view: false,
        labels: spec::userns::labels(pod),
    };
    look_at_sources(world, cx, &row.config.0).await?;
    let rootfs =
        cx.run("prepare the root file system", |cx| async move { volumes::prepare_unpacked(world, &cx, &image.id, prepare).await }).await?;
    let config = volumes::resolve(world, cx, row, image, &rootfs).await?;
    let (id, pod, image, settings) = (row.id.clone(), pod.clone(), image.clone(), world.args.settings.clone());
    let files = world.files();
    let target = spec::target::pid(world, &namespace_options(&config), &pod.id)?;
    let ipc = pod.handle.namespaces.contains_key("ipc");
    let shm = if ipc { world.volatile().join("shm") } else { "/dev/shm".into() };
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
    // It looks at what a client names: mounts, devices. Alone, for a file system may have stopped answering since its sources were looked at.
    const BUILD: &str = "build the specification";
    row.spec = cx.run(BUILD, |cx| async move { cx.blocking_alone(BUILD, LOOK, build).await }).await?;
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

/// Looks at the mounts' sources before anything depends on them. One may lie on a file system whose server is gone: that costs this container only, and
/// the error names the path.
async fn look_at_sources(world: &World, cx: &Cx, config: &cri::ContainerConfig) -> Result<()> {
    let paths: Vec<String> = config.mounts.iter().map(|m| m.host_path.clone()).filter(|p| !p.is_empty()).collect();
    if paths.is_empty() {
        return Ok(());
    }
    let now = Arc::new(std::sync::Mutex::new(String::new()));
    let at = || now.lock().map(|p| p.clone()).unwrap_or_default();
    let name: String = format!("stat {}", paths.join(", ")).chars().take(160).collect();
    let inside = now.clone();
    let look = move || {
        for path in paths {
            let _ = inside.lock().map(|mut p| p.clone_from(&path));
            // Whether it may be missing is for those to say who know what it is for.
            let _ = std::fs::metadata(&path);
        }
        Ok(())
    };
    cx.run("look at the mounts' sources", |cx| async move {
        let mut ending = world.ending.subscribe();
        let mut looking = std::pin::pin!(cx.blocking_alone(name, LOOK, look));
        loop {
            tokio::select! {
                done = &mut looking => return done.with_context(|| format!("mount source {:?}", at())),
                _ = ending.wait_for(|n| *n > 0) => {
                    return Err(Fault::unavailable(format!("the pod is being stopped; mount source {:?} did not answer", at())));
                }
                () = tokio::time::sleep(Duration::from_millis(100)) => cx.step(format!("look at the mount source {}", at())),
            }
        }
    })
    .await
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
    let before = known(world, id)?.phase;
    let _shared = world.whole.read().await;
    let _guard = world.lock(id).await;
    let mut row = known(world, id)?;
    if row.phase == Phase::Running && matches!(before, Phase::Created | Phase::Starting) {
        // Another call has started it while this one waited: one start, one result.
        return Ok(());
    }
    if row.phase == Phase::Starting {
        // We hold the lock, so this is what an attempt left that could not write its end down.
        settle_start(world, cx, &mut row).await?;
        if row.phase == Phase::Running {
            return Ok(());
        }
    }
    if row.phase != Phase::Created {
        let why = if row.reason.1.is_empty() { row.reason.0.clone() } else { format!("{}: {}", row.reason.0, row.reason.1) };
        let why = if why.is_empty() { why } else { format!(" ({why})") };
        return Err(Fault::failed_precondition(format!("container {id} is in state {:?}{why}, not created", row.phase)));
    }
    if world.pod().is_none_or(|p| p.phase != PodPhase::Ready) {
        return Err(Fault::failed_precondition(format!("sandbox {} is not ready", row.sandbox_id)));
    }
    row.phase = Phase::Starting;
    world.save_container(cx, &row).await?;
    let mut ending = world.ending.subscribe();
    let launched = tokio::select! {
        launched = launch(world, cx, &row) => launched,
        // A runtime may take its time, or hang: whoever wants the pod gone does not wait for it. What it has begun is deleted.
        _ = ending.wait_for(|n| *n > 0) => Err(Fault::unavailable("the pod is being stopped")),
    };
    match launched {
        Ok(pid) => {
            (row.phase, row.pid, row.started_ns) = (Phase::Running, pid, now_ns());
            world.save_container(cx, &row).await?;
            world.announce_now(cri::ContainerEventType::ContainerStartedEvent, id, &row.sandbox_id);
            world.tell(cx, "/tasks/start", id).await;
            watch(world, cx, id);
            Ok(())
        }
        Err(fault) => {
            let cx = cx.without_deadline();
            let deleted = world.args.tasks.call(&cx, task::Delete { id: id.to_owned() }).await;
            if not_its_own(&fault) {
                // A retry may start it. What cannot be deleted now, the retry deletes: until then it is a start that has not ended.
                if deleted.is_ok() {
                    row.phase = Phase::Created;
                    world.save_container(&cx, &row).await?;
                }
                return Err(fault.context(format!("failed to start container {id}; try again")));
            }
            tracing::warn!(container = id, error = %fault, "a container does not start");
            row.phase = Phase::Exited;
            row.reason = ("StartError".into(), fault.message.clone());
            row.exit = Some(Exit { code: 128, at_ns: now_ns(), oom: false, witness: "start".into() });
            world.save_container(&cx, &row).await?;
            Err(fault.context(format!("failed to start container {id}")))
        }
    }
}

/// Did a start fail for a reason that is not the container's own?
fn not_its_own(fault: &Fault) -> bool {
    matches!(fault.class, Class::Unavailable | Class::DeadlineExceeded | Class::Canceled | Class::Aborted | Class::ResourceExhausted)
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
    // After a reboot there is no container to see it again.
    let mounts = snapshot::Mounts { snapshotter: row.snapshotter.clone(), key: row.id.clone(), ephemeral: true };
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

/// Makes an end known, once; then it is written down, however long that takes, and the task deleted.
async fn ended(world: &World, cx: &Cx, id: &str, exit: Exit) {
    let Some(mut row) = world.container(id).filter(|r| r.phase == Phase::Running || r.phase == Phase::Starting) else { return };
    row.reason = match &exit {
        e if e.oom => ("OOMKilled".into(), String::new()),
        e if e.witness == "lost" => ("Unknown".into(), "the container's end was not seen".into()),
        e if e.code == 0 => ("Completed".into(), String::new()),
        _ => ("Error".into(), String::new()),
    };
    (row.phase, row.pid, row.exit) = (Phase::Exited, 0, Some(exit));
    let sandbox = row.sandbox_id.clone();
    world.set_container(row);
    world.announce_now(cri::ContainerEventType::ContainerStoppedEvent, id, &sandbox);
    // A store without room for it keeps nobody from seeing the end; and until it is durable the shim goes on knowing it.
    crate::recover::persist(cx, "writing down a container's end", async || match world.container(id) {
        Some(row) => world.commit(cx, vec![Op::put(table::CONTAINERS, id, &row)?]).await,
        None => Ok(()),
    })
    .await;
    if let Err(error) = world.args.tasks.call(cx, task::Delete { id: id.into() }).await {
        tracing::warn!(%error, id, "an ended task could not be deleted yet");
    }
    world.tell(cx, "/tasks/exit", id).await;
}

/// StopContainer. Holds no lock while it waits, so that it keeps nobody from anything.
pub async fn stop(world: &World, cx: &Cx, id: &str, grace_s: i64) -> Result<()> {
    let Some(row) = world.container(id) else { return Ok(()) };
    if row.phase == Phase::Starting {
        // Once the start that is under way has ended, it either runs or it does not.
        drop(world.lock(id).await);
    }
    match world.container(id).map(|r| r.phase) {
        Some(Phase::Running) => {}
        Some(Phase::Starting) => {
            let _guard = world.lock(id).await;
            return abandon_start(world, cx, id).await;
        }
        _ => return Ok(()),
    }
    if grace_s > 0 && wait_gracefully(world, cx, &row, Duration::from_secs(grace_s.min(1 << 31) as u64)).await? {
        return Ok(());
    }
    signal(world, cx, id, libc::SIGKILL as u32, true).await?;
    // The exit of a killed process takes milliseconds; a process in uninterruptible sleep takes for ever, and the client hears of it.
    if cx.run("wait for the end", |_| async { Ok(gone(world, id, UNKILLABLE).await) }).await? {
        return Ok(());
    }
    let pid = world.container(id).map_or(0, |r| r.pid);
    let sleeps = crate::sys::where_it_sleeps(pid);
    Err(Fault::deadline_exceeded(format!("container {id} does not end after SIGKILL: its process {pid} {sleeps}")))
}

/// The stop signal, and the grace period. Has it ended? A client that goes away meanwhile has not asked for more than the signal.
async fn wait_gracefully(world: &World, cx: &Cx, row: &ContainerRow, grace: Duration) -> Result<bool> {
    // Once: a second stop, perhaps of less patience, must not look like a second wish to the process.
    if world.tables.borrow_mut().signalled.insert(row.id.clone())
        && let Err(fault) = signal(world, cx, &row.id, row.stop_signal, false).await
    {
        world.tables.borrow_mut().signalled.remove(&row.id);
        return Err(fault);
    }
    cx.run("grace period", |cx| async move {
        tokio::select! {
            ended = gone(world, &row.id, grace) => Ok(ended),
            () = cx.caller_gone() => Err(Fault::canceled(format!("nobody waits any more for container {} to stop; it has its signal", row.id))),
        }
    })
    .await
}

/// Ends what a start left that could not write its end down. The container's lock is held.
async fn abandon_start(world: &World, cx: &Cx, id: &str) -> Result<()> {
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
    let mut changed = world.changed.subscribe();
    let ended = async {
        while world.container(id).is_some_and(|r| r.phase == Phase::Running) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::time::timeout(limit, ended).await.is_ok()
}

/// RemoveContainer. From the last stop on nobody else gets at it.
pub async fn remove(world: &World, cx: &Cx, id: &str) -> Result<()> {
    loop {
        stop(world, cx, id, 0).await?;
        let _guard = world.lock(id).await;
        match world.container(id).map(|r| r.phase) {
            // Started meanwhile.
            Some(Phase::Starting | Phase::Running) => {}
            _ => return take_down(world, cx, id).await,
        }
    }
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
    world.commit(cx, vec![Op::delete(table::CONTAINERS, id)]).await?;
    world.forget_container(id);
    world.args.selinux.release(&row.label);
    world.announce_now(cri::ContainerEventType::ContainerDeletedEvent, id, &row.sandbox_id);
    world.tell(cx, "/containers/delete", id).await;
    Ok(())
}

/// UpdateContainerResources: what is set replaces, what is not stays. The specification is written down first, and put back if the runtime refuses.
pub async fn update(world: &World, cx: &Cx, request: cri::UpdateContainerResourcesRequest) -> Result<()> {
    let id = request.container_id;
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

//! The life of a pod: made step by step, each undone if a later one fails; stopped; removed.
use crate::record::{Json, Phase, PodPhase, PodRow, Proto, now_ns, pod_name};
use crate::{World, container, spec, status, volumes};
use futures::future::Either;
use kernel::{Class, Cx, Fault, Result, ResultExt, absent};
use messages::network::{Attach, Attachment, Detach, PodNetwork, PortMapping, Prepare};
use messages::sandbox::RunPod;
use messages::store::{Op, table};
use messages::task::{self, PodNamespaces};
use proto::cri::{self, NamespaceMode};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// Disk and mount work for one pod's files takes milliseconds.
const IO: Duration = Duration::from_secs(30);

fn mode(mode: i32) -> NamespaceMode {
    NamespaceMode::try_from(mode).unwrap_or(NamespaceMode::Pod)
}

fn options(config: &cri::PodSandboxConfig) -> cri::NamespaceOption {
    config.linux.as_ref().and_then(|l| l.security_context.as_ref()).and_then(|s| s.namespace_options.clone()).unwrap_or_default()
}

/// RunPodSandbox. A retry of a creation in flight waits for it, and finds the pod made.
pub async fn run(world: &Rc<World>, cx: &Cx, m: RunPod) -> Result<String> {
    let name = pod_name(&m.config)?;
    let (handler, runtime) = choose(world, &m)?;
    check(&m.config)?;
    if spec::userns::wanted(&options(&m.config))?.is_some() {
        status::check(&world.args, &handler)?;
    }
    let _whole = world.whole.write().await;
    match world.pod() {
        Some(row) if row.phase == PodPhase::Ready && row.config.0 == m.config => return Ok(row.id),
        Some(row) if matches!(row.phase, PodPhase::Creating | PodPhase::Failed) => take_down(world, &cx.without_deadline()).await?,
        Some(row) => return Err(Fault::already_exists(format!("pod name {name:?} is reserved for {}", row.id))),
        None => {}
    }
    let mut row = PodRow {
        id: world.id().to_owned(),
        config: Proto(m.config),
        handler,
        phase: PodPhase::Creating,
        created_ns: now_ns(),
        netns: String::new(),
        ips: vec![],
        handle: Default::default(),
        boot: world.boot.clone(),
        cni: Default::default(),
        runtime,
        label: String::new(),
    };
    let selinux = row.config.0.linux.as_ref().and_then(|l| l.security_context.as_ref()).and_then(|s| s.selinux_options.as_ref());
    row.label = world.args.selinux.labels(selinux, None)?.process;
    world.save_pod(cx, &row).await?;
    if let Err(fault) = make(world, cx, &mut row).await {
        let cx = cx.without_deadline();
        if let Err(undo) = take_down(world, &cx).await {
            return Err(fault.context(leave_failed(world, &cx, row, &undo).await));
        }
        return Err(fault);
    }
    watch(world, cx);
    Ok(row.id)
}

/// The pod is neither made nor undone: it is shown as not ready, so that whoever looks can remove it, and taken down in the background.
async fn leave_failed(world: &Rc<World>, cx: &Cx, row: PodRow, undo: &Fault) -> String {
    let row = PodRow { phase: PodPhase::Failed, ..world.pod().unwrap_or(row) };
    if let Err(error) = world.save_pod(cx, &row).await {
        tracing::warn!(%error, id = row.id, "a failed pod is not written down as such");
        world.set_pod(Some(row));
    }
    take_down_later(world, cx);
    format!("undoing it failed, too ({undo}); it is tried again in the background and at RemovePodSandbox")
}

/// Takes down what could not be made, in the background, until that works.
pub fn take_down_later(world: &Rc<World>, cx: &Cx) {
    let world = world.clone();
    cx.spawn("undo pod", move |cx| async move {
        let _call = world.slot.enter();
        let attempt = async || {
            let _whole = world.whole.write().await;
            match world.pod().map(|p| p.phase) {
                Some(PodPhase::Creating | PodPhase::Failed) => take_down(&world, &cx).await,
                _ => Ok(()),
            }
        };
        crate::recover::persist(&cx, "undoing a pod", attempt).await;
    });
}

/// Watches for the end of the pod's sandbox: it is not ready any more then, and its containers have ended.
pub fn watch(world: &Rc<World>, cx: &Cx) {
    let world = world.clone();
    cx.spawn("watch pod", move |cx| async move {
        let mut pause = Duration::from_millis(100);
        let why = loop {
            let wait = cx.with_timeout(Duration::from_secs(24 * 3600));
            match world.args.tasks.call(&wait, task::WaitSandbox { id: world.id().to_owned() }).await {
                Ok(why) => break why,
                Err(fault) if fault.is_not_found() => break fault.message,
                Err(error) => tracing::debug!(%error, id = world.id(), "waiting for a pod's end goes on"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        };
        let _call = world.slot.enter();
        crate::recover::persist(&cx, "writing down a pod's end", async || {
            let _whole = world.whole.write().await;
            match world.pod() {
                Some(row) if row.phase == PodPhase::Ready => {
                    tracing::warn!(id = row.id, why, "a pod's sandbox ended by itself");
                    stopped(&world, &cx, row).await
                }
                _ => Ok(()),
            }
        })
        .await;
    });
}

/// What no pod can be.
fn check(config: &cri::PodSandboxConfig) -> Result<()> {
    let context = config.linux.as_ref().and_then(|l| l.security_context.clone()).unwrap_or_default();
    if mode(options(config).network) == NamespaceMode::Node && !config.hostname.is_empty() {
        return Err(Fault::invalid_argument(format!(
            "hostname {:?}: a pod on the node's network has the node's hostname",
            config.hostname
        )));
    }
    if context.run_as_group.is_some() && context.run_as_user.is_none() {
        return Err(Fault::invalid_argument("user group is specified without user: run_as_group of the pod needs run_as_user"));
    }
    Ok(())
}

/// The annotation by which a pod says that it is not to be trusted, and the handler that such pods get.
const UNTRUSTED: (&str, &str) = ("io.kubernetes.cri.untrusted-workload", "untrusted");

/// The pod's runtime handler.
fn choose(world: &World, m: &RunPod) -> Result<(String, task::Runtime)> {
    let mut handler = m.handler.as_str();
    if m.config.annotations.get(UNTRUSTED.0).is_some_and(|v| v == "true") {
        if !matches!(handler, "" | "untrusted") {
            return Err(Fault::invalid_argument("untrusted workload with explicit runtime handler is not allowed"));
        }
        let options = options(&m.config);
        if [options.network, options.pid, options.ipc].iter().any(|m| mode(*m) == NamespaceMode::Node) {
            return Err(Fault::invalid_argument("untrusted workload with host access is not allowed"));
        }
        handler = UNTRUSTED.1;
    }
    if handler.is_empty() {
        handler = &world.args.settings.default_handler;
    }
    let found = world.args.settings.handlers.get(handler);
    let found = found.ok_or_else(|| Fault::invalid_argument(format!("no runtime for {handler:?} is configured")))?;
    Ok((handler.to_owned(), found.runtime.clone()))
}

async fn make(world: &World, cx: &Cx, row: &mut PodRow) -> Result<()> {
    let options = options(&row.config.0);
    let prepare = async { if own_network(row) { world.args.network.call(cx, Prepare(network(row))).await } else { Ok(String::new()) } };
    let (written, netns) = futures::join!(files(world, cx, row, mode(options.ipc) != NamespaceMode::Node), prepare);
    written.context("pod files")?;
    row.netns = netns.context("failed to create network namespace for sandbox")?;
    let (attached, handle) = attach_and_start(world, cx, row, row.runtime.clone(), pod_namespaces(world, row, &options)).await?;
    (row.ips, row.cni, row.handle) = (attached.ips, Json::of(&attached.result), handle);
    row.phase = PodPhase::Ready;
    world.save_pod(cx, row).await?;
    world.announce_now(cri::ContainerEventType::ContainerCreatedEvent, &row.id, &row.id);
    world.announce_now(cri::ContainerEventType::ContainerStartedEvent, &row.id, &row.id);
    world.tell(cx, "/sandboxes/start", &row.id).await;
    Ok(())
}

/// Runs CNI's plugins and starts the shim, side by side where the shim does not care: Troupe's own shim only needs the namespace, but another may
/// look for the interfaces in it (a VM's shim does), and the pod's own `net.*` sysctls may name an interface, or be a default for those to come.
async fn attach_and_start(
    world: &World,
    cx: &Cx,
    row: &PodRow,
    runtime: task::Runtime,
    namespaces: PodNamespaces,
) -> Result<(Attachment, task::SandboxHandle)> {
    let wished = row.config.0.linux.as_ref().is_some_and(|l| l.sysctls.keys().any(|k| k.starts_with("net.")));
    let side_by_side = runtime.name == task::OWN_SHIM && !wished;
    let attach = async {
        if row.netns.is_empty() {
            return Ok::<_, Fault>(Attachment::default());
        }
        let attach = cx.run("pod network", |cx| async move { world.args.network.call(&cx, Attach(network(row))).await });
        attach.await.context("failed to setup network for sandbox")
    };
    let start = async {
        let start = task::StartSandbox { id: row.id.clone(), runtime, namespaces };
        let start = cx.run("start the pod's shim", |cx| async move { world.args.tasks.call(&cx, start).await });
        start.await.context("failed to start the sandbox")
    };
    if !side_by_side {
        return Ok((attach.await?, start.await?));
    }
    // The first failure is the answer. An ADD under way is ended by the undo, a start under way is waited for: it takes milliseconds.
    match futures::future::select(std::pin::pin!(attach), std::pin::pin!(start)).await {
        Either::Left((attached, start)) => {
            let handle = start.await;
            Ok((attached?, handle?))
        }
        Either::Right((handle, attach)) => {
            let handle = handle?;
            Ok((attach.await?, handle))
        }
    }
}

/// Does the pod have a network of its own?
fn own_network(row: &PodRow) -> bool {
    mode(options(&row.config.0).network) != NamespaceMode::Node
}

/// Gives the pod's network back.
pub async fn release_network(world: &World, cx: &Cx, row: &PodRow) -> Result<()> {
    if !own_network(row) {
        return Ok(());
    }
    // ADD of a pod that was never ready may have been cut off before the network's own record of it was on the disk.
    let unsure = matches!(row.phase, PodPhase::Creating | PodPhase::Failed);
    let detach = Detach { id: row.id.clone(), pod: unsure.then(|| Box::new(network(row))) };
    cx.run("release the pod's network", |cx| async move { world.args.network.call(&cx, detach).await }).await
}

fn network(row: &PodRow) -> PodNetwork {
    let config = &row.config.0;
    let metadata = config.metadata.clone().unwrap_or_default();
    let dns = config.dns_config.clone().unwrap_or_default();
    let protocol = |p: i32| match p {
        1 => "udp",
        2 => "sctp",
        _ => "tcp",
    };
    let ports = config.port_mappings.iter().filter(|p| p.host_port > 0);
    PodNetwork {
        id: row.id.clone(),
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        cgroup_parent: config.linux.clone().unwrap_or_default().cgroup_parent,
        ports: ports
            .map(|p| PortMapping {
                host_port: p.host_port,
                container_port: p.container_port,
                protocol: protocol(p.protocol).into(),
                host_ip: p.host_ip.clone(),
            })
            .collect(),
        dns: (dns.servers, dns.searches, dns.options),
        annotations: config.annotations.clone().into_iter().collect(),
        userns: spec::userns::of_pod(row),
        handler: row.handler.clone(),
    }
}

fn pod_namespaces(world: &World, row: &PodRow, options: &cri::NamespaceOption) -> PodNamespaces {
    let (host_network, userns) = (row.netns.is_empty(), spec::userns::of_pod(row));
    let linux = row.config.0.linux.clone().unwrap_or_default();
    let mut sysctls: std::collections::BTreeMap<String, String> = linux.sysctls.clone().into_iter().collect();
    if !host_network {
        if world.args.settings.unprivileged_ports {
            sysctls.entry("net.ipv4.ip_unprivileged_port_start".into()).or_insert_with(|| "0".into());
        }
        // The sysctl takes ids of the network namespace's owner, who has not all of them.
        if world.args.settings.unprivileged_icmp && userns.is_none() {
            sysctls.entry("net.ipv4.ping_group_range".into()).or_insert_with(|| "0 2147483647".into());
        }
    }
    let kind = |m: i32| match mode(m) {
        NamespaceMode::Node => "node",
        NamespaceMode::Container => "container",
        _ => "pod",
    };
    PodNamespaces {
        network: (!host_network).then(|| row.netns.clone()),
        ipc: if mode(options.ipc) == NamespaceMode::Node { "node" } else { "pod" }.into(),
        pid: kind(options.pid).into(),
        uts: if host_network { "node" } else { "pod" }.into(),
        hostname: row.config.0.hostname.clone(),
        sysctls,
        cgroup_parent: linux.cgroup_parent,
        userns,
    }
}

/// hostname, hosts, resolv.conf, and the pod's /dev/shm.
async fn files(world: &World, cx: &Cx, row: &PodRow, own_ipc: bool) -> Result<()> {
    let (files, volatile, config) = (world.files(), world.volatile(), row.config.0.clone());
    let root = spec::userns::of_pod(row).map(|u| u.root());
    let write = move || {
        std::fs::create_dir_all(&files).with_context(|| format!("create {}", files.display()))?;
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let hostname =
            if config.hostname.is_empty() { read("/proc/sys/kernel/hostname").trim().to_owned() } else { config.hostname.clone() };
        std::fs::write(files.join("hostname"), format!("{hostname}\n"))?;
        std::fs::write(files.join("hosts"), read("/etc/hosts"))?;
        let resolv = match &config.dns_config {
            None => read("/etc/resolv.conf"),
            Some(dns) => {
                let line = |key: &str, list: &[String]| if list.is_empty() { String::new() } else { format!("{key} {}\n", list.join(" ")) };
                let servers: String = dns.servers.iter().map(|s| format!("nameserver {s}\n")).collect();
                format!("{}{servers}{}", line("search", &dns.searches), line("options", &dns.options))
            }
        };
        std::fs::write(files.join("resolv.conf"), resolv)?;
        // Root of the pod may write to them, as root of any other pod may.
        if let Some((uid, gid)) = root {
            for name in ["hostname", "hosts", "resolv.conf"] {
                std::os::unix::fs::chown(files.join(name), Some(uid), Some(gid))?;
            }
        }
        if own_ipc {
            let shm = volatile.join("shm");
            std::fs::create_dir_all(&shm).with_context(|| format!("create {}", shm.display()))?;
            use nix::mount::{MsFlags, mount};
            let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount(Some("shm"), &shm, Some("tmpfs"), flags, Some("mode=1777,size=67108864"))
                .map_err(std::io::Error::from)
                .context("mount the pod's /dev/shm")?;
        }
        Ok(())
    };
    cx.run("pod files", |cx| async move { cx.blocking("write pod files", IO, write).await }).await
}

fn unmount(path: &Path) -> Result<()> {
    use nix::mount::{MntFlags, umount2};
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        Err(e) => Err(std::io::Error::from(e)).with_context(|| format!("unmount {}", path.display())),
    }
}

/// StopPodSandbox.
pub async fn stop(world: &World, cx: &Cx) -> Result<()> {
    let _ending = world.ending();
    let _whole = world.whole.write().await;
    stop_alone(world, cx).await
}

async fn stop_alone(world: &World, cx: &Cx) -> Result<()> {
    let Some(row) = world.pod() else { return Ok(()) };
    let (id, ids) = (world.id(), world.container_ids());
    // Every container gets its end, whatever becomes of the others.
    let stops = futures::future::join_all(ids.iter().map(|c| container::stop(world, cx, c, 0))).await;
    let starting = |id: &String| world.container(id).is_some_and(|r| r.phase == Phase::Starting);
    match stops.into_iter().collect::<Result<()>>() {
        // A deaf shim holds a start that did not end; both end with the shim.
        Err(fault) if fault.class == Class::Unavailable && ids.iter().any(starting) => {
            tracing::debug!(error = %fault, "the shim goes first")
        }
        stopped => stopped.context("stop the pod's containers")?,
    }
    cx.run("stop the pod's shim", |cx| async move { world.args.tasks.call(&cx, task::StopSandbox { id: id.into() }).await })
        .await
        .context("stop the sandbox")?;
    for held in ids.iter().filter(|id| starting(id)) {
        container::stop(world, cx, held, 0).await.context("stop the pod's containers")?;
    }
    let released = release_network(world, cx, &row).await;
    let shm = world.volatile().join("shm");
    let (images, other_boot) = (volumes::directory(world, id), row.boot != world.boot);
    let unmount = move || unmount(&shm).and_then(|()| volumes::unmount(&images));
    // A reboot has taken the mounts and their directories, not the snapshots.
    if cx.blocking("unmount the pod's volumes", IO, unmount).await? || other_boot {
        volumes::release(world, cx, id).await?;
    }
    // Nothing runs in it any more, whatever a plugin says.
    if row.phase != PodPhase::Stopped {
        stopped(world, cx, row).await?;
    }
    released.context("release the pod's network")
}

/// Writes down that the pod is not ready any more.
async fn stopped(world: &World, cx: &Cx, mut row: PodRow) -> Result<()> {
    row.phase = PodPhase::Stopped;
    world.save_pod(cx, &row).await?;
    world.announce_now(cri::ContainerEventType::ContainerStoppedEvent, &row.id, &row.id);
    world.tell(cx, "/sandboxes/exit", &row.id).await;
    Ok(())
}

/// UpdatePodSandboxResources: the pod's limits live in the cgroup that the kubelet made; what it tells is kept with the pod, for plugins and status,
/// and told to the shim, which may run a machine of the pod's size.
pub async fn update(world: &World, cx: &Cx, request: cri::UpdatePodSandboxResourcesRequest) -> Result<()> {
    let _whole = world.whole.write().await;
    let mut row = world.known_pod()?;
    if row.phase != PodPhase::Ready {
        return Err(Fault::failed_precondition(format!("sandbox {} is not ready", row.id)));
    }
    let linux = row.config.0.linux.get_or_insert_default();
    linux.overhead = request.overhead.or(linux.overhead.take());
    linux.resources = request.resources.or(linux.resources.take());
    let told = serde_json::json!({"Overhead": linux.overhead, "Resources": linux.resources}).to_string().into_bytes();
    let id = row.id.clone();
    world.save_pod(cx, &row).await?;
    cx.run("tell the shim", |cx| async move { world.args.tasks.call(&cx, task::UpdateSandbox { id, resources: told }).await })
        .await
        .context("update the pod's resources at its shim")
}

/// RemovePodSandbox.
pub async fn remove(world: &World, cx: &Cx) -> Result<()> {
    let _ending = world.ending();
    let _whole = world.whole.write().await;
    stop_alone(world, cx).await?;
    for container in world.container_ids() {
        container::remove(world, cx, &container).await?;
    }
    take_down(world, cx).await
}

/// Gives back all that a pod may own, whatever of it was made; the row goes last.
pub async fn take_down(world: &World, cx: &Cx) -> Result<()> {
    let Some(row) = world.pod() else { return Ok(()) };
    let id = world.id();
    cx.run("remove the pod's shim", |cx| async move { world.args.tasks.call(&cx, task::RemoveSandbox { id: id.into() }).await }).await?;
    release_network(world, cx, &row).await?;
    let (files, volatile, images) = (world.files(), world.volatile(), volumes::directory(world, id));
    let clean = move || {
        unmount(&volatile.join("shm"))?;
        let volumes = volumes::unmount(&images)?;
        for dir in [&volatile, &files] {
            absent(std::fs::remove_dir_all(dir)).with_context(|| format!("remove {}", dir.display()))?;
        }
        Ok(volumes)
    };
    if cx.blocking("remove pod files", IO, clean).await? {
        volumes::release(world, cx, id).await?;
    }
    world.commit(cx, vec![Op::delete(table::SANDBOXES, id)]).await?;
    world.args.selinux.release(&row.label);
    let before = world.args.view.0.load_full();
    world.set_pod(None);
    if before.pods.contains_key(id) {
        world.announce(cri::ContainerEventType::ContainerDeletedEvent, id, id, &before);
    }
    world.tell(cx, "/sandboxes/delete", id).await;
    Ok(())
}

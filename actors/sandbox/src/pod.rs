//! The life of a pod: made step by step, each undone if a later one fails; stopped; removed.
use crate::record::{Json, PodPhase, PodRow, Proto, new_id, now_ns, pod_name};
use crate::{World, container, spec, status, volumes};
use futures::future::Either;
use kernel::{Cx, Fault, Result, ResultExt};
use messages::network::{Attach, Attachment, Detach, PodNetwork, PortMapping, Prepare};
use messages::sandbox::RunPod;
use messages::store::{self, Op, table};
use messages::task::{self, PodNamespaces};
use proto::cri::{self, NamespaceMode};
use std::path::Path;
use std::time::Duration;

/// Disk and mount work for one pod's files takes milliseconds.
const IO: Duration = Duration::from_secs(30);

fn mode(mode: i32) -> NamespaceMode {
    NamespaceMode::try_from(mode).unwrap_or(NamespaceMode::Pod)
}

fn options(config: &cri::PodSandboxConfig) -> cri::NamespaceOption {
    config.linux.as_ref().and_then(|l| l.security_context.as_ref()).and_then(|s| s.namespace_options.clone()).unwrap_or_default()
}

/// RunPodSandbox.
pub async fn run(world: &World, cx: &Cx, m: RunPod) -> Result<String> {
    let name = pod_name(&m.config)?;
    let (handler, runtime) = choose(world, &m)?;
    if spec::userns::wanted(&options(&m.config))?.is_some() {
        status::check(world, &handler)?;
    }
    // A retry of a creation in flight waits here, and finds the pod made.
    let _guard = world.lock(&name).await;
    let holder = world.args.store.call(cx, store::Get { table: table::NAMES, key: name.clone() }).await?;
    if let Some(holder) = holder {
        let id: String = store::decode(&holder)?;
        match world.pod(&id) {
            Some(row) if row.phase == PodPhase::Ready && row.config.0 == m.config => return Ok(id),
            Some(row) if row.phase == PodPhase::Creating || row.failed => take_down(world, &cx.without_deadline(), &row.id).await?,
            Some(_) => return Err(Fault::already_exists(format!("pod name {:?} is reserved for {id}", name.trim_start_matches("pod/")))),
            None => {}
        }
    }
    let id = new_id();
    let mut row = PodRow {
        id: id.clone(),
        config: Proto(m.config),
        handler,
        phase: PodPhase::Creating,
        created_ns: now_ns(),
        netns: String::new(),
        ips: vec![],
        handle: Default::default(),
        boot: world.boot.clone(),
        failed: false,
        cni: Default::default(),
        runtime,
        label: String::new(),
    };
    let selinux = row.config.0.linux.as_ref().and_then(|l| l.security_context.as_ref()).and_then(|s| s.selinux_options.as_ref());
    row.label = world.selinux.labels(selinux, None)?.process;
    let ops = vec![Op::put(table::NAMES, &name, &id)?, Op::put(table::SANDBOXES, &id, &row)?];
    world.commit(cx, ops).await?;
    world.tables.borrow_mut().pods.insert(id.clone(), row.clone());
    if let Err(fault) = make(world, cx, &mut row).await {
        let cx = cx.without_deadline();
        if let Err(undo) = take_down(world, &cx, &id).await {
            keep_failed(world, &cx, &id).await?;
            return Err(fault.context(format!("undoing it failed, too ({undo}); it is tried again at RemovePodSandbox")));
        }
        return Err(fault);
    }
    Ok(id)
}

/// What could not be taken down is shown as a pod that is not ready, so that the kubelet stops and removes it, and makes another one meanwhile.
pub async fn keep_failed(world: &World, cx: &Cx, id: &str) -> Result<()> {
    let Some(mut row) = world.pod(id) else { return Ok(()) };
    (row.phase, row.failed) = (PodPhase::Stopped, true);
    world.save_pod(cx, &row).await
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
    let unsure = row.phase == PodPhase::Creating || row.failed;
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
    let (files, volatile, config) = (world.files(&row.id), world.volatile(&row.id), row.config.0.clone());
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

/// Completes an id from its unique beginning.
pub fn full_id(world: &World, id: &str) -> Option<String> {
    let tables = world.tables.borrow();
    let mut hits = tables.pods.range(id.to_owned()..).take_while(|(k, _)| k.starts_with(id) && !id.is_empty());
    let first = hits.next()?.0.clone();
    (first == id || hits.next().is_none()).then_some(first)
}

/// StopPodSandbox.
pub async fn stop(world: &World, cx: &Cx, id: &str) -> Result<()> {
    let Some(id) = full_id(world, id) else { return Ok(()) };
    let _guard = world.lock(&id).await;
    stop_locked(world, cx, &id).await
}

async fn stop_locked(world: &World, cx: &Cx, id: &str) -> Result<()> {
    let Some(mut row) = world.pod(id) else { return Ok(()) };
    let ids: Vec<String> = world.tables.borrow().containers.values().filter(|c| c.sandbox_id == id).map(|c| c.id.clone()).collect();
    let stops = ids.iter().map(|c| container::stop(world, cx, c, 0));
    futures::future::try_join_all(stops).await.context("stop the pod's containers")?;
    cx.run("stop the pod's shim", |cx| async move { world.args.tasks.call(&cx, task::StopSandbox { id: id.into() }).await })
        .await
        .context("stop the sandbox")?;
    let released = release_network(world, cx, &row).await;
    let shm = world.volatile(id).join("shm");
    let (images, other_boot) = (volumes::directory(world, id), row.boot != world.boot);
    let unmount = move || unmount(&shm).and_then(|()| volumes::unmount(&images));
    // A reboot has taken the mounts and their directories, not the snapshots.
    if cx.blocking("unmount the pod's volumes", IO, unmount).await? || other_boot {
        volumes::release(world, cx, id).await?;
    }
    // Nothing runs in it any more, whatever a plugin says.
    if row.failed && released.is_ok() {
        row.failed = false;
        world.save_pod(cx, &row).await?;
    }
    if row.phase != PodPhase::Stopped {
        row.phase = PodPhase::Stopped;
        world.save_pod(cx, &row).await?;
        world.announce_now(cri::ContainerEventType::ContainerStoppedEvent, id, id);
        world.tell(cx, "/sandboxes/exit", id).await;
    }
    released.context("release the pod's network")
}

/// UpdatePodSandboxResources: the pod's limits live in the cgroup that the kubelet made; what it tells is kept with the pod, for plugins and status.
pub async fn update(world: &World, cx: &Cx, request: cri::UpdatePodSandboxResourcesRequest) -> Result<()> {
    let id = full_id(world, &request.pod_sandbox_id);
    let id = id.ok_or_else(|| Fault::not_found(format!("sandbox {:?} not found", request.pod_sandbox_id)))?;
    let _guard = world.lock(&id).await;
    let mut row = world.pod(&id).ok_or_else(|| Fault::not_found(format!("sandbox {id} not found")))?;
    if row.phase != PodPhase::Ready {
        return Err(Fault::failed_precondition(format!("sandbox {id} is not ready")));
    }
    let linux = row.config.0.linux.get_or_insert_default();
    linux.overhead = request.overhead.or(linux.overhead.take());
    linux.resources = request.resources.or(linux.resources.take());
    world.save_pod(cx, &row).await
}

/// RemovePodSandbox.
pub async fn remove(world: &World, cx: &Cx, id: &str) -> Result<()> {
    let Some(id) = full_id(world, id) else { return Ok(()) };
    let _guard = world.lock(&id).await;
    if world.pod(&id).is_none() {
        return Ok(());
    }
    stop_locked(world, cx, &id).await?;
    let ids: Vec<String> = world.tables.borrow().containers.values().filter(|c| c.sandbox_id == id).map(|c| c.id.clone()).collect();
    for container in ids {
        container::remove(world, cx, &container).await?;
    }
    take_down(world, cx, &id).await
}

/// Gives back all that a pod may own, whatever of it was made; the row and the name go last.
pub async fn take_down(world: &World, cx: &Cx, id: &str) -> Result<()> {
    let Some(row) = world.pod(id) else { return Ok(()) };
    cx.run("remove the pod's shim", |cx| async move { world.args.tasks.call(&cx, task::RemoveSandbox { id: id.into() }).await }).await?;
    cx.run("release the pod's network", |cx| async move { world.args.network.call(&cx, Detach { id: id.into(), pod: None }).await })
        .await?;
    let (files, volatile, images) = (world.files(id), world.volatile(id), volumes::directory(world, id));
    let clean = move || {
        unmount(&volatile.join("shm"))?;
        let volumes = volumes::unmount(&images)?;
        for dir in [&volatile, &files] {
            match std::fs::remove_dir_all(dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Fault::from(e).context(format!("remove {}", dir.display())));
                }
                _ => {}
            }
        }
        Ok(volumes)
    };
    if cx.blocking("remove pod files", IO, clean).await? {
        volumes::release(world, cx, id).await?;
    }
    let ops = vec![Op::delete(table::SANDBOXES, id), Op::delete(table::NAMES, pod_name(&row.config.0)?)];
    world.commit(cx, ops).await?;
    world.tables.borrow_mut().pods.remove(id);
    world.selinux.release(&row.label);
    let before = world.args.view.0.load_full();
    world.publish_pod(id);
    if before.pods.contains_key(id) {
        world.announce(cri::ContainerEventType::ContainerDeletedEvent, id, id, &before);
    }
    world.tell(cx, "/sandboxes/delete", id).await;
    Ok(())
}

//! What needs a newer hierarchy or a real kernel besides cgroups' limits: users of a pod's own, swap, a pod's own resources.
use crate::world::{CGROUPS, Pod, World, pid, run, value};
use anyhow::{Context, Result, ensure};
use proto::cri::*;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: i64 = 1 << 20;
/// First id outside of a mapped pod.
const HOST: u32 = 200_000;

fn mapping() -> Vec<IdMapping> {
    vec![IdMapping { host_id: HOST, container_id: 0, length: 65_536 }]
}

fn mapped(pod: &mut PodSandboxConfig) {
    let context = pod.linux.get_or_insert_default().security_context.get_or_insert_default();
    let options = context.namespace_options.get_or_insert_default();
    options.network = NamespaceMode::Pod as i32;
    options.userns_options = Some(UserNamespace { mode: NamespaceMode::Pod as i32, uids: mapping(), gids: mapping() });
    pod.hostname = "mapped".into();
}

/// A pod with users of its own: a volume whose files belong inside to whom they belong outside, limits, and devices that are guarded.
pub async fn users_of_its_own(w: &mut World) -> Result<()> {
    let volume = tempfile::tempdir()?;
    let mount = Mount {
        container_path: "/data".into(),
        host_path: volume.path().to_string_lossy().into_owned(),
        uid_mappings: mapping(),
        gid_mappings: mapping(),
        ..Default::default()
    };
    let pod = w.pod_as("", mapped).await?;
    let id = w
        .container(&pod, "sleep 1000", |c| {
            c.mounts = vec![mount];
            let limits = LinuxContainerResources { memory_limit_in_bytes: 64 * MIB, ..Default::default() };
            c.linux.get_or_insert_default().resources = Some(limits);
        })
        .await?;
    let map = w.exec(&id, "tr -s ' ' </proc/self/uid_map").await?;
    ensure!(map.trim() == format!("0 {HOST} 65536"), "{map}");
    w.exec(&id, "echo x >/data/made && touch /made && chown 7:8 /made && test $(stat -c %u:%g /made) = 7:8").await?;
    let made = std::fs::metadata(volume.path().join("made"))?;
    ensure!((made.uid(), made.gid()) == (0, 0), "in the volume, a file of the pod's root belongs to {}", made.uid());
    let owner = std::fs::metadata(format!("/proc/{}", pid(&mut w.cri, &id).await?))?.uid();
    ensure!(owner == HOST, "the pod's root is {owner} outside");
    let dir = w.cgroup(&pod, &id);
    ensure!(value(&dir, "memory.max")? == (64 * MIB).to_string(), "memory.max");
    ensure!(w.exec(&id, "cat /proc/self/cgroup").await? == "0::/", "place");
    let refused = w.exec(&id, "mkdir /sys/fs/cgroup/mine 2>&1 || true").await?;
    ensure!(refused.contains("Read-only file system"), "{refused}");
    Ok(())
}

/// Where the handler gives its cgroup to the container, it is given to the pod's own root: a systemd inside can divide it, and raise no limit.
pub async fn users_of_its_own_divide_their_cgroup(w: &mut World) -> Result<()> {
    let pod = w.pod_as("writable", mapped).await?;
    let id = w
        .container(&pod, "sleep 1000", |c| {
            let limits = LinuxContainerResources { memory_limit_in_bytes: 64 * MIB, ..Default::default() };
            c.linux.get_or_insert_default().resources = Some(limits);
        })
        .await?;
    w.exec(&id, "mkdir /sys/fs/cgroup/mine && echo 1 >/sys/fs/cgroup/mine/cgroup.procs && grep -x 0::/mine /proc/1/cgroup").await?;
    let refused = w.exec(&id, "echo max 2>&1 >/sys/fs/cgroup/memory.max || true").await?;
    ensure!(value(&w.cgroup(&pod, &id), "memory.max")? == (64 * MIB).to_string(), "a container raises its own limit: {refused}");
    Ok(())
}

/// What a container has in swap is told; and the limit of swap is the kubelet's: memory and swap together.
pub async fn swap_is_told(w: &mut World) -> Result<()> {
    let file = "/var/swap";
    if !Path::new(file).exists() {
        run(
            "sh",
            &["-c", &format!("dd if=/dev/zero of={file} bs=1M count=48 2>/dev/null && chmod 600 {file} && mkswap {file} && swapon {file}")],
        )?;
    }
    let pod = w.pod().await?;
    let limits = LinuxContainerResources { memory_limit_in_bytes: 16 * MIB, memory_swap_limit_in_bytes: 48 * MIB, ..Default::default() };
    let script = "dd if=/dev/zero of=/dev/shm/file bs=1M count=28; sleep 1000";
    let id = w.container(&pod, script, |c| c.linux.get_or_insert_default().resources = Some(limits)).await?;
    let dir = w.cgroup(&pod, &id);
    ensure!(value(&dir, "memory.swap.max")? == (32 * MIB).to_string(), "memory.swap.max");
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let stats = w.cri.runtime.container_stats(ContainerStatsRequest { container_id: id.clone() }).await?.into_inner().stats;
        let swap = stats.as_ref().and_then(|s| s.swap).context("no swap")?;
        let (used, free) = (swap.swap_usage_bytes.map_or(0, |v| v.value), swap.swap_available_bytes.map_or(0, |v| v.value));
        if used > 4 << 20 {
            ensure!(used + free == 32 << 20, "{used} of swap are used and {free} available, of 32 MiB");
            break;
        }
        ensure!(Instant::now() < end, "nothing in swap after 20 s: {swap:?}, {}", value(&dir, "memory.swap.current")?);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    w.forget_pods().await;
    run("swapoff", &[file])?;
    Ok(std::fs::remove_file(file)?)
}

fn below(pod: &Pod) -> Result<String> {
    ensure!(pod.cgroup.starts_with(CGROUPS), "{}", pod.cgroup.display());
    value(&pod.cgroup, "cgroup.subtree_control")
}

/// A pod's resources are kept and told, while its containers go on; its cgroup gives every controller to them.
pub async fn a_pod_s_resources_change(w: &mut World) -> Result<()> {
    let pod = w.pod().await?;
    let id = w.container(&pod, "sleep 1000", |_| {}).await?;
    let request = UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        resources: Some(LinuxContainerResources { cpu_shares: 512, memory_limit_in_bytes: 128 * MIB, ..Default::default() }),
        ..Default::default()
    };
    w.cri.runtime.update_pod_sandbox_resources(request).await?;
    w.exec(&id, "true").await?;
    let given = below(&pod)?;
    ensure!(["cpu", "cpuset", "io", "memory", "pids"].iter().all(|c| given.split(' ').any(|g| g == *c)), "{given}");
    Ok(())
}

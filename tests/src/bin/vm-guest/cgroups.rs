//! What holds with either driver on the unified hierarchy.
use crate::world::{CGROUPS, Pod, World, pid, run, scope, until, value};
use anyhow::{Context, Result, ensure};
use proto::cri::*;
use std::path::Path;
use std::time::Duration;

const MIB: i64 = 1 << 20;

fn resources(config: &mut ContainerConfig, resources: LinuxContainerResources) {
    config.linux.get_or_insert_default().resources = Some(resources);
}

fn equal(what: &str, got: &str, want: &str) -> Result<()> {
    ensure!(got == want, "{what}: {got:?} instead of {want:?}");
    Ok(())
}

fn same(dir: &Path, wanted: &[(&str, &str)]) -> Result<()> {
    wanted.iter().try_for_each(|(file, want)| equal(file, &value(dir, file)?, want))
}

/// RuntimeConfig names the driver, for the kubelet to follow.
pub async fn the_driver_is_told(w: &mut World) -> Result<()> {
    let told = w.cri.runtime.runtime_config(RuntimeConfigRequest {}).await?.into_inner().linux.context("no linux")?;
    let want = if w.systemd { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs };
    ensure!(told.cgroup_driver() == want, "{told:?}");
    Ok(())
}

fn limits() -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_shares: 2048,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        cpuset_cpus: "1".into(),
        memory_limit_in_bytes: 64 * MIB,
        unified: [("memory.high".to_owned(), (48 * MIB).to_string()), ("memory.oom.group".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    }
}

/// Each limit is in the container's own cgroup, below the parent that was asked for; and systemd knows it.
pub async fn limits_arrive(w: &mut World) -> Result<()> {
    for handler in ["", "external"] {
        let pod = w.pod_as(handler, |_| {}).await?;
        let id = w.container(&pod, "sleep 1000", |c| resources(c, limits())).await.with_context(|| format!("handler {handler:?}"))?;
        let dir = w.cgroup(&pod, &id);
        let pid = pid(&mut w.cri, &id).await?;
        let place = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        equal("place", place.trim(), &format!("0::/{}", dir.strip_prefix(CGROUPS)?.display()))?;
        let weight = value(&dir, "cpu.weight")?;
        // The two ways to turn 2048 shares into a weight: linear, and runc's quadratic one since 1.3.2.
        ensure!(["79", "174", "170"].contains(&weight.as_str()), "cpu.weight {weight}");
        let max = (64 * MIB).to_string();
        let high = (48 * MIB).to_string();
        same(&dir, &[("cpu.max", "50000 100000"), ("cpuset.cpus", "1"), ("memory.max", &max), ("memory.high", &high)])?;
        same(&dir, &[("memory.oom.group", "1")])?;
        if w.systemd {
            let shown = run("systemctl", &["show", "-p", "MemoryMax,AllowedCPUs,CPUQuotaPerSecUSec,Slice", &scope(&id)])?;
            for want in [format!("MemoryMax={max}"), "AllowedCPUs=1".into(), "CPUQuotaPerSecUSec=500ms".into()] {
                ensure!(shown.lines().any(|l| l == want), "systemd does not know {want}: {shown}");
            }
        }
    }
    Ok(())
}

/// UpdateContainerResources changes what it names and nothing else, and systemd does not undo it.
pub async fn an_update_arrives_and_lasts(w: &mut World) -> Result<()> {
    let pod = w.pod().await?;
    let id = w.container(&pod, "sleep 1000", |c| resources(c, limits())).await?;
    let dir = w.cgroup(&pod, &id);
    let more = LinuxContainerResources { memory_limit_in_bytes: 96 * MIB, cpu_quota: 80_000, ..Default::default() };
    let update = |linux| UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
    w.cri.runtime.update_container_resources(update(more)).await?;
    let max = (96 * MIB).to_string();
    let wanted: &[(&str, &str)] = &[("memory.max", &max), ("cpu.max", "80000 100000"), ("cpuset.cpus", "1")];
    same(&dir, wanted)?;
    let shares = LinuxContainerResources { cpu_shares: 1024, ..Default::default() };
    w.cri.runtime.update_container_resources(update(shares)).await?;
    same(&dir, wanted).context("after an update of the shares alone")?;
    let weight = value(&dir, "cpu.weight")?;
    ensure!(["39", "100"].contains(&weight.as_str()), "cpu.weight {weight}");
    if w.systemd {
        // This makes systemd write all cgroups anew, from what it knows.
        run("systemctl", &["daemon-reload"])?;
        same(&dir, wanted).context("after a reload of systemd")?;
        equal("cpu.weight after a reload", &value(&dir, "cpu.weight")?, &weight)?;
        devices(w, &id).await.context("after a reload of systemd")?;
        run("systemctl", &["daemon-reexec"])?;
        same(&dir, wanted).context("after systemd is executed anew")?;
        devices(w, &id).await.context("after systemd is executed anew")?;
    }
    Ok(())
}

/// A cgroup namespace of its own, which an exec joins; the hierarchy is mounted read-only, or writable where the handler says so.
pub async fn the_container_sees_its_own_cgroup(w: &mut World) -> Result<()> {
    let pod = w.pod().await?;
    let id = w.container(&pod, "sleep 1000", |c| resources(c, limits())).await?;
    equal("place", &w.exec(&id, "cat /proc/self/cgroup").await?, "0::/")?;
    equal("memory.max", &w.exec(&id, "cat /sys/fs/cgroup/memory.max").await?, &(64 * MIB).to_string())?;
    let refused = w.exec(&id, "mkdir /sys/fs/cgroup/mine 2>&1 || true").await?;
    ensure!(refused.contains("Read-only file system"), "{refused}");
    let options = w.exec(&id, "grep ' /sys/fs/cgroup ' /proc/mounts").await?;
    ensure!(["cgroup2", "nosuid", "nodev", "noexec", "ro"].iter().all(|o| options.contains(o)), "{options}");

    let pod = w.pod_as("writable", |_| {}).await?;
    let id = w.container(&pod, "sleep 1000", |_| {}).await?;
    w.exec(&id, "mkdir /sys/fs/cgroup/mine && echo 0 >/sys/fs/cgroup/mine/cgroup.procs && cat /proc/self/cgroup | grep -x 0::/mine")
        .await?;
    Ok(())
}

fn host_options() -> Result<String> {
    run("sh", &["-c", "grep ' /sys/fs/cgroup cgroup2 ' /proc/mounts"])
}

/// A second mount of the hierarchy changes the options of the first: none is lost. Nor when a container without a namespace mounts it.
pub async fn a_privileged_container_costs_the_host_no_mount_option(w: &mut World) -> Result<()> {
    let before = host_options()?;
    ensure!(before.contains("nsdelegate") && before.contains("memory_recursiveprot"), "{before}");
    let privileged = |p: &mut PodSandboxConfig| {
        p.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    };
    let pod = w.pod_as("", privileged).await?;
    let mighty = |c: &mut ContainerConfig| c.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
    let id = w.container(&pod, "sleep 1000", mighty).await?;
    equal("the host's mount", &host_options()?, &before)?;
    // It may steer the machine's cgroups, as an agent does.
    w.exec(&id, "mkdir /sys/fs/cgroup/vm-mine && rmdir /sys/fs/cgroup/vm-mine").await?;
    let pid = pid(&mut w.cri, &id).await?;
    equal("the host's mount", &host_options()?, &before)?;
    ensure!(w.exec(&id, "cat /proc/self/cgroup").await?.contains(&id), "pid {pid} has a cgroup namespace of its own");
    Ok(())
}

/// The disk of the machine, which a container must not read.
async fn devices(w: &mut World, id: &str) -> Result<()> {
    let disk = std::fs::metadata("/dev/vda")?;
    let (major, minor) = {
        use std::os::unix::fs::MetadataExt;
        (libc::major(disk.rdev()), libc::minor(disk.rdev()))
    };
    let script = format!("rm -f /tmp/disk; (mknod /tmp/disk b {major} {minor} && head -c 1 /tmp/disk) 2>&1 || true");
    let read = w.exec(id, &script).await?;
    ensure!(read.contains("Operation not permitted"), "a container reads the machine's disk: {read:?}");
    w.exec(id, "echo x >/dev/null && head -c 4 /dev/urandom >/dev/null && head -c 4 /dev/zero >/dev/null").await?;
    Ok(())
}

/// Without leave a container reads no device, even if it may make nodes; with leave it does, to the letter.
pub async fn devices_are_guarded(w: &mut World) -> Result<()> {
    let pod = w.pod().await?;
    let id = w.container(&pod, "sleep 1000", |_| {}).await?;
    devices(w, &id).await?;
    let given = |c: &mut ContainerConfig| {
        c.devices = vec![Device { container_path: "/dev/given".into(), host_path: "/dev/vda".into(), permissions: "r".into() }];
    };
    let id = w.container(&pod, "sleep 1000", given).await?;
    w.exec(&id, "head -c 1 /dev/given >/dev/null").await?;
    let refused = w.exec(&id, "dd if=/dev/zero of=/dev/given bs=1 count=1 2>&1 || true").await?;
    ensure!(refused.contains("not permitted"), "a device given for reading is written: {refused}");
    Ok(())
}

/// Script, exit code and reason: the kernel kills the init, or another process of the container; or somebody else kills it.
const OOM: [(&str, i32, &str); 3] =
    [("exec tail /dev/zero", 137, "OOMKilled"), ("tail /dev/zero; exit 0", 0, "OOMKilled"), ("sleep 1000", 137, "Error")];

/// `OOMKilled` by the init's death, and by a child's while the init ends well. Each twice: the cgroup may vanish right after.
pub async fn an_oom_kill_is_told(w: &mut World) -> Result<()> {
    let pod = w.pod().await?;
    let small = |c: &mut ContainerConfig| {
        resources(
            c,
            LinuxContainerResources { memory_limit_in_bytes: 16 * MIB, memory_swap_limit_in_bytes: 16 * MIB, ..Default::default() },
        );
    };
    for round in 0..2 {
        for (script, code, reason) in OOM {
            let id = w.container(&pod, script, small).await?;
            if reason == "Error" {
                run("kill", &["-9", &pid(&mut w.cri, &id).await?.to_string()])?;
            }
            let ended = w.cri.wait_exit(&id, 30).await?;
            let told = (ended.exit_code, ended.reason.as_str());
            ensure!(told == (code, reason), "round {round}: {script:?}: {told:?} instead of {:?}", (code, reason));
            w.cri.remove(&id).await?;
        }
    }
    Ok(())
}

/// CPU, memory, pressure, disk and processes of a container that uses some; and of its pod.
pub async fn statistics_are_sane(w: &mut World) -> Result<()> {
    let pod = w.pod().await?;
    let busy = "dd if=/dev/zero of=/file bs=1M count=20 2>/dev/null; sync; while true; do :; done";
    let id = w.container(&pod, busy, |c| resources(c, limits())).await?;
    let end = std::time::Instant::now() + Duration::from_secs(30);
    let stats = loop {
        let stats = w.cri.runtime.container_stats(ContainerStatsRequest { container_id: id.clone() }).await?.into_inner().stats;
        // A rate needs two samples.
        let rate = stats.as_ref().and_then(|s| s.cpu.as_ref()?.usage_nano_cores.as_ref()).map_or(0, |v| v.value);
        match stats {
            Some(stats) if rate > 100_000_000 => break stats,
            stats => ensure!(std::time::Instant::now() < end, "no rate of CPU within 30 s: {stats:?}"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    let (cpu, memory) = (stats.cpu.context("no cpu")?, stats.memory.context("no memory")?);
    let number = |v: &Option<UInt64Value>| v.map_or(0, |v| v.value);
    let rate = number(&cpu.usage_nano_cores);
    ensure!(number(&cpu.usage_core_nano_seconds) > 100_000_000, "{cpu:?}");
    ensure!((100_000_000..650_000_000).contains(&rate), "half a CPU is allowed: {rate}");
    let working = number(&memory.working_set_bytes);
    ensure!(working > 100_000 && working < 64 << 20, "{memory:?}");
    ensure!(number(&memory.available_bytes) == (64 << 20) - working, "{memory:?}");
    ensure!(cpu.psi.as_ref().is_some_and(|p| p.some.is_some_and(|s| s.total > 0)), "throttled, and no pressure: {:?}", cpu.psi);
    ensure!(memory.psi.is_some() && stats.io.is_some_and(|io| io.psi.is_some()), "pressure is missing");

    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let of_pod = w.cri.runtime.pod_sandbox_stats(request).await?.into_inner().stats.context("no pod stats")?;
    let linux = of_pod.linux.context("no linux")?;
    let pod_cpu = number(&linux.cpu.context("no cpu of the pod")?.usage_core_nano_seconds);
    ensure!(pod_cpu >= number(&cpu.usage_core_nano_seconds), "the pod used {pod_cpu} ns, less than its container");
    ensure!(linux.containers.len() == 1 && linux.process.is_some_and(|p| number(&p.process_count) >= 1), "pod");
    let real = value(&w.cgroup(&pod, &id), "cpu.stat")?;
    let real: u64 = real.lines().next().and_then(|l| l.split(' ').nth(1)?.parse().ok()).context("cpu.stat")?;
    let told = number(&cpu.usage_core_nano_seconds) / 1000;
    ensure!(real >= told && real < told + 10_000_000, "the kernel says {real} µs, CRI {told}");
    Ok(())
}

/// In a pod with one PID namespace, a stop ends more than the container's init.
pub async fn a_stop_ends_every_process(w: &mut World) -> Result<()> {
    let shared = |p: &mut PodSandboxConfig| {
        let security = p.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.namespace_options.get_or_insert_default().pid = NamespaceMode::Pod as i32;
    };
    let pod = w.pod_as("", shared).await?;
    let id = w.container(&pod, "sleep 1111 & sleep 1112 & wait", |_| {}).await?;
    let dir = w.cgroup(&pod, &id);
    until("three processes", 10, || value(&dir, "cgroup.procs").is_ok_and(|p| p.lines().count() == 3)).await?;
    w.cri.stop(&id, 0).await?;
    until("all have ended", 10, || value(&dir, "cgroup.procs").map_or(true, |p| p.is_empty())).await?;
    w.cri.remove(&id).await
}

/// After the pods of all checks are removed: no cgroup of a container, no unit, no process, no mount.
pub async fn nothing_is_left(w: &mut World) -> Result<()> {
    let pod = w.pod().await?;
    let id = w.container(&pod, "sleep 1000", |_| {}).await?;
    let dir = w.cgroup(&pod, &id);
    ensure!(dir.is_dir(), "{} is missing", dir.display());
    w.forget_pods().await;
    gone(w, &pod).await?;
    if w.systemd {
        let units = || run("systemctl", &["list-units", "--all", "--no-legend", "--plain", "cri-containerd-*"]).unwrap_or_default();
        until("no scope is loaded", 10, || units().is_empty()).await.with_context(units)?;
    }
    let processes = run("sh", &["-c", "ps -o args | grep '[c]ontainerd-shim' || true"])?;
    ensure!(processes.is_empty(), "{processes}");
    let mounts = run("sh", &["-c", "grep -e /run/troupe -e /var/lib/troupe /proc/mounts || true"])?;
    ensure!(mounts.is_empty(), "{mounts}");
    Ok(())
}

async fn gone(w: &World, pod: &Pod) -> Result<()> {
    // A slice is the kubelet's, or whoever's asked for it; a plain parent that was not there before the pod is the daemon's.
    let left = || {
        let find = format!("find /sys/fs/cgroup -mindepth 1 -type d \\( -name 'cri-containerd-*' -o -path '{}*' \\)", pod.cgroup.display());
        run("sh", &["-c", &find]).unwrap_or_default()
    };
    let systemd = w.systemd;
    until("no cgroup is left", 10, || left().lines().all(|l| systemd && l.ends_with(".slice"))).await.with_context(left)
}

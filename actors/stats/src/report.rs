//! Figures as CRI's statistics.
use crate::cgroup::{Figures, Pressure, now_ns};
use crate::network::Interface;
use crate::{ReadPod, World};
use messages::sandbox::Container;
use proto::cri::{self, UInt64Value};

fn some(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn pressure(p: Option<Pressure>) -> Option<cri::PsiStats> {
    let data = |(total, avg10, avg60, avg300)| Some(cri::PsiData { total, avg10, avg60, avg300 });
    p.map(|[part, full]| cri::PsiStats { full: data(full), some: data(part) })
}

fn memory(f: &Figures) -> cri::MemoryUsage {
    let m = &f.memory;
    cri::MemoryUsage {
        timestamp: f.at_ns,
        working_set_bytes: some(m.working_set()),
        available_bytes: some(m.limit.map_or(0, |l| l.saturating_sub(m.working_set()))),
        usage_bytes: some(m.usage),
        rss_bytes: some(m.rss),
        page_faults: some(m.page_faults),
        major_page_faults: some(m.major_page_faults),
        psi: pressure(f.pressure[1]),
    }
}

fn swap(f: &Figures) -> cri::SwapUsage {
    let m = &f.memory;
    cri::SwapUsage {
        timestamp: f.at_ns,
        swap_available_bytes: some(m.swap_limit.map_or(0, |l| l.saturating_sub(m.swap))),
        swap_usage_bytes: some(m.swap),
    }
}

fn io(f: &Figures) -> Option<cri::IoUsage> {
    f.pressure[2].map(|p| cri::IoUsage { timestamp: f.at_ns, psi: pressure(Some(p)) })
}

impl World {
    fn cpu(&self, id: &str, f: &Figures) -> cri::CpuUsage {
        cri::CpuUsage {
            timestamp: f.at_ns,
            usage_core_nano_seconds: some(f.cpu.usage_ns),
            usage_nano_cores: self.rate(id, f.at_ns, f.cpu.usage_ns).map(|value| UInt64Value { value }),
            psi: pressure(f.pressure[0]),
        }
    }

    pub(crate) fn container(&self, c: &Container, figures: Option<&Figures>) -> cri::ContainerStats {
        let s = &c.status;
        let (at, disk) = self.disk.borrow().get(&s.id).copied().unwrap_or_else(|| (now_ns(), Default::default()));
        let root = self.args.root.join(format!("io.containerd.snapshotter.v1.{}", c.snapshotter));
        cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                id: s.id.clone(),
                metadata: s.metadata.clone(),
                labels: s.labels.clone(),
                annotations: s.annotations.clone(),
            }),
            cpu: figures.map(|f| self.cpu(&s.id, f)),
            memory: figures.map(memory),
            writable_layer: Some(cri::FilesystemUsage {
                timestamp: at,
                fs_id: Some(cri::FilesystemIdentifier { mountpoint: root.to_string_lossy().into_owned() }),
                used_bytes: some(disk.bytes),
                inodes_used: some(disk.inodes),
            }),
            swap: figures.map(swap),
            io: figures.and_then(io),
        }
    }

    pub(crate) fn pod(&self, (pod, own, interfaces, containers): &ReadPod) -> cri::PodSandboxStats {
        let s = &pod.status;
        let processes = containers.iter().filter_map(|(_, f)| f.as_ref()).map(|f| f.pids).sum();
        let at = own.as_ref().map_or_else(now_ns, |f| f.at_ns);
        let linux = cri::LinuxPodSandboxStats {
            cpu: own.as_ref().map(|f| self.cpu(&s.id, f)),
            memory: own.as_ref().map(memory),
            network: network(at, interfaces),
            process: Some(cri::ProcessUsage { timestamp: at, process_count: some(processes) }),
            containers: containers.iter().map(|(c, f)| self.container(c, f.as_ref())).collect(),
            io: own.as_ref().and_then(io),
        };
        let attributes = cri::PodSandboxAttributes {
            id: s.id.clone(),
            metadata: s.metadata.clone(),
            labels: s.labels.clone(),
            annotations: s.annotations.clone(),
        };
        cri::PodSandboxStats { attributes: Some(attributes), linux: Some(linux), windows: None }
    }
}

/// The default interface is `eth0`, or else the first; it is among the interfaces, too.
fn network(timestamp: i64, all: &[Interface]) -> Option<cri::NetworkUsage> {
    let usage = |i: &Interface| cri::NetworkInterfaceUsage {
        name: i.name.clone(),
        rx_bytes: some(i.received[0]),
        rx_errors: some(i.received[2]),
        tx_bytes: some(i.sent[0]),
        tx_errors: some(i.sent[2]),
    };
    let default = all.iter().find(|i| i.name == "eth0").or_else(|| all.first())?;
    Some(cri::NetworkUsage { timestamp, default_interface: Some(usage(default)), interfaces: all.iter().map(usage).collect() })
}

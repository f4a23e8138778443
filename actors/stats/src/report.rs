//! Figures as CRI's statistics.
use crate::cgroup::{Figures, Memory, Pressure, now_ns};
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

fn memory(f: &Figures) -> Option<cri::MemoryUsage> {
    f.memory.as_ref().map(|m| cri::MemoryUsage {
        timestamp: f.at_ns,
        working_set_bytes: some(m.working_set()),
        available_bytes: some(m.limit.map_or(0, |l| l.saturating_sub(m.working_set()))),
        usage_bytes: some(m.usage),
        rss_bytes: some(m.rss),
        page_faults: some(m.page_faults),
        major_page_faults: some(m.major_page_faults),
        psi: pressure(f.pressure[1]),
    })
}

/// Absent where swap is not accounted for. Without a limit nothing is said to be available, as with memory.
fn swap(f: &Figures) -> Option<cri::SwapUsage> {
    let Memory { swap, swap_limit, .. } = f.memory?;
    let used = swap?;
    Some(cri::SwapUsage {
        timestamp: f.at_ns,
        swap_available_bytes: some(swap_limit.map_or(0, |l| l.saturating_sub(used))),
        swap_usage_bytes: some(used),
    })
}

fn io(f: &Figures) -> Option<cri::IoUsage> {
    f.pressure[2].map(|p| cri::IoUsage { timestamp: f.at_ns, psi: pressure(Some(p)) })
}

impl World {
    fn cpu(&self, id: &str, f: &Figures) -> Option<cri::CpuUsage> {
        let used = f.cpu.as_ref()?.usage_ns;
        Some(cri::CpuUsage {
            timestamp: f.at_ns,
            usage_core_nano_seconds: some(used),
            usage_nano_cores: self.samples.borrow_mut().rate(id, f.at_ns, used).map(|value| UInt64Value { value }),
            psi: pressure(f.pressure[0]),
        })
    }

    pub(crate) fn container(&self, c: &Container, figures: Option<&Figures>) -> cri::ContainerStats {
        let s = &c.status;
        let (at, disk) = self.disk(&s.id);
        let root = self.layers(&c.snapshotter);
        cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                id: s.id.clone(),
                metadata: s.metadata.clone(),
                labels: s.labels.clone(),
                annotations: s.annotations.clone(),
            }),
            cpu: figures.and_then(|f| self.cpu(&s.id, f)),
            memory: figures.and_then(memory),
            writable_layer: Some(cri::FilesystemUsage {
                timestamp: at,
                fs_id: Some(cri::FilesystemIdentifier { mountpoint: root.to_string_lossy().into_owned() }),
                used_bytes: some(disk.bytes),
                inodes_used: some(disk.inodes),
            }),
            swap: figures.and_then(swap),
            io: figures.and_then(io),
        }
    }

    /// Where a snapshotter keeps its layers.
    pub(crate) fn layers(&self, snapshotter: &str) -> std::path::PathBuf {
        self.args.root.join(format!("io.containerd.snapshotter.v1.{snapshotter}"))
    }

    pub(crate) fn pod(&self, ReadPod { pod, own, interfaces, containers }: &ReadPod) -> cri::PodSandboxStats {
        let s = &pod.status;
        let processes = containers.iter().filter_map(|(_, f)| f.as_ref()).map(|f| f.processes.len() as u64).sum();
        let at = own.as_ref().map_or_else(now_ns, |f| f.at_ns);
        let linux = cri::LinuxPodSandboxStats {
            cpu: own.as_ref().and_then(|f| self.cpu(&s.id, f)),
            memory: own.as_ref().and_then(memory),
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

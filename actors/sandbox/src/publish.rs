//! The published picture of pods and containers, and events.
use crate::record::{ContainerRow, Phase, PodPhase, PodRow, now_ns};
use crate::slots::Rows;
use crate::{Args, World};
use kernel::Cx;
use messages::events::Publish;
use messages::sandbox::{Container, Picture, Pod, Runtime};
use proto::cri;
use proto::prost::Message as _;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Publishes all pods as they were read at the start of the daemon.
pub(crate) fn everything(args: &Args, pods: &BTreeMap<String, Rows>) {
    let mut picture = Picture { recovered: true, ..Default::default() };
    for (pod_row, containers) in pods.values() {
        picture
            .pods
            .extend(pod_row.iter().filter(|p| p.phase != PodPhase::Creating).map(|p| (p.id.clone(), Arc::new(pod(p, &runtime(args, p))))));
        let shown = containers.iter().filter(|c| c.phase != Phase::Creating);
        picture.containers.extend(shown.map(|c| (c.id.clone(), Arc::new(container(c)))));
    }
    args.view.0.store(Arc::new(picture));
}

fn runtime(args: &Args, row: &PodRow) -> Arc<Runtime> {
    let kind = args.settings.handlers.get(&row.handler).map(|h| h.kind.clone()).unwrap_or_default();
    Arc::new(Runtime { kind, options: row.runtime.clone() })
}

impl World {
    /// Replaces all that the picture has of this pod.
    pub(crate) fn publish_own(&self) {
        let tables = self.tables.borrow();
        let shown = tables.pod.as_ref().filter(|p| p.phase != PodPhase::Creating).map(|p| Arc::new(pod(p, &runtime(&self.args, p))));
        let containers = tables.containers.values().filter(|c| c.phase != Phase::Creating);
        let containers: Vec<_> = containers.map(|c| (c.id.clone(), Arc::new(container(c)))).collect();
        self.change(|picture| {
            match &shown {
                Some(pod) => picture.pods.insert(self.id().to_owned(), pod.clone()),
                None => picture.pods.remove(self.id()),
            };
            picture.containers.retain(|_, c| c.sandbox_id != self.id());
            picture.containers.extend(containers.iter().cloned());
        });
    }

    /// Replaces the pod's place in the picture.
    pub(crate) fn publish_pod(&self) {
        let shown =
            self.tables.borrow().pod.as_ref().filter(|p| p.phase != PodPhase::Creating).map(|p| Arc::new(pod(p, &runtime(&self.args, p))));
        self.change(|picture| {
            match &shown {
                Some(pod) => picture.pods.insert(self.id().to_owned(), pod.clone()),
                None => picture.pods.remove(self.id()),
            };
        });
    }

    /// Replaces one container's place in the picture.
    pub(crate) fn publish_container(&self, id: &str) {
        let shown = self.tables.borrow().containers.get(id).filter(|c| c.phase != Phase::Creating).map(|c| Arc::new(container(c)));
        self.change(|picture| {
            match &shown {
                Some(container) => picture.containers.insert(id.to_owned(), container.clone()),
                None => picture.containers.remove(id),
            };
        });
    }

    /// Changes the picture; pods do so from several threads.
    fn change(&self, change: impl Fn(&mut Picture)) {
        self.args.view.0.rcu(|old| {
            let mut picture = Picture::clone(old);
            change(&mut picture);
            picture
        });
    }

    /// Tells CRI's readers of a change to a pod, or to a container of it, as `picture` shows them. Waits for nobody.
    pub(crate) fn announce(&self, kind: cri::ContainerEventType, id: &str, pod_id: &str, picture: &Picture) {
        let containers = picture.containers.values().filter(|c| c.sandbox_id == pod_id);
        let event = cri::ContainerEventResponse {
            container_id: id.into(),
            container_event_type: kind as i32,
            created_at: now_ns(),
            pod_sandbox_status: picture.pods.get(pod_id).map(|p| p.status.clone()),
            containers_statuses: containers.map(|c| c.status.clone()).collect(),
        };
        self.args.view.1.publish(event);
    }

    /// The same, as published now.
    pub(crate) fn announce_now(&self, kind: cri::ContainerEventType, id: &str, pod_id: &str) {
        self.announce(kind, id, pod_id, &self.args.view.0.load());
    }

    /// Tells the bus; an event that cannot be told is logged, never waited for.
    pub(crate) async fn tell(&self, cx: &Cx, topic: &str, id: &str) {
        let payload = match topic {
            "/sandboxes/start" => proto::any(&proto::events::SandboxStart { sandbox_id: id.into() }),
            "/containers/delete" => proto::any(&proto::events::ContainerDelete { id: id.into() }),
            "/containers/create" => proto::any(&proto::events::ContainerCreate { id: id.into(), ..Default::default() }),
            _ => proto::any_bytes("troupe.v1.Id", id.as_bytes().to_vec()),
        };
        let event = Publish { namespace: "k8s.io".into(), topic: topic.into(), payload, at: None };
        if let Err(error) = self.args.events.call(cx, event).await {
            tracing::warn!(%error, topic, id, "event lost");
        }
    }
}

fn pod(row: &PodRow, runtime: &Arc<Runtime>) -> Pod {
    let config = &row.config.0;
    let ready = row.phase == PodPhase::Ready;
    let options = config.linux.as_ref().and_then(|l| l.security_context.as_ref()).and_then(|s| s.namespace_options.clone());
    let mut ips = if ready { row.ips.clone() } else { vec![] }.into_iter();
    let network =
        cri::PodSandboxNetworkStatus { ip: ips.next().unwrap_or_default(), additional_ips: ips.map(|ip| cri::PodIp { ip }).collect() };
    let state = if ready { cri::PodSandboxState::SandboxReady } else { cri::PodSandboxState::SandboxNotready };
    let status = cri::PodSandboxStatus {
        id: row.id.clone(),
        metadata: config.metadata.clone(),
        state: state as i32,
        created_at: row.created_ns,
        network: Some(network),
        linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(cri::Namespace { options }) }),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: row.handler.clone(),
    };
    let spec = shape(row).to_string().into();
    Pod {
        status,
        netns: row.netns.clone(),
        config: Arc::new(config.clone()),
        pid: row.handle.pid,
        runtime: runtime.clone(),
        spec,
        cni: row.cni.text().clone(),
    }
}

/// A pod in the words of an OCI specification, for tools that look for its namespaces and its cgroup there.
fn shape(row: &PodRow) -> serde_json::Value {
    let config = &row.config.0;
    let network = (!row.netns.is_empty()).then_some(("network", row.netns.as_str()));
    let shared = row.handle.namespaces.iter().map(|(kind, path)| (kind.as_str(), path.as_str()));
    let namespaces: Vec<_> = shared.chain(network).map(|(kind, path)| json!({"type": kind, "path": path})).collect();
    let mut annotations = serde_json::Map::new();
    crate::spec::annotations::identity(&row.id, config, "", "", &mut annotations);
    let linux = config.linux.clone().unwrap_or_default();
    json!({"hostname": config.hostname, "annotations": annotations,
        "linux": {"namespaces": namespaces, "cgroupsPath": linux.cgroup_parent, "sysctl": linux.sysctls}})
}

/// CRI's number of a signal: its numbers go by names.
fn signal(number: u32) -> i32 {
    let number = number as i32;
    let (first, last) = (libc::SIGRTMIN(), libc::SIGRTMAX());
    let name = match number {
        n if n == first => "SIGRTMIN".to_owned(),
        n if n == last => "SIGRTMAX".to_owned(),
        n if n > first && n - first <= 15 => format!("SIGRTMINPLUS{}", n - first),
        n if n > first && n < last => format!("SIGRTMAXMINUS{}", last - n),
        n => nix::sys::signal::Signal::try_from(n).map_or_else(|_| String::new(), |s| s.as_str().to_owned()),
    };
    cri::Signal::from_str_name(&name).map_or(0, |s| s as i32)
}

fn container(row: &ContainerRow) -> Container {
    let config = &row.config.0;
    let state = match row.phase {
        Phase::Creating | Phase::Created | Phase::Starting => cri::ContainerState::ContainerCreated,
        Phase::Running => cri::ContainerState::ContainerRunning,
        Phase::Exited => cri::ContainerState::ContainerExited,
    };
    let resources = config.linux.as_ref().and_then(|l| l.resources.clone());
    let status = cri::ContainerStatus {
        id: row.id.clone(),
        metadata: config.metadata.clone(),
        state: state as i32,
        created_at: row.created_ns,
        started_at: row.started_ns,
        finished_at: row.exit.as_ref().map_or(0, |e| e.at_ns),
        exit_code: row.exit.as_ref().map_or(0, |e| e.code as i32),
        image: config.image.clone(),
        image_ref: row.image_ref.clone(),
        image_id: row.image_id.clone(),
        reason: row.reason.0.clone(),
        message: row.reason.1.clone(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        mounts: config.mounts.clone(),
        log_path: row.log_path.clone(),
        resources: resources.map(|linux| cri::ContainerResources { linux: Some(linux), windows: None }),
        user: Some(cri::ContainerUser { linux: row.spec.value().ok().as_ref().and_then(user) }),
        stop_signal: if config.stop_signal == 0 { signal(row.stop_signal) } else { config.stop_signal },
    };
    Container {
        sandbox_id: row.sandbox_id.clone(),
        snapshotter: row.snapshotter.clone(),
        tty: config.tty,
        status,
        pid: row.pid,
        spec: row.spec.text().clone(),
        config: config.encode_to_vec().into(),
        removing: false,
    }
}

/// The user that the specification gives it.
fn user(spec: &serde_json::Value) -> Option<cri::LinuxContainerUser> {
    let user = spec.pointer("/process/user")?;
    let number = |v: &serde_json::Value| v.as_i64().unwrap_or_default();
    let groups = user["additionalGids"].as_array().into_iter().flatten();
    Some(cri::LinuxContainerUser {
        uid: number(&user["uid"]),
        gid: number(&user["gid"]),
        supplemental_groups: groups.map(number).collect(),
    })
}

//! The published picture of pods and containers, and events.
use crate::World;
use crate::record::{ContainerRow, Phase, PodPhase, PodRow, now_ns};
use kernel::Cx;
use messages::events::Publish;
use messages::sandbox::{Container, Picture, Pod, Runtime};
use proto::cri;
use proto::prost::Message as _;
use serde_json::json;
use std::sync::Arc;

impl World {
    fn runtime(&self, row: &PodRow) -> Arc<Runtime> {
        let kind = self.args.settings.handlers.get(&row.handler).map(|h| h.kind.clone()).unwrap_or_default();
        Arc::new(Runtime { kind, options: row.runtime.clone() })
    }

    /// Replaces the picture as a whole.
    pub(crate) fn publish(&self) {
        let tables = self.tables.borrow();
        let pods = tables.pods.values().filter(|p| p.phase != PodPhase::Creating);
        let containers = tables.containers.values().filter(|c| c.phase != Phase::Creating);
        let picture = Picture {
            pods: pods.map(|p| (p.id.clone(), Arc::new(pod(p, &self.runtime(p))))).collect(),
            containers: containers.map(|c| (c.id.clone(), Arc::new(container(c)))).collect(),
            recovered: tables.recovered,
        };
        self.args.view.0.store(Arc::new(picture));
    }

    /// Replaces one pod's place in the picture.
    pub(crate) fn publish_pod(&self, id: &str) {
        let mut picture = Picture::clone(&self.args.view.0.load());
        match self.tables.borrow().pods.get(id).filter(|p| p.phase != PodPhase::Creating) {
            Some(row) => picture.pods.insert(id.to_owned(), Arc::new(pod(row, &self.runtime(row)))),
            None => picture.pods.remove(id),
        };
        self.args.view.0.store(Arc::new(picture));
    }

    /// Replaces one container's place in the picture.
    pub(crate) fn publish_container(&self, id: &str) {
        let mut picture = Picture::clone(&self.args.view.0.load());
        match self.tables.borrow().containers.get(id).filter(|c| c.phase != Phase::Creating) {
            Some(row) => picture.containers.insert(id.to_owned(), Arc::new(container(row))),
            None => picture.containers.remove(id),
        };
        self.args.view.0.store(Arc::new(picture));
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
    Pod { status, netns: row.netns.clone(), config: Arc::new(config.clone()), pid: row.handle.pid, runtime: runtime.clone(), spec }
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

//! Lists and statuses, from the published pictures. Pure functions.

use kernel::{Class, Fault, Result};
use messages::image::{self as images, Image};
use messages::sandbox::{Container, Picture, Pod};
use proto::cri;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Finds by id or unique prefix of one. An empty or ambiguous id is not "not found": clients take that for "already gone".
pub fn find<'a, T>(all: &'a BTreeMap<String, Arc<T>>, id: &str, what: &str) -> Result<&'a Arc<T>> {
    if id.is_empty() {
        return Err(Fault::new(Class::Unknown, format!("the {what} id is empty")));
    }
    let mut hits = all.range(id.to_owned()..).take_while(|(k, _)| k.starts_with(id));
    match (hits.next(), hits.next()) {
        (Some((key, hit)), _) if key == id => Ok(hit),
        (Some((_, hit)), None) => Ok(hit),
        (Some(_), Some(_)) => Err(Fault::new(Class::Unknown, format!("{what} id {id} is ambiguous: give more of it"))),
        (None, _) => Err(Fault::not_found(format!("{what} {id} does not exist"))),
    }
}

/// Completes a shortened id. What is not in the picture (just created, or gone) stays as it is: its actor knows better.
pub fn complete<T>(all: &BTreeMap<String, Arc<T>>, id: String, what: &str) -> Result<String> {
    if all.contains_key(&id) {
        return Ok(id);
    }
    let mut hits = all.range(id.clone()..).map(|(k, _)| k).take_while(|k| k.starts_with(&id));
    match (id.is_empty(), hits.next(), hits.next()) {
        (true, _, _) => Err(Fault::invalid_argument(format!("the {what} id is empty"))),
        (_, Some(_), Some(_)) => Err(Fault::new(Class::Unknown, format!("{what} id {id} is ambiguous: give more of it"))),
        (_, Some(full), None) => Ok(full.clone()),
        (_, None, _) => Ok(id),
    }
}

/// Pods that a filter lets through.
pub fn pods(picture: &Picture, filter: Option<&cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
    let wanted = |p: &&Arc<Pod>| {
        let s = &p.status;
        filter.is_none_or(|f| {
            s.id.starts_with(&f.id) && f.state.as_ref().is_none_or(|v| v.state == s.state) && labelled(&s.labels, &f.label_selector)
        })
    };
    picture.pods.values().filter(wanted).map(|p| pod(&p.status)).collect()
}

fn pod(s: &cri::PodSandboxStatus) -> cri::PodSandbox {
    cri::PodSandbox {
        id: s.id.clone(),
        metadata: s.metadata.clone(),
        state: s.state,
        created_at: s.created_at,
        labels: s.labels.clone(),
        annotations: s.annotations.clone(),
        runtime_handler: s.runtime_handler.clone(),
    }
}

/// Statuses of a pod's containers, the newest first: a kubelet takes the first of a name for the present one.
pub fn newest_first(picture: &Picture, pod: &str) -> Vec<cri::ContainerStatus> {
    let mut all: Vec<_> = picture.containers.values().filter(|c| c.sandbox_id == pod).map(|c| c.status.clone()).collect();
    all.sort_by_key(|s| std::cmp::Reverse(s.created_at));
    all
}

/// Containers that a filter lets through.
pub fn containers(picture: &Picture, filter: Option<&cri::ContainerFilter>) -> Vec<cri::Container> {
    let wanted = |c: &&Arc<Container>| {
        let s = &c.status;
        filter.is_none_or(|f| {
            s.id.starts_with(&f.id)
                && c.sandbox_id.starts_with(&f.pod_sandbox_id)
                && f.state.as_ref().is_none_or(|v| v.state == s.state)
                && labelled(&s.labels, &f.label_selector)
        })
    };
    picture.containers.values().filter(wanted).map(|c| container(c)).collect()
}

fn container(c: &Container) -> cri::Container {
    let s = &c.status;
    cri::Container {
        id: s.id.clone(),
        pod_sandbox_id: c.sandbox_id.clone(),
        metadata: s.metadata.clone(),
        image: s.image.clone(),
        image_ref: s.image_ref.clone(),
        state: s.state,
        created_at: s.created_at,
        labels: s.labels.clone(),
        annotations: s.annotations.clone(),
        image_id: s.image_id.clone(),
    }
}

/// Ids of containers that a filter of statistics lets through.
pub fn measured(picture: &Picture, filter: &cri::ContainerStatsFilter) -> Vec<String> {
    let wanted = |c: &&Arc<Container>| {
        c.status.id.starts_with(&filter.id)
            && c.sandbox_id.starts_with(&filter.pod_sandbox_id)
            && labelled(&c.status.labels, &filter.label_selector)
    };
    picture.containers.values().filter(wanted).map(|c| c.status.id.clone()).collect()
}

fn labelled(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// An image as CRI lists it. A numeric user is given as uid, another as name.
pub fn image(i: &Image) -> cri::Image {
    let user = i.user().split(':').next().unwrap_or_default();
    let uid = user.parse::<i64>().ok();
    cri::Image {
        id: i.id.clone(),
        repo_tags: i.repo_tags.clone(),
        repo_digests: i.repo_digests.clone(),
        size: i.size,
        username: if uid.is_some() { String::new() } else { user.to_owned() },
        uid: uid.map(|value| cri::Int64Value { value }),
        spec: None,
        pinned: i.pinned,
    }
}

/// A container's status, with its image named as that is named now.
pub fn status(c: &Container, images: &images::View) -> cri::ContainerStatus {
    let mut status = c.status.clone();
    let all = images.0.load();
    if let Some(image) = all.iter().find(|i| i.id == status.image_id) {
        if let Some(tag) = image.repo_tags.first() {
            status.image.get_or_insert_default().image.clone_from(tag);
        }
        status.image_ref.clone_from(image.repo_digests.first().unwrap_or(&image.id));
    }
    status
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn picture() -> Picture {
        let mut p = Picture { recovered: true, ..Default::default() };
        for (id, app, state) in [("aa1", "web", 0), ("aa2", "db", 0), ("b", "web", 1)] {
            let labels = HashMap::from([("app".to_owned(), app.to_owned())]);
            let status = cri::PodSandboxStatus { id: id.into(), state, labels, ..Default::default() };
            p.pods.insert(id.into(), Arc::new(Pod { status, ..Default::default() }));
        }
        p
    }

    #[test]
    fn ids_may_be_shortened_but_not_ambiguous() {
        let p = picture();
        assert_eq!(find(&p.pods, "b", "pod").unwrap().status.id, "b");
        assert_eq!(find(&p.pods, "aa2", "pod").unwrap().status.id, "aa2");
        assert_eq!(find(&p.pods, "aa", "pod").unwrap_err().class, Class::Unknown);
        assert_eq!(find(&p.pods, "", "pod").unwrap_err().class, Class::Unknown);
        assert_eq!(find(&p.pods, "c", "pod").unwrap_err().class, Class::NotFound);
        assert_eq!(complete(&p.pods, "c".into(), "pod").unwrap(), "c");
        assert!(complete(&p.pods, "aa".into(), "pod").is_err());
    }

    #[test]
    fn a_filter_needs_all_its_parts_to_match() {
        let ids = |f: cri::PodSandboxFilter| pods(&picture(), Some(&f)).into_iter().map(|p| p.id).collect::<Vec<_>>();
        let web = HashMap::from([("app".to_owned(), "web".to_owned())]);
        assert_eq!(ids(cri::PodSandboxFilter::default()), ["aa1", "aa2", "b"]);
        assert_eq!(ids(cri::PodSandboxFilter { label_selector: web.clone(), ..Default::default() }), ["aa1", "b"]);
        let ready = Some(cri::PodSandboxStateValue { state: 0 });
        assert_eq!(ids(cri::PodSandboxFilter { label_selector: web, state: ready, ..Default::default() }), ["aa1"]);
        assert_eq!(ids(cri::PodSandboxFilter { id: "aa".into(), ..Default::default() }), ["aa1", "aa2"]);
    }

    #[test]
    fn a_restarted_container_comes_before_its_dead_predecessor() {
        let mut p = picture();
        for (id, pod, created_at) in [("c1", "b", 1), ("c2", "b", 3), ("c3", "b", 2), ("c4", "aa1", 4)] {
            let status = cri::ContainerStatus { id: id.into(), created_at, ..Default::default() };
            let container = Container { sandbox_id: pod.into(), status, ..Default::default() };
            p.containers.insert(id.into(), Arc::new(container));
        }
        assert_eq!(newest_first(&p, "b").into_iter().map(|s| s.id).collect::<Vec<_>>(), ["c2", "c3", "c1"]);
    }
}

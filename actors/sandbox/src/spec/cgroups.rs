//! Where a container's cgroup is.
use std::path::Path;

/// `<slice>:cri-containerd:<id>` below a parent that is a systemd slice, a path below others. Without a parent the driver decides.
pub fn path(parent: &str, id: &str, systemd: bool) -> String {
    let name = Path::new(parent).file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    match (parent.trim_matches('/').is_empty(), name.ends_with(".slice")) {
        (true, _) if systemd => format!("system.slice:cri-containerd:{id}"),
        (true, _) => format!("/k8s.io/{id}"),
        (false, true) => format!("{name}:cri-containerd:{id}"),
        (false, false) => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parents_name_decides() {
        assert_eq!(path("/kubepods.slice/kubepods-pod1.slice", "c", true), "kubepods-pod1.slice:cri-containerd:c");
        assert_eq!(path("/kubepods/pod1/", "c", false), "/kubepods/pod1/c");
        assert_eq!(path("", "c", false), "/k8s.io/c");
        assert_eq!(path("", "c", true), "system.slice:cri-containerd:c");
    }
}

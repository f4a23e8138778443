//! The generated protocols against the published ones: nothing missing, no number moved.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use containerd_shim_protos as published;
use proto::prost::Message as _;
use proto::prost_types::{DescriptorProto, FileDescriptorProto, FileDescriptorSet};
use protobuf::Message as _;
use std::collections::BTreeSet;
use troupe_proto as proto;

fn ours() -> FileDescriptorSet {
    FileDescriptorSet::decode(&include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"))[..]).unwrap()
}

/// One line for each message, field, enum value and method of a file.
fn items(file: &FileDescriptorProto, out: &mut BTreeSet<String>) {
    let package = file.package();
    for m in &file.message_type {
        message(package, m, out);
    }
    for e in &file.enum_type {
        out.extend(e.value.iter().map(|v| format!("{package}.{}.{} = {}", e.name(), v.name(), v.number())));
    }
    for s in &file.service {
        out.extend(s.method.iter().map(|m| {
            let (from, to) = (m.input_type(), m.output_type());
            format!("{package}.{}/{}({from}) -> {}{to}", s.name(), m.name(), if m.server_streaming() { "stream " } else { "" })
        }));
    }
}

fn message(parent: &str, m: &DescriptorProto, out: &mut BTreeSet<String>) {
    let name = format!("{parent}.{}", m.name());
    out.insert(name.clone());
    out.extend(m.field.iter().map(|f| format!("{name}.{} = {} {:?} {:?} {}", f.name(), f.number(), f.label(), f.r#type(), f.type_name())));
    for nested in &m.nested_type {
        message(&name, nested, out);
    }
    for e in &m.enum_type {
        out.extend(e.value.iter().map(|v| format!("{name}.{}.{} = {}", e.name(), v.name(), v.number())));
    }
}

fn all(files: &[FileDescriptorProto]) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    files.iter().for_each(|f| items(f, &mut out));
    out
}

#[test]
fn everything_a_shim_speaks_is_there() {
    use published::{bootstrap_api, cgroups, cgroups_v2, events, sandbox_api, shim};
    let roots = [
        shim::shim::file_descriptor(),
        shim::events::file_descriptor(),
        shim::event::file_descriptor(),
        shim::oci::file_descriptor(),
        sandbox_api::file_descriptor(),
        bootstrap_api::file_descriptor(),
        events::task::file_descriptor(),
        events::container::file_descriptor(),
        events::image::file_descriptor(),
        events::snapshot::file_descriptor(),
        events::content::file_descriptor(),
        events::namespace::file_descriptor(),
        events::sandbox::file_descriptor(),
        cgroups::metrics::file_descriptor(),
        cgroups_v2::metrics::file_descriptor(),
    ];
    let theirs: Vec<_> =
        roots.iter().map(|f| FileDescriptorProto::decode(f.proto().write_to_bytes().unwrap().as_slice()).unwrap()).collect();
    let (theirs, ours) = (all(&theirs), all(&ours().file));
    assert!(theirs.len() > 400, "only {} items to compare", theirs.len());
    let missing: Vec<_> = theirs.difference(&ours).collect();
    assert!(missing.is_empty(), "missing: {missing:#?}");
}

#[cfg(feature = "grpc")]
#[test]
fn cri_has_its_methods() {
    let ours = all(&ours().file);
    let methods: Vec<_> = ours.iter().filter(|i| i.starts_with("runtime.v1.") && i.contains('/')).collect();
    assert_eq!(methods.len(), 41, "{methods:#?}");
    let streams = methods.iter().filter(|m| m.contains("stream ")).count();
    assert_eq!(streams, 7, "six lists and the events");
}

/// Field numbers noted from the interface by hand, apart from the generated file.
#[cfg(feature = "grpc")]
#[test]
fn cri_field_numbers_are_the_known_ones() {
    const KNOWN: [(&str, &str); 12] = [
        ("PodSandboxConfig", "metadata1 hostname2 log_directory3 dns_config4 port_mappings5 labels6 annotations7 linux8 windows9"),
        ("LinuxPodSandboxConfig", "cgroup_parent1 security_context2 sysctls3 overhead4 resources5"),
        ("NamespaceOption", "network1 pid2 ipc3 target_id4 userns_options5"),
        (
            "ContainerConfig",
            "metadata1 image2 command3 args4 working_dir5 envs6 mounts7 devices8 labels9 annotations10 log_path11 stdin12 stdin_once13 tty14 linux15 windows16 CDI_devices17 stop_signal18",
        ),
        (
            "LinuxContainerResources",
            "cpu_period1 cpu_quota2 cpu_shares3 memory_limit_in_bytes4 oom_score_adj5 cpuset_cpus6 cpuset_mems7 hugepage_limits8 unified9 memory_swap_limit_in_bytes10",
        ),
        (
            "Mount",
            "container_path1 host_path2 readonly3 selinux_relabel4 propagation5 uidMappings6 gidMappings7 recursive_read_only8 image9 image_sub_path10",
        ),
        (
            "ContainerStatus",
            "id1 metadata2 state3 created_at4 started_at5 finished_at6 exit_code7 image8 image_ref9 reason10 message11 labels12 annotations13 mounts14 log_path15 resources16 image_id17 user18 stop_signal19",
        ),
        ("ImageSpec", "image1 annotations2 user_specified_image18 runtime_handler19 image_ref20"),
        ("Image", "id1 repo_tags2 repo_digests3 size4 uid5 username6 spec7 pinned8"),
        ("ContainerStats", "attributes1 cpu2 memory3 writable_layer4 swap5 io6"),
        ("UpdatePodSandboxResourcesRequest", "pod_sandbox_id1 overhead2 resources3"),
        ("PsiData", "Total1 Avg102 Avg603 Avg3004"),
    ];
    let set = ours();
    let cri = set.file.iter().find(|f| f.package() == "runtime.v1").unwrap();
    for (name, fields) in KNOWN {
        let m = cri.message_type.iter().find(|m| m.name() == name).unwrap_or_else(|| panic!("no message {name}"));
        let found: Vec<_> = m.field.iter().map(|f| format!("{}{}", f.name(), f.number())).collect();
        assert_eq!(found.join(" "), fields, "{name}");
    }
}

#[cfg(feature = "grpc")]
#[test]
fn credentials_are_not_printed() {
    let auth =
        proto::cri::AuthConfig { username: "u".into(), password: "s3cret".into(), registry_token: "s3cret".into(), ..Default::default() };
    let request = proto::cri::PullImageRequest { auth: Some(auth), ..Default::default() };
    let text = format!("{request:?}");
    assert!(!text.contains("s3cret") && text.contains("[hidden]"), "{text}");
}

#[test]
fn any_has_containerds_type_url() {
    let exit = proto::events::TaskExit { container_id: "c".into(), exit_status: 7, ..Default::default() };
    let any = proto::any(&exit);
    assert_eq!(any.type_url, "containerd.events.TaskExit");
    assert_eq!(proto::from_any::<proto::events::TaskExit>(&any), Some(exit));
    assert_eq!(proto::from_any::<proto::events::TaskStart>(&any), None);
}

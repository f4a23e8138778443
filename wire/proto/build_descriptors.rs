//! Collects file descriptors for `build.rs`.

use containerd_shim_protos as published;
use prost::Message as _;
use prost_types::{FileDescriptorProto, FileDescriptorSet, MethodDescriptorProto};
use protobuf::Message as _;
use protobuf::reflect::FileDescriptor;
use std::error::Error;

/// Holds only options: needs no code.
const OPTIONS_ONLY: &str = "gogoproto";

/// All descriptors: the published ones, then our own files. A file's dependencies come before it.
pub fn collect(own: &[&str]) -> Result<FileDescriptorSet, Box<dyn Error>> {
    let mut set = FileDescriptorSet::default();
    for root in published_roots() {
        add(root, &mut set)?;
    }
    for file in protox::compile(own, ["proto"])?.file {
        push(file, &mut set);
    }
    set.file.retain(|f| f.package() != OPTIONS_ONLY);
    complete(&mut set);
    Ok(set)
}

/// The published sandbox service has the messages of an update, but no method that takes them. This is the one that they are named for; a shim
/// without it says so.
fn complete(set: &mut FileDescriptorSet) {
    const PACKAGE: &str = "containerd.runtime.sandbox.v1";
    let services = set.file.iter_mut().filter(|f| f.package() == PACKAGE).flat_map(|f| &mut f.service);
    for service in services.filter(|s| s.name() == "Sandbox" && s.method.iter().all(|m| m.name() != "UpdateSandbox")) {
        service.method.push(MethodDescriptorProto {
            name: Some("UpdateSandbox".into()),
            input_type: Some(format!(".{PACKAGE}.UpdateSandboxRequest")),
            output_type: Some(format!(".{PACKAGE}.UpdateSandboxResponse")),
            ..Default::default()
        });
    }
}

fn published_roots() -> [&'static FileDescriptor; 15] {
    use published::{bootstrap_api, cgroups, cgroups_v2, events, sandbox_api, shim, types};
    [
        shim::shim::file_descriptor(),
        shim::events::file_descriptor(),
        shim::oci::file_descriptor(),
        sandbox_api::file_descriptor(),
        bootstrap_api::file_descriptor(),
        types::introspection::file_descriptor(),
        events::container::file_descriptor(),
        events::content::file_descriptor(),
        events::image::file_descriptor(),
        events::namespace::file_descriptor(),
        events::sandbox::file_descriptor(),
        events::snapshot::file_descriptor(),
        events::task::file_descriptor(),
        cgroups::metrics::file_descriptor(),
        cgroups_v2::metrics::file_descriptor(),
    ]
}

fn add(file: &FileDescriptor, set: &mut FileDescriptorSet) -> Result<(), Box<dyn Error>> {
    for dependency in file.deps() {
        add(dependency, set)?;
    }
    push(FileDescriptorProto::decode(file.proto().write_to_bytes()?.as_slice())?, set);
    Ok(())
}

fn push(file: FileDescriptorProto, set: &mut FileDescriptorSet) {
    if !set.file.iter().any(|f| f.name() == file.name()) {
        set.file.push(file);
    }
}

//! Collects file descriptors for `build.rs`.

use containerd_shim_protos as published;
use prost::Message as _;
use prost_types::{FileDescriptorProto, FileDescriptorSet};
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
    Ok(set)
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

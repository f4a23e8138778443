//! Generates the outside protocols without `protoc`.
//!
//! Two sources of descriptors: our own `.proto` files, parsed by protox, and, for all that a shim speaks, the descriptors that the published crate
//! `containerd-shim-protos` carries (so nothing of it is copied). One code family comes out: prost messages, with tonic glue for gRPC services and
//! ttrpc glue (`build/ttrpc_glue.rs`) for the packages in `TTRPC_PACKAGES`.

mod build_descriptors;
mod build_ttrpc;

use prost::Message as _;
use prost_build::{Service, ServiceGenerator};
use std::error::Error;
use std::path::Path;

/// Packages whose services are spoken over ttrpc; every other service is gRPC.
const TTRPC_PACKAGES: [&str; 4] =
    ["containerd.task.v3", "containerd.runtime.sandbox.v1", "containerd.services.events.ttrpc.v1", "troupe.shim.v1"];

/// Own files for every build.
const PROTOS: [&str; 1] = ["proto/shim.proto"];
/// Own files for the `grpc` feature: a shim has no use for them.
const GRPC_PROTOS: [&str; 2] = ["proto/cri.proto", "proto/rpc_status.proto"];

/// Messages of CRI that are shown as JSON: the configurations of pods and containers, and all that they hold. None of them has credentials.
const SHOWN: [&str; 31] = [
    "CDIDevice",
    "Capability",
    "ContainerConfig",
    "ContainerMetadata",
    "DNSConfig",
    "Device",
    "HugepageLimit",
    "IDMapping",
    "ImageSpec",
    "Int64Value",
    "KeyValue",
    "LinuxContainerConfig",
    "LinuxContainerResources",
    "LinuxContainerSecurityContext",
    "LinuxPodSandboxConfig",
    "LinuxSandboxSecurityContext",
    "Mount",
    "NamespaceOption",
    "PodSandboxConfig",
    "PodSandboxMetadata",
    "PortMapping",
    "SELinuxOption",
    "SecurityProfile",
    "UserNamespace",
    "WindowsContainerConfig",
    "WindowsContainerResources",
    "WindowsContainerSecurityContext",
    "WindowsCpuGroupAffinity",
    "WindowsNamespaceOption",
    "WindowsPodSandboxConfig",
    "WindowsSandboxSecurityContext",
];

/// Gives each service the glue of its transport.
struct Glue {
    grpc: Option<Box<dyn ServiceGenerator>>,
}

impl ServiceGenerator for Glue {
    fn generate(&mut self, service: Service, out: &mut String) {
        if TTRPC_PACKAGES.contains(&service.package.as_str()) {
            build_ttrpc::generate(&service, out);
        } else if let Some(grpc) = &mut self.grpc {
            grpc.generate(service, out);
        }
    }

    fn finalize(&mut self, out: &mut String) {
        if let Some(grpc) = &mut self.grpc {
            grpc.finalize(out);
        }
    }

    fn finalize_package(&mut self, package: &str, out: &mut String) {
        if let Some(grpc) = &mut self.grpc {
            grpc.finalize_package(package, out);
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    for path in ["build.rs", "build_descriptors.rs", "build_ttrpc.rs", "proto"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let grpc = std::env::var_os("CARGO_FEATURE_GRPC").is_some();
    let mut files = PROTOS.to_vec();
    if grpc {
        files.extend(GRPC_PROTOS);
    }
    let set = build_descriptors::collect(&files)?;
    // For the tests, which compare it with the published contracts.
    std::fs::write(Path::new(&std::env::var("OUT_DIR")?).join("descriptors.bin"), set.encode_to_vec())?;
    let tonic = || tonic_prost_build::configure().build_transport(false).generate_default_stubs(true).service_generator();
    let mut config = prost_build::Config::new();
    if grpc {
        // Verbose statuses show clients' configurations as JSON, under the names of the fields.
        for message in SHOWN {
            config.type_attribute(format!("runtime.v1.{message}"), "#[derive(serde::Serialize)]");
        }
        config.field_attribute("runtime.v1.KeyValue.value", "#[serde(serialize_with = \"crate::shown::text\")]");
    }
    config
        .enable_type_names()
        // Credentials: `src/redact.rs` prints it without them.
        .skip_debug(["runtime.v1.AuthConfig"])
        .include_file("protos.rs")
        .service_generator(Box::new(Glue { grpc: grpc.then(tonic) }))
        .compile_fds(set)?;
    Ok(())
}

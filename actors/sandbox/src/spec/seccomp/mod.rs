//! Seccomp: which profile a container gets.
mod profile;

use super::capabilities::Set;
use kernel::{Fault, Result};
use proto::cri::{SecurityProfile, security_profile::ProfileType};
use serde_json::Value;

/// `linux.seccomp`, if any. `path` is the deprecated field, which counts when there is no `profile`; `unset` is the configuration's profile for
/// containers that name none at all. `capabilities` must be final: the default profile goes by them.
pub fn of(profile: Option<&SecurityProfile>, path: &str, privileged: bool, unset: &str, capabilities: &Set) -> Result<Option<Value>> {
    let named;
    let profile = match profile {
        Some(profile) => profile,
        None => {
            named = by_name(if path.is_empty() { unset } else { path })?;
            &named
        }
    };
    let kind = ProfileType::try_from(profile.profile_type);
    let kind = kind.map_err(|_| Fault::invalid_argument(format!("seccomp.profile_type {} is not known", profile.profile_type)))?;
    if kind != ProfileType::Localhost && !profile.localhost_ref.is_empty() {
        return Err(Fault::invalid_argument("seccomp config invalid: localhost_ref must only be set if profile_type is Localhost"));
    }
    if privileged || kind == ProfileType::Unconfined {
        return Ok(None);
    }
    if !supported() {
        return Err(Fault::failed_precondition("seccomp is not supported by this kernel: only unconfined containers can run"));
    }
    match kind {
        ProfileType::Localhost => local(profile.localhost_ref.trim_start_matches("localhost/")).map(Some),
        _ => Ok(Some(profile::default(capabilities))),
    }
}

/// A profile by its old name.
fn by_name(name: &str) -> Result<SecurityProfile> {
    let of = |kind: ProfileType, file: &str| SecurityProfile { profile_type: kind.into(), localhost_ref: file.into() };
    match name {
        "" | "unconfined" => Ok(of(ProfileType::Unconfined, "")),
        "runtime/default" | "docker/default" => Ok(of(ProfileType::RuntimeDefault, "")),
        other => match other.strip_prefix("localhost/") {
            Some(file) => Ok(of(ProfileType::Localhost, file)),
            None => Err(Fault::invalid_argument(format!("invalid seccomp profile {other:?}"))),
        },
    }
}

fn supported() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|s| s.lines().any(|l| l.starts_with("Seccomp:")))
}

/// A profile of the node's files.
fn local(path: &str) -> Result<Value> {
    let refused = |e: &dyn std::fmt::Display| Fault::invalid_argument(format!("cannot load seccomp profile {path:?}: {e}"));
    let bytes = std::fs::read(path).map_err(|e| refused(&e))?;
    let profile: Value = serde_json::from_slice(&bytes).map_err(|e| refused(&e))?;
    if profile["defaultAction"].is_string() { Ok(profile) } else { Err(refused(&"it has no defaultAction")) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_new_field_beats_the_old_and_the_old_beats_the_configuration() {
        let caps = Set::new();
        let of = |p: Option<&SecurityProfile>, path: &str, unset: &str| of(p, path, false, unset, &caps);
        let unconfined = SecurityProfile { profile_type: ProfileType::Unconfined.into(), ..Default::default() };
        assert!(of(Some(&unconfined), "runtime/default", "").unwrap().is_none());
        assert!(of(None, "runtime/default", "").unwrap().is_some());
        assert!(of(None, "unconfined", "runtime/default").unwrap().is_none());
        assert!(of(None, "", "docker/default").unwrap().is_some());
        assert!(of(None, "", "").unwrap().is_none());
        assert!(of(None, "whatever", "").unwrap_err().message.contains("whatever"));
        let mixed = SecurityProfile { profile_type: ProfileType::RuntimeDefault.into(), localhost_ref: "x".into() };
        assert!(of(Some(&mixed), "", "").unwrap_err().message.contains("localhost_ref"));
    }

    #[test]
    fn a_file_of_the_node() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.json");
        std::fs::write(&file, r#"{"defaultAction":"SCMP_ACT_LOG"}"#).unwrap();
        let path = format!("localhost/{}", file.display());
        let local = SecurityProfile { profile_type: ProfileType::Localhost.into(), localhost_ref: path.clone() };
        let caps = Set::new();
        assert_eq!(of(Some(&local), "", false, "", &caps).unwrap().unwrap()["defaultAction"], "SCMP_ACT_LOG");
        assert!(of(None, &path, false, "", &caps).unwrap().is_some());
        assert!(of(Some(&local), "", true, "", &caps).unwrap().is_none(), "privileged containers are not filtered");
        std::fs::write(&file, "{}").unwrap();
        assert!(of(None, &path, false, "", &caps).unwrap_err().message.contains("defaultAction"));
        assert!(of(None, "localhost//no/such/file", false, "", &caps).unwrap_err().message.contains("/no/such/file"));
    }
}

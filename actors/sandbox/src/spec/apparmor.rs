//! AppArmor: which profile a container gets, and the default one, generated and loaded when it is first needed.
use kernel::{Fault, Result};
use proto::cri::{SecurityProfile, security_profile::ProfileType};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Name of the default profile: containerd's, which other tools know.
pub const DEFAULT: &str = "cri-containerd.apparmor.d";

/// Where the host shows AppArmor.
#[derive(Clone, Debug)]
pub struct Host {
    /// `/sys`.
    pub sys: PathBuf,
    /// `apparmor_parser`.
    pub parser: PathBuf,
    /// `/etc/apparmor.d`.
    pub policies: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Host { sys: "/sys".into(), parser: "/sbin/apparmor_parser".into(), policies: "/etc/apparmor.d".into() }
    }
}

impl Host {
    /// The kernel enforces it, and profiles can be loaded. Within a container neither is ours to say.
    pub fn supports(&self) -> bool {
        let enabled = std::fs::read_to_string(self.sys.join("module/apparmor/parameters/enabled")).is_ok_and(|t| t.starts_with('Y'));
        let inside = std::env::var("container").is_ok_and(|c| !c.is_empty());
        enabled && !inside && self.sys.join("kernel/security/apparmor").exists() && self.parser.exists()
    }

    fn loaded(&self, profile: &str) -> Result<bool> {
        let list = std::fs::read_to_string(self.sys.join("kernel/security/apparmor/profiles"));
        let list = list.map_err(|e| Fault::from(e).context("list AppArmor profiles"))?;
        Ok(list.lines().any(|l| l.strip_prefix(profile).is_some_and(|rest| rest.starts_with(" ("))))
    }

    /// `process.apparmorProfile`, if any. `path` is the deprecated field, which counts when there is no `profile`.
    pub fn profile(&self, profile: Option<&SecurityProfile>, path: &str, privileged: bool, disabled: bool) -> Result<Option<String>> {
        let asked = match profile {
            Some(profile) => Some(profile.clone()),
            None if path.is_empty() => None,
            None => Some(by_name(path)?),
        };
        if disabled || !self.supports() {
            return match asked {
                Some(p) if p.profile_type != ProfileType::Unconfined as i32 => {
                    Err(Fault::failed_precondition("apparmor is not supported on this node, or disabled by its configuration"))
                }
                _ => Ok(None),
            };
        }
        let asked = asked.unwrap_or_default();
        let kind = ProfileType::try_from(asked.profile_type);
        let kind = kind.map_err(|_| Fault::invalid_argument(format!("apparmor.profile_type {} is not known", asked.profile_type)))?;
        if kind != ProfileType::Localhost && !asked.localhost_ref.is_empty() {
            return Err(Fault::invalid_argument("apparmor config invalid: localhost_ref must only be set if profile_type is Localhost"));
        }
        match kind {
            ProfileType::Unconfined => Ok(None),
            ProfileType::RuntimeDefault if privileged => Ok(None),
            ProfileType::RuntimeDefault => self.load_default().map(Some),
            ProfileType::Localhost => {
                let name = asked.localhost_ref.trim_start_matches("localhost/");
                if name.is_empty() || !self.loaded(name)? {
                    return Err(Fault::failed_precondition(format!(
                        "apparmor profile not found {name}: load it with apparmor_parser first"
                    )));
                }
                Ok(Some(name.to_owned()))
            }
        }
    }

    fn load_default(&self) -> Result<String> {
        if !self.loaded(DEFAULT)? {
            let file = std::env::temp_dir().join(format!("{DEFAULT}.{}", std::process::id()));
            std::fs::write(&file, self.text()).map_err(|e| Fault::from(e).context("write the default AppArmor profile"))?;
            let run = Command::new(&self.parser).arg("-Kr").arg(&file).stdin(Stdio::null()).output();
            let _ = std::fs::remove_file(&file);
            let run = run.map_err(|e| Fault::from(e).context(format!("run {}", self.parser.display())))?;
            if !run.status.success() {
                let told = String::from_utf8_lossy(&run.stderr).trim().to_owned();
                return Err(Fault::internal(format!("{} could not load the default profile: {told}", self.parser.display())));
            }
        }
        Ok(DEFAULT.to_owned())
    }

    /// The default profile: everything that capabilities, seccomp and namespaces leave, except for the ways to change the node itself.
    fn text(&self) -> String {
        let has = |file: &str| self.policies.join(file).exists();
        let own = std::fs::read_to_string("/proc/self/attr/current").unwrap_or_default();
        let own = own.split([' ', '\n', '\0']).next().filter(|p| !p.is_empty()).unwrap_or("unconfined");
        let abi = if has("abi/3.0") { "abi <abi/3.0>,\n" } else { "" };
        let tunables = if has("tunables/global") { "#include <tunables/global>\n" } else { "@{PROC}=/proc/\n" };
        let base = if has("abstractions/base") { "  #include <abstractions/base>\n" } else { "" };
        let signals: String = ["unconfined", "runc", "crun", own].map(|peer| format!("  signal (receive) peer={peer},\n")).concat();
        let refused: String = REFUSED.iter().map(|rule| format!("  deny {rule},\n")).collect();
        format!(
            "{abi}{tunables}profile {DEFAULT} flags=(attach_disconnected,mediate_deleted) {{\n{base}  network,\n  capability,\n  file,\n  umount,\n\
             {signals}  signal (send,receive) peer={DEFAULT},\n  ptrace (trace,tracedby,read,readby) peer={DEFAULT},\n{refused}}}\n"
        )
    }
}

/// Refused whatever else is allowed. AppArmor has no "all but": the sets of names spell out what does not begin as it should.
const REFUSED: &[&str] = &[
    "mount",
    // Files of /proc itself, and directories that are neither a process' nor sys.
    "@{PROC}/* w",
    "@{PROC}/{[^1-9/],[^1-9/][^0-9/],[^1-9s/][^0-9y/][^0-9s/],[^1-9/][^0-9/][^0-9/][^0-9/]*}/** w",
    // Of /proc/sys only kernel/shm*.
    "@{PROC}/sys/[^k]** w",
    "@{PROC}/sys/kernel/{?,??,[^s][^h][^m]**} w",
    "@{PROC}/sysrq-trigger rwklx",
    "@{PROC}/kcore rwklx",
    // Of /sys only fs/cgroup.
    "/sys/[^f]*/** wklx",
    "/sys/f[^s]*/** wklx",
    "/sys/fs/[^c]*/** wklx",
    "/sys/fs/c[^g]*/** wklx",
    "/sys/fs/cg[^r]*/** wklx",
    "/sys/firmware/** rwklx",
    "/sys/devices/virtual/powercap/** rwklx",
    "/sys/kernel/security/** rwklx",
];

/// A profile by its old name.
fn by_name(name: &str) -> Result<SecurityProfile> {
    let of = |kind: ProfileType, name: &str| SecurityProfile { profile_type: kind.into(), localhost_ref: name.into() };
    match name {
        "runtime/default" => Ok(of(ProfileType::RuntimeDefault, "")),
        "unconfined" => Ok(of(ProfileType::Unconfined, "")),
        other => match other.strip_prefix("localhost/") {
            Some(profile) => Ok(of(ProfileType::Localhost, profile)),
            None => Err(Fault::invalid_argument(format!("invalid apparmor profile {other:?}"))),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    /// A host whose parser "loads" what it is given.
    fn host(dir: &Path) -> Host {
        let host = Host { sys: dir.join("sys"), parser: dir.join("parser"), policies: dir.join("etc") };
        std::fs::create_dir_all(host.sys.join("module/apparmor/parameters")).unwrap();
        std::fs::write(host.sys.join("module/apparmor/parameters/enabled"), "Y\n").unwrap();
        std::fs::create_dir_all(host.sys.join("kernel/security/apparmor")).unwrap();
        let list = host.sys.join("kernel/security/apparmor/profiles");
        std::fs::write(&list, "mine (enforce)\nmine-too (complain)\n").unwrap();
        let script = format!("#!/bin/sh\ncp \"$2\" {0}/given; echo '{DEFAULT} (enforce)' >> {1}\n", dir.display(), list.display());
        std::fs::write(&host.parser, script).unwrap();
        std::fs::set_permissions(&host.parser, std::fs::Permissions::from_mode(0o755)).unwrap();
        host
    }

    #[test]
    fn the_default_is_loaded_once_and_others_must_be_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path());
        let local = |name: &str| SecurityProfile { profile_type: ProfileType::Localhost.into(), localhost_ref: name.into() };
        assert_eq!(host.profile(None, "", false, false).unwrap().unwrap(), DEFAULT);
        let text = std::fs::read_to_string(dir.path().join("given")).unwrap();
        assert!(text.contains("deny mount,") && text.contains(&format!("profile {DEFAULT} ")) && text.contains("@{PROC}=/proc/"), "{text}");
        std::fs::remove_file(dir.path().join("given")).unwrap();
        host.profile(None, "runtime/default", false, false).unwrap();
        assert!(!dir.path().join("given").exists(), "it is loaded already");
        assert_eq!(host.profile(Some(&local("localhost/mine")), "localhost/nope", true, false).unwrap().unwrap(), "mine");
        for gone in ["nope", "min", ""] {
            assert!(host.profile(Some(&local(gone)), "", false, false).unwrap_err().message.contains("apparmor profile not found"));
        }
        assert!(host.profile(Some(&SecurityProfile::default()), "", true, false).unwrap().is_none(), "privileged");
        assert!(host.profile(None, "weird", false, false).is_err());
    }

    #[test]
    fn a_host_without_it_refuses_profiles_only() {
        let host = Host { sys: "/no".into(), ..Default::default() };
        assert!(host.profile(None, "", false, false).unwrap().is_none());
        assert!(host.profile(None, "unconfined", false, false).unwrap().is_none());
        let default = SecurityProfile::default();
        assert!(host.profile(Some(&default), "", false, false).unwrap_err().message.contains("apparmor is not supported"));
    }
}

//! Capabilities, seccomp, masked and read-only paths.
use kernel::{Fault, Result};
use proto::cri::{LinuxContainerSecurityContext, SecurityProfile, security_profile::ProfileType};
use serde_json::{Value, json};

/// What a container gets without asking, as containerd and Docker give.
const DEFAULT: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// All that Linux has (capabilities(7)).
const ALL: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Calls that need SYS_ADMIN or are of no use in a container.
const ADMIN_CALLS: &[&str] = &[
    "bpf",
    "fanotify_init",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "lookup_dcookie",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "perf_event_open",
    "pivot_root",
    "quotactl",
    "setns",
    "umount2",
    "unshare",
];
const OTHER_CALLS: &[&str] = &[
    "_sysctl",
    "add_key",
    "create_module",
    "get_kernel_syms",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "kcmp",
    "keyctl",
    "nfsservctl",
    "query_module",
    "request_key",
    "sysfs",
    "uselib",
    "userfaultfd",
    "ustat",
];
/// Calls by the capability that lifts their ban.
const BY_CAPABILITY: &[(&str, &[&str])] = &[
    ("SYS_MODULE", &["delete_module", "init_module", "finit_module"]),
    ("SYS_BOOT", &["reboot", "kexec_load", "kexec_file_load"]),
    ("SYS_TIME", &["settimeofday", "clock_settime", "clock_adjtime", "adjtimex"]),
    ("SYS_RAWIO", &["iopl", "ioperm"]),
    ("SYS_PACCT", &["acct"]),
    ("SYS_NICE", &["get_mempolicy", "mbind", "set_mempolicy", "move_pages", "migrate_pages"]),
    ("DAC_READ_SEARCH", &["open_by_handle_at"]),
    ("SYS_TTY_CONFIG", &["vhangup"]),
    ("SYS_ADMIN", &["swapon", "swapoff", "sethostname", "setdomainname"]),
];

fn known(name: &str) -> Result<String> {
    let bare = name.to_uppercase();
    let bare = bare.strip_prefix("CAP_").unwrap_or(&bare);
    if bare == "ALL" || ALL.contains(&bare) {
        Ok(bare.to_owned())
    } else {
        Err(Fault::invalid_argument(format!("capabilities: {name:?} is not known")))
    }
}

/// The container's capabilities, without `CAP_`.
pub fn capabilities(context: &LinuxContainerSecurityContext) -> Result<(Vec<String>, Vec<String>)> {
    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    if context.privileged {
        return Ok((names(&available()), vec![]));
    }
    let wish = context.capabilities.clone().unwrap_or_default();
    let add = wish.add_capabilities.iter().map(|c| known(c)).collect::<Result<Vec<_>>>()?;
    let drop = wish.drop_capabilities.iter().map(|c| known(c)).collect::<Result<Vec<_>>>()?;
    let ambient = wish.add_ambient_capabilities.iter().map(|c| known(c)).collect::<Result<Vec<_>>>()?;
    let mut all = if drop.iter().any(|d| d == "ALL") {
        vec![]
    } else if add.iter().any(|a| a == "ALL") {
        names(&available())
    } else {
        names(DEFAULT)
    };
    all.retain(|c| !drop.contains(c));
    for name in add.iter().chain(&ambient).filter(|a| *a != "ALL") {
        if !all.contains(name) {
            all.push(name.clone());
        }
    }
    Ok((all, ambient))
}

/// Capabilities that this kernel and this daemon have.
fn available() -> Vec<&'static str> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("CapBnd:"));
    let bits = line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok()).unwrap_or(u64::MAX);
    ALL.iter().enumerate().filter(|(n, _)| bits & (1 << n) != 0).map(|(_, c)| *c).collect()
}

/// `process.capabilities`.
pub fn capabilities_json(all: &[String], ambient: &[String]) -> Value {
    let full = |list: &[String]| list.iter().map(|c| format!("CAP_{c}")).collect::<Vec<_>>();
    json!({"bounding": full(all), "effective": full(all), "permitted": full(all), "inheritable": full(ambient), "ambient": full(ambient)})
}

/// `linux.seccomp`, if any. `unset` is the configuration's profile for containers that name none.
pub fn seccomp(profile: Option<&SecurityProfile>, privileged: bool, unset: &str, capabilities: &[String]) -> Result<Option<Value>> {
    if privileged {
        return Ok(None);
    }
    let by_name = |name: &str| match name {
        "" | "unconfined" => Ok(None),
        "runtime/default" | "docker/default" => Ok(Some(default_profile(capabilities))),
        other => local(other.strip_prefix("localhost/").unwrap_or(other)).map(Some),
    };
    match profile {
        None => by_name(unset),
        Some(p) => match ProfileType::try_from(p.profile_type) {
            Ok(ProfileType::RuntimeDefault) => by_name("runtime/default"),
            Ok(ProfileType::Unconfined) => Ok(None),
            Ok(ProfileType::Localhost) => local(p.localhost_ref.strip_prefix("localhost/").unwrap_or(&p.localhost_ref)).map(Some),
            Err(_) => Err(Fault::invalid_argument(format!("seccomp.profile_type {} is not known", p.profile_type))),
        },
    }
}

fn local(path: &str) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|e| Fault::invalid_argument(format!("seccomp profile {path:?}: {e}")))?;
    serde_json::from_slice(&bytes).map_err(|e| Fault::invalid_argument(format!("seccomp profile {path:?}: {e}")))
}

/// The default profile: what containers have no business with fails with EPERM, unless a capability of theirs says otherwise.
fn default_profile(capabilities: &[String]) -> Value {
    let has = |name: &str| capabilities.iter().any(|c| c == name);
    let mut banned: Vec<&str> = OTHER_CALLS.to_vec();
    let mut rules = vec![];
    if !has("SYS_ADMIN") {
        banned.extend(ADMIN_CALLS);
        // CLONE_NEW*: new namespaces.
        rules.push(json!({"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
            "args": [{"index": 0, "value": 0x1000_0000u64, "valueTwo": 0x1000_0000u64, "op": "SCMP_CMP_MASKED_EQ"}]}));
        // clone3's flags are behind a pointer: ENOSYS makes the C library fall back to clone.
        rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}));
    }
    for (capability, calls) in BY_CAPABILITY {
        if !has(capability) {
            banned.extend(*calls);
        }
    }
    rules.push(json!({"names": banned, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}));
    json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures(), "syscalls": rules})
}

fn architectures() -> Vec<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => vec!["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => vec!["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        _ => vec![],
    }
}

/// Masked when the client does not say.
pub const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/interrupts",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
];
/// Read-only when the client does not say.
pub const READ_ONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proto::cri::Capability;

    #[test]
    fn adding_dropping_and_misspelling() {
        let context = |add: &[&str], drop: &[&str]| LinuxContainerSecurityContext {
            capabilities: Some(Capability {
                add_capabilities: add.iter().map(|s| s.to_string()).collect(),
                drop_capabilities: drop.iter().map(|s| s.to_string()).collect(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(capabilities(&context(&["NET_ADMIN"], &["ALL"])).unwrap().0, ["NET_ADMIN"]);
        assert!(!capabilities(&context(&[], &["KILL"])).unwrap().0.contains(&"KILL".to_owned()));
        assert!(capabilities(&context(&["ALL"], &[])).unwrap().0.len() > 30);
        assert!(capabilities(&context(&["NET_AMDIN"], &[])).unwrap_err().message.contains("NET_AMDIN"));
    }
}

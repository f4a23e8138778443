//! The default profile: a list of what containers may call. Everything else, and what comes with newer kernels, fails with EPERM.
use super::Set;
use serde_json::{Value, json};

/// Allowed on every machine.
const ALLOWED: &str = include_str!("allowed.txt");

/// Allowed with a capability.
const BY_CAPABILITY: &[(&str, &str)] = &[
    ("BPF", "bpf"),
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    ("PERFMON", "perf_event_open"),
    (
        "SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount open_tree perf_event_open \
         quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module finit_module init_module"),
    ("SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    ("SYS_RAWIO", "ioperm iopl"),
    ("SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYSLOG", "syslog"),
];

/// Tracing was a way around seccomp before this kernel.
const SAFE_PTRACE: (u32, u32) = (4, 8);

/// Execution domains of personality(2) that change nothing dangerous: Linux, 32 bit, and both without address randomisation's absence; and the query.
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Address families of socket(2) that have hurt: the kernel's crypto API and the hypervisor's sockets.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

/// `CLONE_NEWNS`, `…CGROUP`, `…UTS`, `…IPC`, `…USER`, `…PID`, `…NET`.
const NEW_NAMESPACES: u64 = 0x7e02_0000;

fn allow(names: &str) -> Value {
    json!({"names": names.split_whitespace().collect::<Vec<_>>(), "action": "SCMP_ACT_ALLOW"})
}

fn allow_if(name: &str, index: u32, op: &str, value: u64) -> Value {
    let arg = json!({"index": index, "value": value, "valueTwo": 0, "op": op});
    json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": [arg]})
}

/// The profile for a container with these capabilities.
pub fn default(capabilities: &Set) -> Value {
    let has = |name: &str| capabilities.contains(&format!("CAP_{name}"));
    let mut rules = vec![allow(ALLOWED)];
    rules.push(allow_if("socket", 0, "SCMP_CMP_LT", AF_ALG));
    rules.push(allow_if("socket", 0, "SCMP_CMP_EQ", AF_ALG + 1));
    rules.push(allow_if("socket", 0, "SCMP_CMP_GT", AF_VSOCK));
    rules.extend(PERSONALITIES.map(|p| allow_if("personality", 0, "SCMP_CMP_EQ", p)));
    if kernel() >= SAFE_PTRACE {
        rules.push(allow("process_vm_readv process_vm_writev ptrace"));
    }
    rules.extend(of_machine().map(allow));
    rules.extend(BY_CAPABILITY.iter().filter(|(capability, _)| has(capability)).map(|(_, names)| allow(names)));
    if !has("SYS_ADMIN") {
        // Flags are the second argument on s390.
        let flags = u32::from(std::env::consts::ARCH == "s390x");
        rules.push(allow_if("clone", flags, "SCMP_CMP_MASKED_EQ", NEW_NAMESPACES));
        // clone3 has its flags behind a pointer, out of seccomp's sight: ENOSYS makes the C library fall back to clone.
        rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS}));
    }
    json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": architectures(), "syscalls": rules})
}

fn of_machine() -> Option<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Some("arch_prctl modify_ldt"),
        "x86" => Some("modify_ldt"),
        "aarch64" | "arm" => Some("arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2"),
        "powerpc64" => Some("swapcontext sync_file_range2"),
        "s390x" => Some("s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr"),
        "riscv64" => Some("riscv_flush_icache riscv_hwprobe"),
        _ => None,
    }
}

fn architectures() -> &'static [&'static str] {
    match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_ARM", "SCMP_ARCH_AARCH64"],
        "s390x" => &["SCMP_ARCH_S390", "SCMP_ARCH_S390X"],
        "riscv64" => &["SCMP_ARCH_RISCV64"],
        "loongarch64" => &["SCMP_ARCH_LOONGARCH64"],
        _ => &[],
    }
}

fn kernel() -> (u32, u32) {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = text.split(['.', '-']).map_while(|p| p.parse().ok());
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn allowed(profile: &Value, name: &str) -> Vec<Value> {
        let rules = profile["syscalls"].as_array().unwrap().iter();
        rules.filter(|r| r["action"] == "SCMP_ACT_ALLOW" && r["names"].as_array().unwrap().iter().any(|n| n == name)).cloned().collect()
    }

    #[test]
    fn what_is_not_listed_is_refused_and_capabilities_open_their_calls() {
        let plain = default(&Set::new());
        assert_eq!(plain["defaultAction"], "SCMP_ACT_ERRNO");
        for name in ["read", "openat2", "futex_waitv", "epoll_pwait2", "getrandom", "landlock_create_ruleset"] {
            assert_eq!(allowed(&plain, name).len(), 1, "{name}");
        }
        for name in
            ["mount", "bpf", "keyctl", "add_key", "io_uring_setup", "userfaultfd", "kexec_load", "swapon", "chroot", "unshare", "clone3"]
        {
            assert!(allowed(&plain, name).is_empty(), "{name}");
        }
        assert_eq!(allowed(&plain, "clone")[0]["args"][0]["value"], NEW_NAMESPACES);
        let admin = default(&Set::from(["CAP_SYS_ADMIN".into(), "CAP_SYS_CHROOT".into()]));
        for name in ["mount", "bpf", "clone3", "chroot", "unshare"] {
            assert!(!allowed(&admin, name).is_empty(), "{name}");
        }
        assert!(allowed(&admin, "clone").iter().any(|r| r.get("args").is_none()));
    }

    #[test]
    fn two_families_of_sockets_are_closed() {
        let open = |family: u64| {
            allowed(&default(&Set::new()), "socket").iter().any(|r| {
                let (op, value) = (r["args"][0]["op"].as_str().unwrap(), r["args"][0]["value"].as_u64().unwrap());
                match op {
                    "SCMP_CMP_LT" => family < value,
                    "SCMP_CMP_GT" => family > value,
                    _ => family == value,
                }
            })
        };
        assert!((0..60).all(|family| open(family) == (family != AF_ALG && family != AF_VSOCK)));
    }
}

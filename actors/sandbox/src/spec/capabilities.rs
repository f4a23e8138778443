//! Capabilities.
use kernel::{Fault, Result};
use proto::cri::LinuxContainerSecurityContext;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// What a container gets without asking, as containerd and Docker give.
const DEFAULT: &str =
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE";

/// All that Linux has, by number (capabilities(7)).
const ALL: &str = "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST \
    NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME \
    SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF \
    CHECKPOINT_RESTORE";

/// Names with `CAP_`.
pub type Set = BTreeSet<String>;

/// What the process may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Bounding, effective and permitted.
    pub all: Set,
    /// Ambient, hence inheritable too: what a process keeps that is not root.
    pub ambient: Set,
}

/// `ALL`, or a name that the kernel knows, with or without `CAP_`.
fn known(name: &str) -> Result<String> {
    let upper = name.to_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if bare == "ALL" {
        return Ok(bare.to_owned());
    }
    if ALL.split_whitespace().any(|c| c == bare) {
        return Ok(format!("CAP_{bare}"));
    }
    Err(Fault::invalid_argument(format!("capabilities: {name:?} is not known")))
}

/// The container's capabilities. `base` is the base specification's set. Order, as clients rely on it: add ALL, drop ALL, add others, drop others.
pub fn of(context: &LinuxContainerSecurityContext, base: Option<&Value>) -> Result<Capabilities> {
    if context.privileged {
        return Ok(Capabilities { all: available(), ambient: Set::new() });
    }
    let wish = context.capabilities.clone().unwrap_or_default();
    let names = |list: &[String]| list.iter().map(|c| known(c)).collect::<Result<Set>>();
    let (add, drop, ambient) = (names(&wish.add_capabilities)?, names(&wish.drop_capabilities)?, names(&wish.add_ambient_capabilities)?);
    let has_all = |set: &Set| set.contains("ALL");
    let mut all = match (has_all(&add), has_all(&drop)) {
        (_, true) => Set::new(),
        (true, false) => available(),
        (false, false) => default_set(base),
    };
    let one_by_one = |set: Set| set.into_iter().filter(|c| c != "ALL");
    let ambient: Set = if has_all(&ambient) { available() } else { ambient };
    // What is ambient must be permitted.
    all.extend(one_by_one(add).chain(ambient.iter().cloned()));
    let drop: Set = one_by_one(drop).collect();
    all.retain(|c| !drop.contains(c));
    Ok(Capabilities { ambient: ambient.intersection(&all).cloned().collect(), all })
}

fn default_set(base: Option<&Value>) -> Set {
    let of_base = base.and_then(|b| b.get("bounding")).and_then(Value::as_array);
    match of_base {
        Some(list) => list.iter().filter_map(|c| c.as_str().map(str::to_owned)).collect(),
        None => DEFAULT.split_whitespace().map(|c| format!("CAP_{c}")).collect(),
    }
}

/// What this daemon has: more it cannot give.
fn available() -> Set {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let bits = line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok()).unwrap_or(u64::MAX);
    ALL.split_whitespace().enumerate().filter(|(n, _)| bits & (1 << n) != 0).map(|(_, c)| format!("CAP_{c}")).collect()
}

impl Capabilities {
    /// `process.capabilities`.
    pub fn json(&self) -> Value {
        json!({"bounding": self.all, "effective": self.all, "permitted": self.all, "inheritable": self.ambient, "ambient": self.ambient})
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proto::cri::Capability;

    fn ask(add: &[&str], drop: &[&str], ambient: &[&str]) -> Result<Capabilities> {
        let own = |l: &[&str]| l.iter().map(|s| s.to_string()).collect();
        let wish = Capability { add_capabilities: own(add), drop_capabilities: own(drop), add_ambient_capabilities: own(ambient) };
        of(&LinuxContainerSecurityContext { capabilities: Some(wish), ..Default::default() }, None)
    }

    #[test]
    fn adding_dropping_and_misspelling() {
        let names = |c: Capabilities| c.all.into_iter().collect::<Vec<_>>();
        assert_eq!(names(ask(&["NET_ADMIN"], &["all"], &[]).unwrap()), ["CAP_NET_ADMIN"]);
        assert_eq!(ask(&[], &["KILL"], &[]).unwrap().all.len(), 13);
        assert_eq!(ask(&["aLL"], &[], &[]).unwrap().all, available());
        assert_eq!(names(ask(&["ALL", "SYS_TIME", "KILL"], &["ALL", "CAP_KILL"], &[]).unwrap()), ["CAP_SYS_TIME"]);
        assert!(ask(&["NET_AMDIN"], &[], &[]).unwrap_err().message.contains("NET_AMDIN"));
        assert_eq!(ask(&[], &[], &[]).unwrap().all.len(), 14);
    }

    #[test]
    fn what_is_ambient_is_permitted_and_inheritable() {
        let got = ask(&[], &["ALL"], &["NET_BIND_SERVICE"]).unwrap();
        assert_eq!(got.json()["ambient"], json!(["CAP_NET_BIND_SERVICE"]));
        assert_eq!(
            (&got.json()["inheritable"], &got.json()["bounding"]),
            (&json!(["CAP_NET_BIND_SERVICE"]), &json!(["CAP_NET_BIND_SERVICE"]))
        );
        assert!(ask(&[], &["CHOWN"], &["CHOWN"]).unwrap().ambient.is_empty(), "a single drop comes last");
    }
}

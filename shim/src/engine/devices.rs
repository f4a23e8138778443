//! Which devices a container of cgroup version 2 may use: the rules of its specification as a program in the kernel (`BPF_PROG_TYPE_CGROUP_DEVICE`).
//! Version 1 has files for it, which libcgroups writes.
use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxResources};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// One instruction: code, registers, jump, number (linux/bpf.h).
type Instruction = [u8; 8];

fn instruction(code: u8, into: u8, from: u8, jump: i16, number: i32) -> Instruction {
    let (j, n) = (jump.to_le_bytes(), number.to_le_bytes());
    [code, into | from << 4, j[0], j[1], n[0], n[1], n[2], n[3]]
}

const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const COPY: u8 = 0xbc;
const SET: u8 = 0xb7;
const UNLESS_EQUAL: u8 = 0x55;
const IF_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;

/// Bits of an access: mknod, read, write (linux/bpf.h).
fn access(rule: &LinuxDeviceCgroup) -> i32 {
    let text = rule.access().clone().unwrap_or_else(|| "rwm".into());
    [('m', 1), ('r', 2), ('w', 4)].iter().filter(|(c, _)| text.contains(*c)).map(|(_, bit)| bit).sum()
}

/// Numbers of devices: 64 bits in the specification, where -1 is any.
fn number(n: Option<i64>) -> Option<i32> {
    n.filter(|n| *n >= 0).map(|n| i32::try_from(n).unwrap_or(i32::MAX))
}

/// The program: the last rule that fits decides, as the specification says; where none fits, all is allowed, as version 1 begins.
fn program(rules: &[LinuxDeviceCgroup]) -> Vec<Instruction> {
    // What is asked arrives in r1: type and access, major, minor.
    let mut all = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(COPY, 3, 2, 0, 0),
        instruction(AND, 3, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, 2, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let block = block(rule);
        let always = block.len() == 2;
        all.extend(block);
        if always {
            // The kernel refuses what can never be reached.
            return all;
        }
    }
    all.extend(answer(true));
    all
}

/// One rule; jumps past itself where it does not fit.
fn block(rule: &LinuxDeviceCgroup) -> Vec<Instruction> {
    let mut tests: Vec<(u8, u8, i32)> = Vec::new();
    let mut prepared = Vec::new();
    match rule.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::B => tests.push((UNLESS_EQUAL, 3, 1)),
        LinuxDeviceType::C | LinuxDeviceType::U => tests.push((UNLESS_EQUAL, 3, 2)),
        _ => {}
    }
    let bits = access(rule);
    if bits != 7 {
        // Allowed if it is all within the rule's access; refused if any of it is.
        let (mask, test) = if rule.allow() { (7 & !bits, UNLESS_EQUAL) } else { (bits, IF_EQUAL) };
        prepared = vec![instruction(COPY, 6, 2, 0, 0), instruction(AND, 6, 0, 0, mask)];
        tests.push((test, 6, 0));
    }
    tests.extend(number(rule.major()).map(|n| (UNLESS_EQUAL, 4, n)));
    tests.extend(number(rule.minor()).map(|n| (UNLESS_EQUAL, 5, n)));
    let mut all = prepared;
    let count = tests.len();
    for (at, (code, register, value)) in tests.into_iter().enumerate() {
        let past = (count - at - 1 + 2) as i16;
        all.push(instruction(code, register, 0, past, value));
    }
    all.extend(answer(rule.allow()));
    all
}

fn answer(allow: bool) -> [Instruction; 2] {
    [instruction(SET, 0, 0, 0, i32::from(allow)), instruction(EXIT, 0, 0, 0, 0)]
}

/// Making a node is no use of it, and every runtime lets who has the capability for it make any.
fn with_nodes(rules: &[LinuxDeviceCgroup]) -> io::Result<Vec<LinuxDeviceCgroup>> {
    let make = |kind| LinuxDeviceCgroupBuilder::default().allow(true).typ(kind).access("m").build().map_err(io::Error::other);
    let mut all = rules.to_vec();
    all.extend([make(LinuxDeviceType::B)?, make(LinuxDeviceType::C)?]);
    Ok(all)
}

/// Puts the rules in force for a cgroup of version 2.
pub fn guard(cgroup: &Path, resources: &LinuxResources) -> io::Result<()> {
    let Some(rules) = resources.devices().as_ref().filter(|r| !r.is_empty()) else { return Ok(()) };
    let failed = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("device rules of {}: {what}: {e}", cgroup.display()));
    let dir = File::open(cgroup).map_err(|e| failed("open", e))?;
    let program = load(&program(&with_nodes(rules)?)).map_err(|e| failed("load", e))?;
    attach(&dir, &program).map_err(|e| failed("attach", e))
}

/// The beginning of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel: u32,
    flags: u32,
}

/// The beginning of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

fn bpf<T>(command: i32, attributes: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads as many bytes as it is told, and the structures are laid out as linux/bpf.h has them.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as i32) }
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    const PROG_LOAD: i32 = 5;
    const CGROUP_DEVICE: u32 = 15;
    let license = c"Apache-2.0";
    let attributes = Load {
        kind: CGROUP_DEVICE,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel has just made this descriptor for us.
    bpf(PROG_LOAD, &attributes).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach(cgroup: &File, program: &OwnedFd) -> io::Result<()> {
    const PROG_ATTACH: i32 = 8;
    const DEVICE: u32 = 6;
    const ALLOW_MULTI: u32 = 2;
    let attributes = Attach { target: cgroup.as_raw_fd() as u32, program: program.as_raw_fd() as u32, kind: DEVICE, flags: ALLOW_MULTI };
    bpf(PROG_ATTACH, &attributes).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::FileTypeExt;
    use std::process::Command;

    fn rules(json: serde_json::Value) -> LinuxResources {
        serde_json::from_value(serde_json::json!({"devices": json})).unwrap()
    }

    /// A cgroup of version 2 on a mount of the test's own: it works beside version 1, too.
    struct Group(std::path::PathBuf);
    impl Group {
        fn make(tag: &str) -> Group {
            let at = std::env::temp_dir().join(format!("trpdev{tag}{}", std::process::id()));
            std::fs::create_dir_all(&at).unwrap();
            let none: Option<&str> = None;
            nix::mount::mount(Some("cgroup2"), &at, Some("cgroup2"), nix::mount::MsFlags::empty(), none).unwrap();
            let group = at.join(format!("trpdev{tag}{}", std::process::id()));
            std::fs::create_dir_all(&group).unwrap();
            Group(group)
        }
        /// Does this shell command succeed inside?
        fn succeeds(&self, command: &str) -> bool {
            let inside = format!("echo 0 > {}/cgroup.procs && {command}", self.0.display());
            Command::new("sh").args(["-c", &inside]).stderr(std::process::Stdio::null()).status().unwrap().success()
        }
    }
    impl Drop for Group {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir(&self.0);
            let at = self.0.parent().unwrap();
            let _ = nix::mount::umount2(at, nix::mount::MntFlags::MNT_DETACH);
            let _ = std::fs::remove_dir(at);
        }
    }

    #[test]
    fn the_kernel_follows_the_rules_and_the_last_one_wins() {
        let group = Group::make("a");
        let wanted = rules(serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "r"},
            {"allow": true, "type": "c", "major": 1, "access": "m"},
            {"allow": true, "type": "c", "major": 1, "minor": 9, "access": "rwm"},
            {"allow": false, "type": "c", "major": 1, "minor": 9, "access": "w"},
        ]));
        guard(&group.0, &wanted).unwrap();
        assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        for (command, allowed) in [
            ("true > /dev/null", true),
            ("head -c1 /dev/zero > /dev/null", true),
            ("echo > /dev/zero", false),
            ("head -c1 /dev/full > /dev/null", false),
            ("head -c1 /dev/urandom > /dev/null", true),
            ("echo > /dev/urandom", false),
            ("mknod $(mktemp -u) b 250 7", true),
        ] {
            assert_eq!(group.succeeds(command), allowed, "{command}");
        }
    }

    #[test]
    fn no_rules_no_program_and_all_allowed() {
        let group = Group::make("b");
        guard(&group.0, &LinuxResources::default()).unwrap();
        guard(&group.0, &rules(serde_json::json!([{"allow": true, "access": "rwm"}]))).unwrap();
        assert!(group.succeeds("echo > /dev/full 2>/dev/null; head -c1 /dev/full > /dev/null"));
    }
}

//! Users' machines have the unified cgroup hierarchy and systemd; a builder's may have neither. So this boots Debian's kernel in an emulated machine
//! (qemu; no hardware support is asked for), once with systemd as PID 1 and `SystemdCgroup = true`, once without systemd, and runs `vm-guest`
//! (`tests/src/bin/vm-guest`) in it against the daemon and shim under test. The machine's root comes from Debian's packages by `tests/vm/root`,
//! which keeps it under `target/vm`. Nothing here is skipped: what is missing fails the test, and says what to install.
//!
//! By hand: `VM_ONLY=oom cargo test -p troupe-tests --test vm -- --nocapture` runs the checks with `oom` in their name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A boot and all checks take some 80 s on two idle cores.
const LIMIT: Duration = Duration::from_secs(600);
/// Room for the unstripped binaries of a debug build.
const DISK_MIB: u64 = 64;

fn run(what: &str, command: &mut Command) {
    let done = command.output().unwrap_or_else(|e| panic!("{what}: {e}: run deploy/setup test"));
    assert!(done.status.success(), "{what}: {}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
}

/// The machine's root and kernel.
fn machine() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("vm");
    run("tests/vm/root", Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/vm/root")).arg(&dir));
    dir
}

/// A disk with the binaries under test.
fn disk(scratch: &Path, only: &str) -> PathBuf {
    let (tree, image) = (scratch.join("tree"), scratch.join("test.ext4"));
    std::fs::create_dir(&tree).unwrap();
    let built = troupe_tests::daemon::binaries();
    let mut bytes = 0;
    for binary in [built.join("troupe"), built.join("containerd-shim-troupe-v2"), env!("CARGO_BIN_EXE_vm-guest").into()] {
        let to = tree.join(binary.file_name().unwrap());
        // Debug information is most of a debug build, and of no use in there.
        run("strip", Command::new("strip").args(["--strip-debug", "-o"]).arg(&to).arg(&binary));
        bytes += to.metadata().unwrap().len();
    }
    std::fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/troupe.service"), tree.join("troupe.service")).unwrap();
    let modules =
        "overlay bridge veth nf_tables nft_compat nft_chain_nat nf_nat xt_MASQUERADE xt_comment xt_addrtype xt_mark ipt_REJECT fuse";
    let script = format!("#!/bin/sh\nmodprobe -a {modules}\nexec /opt/troupe/vm-guest {only}\n");
    std::fs::write(tree.join("run"), script).unwrap();
    run("chmod", Command::new("chmod").arg("755").arg(tree.join("run")));
    let size = format!("{}m", (bytes >> 20) + DISK_MIB);
    let mut make = Command::new("mke2fs");
    make.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    run("mke2fs", make.args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"]).arg(&tree).arg(&image).arg(size));
    image
}

/// A running machine; it ends with this.
#[derive(Clone)]
struct Vm(Arc<Mutex<Child>>);

impl Vm {
    fn end(&self) {
        let mut child = self.0.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.end();
    }
}

fn boot(machine: &Path, disk: &Path, console: &Path, arguments: &str) -> Vm {
    let drive = |path: &Path, more: &str| format!("file={},format=raw,if=virtio,{more}", path.display());
    let child = Command::new("qemu-system-x86_64")
        .args(["-M", "q35", "-cpu", "max", "-smp", "2", "-m", "1024", "-accel", "tcg,thread=multi"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-nic", "none"])
        .arg("-kernel")
        .arg(machine.join("vmlinuz"))
        .arg("-initrd")
        .arg(machine.join("initrd"))
        // A panic ends the machine, and with it the test.
        .args(["-append", &format!("console=ttyS0 rw quiet panic=-1 mitigations=off {arguments}")])
        .args(["-drive", &drive(&machine.join("root.ext4"), "snapshot=on,cache=unsafe")])
        .args(["-drive", &drive(disk, "readonly=on")])
        .args(["-serial", &format!("file:{}", console.display()), "-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    Vm(Arc::new(Mutex::new(child.unwrap_or_else(|e| panic!("qemu-system-x86_64: {e}: run deploy/setup test")))))
}

/// Boots, runs the checks, and passes their lines on.
fn checks(arguments: &str, least: usize) {
    let began = Instant::now();
    let only = std::env::var("VM_ONLY").unwrap_or_default();
    let scratch = tempfile::tempdir().unwrap();
    let (machine, disk, console) = (machine(), disk(scratch.path(), &only), scratch.path().join("console"));
    let vm = boot(&machine, &disk, &console, arguments);
    let output = vm.0.lock().unwrap().stdout.take().unwrap();
    let late = vm.clone();
    std::thread::spawn(move || {
        std::thread::sleep(LIMIT);
        late.end();
    });
    let mut said = Vec::new();
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        let line = line.trim_end().to_owned();
        println!("{:6.1} s  {line}", began.elapsed().as_secs_f64());
        said.push(line);
    }
    let console = String::from_utf8_lossy(&std::fs::read(&console).unwrap_or_default()).into_owned();
    let sum = said.iter().find_map(|l| l.strip_prefix("sum: ")).unwrap_or_else(|| {
        panic!("the machine ended after {:?} without a result:\n{}\n--- console\n{console}", began.elapsed(), said.join("\n"))
    });
    let passed: usize = sum.split(' ').next().and_then(|n| n.parse().ok()).unwrap();
    let failed: Vec<&String> = said.iter().filter(|l| l.starts_with("FAILED")).collect();
    assert!(failed.is_empty() && sum.ends_with(" 0 failed"), "{failed:#?}");
    assert!(passed >= if only.is_empty() { least } else { 1 }, "only {passed} checks ran: {said:#?}");
}

#[test]
fn the_systemd_driver_on_a_machine_as_users_have_it() {
    checks("", 17);
}

#[test]
fn the_cgroupfs_driver_on_the_unified_hierarchy() {
    checks("troupe.plain", 14);
}

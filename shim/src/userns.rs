//! User namespaces, made by a helper process: to enter one a process must have one thread, and this server may have more.
//!
//! The helper enters the user namespace that owns the pod's network namespace, or makes one; becomes root in it; and only then makes the other
//! namespaces, so that they are owned by it. It waits until the server has opened them, and ends. The init of a shared PID namespace, its child,
//! comes to the server, the nearest subreaper.
use crate::idmap::{Maps, Ranges};
use crate::sandbox;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

/// Name of the helper's action.
pub const ACTION: &str = "namespaces";

/// Makes a user namespace and the namespaces of `wish` (see [`sandbox`]) in it: descriptors by kind, and the init of a shared PID namespace.
pub fn make(wish: &Value) -> io::Result<sandbox::Made> {
    let mut helper = Command::new("/proc/self/exe")
        .arg(ACTION)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("start the helper for the user namespace: {e}")))?;
    let made = match (helper.stdin.take(), helper.stdout.take()) {
        (Some(mut input), Some(output)) => talk(wish, helper.id(), &mut input, BufReader::new(output)),
        _ => Err(io::Error::other("no pipes to the helper")),
    };
    // Its input is closed now, so it ends.
    let ended = helper.wait();
    made.and_then(|made| ended.map(|_| made))
}

/// A user namespace with a mapping (`uid`, `gid`: lists of ranges), by which mounts are mapped.
pub fn alone(userns: &Value) -> io::Result<OwnedFd> {
    let (held, _) = make(&json!({ "userns": userns }))?;
    let user = held.into_iter().find(|(kind, _)| *kind == "user").map(|(_, file)| file.into());
    user.ok_or_else(|| io::Error::other("the helper made no user namespace"))
}

fn talk(wish: &Value, pid: u32, input: &mut impl Write, mut output: impl BufRead) -> io::Result<sandbox::Made> {
    writeln!(input, "{wish}")?;
    loop {
        let mut line = String::new();
        output.read_line(&mut line)?;
        let told: Value = serde_json::from_str(&line).map_err(|_| io::Error::other("the helper for the user namespace died"))?;
        if let Some(error) = told["error"].as_str() {
            return Err(io::Error::other(error.to_owned()));
        }
        if told["map"] == true {
            let maps = maps(wish);
            for (file, ranges) in [("uid_map", &maps.uid), ("gid_map", &maps.gid)] {
                std::fs::write(format!("/proc/{pid}/{file}"), ranges.lines())
                    .map_err(|e| io::Error::new(e.kind(), format!("write {file} {:?}: {e}", ranges.lines())))?;
            }
            writeln!(input, "mapped")?;
            continue;
        }
        let open = |kind: &'static str| Ok((kind, File::open(format!("/proc/{pid}/ns/{kind}"))?));
        let kinds = ["user"].into_iter().chain(sandbox::shared(wish));
        let held = kinds.map(open).collect::<io::Result<Vec<_>>>()?;
        return Ok((held, told["init"].as_u64().map(|p| p as u32)));
    }
}

fn maps(wish: &Value) -> Maps {
    let list = |key: &str| {
        let one = &wish["userns"][key];
        let all = one.as_array().cloned().unwrap_or_else(|| vec![one.clone()]);
        let oci = |m: &Value| json!({"containerID": m["container"], "hostID": m["host"], "size": m["size"]});
        Ranges::of(Some(&all.iter().map(oci).collect()))
    };
    Maps { uid: list("uid"), gid: list("gid") }
}

/// The helper.
pub fn helper() -> io::Result<()> {
    let mut input = io::stdin().lock();
    let done = work(&mut input).unwrap_or_else(|e| json!({ "error": e.to_string() }));
    println!("{done}");
    let mut rest = String::new();
    // The end of the input: all is opened.
    while input.read_line(&mut rest)? > 0 {}
    Ok(())
}

fn work(input: &mut impl BufRead) -> io::Result<Value> {
    let mut line = String::new();
    input.read_line(&mut line)?;
    let wish: Value = serde_json::from_str(&line)?;
    let alive = sandbox::lifeline(&wish)?;
    let what = |what: &'static str| move |e: nix::Error| io::Error::new(io::Error::from(e).kind(), format!("{what}: {e}"));
    match wish["network"].as_str().filter(|p| !p.is_empty()) {
        Some(path) => {
            let network = File::open(path).map_err(|e| io::Error::new(e.kind(), format!("open {path}: {e}")))?;
            setns(owner(&network, path)?, CloneFlags::CLONE_NEWUSER).map_err(what("enter the pod's user namespace"))?;
            become_root()?;
            setns(network, CloneFlags::CLONE_NEWNET).map_err(what("enter the pod's network namespace"))?;
        }
        None => {
            unshare(CloneFlags::CLONE_NEWUSER).map_err(what("make a user namespace"))?;
            println!("{}", json!({"map": true}));
            line.clear();
            input.read_line(&mut line)?;
            become_root()?;
        }
    }
    let init = sandbox::inside(&wish, alive)?;
    Ok(json!({"ready": true, "init": init}))
}

fn become_root() -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[]).and_then(|()| setresgid(gid, gid, gid)).and_then(|()| setresuid(uid, uid, uid))?;
    Ok(())
}

/// The user namespace that owns a namespace.
#[allow(unsafe_code)]
fn owner(namespace: &File, path: &str) -> io::Result<File> {
    // SAFETY: this ioctl takes no argument and answers a new descriptor.
    let fd = unsafe { libc::ioctl(namespace.as_raw_fd(), libc::NS_GET_USERNS) };
    if fd < 0 {
        let e = io::Error::last_os_error();
        return Err(io::Error::new(e.kind(), format!("find the owner of {path}: {e}")));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let owner = unsafe { File::from_raw_fd(fd) };
    if owner.metadata()?.ino() == std::fs::metadata("/proc/self/ns/user")?.ino() {
        return Err(io::Error::other(format!("{path} is owned by the node's user namespace, not by one of the pod")));
    }
    Ok(owner)
}

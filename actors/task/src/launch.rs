//! Runs the shim binary: `start` and `delete` (`contracts/core.md` §5.2, §5.9). Never a plain fork: std uses `posix_spawn` for what is asked of it here.
use crate::reply::{self, Endpoint};
use crate::{Args, NAMESPACE};
use kernel::{Cx, Fault, Result, ResultExt};
use messages::task::Runtime;
use proto::bootstrap::{BootstrapParams, Extension, LogLevel};
use proto::prost::Message as _;
use proto::prost_types::Any;
use proto::runc_options::Options;
use proto::task::DeleteResponse;
use rustix::process::{Pid, Signal, kill_process_group};
use std::io::Write;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::process::Command;
use tokio::time::Instant;

/// A reply is a few hundred bytes, an error text a few thousand.
const MAX_REPLY: u64 = 1 << 20;
/// How often one that takes its time is shown with what it said.
const SLOW: Duration = Duration::from_secs(1);
/// Bytes of it that go into an error.
const TOLD: usize = 4096;
/// The reply is complete when the binary ends; a server that kept its output open must not hold us.
const AFTER_EXIT: Duration = Duration::from_millis(100);

/// The runtime's options as its shim knows them.
pub fn options(runtime: &Runtime) -> Any {
    if let Some(other) = runtime.other.clone() {
        let (type_url, config_path, config_body) = (other.type_url, other.config_path, other.config_body.into_bytes());
        return proto::any(&proto::runtime_options::Options { type_url, config_path, config_body });
    }
    proto::any(&Options {
        binary_name: runtime.binary_name.clone(),
        root: runtime.root.clone(),
        systemd_cgroup: runtime.systemd_cgroup,
        criu_image_path: runtime.criu_image_path.clone(),
        criu_work_path: runtime.criu_work_path.clone(),
        io_uid: runtime.io_uid,
        io_gid: runtime.io_gid,
        no_new_keyring: runtime.no_new_keyring,
        shim_cgroup: runtime.shim_cgroup.clone(),
        ..Default::default()
    })
}

/// The process group of a binary that was run: killed when this is dropped, whatever it has begun, unless it is to go on.
pub struct Group(Option<Pid>);

impl Group {
    fn of(child: &tokio::process::Child) -> Group {
        Group(child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)))
    }
    /// What it has left running is meant to.
    pub fn keep(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // Nothing is left in it, as a rule.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// Starts the shim of a pod. What else it has started in its group is given up with it, until it is known to answer.
pub async fn start(cx: &Cx, args: &Args, id: &str, binary: &Path, bundle: &Path, runtime: &Runtime) -> Result<(Endpoint, Group)> {
    let log_level = if args.debug { LogLevel::Debug } else { LogLevel::Info };
    let params = BootstrapParams {
        instance_id: id.into(),
        namespace: NAMESPACE.into(),
        log_level: log_level as i32,
        containerd_version: env!("CARGO_PKG_VERSION").into(),
        containerd_ttrpc_address: args.ttrpc_address.clone(),
        containerd_grpc_address: args.grpc_address.clone(),
        containerd_binary: args.exe.display().to_string(),
        extensions: vec![Extension { value: Some(options(runtime)) }],
        socket_dir: args.socket_dir.as_ref().map(|d| d.display().to_string()),
    };
    let mut command = command(args, id, binary, bundle);
    let env =
        [("GOMAXPROCS", "2"), ("MAX_SHIM_VERSION", "2"), ("TTRPC_ADDRESS", &args.ttrpc_address), ("GRPC_ADDRESS", &args.grpc_address)];
    command.envs(env).env("NAMESPACE", NAMESPACE).env("TRACEPARENT", cx.traceparent()).envs(args.env.iter().cloned());
    command.arg("start");
    let heard = |said: &[u8]| cx.step(format!("shim.start (so far it says: {})", words(said)));
    let run = capture(command, &params.encode_to_vec(), args.timeouts.start, heard).await;
    cx.step("shim.start");
    let (status, output, group) = run.with_context(|| format!("run {} start", binary.display()))?;
    if !status.success() {
        return Err(Fault::internal(format!("{} start: {status}: {}", binary.display(), words(&output))));
    }
    let endpoint = reply::parse(&output).with_context(|| format!("{} start", binary.display()))?;
    Ok((endpoint, group))
}

/// What it said, for an error.
fn words(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let text = text.trim();
    // The end tells why.
    text[text.ceil_char_boundary(text.len().saturating_sub(TOLD))..].to_owned()
}

/// Cleans up after a dead shim; answers the exit code that the binary knows.
pub async fn delete(args: &Args, id: &str, binary: &Path, bundle: &Path) -> Result<DeleteResponse> {
    let mut command = command(args, id, binary, bundle);
    command.arg("-bundle").arg(bundle).arg("delete").stderr(Stdio::null());
    let run = capture_stdout(command, args.timeouts.cleanup).await;
    let (status, output) = run.with_context(|| format!("run {} delete", binary.display()))?;
    if !status.success() {
        return Err(Fault::internal(format!("{} delete: {status}", binary.display())));
    }
    DeleteResponse::decode(output.as_slice()).class(kernel::Class::Internal, "reply of delete")
}

fn command(args: &Args, id: &str, binary: &Path, bundle: &Path) -> Command {
    let mut command = Command::new(binary);
    command.current_dir(bundle).process_group(0).kill_on_drop(true).stdin(Stdio::null());
    // Ours alone: whoever inherits it (`runc start`, a container's hook) waits for a container to say that it is ready, or speaks for this unit.
    command.env_remove("NOTIFY_SOCKET");
    command.args(["-namespace", NAMESPACE, "-address", &args.grpc_address, "-publish-binary"]).arg(&args.exe).args(["-id", id]);
    if args.debug {
        command.arg("-debug");
    }
    command
}

/// Runs it with `input`; output and errors come together, in their order.
async fn capture(mut command: Command, input: &[u8], limit: Duration, heard: impl Fn(&[u8])) -> Result<(ExitStatus, Vec<u8>, Group)> {
    let (stdin, mut feed) = std::io::pipe()?;
    // Fits into the pipe's buffer (64 KiB), so it waits for nobody.
    if input.len() > 32 << 10 {
        return Err(Fault::invalid_argument("the runtime options are too long"));
    }
    feed.write_all(input)?;
    drop(feed);
    let (reader, writer) = std::io::pipe()?;
    command.stdin(stdin).stdout(writer.try_clone()?).stderr(writer);
    run(command, reader, limit, heard).await
}

/// Runs it; answers its output.
pub async fn capture_stdout(mut command: Command, limit: Duration) -> Result<(ExitStatus, Vec<u8>)> {
    let (reader, writer) = std::io::pipe()?;
    command.stdout(writer);
    let (status, output, mut group) = run(command, reader, limit, |_| ()).await?;
    group.keep();
    Ok((status, output))
}

async fn run(
    mut command: Command,
    reader: std::io::PipeReader,
    limit: Duration,
    heard: impl Fn(&[u8]),
) -> Result<(ExitStatus, Vec<u8>, Group)> {
    let mut child = command.spawn()?;
    let group = Group::of(&child);
    // Our copies of the write ends live in it.
    drop(command);
    let mut reader = Receiver::from_owned_fd(reader.into())?.take(MAX_REPLY);
    let (mut output, mut status, mut open) = (Vec::new(), None, true);
    let (mut deadline, mut tell) = (Instant::now() + limit, Instant::now() + SLOW);
    while status.is_none() || open {
        tokio::select! {
            n = reader.read_buf(&mut output), if open => open = n? > 0,
            ended = child.wait(), if status.is_none() => {
                status = Some(ended?);
                deadline = Instant::now() + AFTER_EXIT;
            }
            () = tokio::time::sleep_until(tell), if status.is_none() => {
                heard(&output);
                tell += SLOW;
            }
            () = tokio::time::sleep_until(deadline) => match status {
                Some(_) => break,
                None => return Err(Fault::deadline_exceeded(format!("no end within {limit:?}; said: {}", words(&output)))),
            },
        }
    }
    let status = status.ok_or_else(|| Fault::internal("lost the process"))?;
    Ok((status, output, group))
}

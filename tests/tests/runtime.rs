//! Runtimes and shims of other makes that hang, crash and lie: each costs its own call, which says so; nothing of it is left, and nobody else notices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::{census, registry::Registry};

/// runc, unless the container's variable `WRONG` names the step: then it hangs before it or behind it, crashes, or lies.
const RUNTIME: &str = r#"#!/bin/sh
export CALLED="$*"
for word in "$@"; do
    case "$previous" in
        --log) log=$word ;;
        --pid-file) pid_file=$word ;;
    esac
    case "$word" in create | start | exec | delete) step=${step:-$word} ;; esac
    previous=$word
done
wrong() { grep -q "WRONG=$1\"" "$(dirname "$log")/config.json" 2>/dev/null; }
hang() { sleep 9876 & sleep 9876; }
wrong "$step" && hang
wrong all && [ "$step" != create ] && hang
if wrong "late-$step"; then
    runc "$@"
    hang
fi
wrong "crash-$step" && { runc "$@"; kill -9 $$; }
wrong "garbage-$step" && { printf '\377\376{"level": nonsense\n' > "$log"; exit 1; }
wrong "silent-$step" && { runc "$@"; rm -f "$pid_file"; exit 0; }
wrong "lie-$step" && { runc "$@"; echo $PPID > "$pid_file"; exit 0; }
exec runc "$@"
"#;

fn executable(path: &Path, text: &str) {
    // Written elsewhere and moved, so that it is never executed while it is open for writing.
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text).unwrap();
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(draft, path).unwrap();
}

struct Bed {
    daemon: Daemon,
    cri: Cri,
    image: String,
    before: census::Census,
    _registry: Registry,
    _scripts: tempfile::TempDir,
}

async fn bed(change: impl Fn(String, &Path) -> String) -> Bed {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let scripts = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_with(&Options::default(), |text| change(text, scripts.path())).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let before = census::take(&daemon);
    Bed { daemon, cri, image, before, _registry: registry, _scripts: scripts }
}

async fn with_runtime() -> Bed {
    bed(|text, scripts| {
        let path = scripts.join("runtime");
        executable(&path, RUNTIME);
        text.replace("BinaryName = \"\"", &format!("BinaryName = \"{}\"", path.display()))
    })
    .await
}

fn within<T>(limit: Duration, body: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(body);
    request.set_timeout(limit);
    request
}

impl Bed {
    /// A pod and a container in it whose runtime goes wrong in a step.
    async fn made(&self, wrong: &str) -> (Cri, String, String) {
        let mut cri = self.cri.clone();
        let pod = cri.pod(wrong, true, &self.daemon.logs());
        let sandbox = cri.run_pod(&pod).await.unwrap();
        let mut config = cri.container("c", &self.image, &["sleep", "1000"]);
        config.envs = vec![KeyValue { key: "WRONG".into(), value: wrong.into() }];
        let id = cri.create(&sandbox, &config, &pod).await.unwrap();
        (cri, sandbox, id)
    }
    async fn others_go_on(&self) {
        let (mut cri, sandbox, id) = self.made("nothing").await;
        let began = Instant::now();
        cri.start(&id).await.unwrap();
        assert_eq!(cri.exec(&id, &["echo", "hi"], 10).await.unwrap().stdout, b"hi\n");
        cri.drop_pod(&sandbox).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(8), "another pod's life took {:?}", began.elapsed());
    }
    async fn settle(&self) {
        census::settle(&self.daemon, &self.before, Duration::from_secs(10), "what is left").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_hangs_in_a_step_costs_that_call_and_nothing_is_left() {
    let bed = with_runtime().await;
    let life = async |wrong: &'static str| {
        let (mut cri, sandbox, id) = bed.made(wrong).await;
        let exec = ExecSyncRequest { container_id: id.clone(), cmd: vec!["sleep".into(), "1234".into()], timeout: 0 };
        let (patience, began) = (Duration::from_secs(6), Instant::now());
        let started = cri.runtime.start_container(within(patience, StartContainerRequest { container_id: id.clone() })).await;
        let fault = match wrong {
            "exec" => {
                started.unwrap();
                Some(cri.runtime.exec_sync(within(patience, exec)).await.unwrap_err())
            }
            // It goes on until its pod is removed.
            "late-exec" => {
                started.unwrap();
                let mut cri = cri.clone();
                tokio::spawn(async move { drop(cri.runtime.exec_sync(exec).await) });
                tokio::time::sleep(Duration::from_millis(500)).await;
                None
            }
            "delete" => {
                started.unwrap();
                None
            }
            _ => Some(started.unwrap_err()),
        };
        if let Some(fault) = fault {
            println!("{wrong}: after {:?}: {fault}", began.elapsed());
            assert_eq!(fault.code(), tonic::Code::DeadlineExceeded, "{wrong}: {fault}");
            // Where its deletion hangs as well, the caller's time is over before that is known.
            assert!(wrong == "all" || fault.message().contains("runtime did not end within"), "{wrong}: {fault}");
        }
        let began = Instant::now();
        let stop = StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
        cri.runtime.stop_pod_sandbox(stop).await.unwrap_or_else(|e| panic!("{wrong}: stop: {e}"));
        let remove = RemovePodSandboxRequest { pod_sandbox_id: sandbox };
        cri.runtime.remove_pod_sandbox(remove).await.unwrap_or_else(|e| panic!("{wrong}: removal: {e}"));
        println!("{wrong}: gone after {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(12), "{wrong}: its removal took {:?}", began.elapsed());
    };
    let all = ["create", "late-create", "start", "late-start", "exec", "late-exec", "delete", "all"].map(|wrong| Box::pin(life(wrong)));
    futures::join!(futures::future::join_all(all), Box::pin(bed.others_go_on()));
    bed.settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_hangs_while_the_daemon_or_its_shim_is_killed_is_ended() {
    let mut bed = with_runtime().await;
    let hung = |bed: &Bed| bed.daemon.processes().iter().filter(|(_, c)| c.contains("sleep 9876")).count();
    let mut pods = vec![];
    for wrong in ["create", "start"] {
        let (cri, sandbox, id) = bed.made(wrong).await;
        let mut caller = cri.clone();
        tokio::spawn(async move { drop(caller.start(&id).await) });
        pods.push((cri, sandbox));
    }
    let until = async |bed: &Bed, expected: usize, what: &str| {
        let end = Instant::now() + Duration::from_secs(15);
        while hung(bed) != expected {
            assert!(Instant::now() < end, "{what}: {:?}", bed.daemon.processes());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    until(&bed, 4, "both hang").await;
    bed.daemon.kill();
    bed.daemon.spawn().await.unwrap();
    bed.cri = bed.daemon.cri().await.unwrap();
    until(&bed, 0, "the next daemon ends what its predecessor's callers wanted").await;
    for (_, sandbox) in pods {
        bed.cri.clone().drop_pod(&sandbox).await.unwrap();
    }
    for wrong in ["create", "start"] {
        let (cri, sandbox, id) = bed.made(wrong).await;
        let mut caller = cri.clone();
        tokio::spawn(async move { drop(caller.start(&id).await) });
        until(&bed, 2, "it hangs").await;
        let shims = bed.daemon.processes().into_iter().filter(|(_, c)| c.contains("containerd-shim-troupe") && c.contains(&sandbox));
        for (pid, _) in shims {
            // SAFETY: kill(2) with a plain pid and signal number touches no memory.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
        until(&bed, 0, "it ends with its shim").await;
        cri.clone().drop_pod(&sandbox).await.unwrap();
    }
    bed.settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_crashes_or_lies_is_told_of_and_all_is_undone() {
    let bed = with_runtime().await;
    let life = async |(wrong, expected): (&'static str, &'static str)| {
        let (mut cri, sandbox, id) = bed.made(wrong).await;
        let started = cri.start(&id).await;
        let fault = match wrong.split_once('-').unwrap().1 {
            "exec" => {
                started.unwrap();
                cri.exec(&id, &["sleep", "1000"], 10).await.unwrap_err()
            }
            "delete" => {
                started.unwrap();
                anyhow::anyhow!("nobody hears of it")
            }
            _ => {
                let fault = started.unwrap_err();
                let status = cri.status(&id).await.unwrap();
                assert_eq!(
                    (status.state, status.reason.as_str()),
                    (ContainerState::ContainerExited as i32, "StartError"),
                    "{wrong}: {status:?}"
                );
                let living = bed.daemon.processes().into_iter().filter(|(pid, c)| {
                    let own = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
                    own.contains(&id) || c.contains(&format!(" {id}"))
                });
                assert_eq!(living.collect::<Vec<_>>(), [], "{wrong}");
                fault
            }
        };
        assert!(fault.to_string().contains(expected), "{wrong}: {fault}");
        cri.drop_pod(&sandbox).await.unwrap_or_else(|e| panic!("{wrong}: removal: {e}"));
    };
    let all = [
        ("crash-create", "/runtime create was killed by signal 9"),
        ("garbage-create", "/runtime create ended with 1: \u{fffd}\u{fffd}{"),
        ("silent-create", "/runtime create succeeded, but its pid file is of no use: No such file"),
        ("lie-create", "is another's process"),
        ("crash-start", "/runtime start was killed by signal 9"),
        ("garbage-start", "/runtime start ended with 1: \u{fffd}"),
        ("garbage-exec", "/runtime exec ended with 1: \u{fffd}"),
        ("lie-exec", "is another's process"),
        ("crash-delete", ""),
        ("garbage-delete", ""),
    ];
    futures::future::join_all(all.map(|wrong| Box::pin(life(wrong)))).await;
    bed.others_go_on().await;
    bed.settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_hangs_costs_its_own_container_and_nothing_is_left() {
    let bed = bed(|text, scripts| {
        let device = |hook: &str| {
            let edit = serde_json::json!({"hookName": hook, "path": "/bin/sh", "args": ["sh", "-c", "sleep 9876 & sleep 9876"]});
            serde_json::json!({"name": hook, "containerEdits": {"hooks": [edit]}})
        };
        let devices: Vec<_> = ["createRuntime", "poststop"].into_iter().map(device).collect();
        let spec = serde_json::json!({"cdiVersion": "0.6.0", "kind": "test.com/hook", "devices": devices});
        std::fs::write(scripts.join("hooks.json"), spec.to_string()).unwrap();
        let keys = format!("restrict_oom_score_adj = true\ncdi_spec_dirs = [{scripts:?}]");
        text.replace("restrict_oom_score_adj = true", &keys)
    })
    .await;
    let life = async |hook: &'static str| {
        let mut cri = bed.cri.clone();
        let pod = cri.pod(&hook.to_lowercase(), true, &bed.daemon.logs());
        let sandbox = cri.run_pod(&pod).await.unwrap();
        let mut config = cri.container("c", &bed.image, &["sleep", "1000"]);
        config.cdi_devices = vec![CdiDevice { name: format!("test.com/hook={hook}") }];
        let id = cri.create(&sandbox, &config, &pod).await.unwrap();
        let start = within(Duration::from_secs(6), StartContainerRequest { container_id: id.clone() });
        match (hook, cri.runtime.start_container(start).await) {
            ("createRuntime", Err(fault)) => {
                assert!(fault.message().contains("the engine did not end within"), "{fault}");
                // The hung one of a caller that waits longer holds up nobody who wants the pod gone.
                let mut cri = cri.clone();
                tokio::spawn(async move { drop(cri.start(&id).await) });
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            ("poststop", Ok(_)) => {}
            (_, other) => panic!("{hook}: {other:?}"),
        }
        let began = Instant::now();
        cri.drop_pod(&sandbox).await.unwrap();
        println!("{hook}: gone after {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(8), "{hook}: its removal took {:?}", began.elapsed());
    };
    futures::join!(Box::pin(life("createRuntime")), Box::pin(life("poststop")), Box::pin(bed.others_go_on()));
    bed.settle().await;
}

/// A shim that starts what it shall be rid of, and then does what `then` says.
fn shim(then: &str) -> String {
    format!("#!/bin/sh\nexport CALLED=\"$PWD $*\"\ncase \"$*\" in *delete*) exec sleep 9876 ;; esac\nsleep 9876 &\n{then}\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_does_not_start_is_told_of_in_its_own_words_and_nothing_is_left() {
    const SHIMS: [(&str, &str, &str); 5] = [
        ("hangs", "echo waiting for the moon >&2; sleep 9876", "waiting for the moon"),
        ("fails", "echo no such kernel >&2; exit 1", "no such kernel"),
        ("crashes", "echo out of luck >&2; kill -9 $$", "out of luck"),
        ("raves", "printf '\\377\\376 hm'; exit 0", "neither a BootstrapResult nor text"),
        ("lies", "echo unix:///nowhere/at/all; exit 0", "unix:///nowhere/at/all"),
    ];
    let bed = bed(|mut text, scripts| {
        for (name, then, _) in SHIMS {
            let path = scripts.join(name);
            executable(&path, &shim(then));
            let table = format!("plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.{name}");
            text += &format!("[{table}]\nruntime_type = \"io.containerd.{name}.v2\"\nruntime_path = {path:?}\n");
        }
        text + "[timeouts]\n\"io.troupe.timeout.shim.start\" = \"6s\"\n"
    })
    .await;
    let attempt = async |(name, _, words): (&'static str, &'static str, &'static str)| {
        let mut cri = bed.cri.clone();
        let request = RunPodSandboxRequest { config: Some(cri.pod(name, false, &bed.daemon.logs())), runtime_handler: name.into() };
        let began = Instant::now();
        let fault = cri.runtime.run_pod_sandbox(within(Duration::from_secs(4), request)).await.unwrap_err();
        println!("{name}: after {:?}: {fault}", began.elapsed());
        assert!(fault.message().contains(words), "{name}: {fault}");
    };
    futures::join!(futures::future::join_all(SHIMS.map(|s| Box::pin(attempt(s)))), Box::pin(bed.others_go_on()));
    let left = bed.cri.clone().runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    assert!(left.is_empty(), "{left:?}");
    bed.settle().await;
}

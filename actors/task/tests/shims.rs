//! The task actor over scripted shims: lives, deaths, deafness, adoption.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod bed;

use bed::fake::{Fake, Says};
use bed::{Bed, eventually};
use kernel::{Class, FaultKind};
use messages::task::{Adopted, Delete, ExecSync, Kill, RemoveSandbox, Start, State, StopSandbox, TaskState, UpdateSandbox, Wait};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

fn id(s: &str) -> String {
    s.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_from_start_to_nothing_left() {
    let bed = Bed::new().await;
    let fake = Fake::new(&bed, "p1", Says::Protobuf).await;
    let handle = bed.start_sandbox("p1").await.unwrap();
    assert_eq!((handle.pid, handle.namespaces["ipc"].as_str(), handle.namespaces.len()), (7, "/proc/7/ns/ipc", 1));
    assert_eq!(bed.start_sandbox("p1").await.unwrap_err().class, Class::AlreadyExists);
    let pid = bed.create("c1", "p1").await.unwrap();
    assert!(pid > 0 && fake.state.traced.load(Ordering::SeqCst));
    assert_eq!(bed.create("c1", "p1").await.unwrap_err().class, Class::AlreadyExists);
    assert_eq!(bed.call(Start { id: id("c1") }).await.unwrap(), pid);
    assert!(matches!(bed.call(State { id: id("c1") }).await.unwrap(), Some(TaskState::Running { pid: p }) if p == pid));
    assert!(bed.path("state/io.containerd.runtime.v2.task/k8s.io/c1/bootstrap.json").exists());
    let mut all = bed.call(Adopted).await.unwrap();
    all.sort();
    assert_eq!(all, ["c1", "p1"]);
    bed.call(UpdateSandbox { id: id("p1"), resources: b"{}".to_vec() }).await.unwrap();
    let told = fake.state.resources.lock().take().unwrap();
    assert_eq!((told.type_url.as_str(), told.value.as_slice()), ("io.containerd.cri.v1/UpdatedResources", &b"{}"[..]));
    assert_eq!(bed.call(UpdateSandbox { id: id("other"), resources: vec![] }).await.unwrap_err().class, Class::NotFound);
    fake.exit("c1", 3);
    let exit = bed.call(Wait { id: id("c1") }).await.unwrap();
    assert_eq!((exit.code, exit.witness.as_str()), (3, "wait"));
    assert_eq!(bed.call(Kill { id: id("c1"), exec_id: id(""), signal: 9, all: false }).await.unwrap_err().class, Class::NotFound);
    assert_eq!(bed.call(Wait { id: id("c1") }).await.unwrap().code, 3, "kept until it is deleted");
    assert_eq!(bed.call(Delete { id: id("c1") }).await.unwrap().unwrap().code, 3);
    assert!(bed.call(Delete { id: id("c1") }).await.unwrap().is_none());
    bed.call(StopSandbox { id: id("p1") }).await.unwrap();
    bed.call(RemoveSandbox { id: id("p1") }).await.unwrap();
    bed.call(RemoveSandbox { id: id("p1") }).await.unwrap();
    assert!(!fake.runs());
    assert_eq!(bed.census(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn old_shims_reply_in_json_or_text() {
    let bed = Bed::new().await;
    for (pod, says) in [("json", Says::Json), ("text", Says::Text)] {
        let _fake = Fake::new(&bed, pod, says).await;
        bed.start_sandbox(pod).await.unwrap();
        bed.create(&format!("c-{pod}"), pod).await.unwrap();
        bed.call(RemoveSandbox { id: id(pod) }).await.unwrap();
    }
    assert_eq!(bed.census(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_leaves_nothing() {
    let bed = Bed::new().await;
    let fake = Fake::new(&bed, "p1", Says::Protobuf).await;
    fake.state.refuse.store(true, Ordering::SeqCst);
    let fault = bed.start_sandbox("p1").await.unwrap_err();
    assert!(fault.message.contains("unshare: no memory"), "{fault}");
    assert!(!fake.runs());
    assert_eq!(bed.census(), Vec::<String>::new());
    let missing = messages::task::Runtime { name: id("/no/such/shim"), ..Default::default() };
    let fault =
        bed.call(messages::task::StartSandbox { id: id("p2"), runtime: missing, namespaces: Default::default() }).await.unwrap_err();
    assert_eq!(fault.class, Class::NotFound);
    assert_eq!(bed.census(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_create_leaves_nothing_of_the_container() {
    let bed = Bed::new().await;
    let _fake = Fake::new(&bed, "p1", Says::Protobuf).await;
    bed.start_sandbox("p1").await.unwrap();
    let before = bed.census();
    let fault = bed.create("bad1", "p1").await.unwrap_err();
    assert!(fault.message.contains("Task/Create: mount: no such device"), "{fault}");
    assert_eq!(bed.census(), before);
    assert!(bed.call(State { id: id("bad1") }).await.unwrap().is_none());
    bed.create("good", "p1").await.unwrap();
    bed.call(RemoveSandbox { id: id("p1") }).await.unwrap();
    assert_eq!(bed.census(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_is_witnessed_once() {
    let bed = Bed::new().await;
    let fake = Fake::new(&bed, "p1", Says::Protobuf).await;
    bed.start_sandbox("p1").await.unwrap();
    for c in ["told", "untold"] {
        bed.create(c, "p1").await.unwrap();
        bed.call(Start { id: id(c) }).await.unwrap();
    }
    // One exit comes as an event, as from the shim, and by `Wait` as well; the other by `Wait` alone.
    let event = proto::events::TaskExit { container_id: id("told"), id: id("told"), exit_status: 5, ..Default::default() };
    let publish = messages::events::Publish { namespace: id("k8s.io"), topic: id("/tasks/exit"), payload: proto::any(&event), at: None };
    let op = bed.op();
    bed.system.addr::<messages::events::Events>().call(&op.cx, publish).await.unwrap();
    let exit = bed.call(Wait { id: id("told") }).await.unwrap();
    assert_eq!((exit.code, exit.witness.as_str()), (5, "event"));
    fake.exit("told", 5);
    fake.exit("untold", 6);
    assert_eq!(bed.call(Wait { id: id("untold") }).await.unwrap().code, 6);
    tokio::time::sleep(bed.args.timeouts.exit_grace * 3).await;
    let mut exits = bed.exits();
    exits.sort();
    assert_eq!(exits, [(id("told"), 5), (id("untold"), 6)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_daemon_adopts_and_learns_what_happened_meanwhile() {
    let bed = Bed::new().await;
    let fake = Fake::new(&bed, "p1", Says::Protobuf).await;
    let deaf = Fake::new(&bed, "deaf", Says::Text).await;
    for (c, p) in [("runs", "p1"), ("ends", "p1"), ("far", "deaf")] {
        let _ = bed.start_sandbox(p).await;
        bed.create(c, p).await.unwrap();
        bed.call(Start { id: id(c) }).await.unwrap();
    }
    let bed = bed
        .restart(async || {
            fake.exit("ends", 42);
            deaf.state.deaf.store(true, Ordering::SeqCst);
        })
        .await;
    let exit = bed.call(Wait { id: id("ends") }).await.unwrap();
    assert_eq!(exit.code, 42);
    assert!(matches!(bed.call(State { id: id("runs") }).await.unwrap(), Some(TaskState::Running { .. })));
    assert_ne!(bed.shim_step("deaf"), "up", "the deaf one, which is not adopted yet, delays nobody");
    eventually("the deaf one is shown", || bed.shim_step("deaf").starts_with("deaf")).await;
    eventually("the missed exit is published", || bed.exits() == [(id("ends"), 42)]).await;
    deaf.state.deaf.store(false, Ordering::SeqCst);
    eventually("the deaf one is adopted", || bed.shim_step("deaf") == "up").await;
    deaf.exit("far", 1);
    assert_eq!(bed.call(Wait { id: id("far") }).await.unwrap().code, 1);
    for p in ["p1", "deaf"] {
        bed.call(RemoveSandbox { id: id(p) }).await.unwrap();
    }
    assert_eq!(bed.census(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn actors_that_crash_come_back_to_their_shims() {
    let bed = Bed::new().await;
    let fake = Fake::new(&bed, "p1", Says::Protobuf).await;
    bed.start_sandbox("p1").await.unwrap();
    bed.create("c1", "p1").await.unwrap();
    let waiting = async { bed.call(Wait { id: id("c1") }).await };
    let crashes = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        for actor in ["task.shim", "task"] {
            let rule = serde_json::json!({ "actor": actor, "message": "task.State", "fault": FaultKind::Panic, "nth": 1 });
            let rule = bed.system.chaos().add(serde_json::from_value(rule).unwrap()).unwrap();
            let state = bed.call(State { id: id("c1") }).await.unwrap();
            assert!(matches!(state, Some(TaskState::Created { .. })), "asked again of the next generation of {actor}: {state:?}");
            bed.system.chaos().clear(Some(rule)).unwrap();
        }
        fake.exit("c1", 9);
    };
    let (exit, ()) = tokio::join!(waiting, crashes);
    assert_eq!(exit.unwrap().code, 9, "the wait survived both");
    bed.call(RemoveSandbox { id: id("p1") }).await.unwrap();
    assert_eq!(bed.census(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_cut_off_in_its_creation_is_undone_by_the_next_generation() {
    let bed = Bed::new().await;
    let fake = Fake::new(&bed, "p1", Says::Protobuf).await;
    bed.start_sandbox("p1").await.unwrap();
    bed.create("half", "p1").await.unwrap();
    // As if the daemon had died between the shim's answer and its note of it.
    std::fs::remove_file(bed.path("state/io.containerd.runtime.v2.task/k8s.io/half/created")).unwrap();
    let bed = bed.restart(async || {}).await;
    eventually("undone", || !fake.has("half")).await;
    eventually("bundle gone", || !bed.path("state/io.containerd.runtime.v2.task/k8s.io/half").exists()).await;
    bed.call(RemoveSandbox { id: id("p1") }).await.unwrap();
    assert_eq!(bed.census(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_cut_off_in_its_start_is_removed_by_the_next_daemon() {
    let bed = Bed::new().await;
    let fake = Fake::new(&bed, "p1", Says::Protobuf).await;
    bed.start_sandbox("p1").await.unwrap();
    std::fs::remove_file(bed.path("state/io.containerd.sandbox.controller.v1.shim/k8s.io/p1/started")).unwrap();
    bed.rows.lock().clear();
    let bed = bed.restart(async || {}).await;
    eventually("nothing is left", || bed.census().is_empty()).await;
    assert!(!fake.runs());
}

fn exec(args: &[&str]) -> ExecSync {
    ExecSync { id: id("c1"), process: args.join("\n").into_bytes(), timeout_ms: 0, max_output: 1 << 20 }
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_collects_output_within_its_bounds() {
    let bed = Bed::new().await;
    let _fake = Fake::new(&bed, "p1", Says::Protobuf).await;
    bed.start_sandbox("p1").await.unwrap();
    bed.create("c1", "p1").await.unwrap();
    let r = bed.call(exec(&["sh", "-c", "echo out; echo err >&2; exit 4"])).await.unwrap();
    assert_eq!((r.code, r.stdout.as_slice(), r.stderr.as_slice()), (4, b"out\n".as_slice(), b"err\n".as_slice()));
    let r = bed.call(ExecSync { max_output: 1000, ..exec(&["sh", "-c", "head -c 3000000 /dev/zero"]) }).await.unwrap();
    assert_eq!((r.code, r.stdout.len()), (0, 1000), "the rest passes, and blocks nobody");
    let began = Instant::now();
    let r = bed.call(exec(&["sh", "-c", "echo before; sleep 30 & exit 0"])).await.unwrap();
    assert_eq!((r.code, r.stdout.as_slice()), (0, b"before\n".as_slice()));
    assert!(began.elapsed() < Duration::from_secs(3), "a grandchild holds the pipe: {:?}", began.elapsed());
    let began = Instant::now();
    let fault = bed.call(ExecSync { timeout_ms: 200, ..exec(&["sleep", "30"]) }).await.unwrap_err();
    assert_eq!(fault.class, Class::DeadlineExceeded, "{fault}");
    assert!(began.elapsed() < Duration::from_secs(2));
    assert_eq!(bed::names(&bed.path("state/fifo/p1")), Vec::<String>::new());
    assert_eq!(bed.call(ExecSync { id: id("none"), ..exec(&["true"]) }).await.unwrap_err().class, Class::NotFound);
    bed.call(RemoveSandbox { id: id("p1") }).await.unwrap();
    assert_eq!(bed.census(), Vec::<String>::new());
}

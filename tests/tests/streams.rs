//! Exec, attach, port-forward, ExecSync and logs, as a client meets them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use troupe_tests::census;
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::registry::Registry;
use troupe_tests::socket::Socket;

const V5: &str = "v5.channel.k8s.io";

struct World {
    daemon: Daemon,
    cri: Cri,
    pod: PodSandboxConfig,
    sandbox: String,
    image: String,
    _registry: Registry,
}

impl World {
    async fn new(host_network: bool) -> World {
        let registry = Registry::start().await;
        let image = registry.add_busybox().unwrap();
        let daemon = Daemon::start(&Options::default()).await.unwrap();
        let mut cri = daemon.cri().await.unwrap();
        cri.pull(&image).await.unwrap();
        let pod = cri.pod("streams", host_network, &daemon.logs());
        let sandbox = cri.run_pod(&pod).await.unwrap();
        World { daemon, cri, pod, sandbox, image, _registry: registry }
    }
    async fn run(&mut self, name: &str, script: &str) -> String {
        let config = self.cri.container(name, &self.image, &["sh", "-c", script]);
        self.cri.run(&self.sandbox, &config, &self.pod).await.unwrap()
    }
    fn log(&self, name: &str) -> PathBuf {
        self.daemon.logs().join(format!("{name}.log"))
    }
}

async fn exec(cri: &mut Cri, id: &str, script: &str, stdin: bool, tty: bool) -> Socket {
    let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
    let request = ExecRequest { container_id: id.into(), cmd, tty, stdin, stdout: true, stderr: !tty };
    let url = cri.runtime.exec(request).await.unwrap().into_inner().url;
    Socket::dial(&url, V5).await
}

async fn attach(cri: &mut Cri, id: &str) -> Socket {
    let request = AttachRequest { container_id: id.into(), stdin: false, tty: false, stdout: true, stderr: true };
    let url = cri.runtime.attach(request).await.unwrap().into_inner().url;
    Socket::dial(&url, V5).await
}

/// Waits until something holds.
async fn until(what: &str, seconds: u64, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !holds().await {
        assert!(Instant::now() < end, "after {seconds} s: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn sleepers(cri: &mut Cri, id: &str, seconds: &str) -> i32 {
    let script = format!("ps | grep -c '[s]leep {seconds}' || true");
    let out = cri.exec(id, &["sh", "-c", &script], 10).await.unwrap().stdout;
    String::from_utf8_lossy(&out).trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_get_their_input_and_tell_output_and_exit_code() {
    let mut w = World::new(true).await;
    let id = w.run("c", "sleep 1000").await;
    let before = census::take(&w.daemon);
    let input: Vec<u8> = (0..8u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let out = exec(&mut w.cri, &id, "cat; echo oops >&2; exit 7", true, false).await.copy(input.clone()).await;
    assert_eq!((out.stdout.len(), &out.stderr[..], out.code()), (input.len(), &b"oops\n"[..], 7));
    assert!(out.stdout == input, "what came back is what was sent");

    let mut tty = exec(&mut w.cri, &id, "stty size; tty -s && echo terminal; read line; echo got $line; exit 3", true, true).await;
    tty.send(4, br#"{"Width":123,"Height":41}"#).await;
    tty.until(1, "terminal").await;
    tty.send(0, b"hello\n").await;
    tty.until(1, "got hello").await;
    assert_eq!(tty.finish().await.code(), 3);

    let many = (0..30).map(|n| {
        let (mut cri, id) = (w.cri.clone(), id.clone());
        tokio::spawn(async move {
            let out = exec(&mut cri, &id, &format!("echo out{n}; exit {}", n % 5), false, false).await.finish().await;
            assert_eq!((String::from_utf8(out.stdout.clone()).unwrap(), out.code()), (format!("out{n}\n"), n % 5), "{out:?}");
        })
    });
    for one in many.collect::<Vec<_>>() {
        one.await.unwrap();
    }
    // A child in the background holds the command's end up for a moment only, and lives.
    let began = Instant::now();
    let out = exec(&mut w.cri, &id, "sleep 19 & echo started", false, false).await.finish().await;
    assert_eq!((&out.stdout[..], out.code()), (&b"started\n"[..], 0));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(sleepers(&mut w.cri, &id, "19").await, 1);
    until("nothing of an exec is left", 40, async || census::take(&w.daemon) == before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_vanishes_takes_its_command_with_it() {
    let mut w = World::new(true).await;
    let id = w.run("c", "sleep 1000").await;
    let before = census::take(&w.daemon);
    let fds = || std::fs::read_dir(format!("/proc/{}/fd", w.daemon.pid())).unwrap().count();
    let open = fds();
    let mut tty = exec(&mut w.cri, &id, "sleep 772 & sleep 772", true, true).await;
    tty.send(0, b"x").await;
    let plain = exec(&mut w.cri, &id, "sleep 773 & sleep 773", false, false).await;
    // Its input is never read, so the connection's end stands behind what nobody takes.
    let mut full = exec(&mut w.cri, &id, "sleep 774", true, false).await;
    let stuffing = async {
        loop {
            full.send(0, &[b'x'; 32 << 10]).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(2), stuffing).await;
    assert_eq!([sleepers(&mut w.cri, &id, "772").await, sleepers(&mut w.cri, &id, "773").await], [2, 2]);
    let ops = w.daemon.cli(&["ops"]).unwrap();
    assert_eq!(ops.matches("stream/exec").count(), 3, "sessions are operations: {ops}");
    drop((tty, plain, full));
    until("commands of clients that are gone run on", 60, async || {
        sleepers(&mut w.cri, &id, "77").await == 0 && census::take(&w.daemon) == before
    })
    .await;
    until("descriptors are left", 20, async || fds() <= open + 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_client_that_takes_nothing_holds_nobody_up() {
    let mut w = World::new(true).await;
    // More than the buffers of a connection take.
    let words = "which is as long as lines are, and longer, ".repeat(5);
    let script = format!("sleep 2; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo line $i of many, {words}; done");
    let id = w.run("talker", &script).await;
    let stuck = attach(&mut w.cri, &id).await;
    let lively = attach(&mut w.cri, &id).await;
    let reading = tokio::spawn(lively.finish());
    let ended = w.cri.wait_exit(&id, 120).await.unwrap();
    // Its end is told once everything it said is in the log.
    let log = std::fs::read_to_string(w.log("talker")).unwrap();
    assert_eq!((ended.exit_code, log.lines().count()), (0, 100_000));
    assert!(log.lines().all(|l| l.contains(" stdout F line ")), "every line is whole");
    let out = reading.await.unwrap();
    assert_eq!(out.stdout.iter().filter(|b| **b == b'\n').count(), 100_000, "who reads misses nothing");
    let told = stuck.finish().await;
    assert!(told.status["message"].as_str().unwrap().contains("cut off"), "{:?}", told.status);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_attach_again_after_the_daemon_was_killed() {
    let mut w = World::new(true).await;
    let id = w.run("c", "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.1; done").await;
    let mut first = attach(&mut w.cri, &id).await;
    first.until(1, "tick").await;
    let running = exec(&mut w.cri, &id, "sleep 775", false, false).await;
    until("the command runs", 10, async || sleepers(&mut w.cri, &id, "775").await == 1).await;
    w.daemon.kill();
    w.daemon.spawn().await.unwrap();
    w.cri = w.daemon.cri().await.unwrap();
    drop((first, running));
    let mut second = attach(&mut w.cri, &id).await;
    second.until(1, "tick").await;
    until("a command of the killed daemon runs on", 30, async || sleepers(&mut w.cri, &id, "775").await == 0).await;
    drop(second);
    until("FIFOs are left", 20, async || census::take(&w.daemon).fifos.iter().all(|f| !f.contains("/fifo/"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_sync_ends_what_it_began_and_its_answer_always_fits() {
    let mut w = World::new(true).await;
    let id = w.run("c", "sleep 1000").await;
    let late = w.cri.exec(&id, &["sh", "-c", "sleep 776 & (sleep 776; true) & sleep 776"], 1).await.unwrap_err();
    let status = late.downcast_ref::<tonic::Status>().unwrap();
    assert!(status.code() == tonic::Code::DeadlineExceeded && status.message().contains("timeout 1s exceeded"), "{status}");
    assert_eq!(sleepers(&mut w.cri, &id, "776").await, 0, "its whole family is killed");

    let (mut cri, container) = (w.cri.clone(), id.clone());
    let call = tokio::spawn(async move { cri.exec(&container, &["sh", "-c", "sleep 777 & sleep 777"], 0).await });
    until("it runs", 10, async || sleepers(&mut w.cri, &id, "777").await == 2).await;
    call.abort();
    until("the command of a caller that is gone runs on", 10, async || sleepers(&mut w.cri, &id, "777").await == 0).await;

    let began = Instant::now();
    let said = w.cri.exec(&id, &["sh", "-c", "sleep 778 & echo started"], 60).await.unwrap();
    assert_eq!((said.exit_code, &said.stdout[..]), (0, &b"started\n"[..]));
    assert!(began.elapsed() < Duration::from_secs(10), "a child in the background: {:?}", began.elapsed());

    let mut kubelet = w.cri.clone();
    kubelet.runtime = kubelet.runtime.max_decoding_message_size(16 << 20);
    let big =
        kubelet.exec(&id, &["sh", "-c", "head -c 30000000 /dev/zero & head -c 30000000 /dev/zero >&2; wait; exit 5"], 60).await.unwrap();
    assert_eq!(big.exit_code, 5);
    assert!(big.stdout.len() >= 7 << 20 && big.stderr.len() >= 7 << 20, "{} {}", big.stdout.len(), big.stderr.len());

    w.cri.stop(&id, 0).await.unwrap();
    let ended = w.cri.exec(&id, &["true"], 5).await.unwrap_err();
    assert_eq!(ended.downcast_ref::<tonic::Status>().unwrap().code(), tonic::Code::FailedPrecondition);
    let unknown = w.cri.exec("nobody", &["true"], 5).await.unwrap_err();
    assert_eq!(unknown.downcast_ref::<tonic::Status>().unwrap().code(), tonic::Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_forwarded_over_both_address_families() {
    let mut w = World::new(false).await;
    let serve = "mkdir /w; echo four > /w/four; httpd -p 127.0.0.1:8080 -h /w; echo six > /w/six; httpd -p [::1]:8081 -h /w; sleep 1000";
    let id = w.run("web", serve).await;
    until("it listens", 10, async || {
        let out = w.cri.exec(&id, &["netstat", "-ltn"], 5).await.unwrap().stdout;
        String::from_utf8_lossy(&out).matches("LISTEN").count() >= 2
    })
    .await;
    let request = PortForwardRequest { pod_sandbox_id: w.sandbox.clone(), port: vec![8080, 8081, 9999] };
    let url = w.cri.runtime.port_forward(request).await.unwrap().into_inner().url;
    let mut socket = Socket::dial(&url, "v4.channel.k8s.io").await;
    socket.send(0, b"GET /four HTTP/1.0\r\n\r\n").await;
    socket.send(2, b"GET /six HTTP/1.0\r\n\r\n").await;
    let mut got = [const { String::new() }; 6];
    while !(got[0].contains("four") && got[2].contains("six") && got[5].contains("failed to connect")) {
        let (channel, bytes) = socket.next().await.unwrap_or_else(|| panic!("it ended: {got:?}"));
        got[usize::from(channel)].push_str(&String::from_utf8_lossy(&bytes));
    }
    assert!(got[0].contains("200 OK") && got[2].contains("200 OK"), "{got:?}");
}

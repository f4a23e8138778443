#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use kernel::testing;
use messages::network::PodNetwork;
use messages::store::{self, Op};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

/// A store in memory.
#[derive(Clone, Default)]
struct Rows(std::sync::Arc<std::sync::Mutex<std::collections::BTreeMap<String, Vec<u8>>>>);
struct MemoryStore(Rows);
impl Actor for MemoryStore {
    type Proto = Store;
    type Args = Rows;
    async fn start(rows: Rows, _: Cx) -> Result<Self> {
        Ok(MemoryStore(rows))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<store::Get>().on::<store::Scan>().on::<store::Commit>()
    }
}
impl Handle<store::Get> for MemoryStore {
    fn handle(&mut self, m: store::Get, _: Cx) -> Reply<Option<Vec<u8>>> {
        Reply::ok(self.0.0.lock().unwrap().get(&m.key).cloned())
    }
}
impl Handle<store::Scan> for MemoryStore {
    fn handle(&mut self, _: store::Scan, _: Cx) -> Reply<Vec<(String, Vec<u8>)>> {
        Reply::ok(self.0.0.lock().unwrap().clone().into_iter().collect())
    }
}
impl Handle<store::Commit> for MemoryStore {
    fn handle(&mut self, m: store::Commit, _: Cx) -> Reply<()> {
        for op in m.ops {
            match op {
                Op::Put { key, value, .. } | Op::Insert { key, value, .. } => self.0.0.lock().unwrap().insert(key, value),
                Op::Delete { key, .. } => self.0.0.lock().unwrap().remove(&key),
            };
        }
        Reply::ok(())
    }
}

struct World {
    dir: tempfile::TempDir,
    rows: Rows,
    system: kernel::System,
    network: Addr<Network>,
    marker: std::cell::Cell<u32>,
}

async fn boot(dir: &Path, rows: &Rows, registry: &prometheus::Registry, change: impl FnOnce(&mut Args)) -> (kernel::System, Addr<Network>) {
    let system = testing::system(&[testing::spec("store", 0), testing::spec("network", 10)]).unwrap();
    let store = system.start::<MemoryStore>(rows.clone()).await.unwrap();
    let mut args = Args {
        bin_dirs: vec![dir.join("bin"), "/usr/lib/cni".into()],
        conf: BTreeMap::from([(String::new(), (dir.join("conf"), 0)), ("vm".to_owned(), (dir.join("vm/conf"), 1))]),
        serially: false,
        template: Some(dir.join("template")),
        netns_dir: dir.join("netns"),
        cache_dir: dir.join("cache"),
        ip_pref: String::new(),
        plugin_timeout: Duration::from_millis(1500),
        retry_after: Duration::from_millis(100),
        meter: Meter::new(registry).unwrap(),
        store,
    };
    change(&mut args);
    let network = system.start::<NetworkActor>(args).await.unwrap();
    (system, network)
}

async fn world_with(change: impl FnOnce(&mut Args)) -> World {
    let (dir, rows, registry) = (tempfile::tempdir().unwrap(), Rows::default(), prometheus::Registry::new());
    let (system, network) = boot(dir.path(), &rows, &registry, change).await;
    World { dir, rows, system, network, marker: Default::default() }
}

async fn world() -> World {
    world_with(|_| {}).await
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

impl World {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// A plugin; what it reads is in `$input`, and is added to the file `<name>.log` with verb, interface, namespace and arguments.
    fn plugin(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        let log = self.path(&format!("{name}.log"));
        let head = format!(
            "input=$(cat)\nprintf '%s\\n' \"$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME netns=$CNI_NETNS args=$CNI_ARGS trace=$TRACEPARENT $input\" >> {}",
            log.display()
        );
        // Never open for writing while another test's plugin is started: `ETXTBSY`.
        let draft = self.path(&format!("{name}.draft"));
        write(
            &draft,
            &format!(
                "#!/bin/sh\n{head}\n[ $CNI_COMMAND = VERSION ] && echo '{{\"supportedVersions\": [\"1.0.0\"]}}' && exit 0\n{script}\n"
            ),
        );
        std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::rename(&draft, &path).unwrap();
    }
    /// Lines of a plugin's log that begin with `verb`.
    fn said(&self, name: &str, verb: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
        text.lines().filter(|l| l.starts_with(&format!("{verb} "))).map(str::to_owned).collect()
    }
    async fn chain(&self, plugins: serde_json::Value) {
        self.list("1.conflist", "t", "1.0.0", plugins).await;
    }
    /// Writes a list and waits until it is loaded.
    async fn list(&self, file: &str, name: &str, version: &str, mut plugins: serde_json::Value) {
        self.marker.set(self.marker.get() + 1);
        let marker = format!("marker-{}-", self.marker.get());
        plugins[0]["marker"] = marker.clone().into();
        let list = serde_json::json!({"cniVersion": version, "name": name, "plugins": plugins});
        write(&self.path("conf").join(file), &list.to_string());
        self.until("the configuration is loaded", |s| s.info["cniconfig"].contains(&marker)).await;
    }
    async fn until(&self, what: &str, holds: impl Fn(&NetworkStatus) -> bool) -> NetworkStatus {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let status = self.status().await;
            if holds(&status) {
                return status;
            }
            assert!(Instant::now() < end, "{what}: {status:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    async fn status(&self) -> NetworkStatus {
        let op = self.system.root("test", None, Some(Duration::from_secs(5)));
        let began = Instant::now();
        let status = self.network.call(&op.cx, Status).await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(500), "Status waits for nothing");
        status
    }
    /// Nothing is left; what is given back in the background has ten seconds.
    async fn clean(&self) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let count = |dir: &str| std::fs::read_dir(self.path(dir)).map_or(0, Iterator::count);
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            let left = (
                self.rows.0.lock().unwrap().len(),
                count("netns"),
                count("cache/results"),
                mounts.matches(&*self.dir.path().to_string_lossy()).count(),
            );
            if left == (0, 0, 0, 0) {
                return;
            }
            assert!(Instant::now() < end, "rows, namespaces, cached results and mounts are left: {left:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    async fn attach_pod(&self, pod: PodNetwork) -> Result<Attachment> {
        let op = self.system.root("test", None, Some(Duration::from_secs(20)));
        self.network.call(&op.cx, Prepare(pod.clone())).await?;
        self.network.call(&op.cx, Attach(pod)).await
    }
    async fn attach(&self, id: &str) -> Result<Attachment> {
        self.attach_pod(pod(id)).await
    }
    async fn detach(&self, id: &str) -> Result<()> {
        let op = self.system.root("test", None, None);
        self.network.call(&op.cx, Detach { id: id.into(), pod: None }).await
    }
}

fn pod(id: &str) -> PodNetwork {
    PodNetwork { id: id.into(), name: format!("pod-{id}"), namespace: "ns".into(), uid: "u".into(), ..Default::default() }
}

/// Answers an address; DEL is fine.
const FINE: &str = r#"[ $CNI_COMMAND = ADD ] && echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "x"}], "ips": [{"address": "10.1.2.3/24", "interface": 0}]}'; exit 0"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_real_bridge_plugin_gives_both_families_and_takes_them_back() {
    let world = world().await;
    let bridge = format!("trpn{}", std::process::id() % 100_000);
    let data = world.path("ipam");
    let ranges = serde_json::json!([[{"subnet": "10.189.3.0/24"}], [{"subnet": "fd00:189::/64"}]]);
    world
        .chain(serde_json::json!([{"type": "bridge", "bridge": bridge, "ipam": {"type": "host-local", "dataDir": data, "ranges": ranges}}]))
        .await;
    let began = Instant::now();
    let attached = world.attach("a").await;
    println!("attached in {:?}", began.elapsed());
    let again = world.attach_again("a").await;
    let cached = std::fs::read_to_string(world.path("cache/results/t-a-eth0")).unwrap_or_default();
    let checked = {
        let op = world.system.root("test", None, None);
        world.network.call(&op.cx, Check { id: "a".into() }).await
    };
    let detached = world.detach("a").await;
    let twice = world.detach("a").await;
    let _ = std::process::Command::new("ip").args(["link", "del", &bridge]).status();
    let attached = attached.unwrap();
    assert!(
        attached.ips.len() == 2 && attached.ips[0].starts_with("10.189.3.") && attached.ips[1].starts_with("fd00:189::"),
        "{attached:?}"
    );
    assert_eq!(attached.result["Interfaces"]["eth0"]["IPConfigs"].as_array().unwrap().len(), 2, "{}", attached.result);
    assert_eq!(again.unwrap().ips, attached.ips);
    let cached: serde_json::Value = serde_json::from_str(&cached).unwrap();
    assert_eq!((cached["kind"].as_str(), cached["containerId"].as_str()), (Some("cniCacheV1"), Some("a")));
    assert!(cached["result"]["ips"].is_array() && cached["config"].is_string());
    checked.unwrap();
    detached.unwrap();
    twice.unwrap();
    let files = std::fs::read_dir(data.join("t")).unwrap().flatten().map(|e| e.file_name().into_string().unwrap());
    let addresses: Vec<String> = files.filter(|f| f.starts_with("10.") || f.starts_with("fd00")).collect();
    assert_eq!(addresses, Vec::<String>::new());
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_that_hang_crash_or_lie_are_explained_and_undone() {
    let world = world().await;
    let noise = "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo the end >&2";
    for (kind, script, texts) in [
        ("hang", "[ $CNI_COMMAND = DEL ] && exit 0; echo thinking >&2; sleep 100", &["did not end", "killed", "thinking"][..]),
        (
            "crash",
            r#"[ $CNI_COMMAND = DEL ] && exit 0; echo why >&2; echo '{"code": 11, "msg": "no more ports", "details": "ask"}'; exit 1"#,
            &["no more ports; ask", "why", "failed (add)"],
        ),
        ("mute", "[ $CNI_COMMAND = DEL ] && exit 0; exit 3", &["exit status: 3"]),
        ("killed", "[ $CNI_COMMAND = DEL ] && exit 0; kill -9 $$", &["signal: 9"]),
        ("loud", &format!("[ $CNI_COMMAND = DEL ] && exit 0; {noise}; exit 1"), &["the end"]),
        ("lie", "[ $CNI_COMMAND = DEL ] && exit 0; echo hello", &["not a JSON object", "hello"]),
        ("nobody", r#"echo '{"cniVersion": "1.0.0"}'"#, &["failed to find network info for sandbox"]),
        (
            "elsewhere",
            r#"echo '{"interfaces": [{"name": "net0"}], "ips": [{"address": "10.0.0.1/8", "interface": 0}]}'"#,
            &["failed to find network info"],
        ),
        ("absent", "", &["no CNI plugin \"absent\""]),
    ] {
        if kind != "absent" {
            world.plugin(kind, script);
        }
        world.chain(serde_json::json!([{ "type": kind }])).await;
        let fault = world.attach(kind).await.unwrap_err();
        assert!(texts.iter().all(|t| fault.message.contains(t)) && fault.message.len() < 6000, "{kind}: {fault}");
        world.detach(kind).await.unwrap();
        world.clean().await;
    }
}

impl World {
    /// Without making a namespace anew.
    async fn attach_again(&self, id: &str) -> Result<Attachment> {
        let op = self.system.root("test", None, Some(Duration::from_secs(20)));
        self.network.call(&op.cx, Attach(pod(id))).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_under_way_is_ended_with_its_children_when_the_pod_is_given_up() {
    let world = world_with(|a| a.plugin_timeout = Duration::from_secs(60)).await;
    let pids = world.path("pids");
    world.plugin("stuck", &format!("[ $CNI_COMMAND = DEL ] && exit 0; sleep 1000 & echo $! $$ > {}; wait", pids.display()));
    world.chain(serde_json::json!([{"type": "stuck"}])).await;
    let (attached, ()) = tokio::join!(world.attach("a"), async {
        while !std::fs::read_to_string(&pids).is_ok_and(|t| t.ends_with('\n')) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let began = Instant::now();
        world.detach("a").await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    });
    assert!(attached.unwrap_err().message.contains("not wanted any more"));
    for pid in std::fs::read_to_string(&pids).unwrap().split_whitespace() {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "{state}");
    }
    assert_eq!(world.said("stuck", "DEL").len(), 1);
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_plugin_delays_no_other_pod() {
    let world = world_with(|a| a.plugin_timeout = Duration::from_secs(4)).await;
    world.plugin("slow", &format!("[ $CNI_CONTAINERID = stuck ] && sleep 100; {FINE}"));
    world.chain(serde_json::json!([{"type": "slow"}])).await;
    let (stuck, others) = tokio::join!(world.attach("stuck"), async {
        let began = Instant::now();
        let names: Vec<String> = (0..20).map(|n| format!("p{n}")).collect();
        let all = futures::future::join_all(names.iter().map(|n| world.attach(n))).await;
        (all, began.elapsed())
    });
    assert!(stuck.unwrap_err().message.contains("did not end"));
    assert!(others.0.iter().all(Result::is_ok) && others.1 < Duration::from_secs(4), "{others:?}");
    for n in 0..20 {
        world.detach(&format!("p{n}")).await.unwrap();
    }
    // DEL hangs as well: the pod never had an address, so it may go while that is tried again.
    world.detach("stuck").await.unwrap();
    assert_eq!(world.rows.0.lock().unwrap().len(), 1);
    world.plugin("slow", FINE);
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn del_is_repeated_until_it_is_acknowledged_also_by_the_next_start() {
    let world = world().await;
    let count = world.path("count");
    let fails = format!(
        "if [ $CNI_COMMAND = DEL ]; then echo x >> {0}; [ $(wc -l < {0}) -gt 5 ] || {{ echo not yet >&2; exit 1; }}; fi",
        count.display()
    );
    world.plugin("late", &format!("{fails}; {FINE}"));
    world.chain(serde_json::json!([{"type": "late"}])).await;
    world.attach("a").await.unwrap();
    let fault = world.detach("a").await.unwrap_err();
    assert!(fault.message.contains("not yet") && fault.message.contains("not given back yet"), "{fault}");
    // By itself, or by whoever asks; then by another start of the daemon, whatever the directory says by then.
    while std::fs::read_to_string(&count).unwrap().lines().count() < 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    world.system.shutdown(Duration::from_secs(2)).await;
    std::fs::remove_file(world.path("conf/1.conflist")).unwrap();
    let (_system, network) = boot(world.dir.path(), &world.rows, &prometheus::Registry::new(), |_| {}).await;
    world.clean().await;
    assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 6, "five failures and a success");
    let dels = world.said("late", "DEL");
    assert!(dels.iter().all(|d| d.contains("prevResult") && d.contains("10.1.2.3")), "DEL gets the result: {dels:?}");
    drop(network);
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_get_what_the_specification_says() {
    let world = world().await;
    world.plugin("first", FINE);
    world.plugin(
        "second",
        r#"[ $CNI_COMMAND = ADD ] && printf '%s' "$input" | sed 's/.*"prevResult":\({.*}\),"runtimeConfig".*/\1/'; exit 0"#,
    );
    let second = serde_json::json!({"type": "second", "capabilities": {"portMappings": true, "io.kubernetes.cri.pod-annotations": true, "ips": true}});
    world.chain(serde_json::json!([{"type": "first"}, second])).await;
    let port = messages::network::PortMapping { host_port: 8080, container_port: 80, protocol: "udp".into(), host_ip: "127.0.0.1".into() };
    let wish = PodNetwork { ports: vec![port], annotations: BTreeMap::from([("k".into(), "v".into())]), ..pod("a") };
    let attached = world.attach_pod(wish).await.unwrap();
    assert_eq!(attached.ips, ["10.1.2.3"]);
    let (first, second) = (world.said("first", "ADD").remove(0), world.said("second", "ADD").remove(0));
    assert!(
        first.contains("IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod-a;K8S_POD_INFRA_CONTAINER_ID=a;K8S_POD_UID=u"),
        "{first}"
    );
    assert!(first.contains("trace=00-") && first.contains(&format!("netns={}", attached.netns)) && first.contains(" eth0 "), "{first}");
    assert!(!first.contains("runtimeConfig") && !first.contains("prevResult"), "{first}");
    for text in
        ["\"hostPort\":8080", "\"protocol\":\"udp\"", "\"hostIP\":\"127.0.0.1\"", "{\"k\":\"v\"}", "prevResult", "\"cniVersion\":\"1.0.0\""]
    {
        assert!(second.contains(text), "{text}: {second}");
    }
    // The namespace is taken away by somebody: plugins are told so.
    netns::remove(Path::new(&attached.netns)).unwrap();
    world.detach("a").await.unwrap();
    let order: Vec<String> = [world.said("second", "DEL"), world.said("first", "DEL")].concat();
    assert!(order.len() == 2 && order.iter().all(|d| d.contains("netns= ")), "{order:?}");
    world.clean().await;
    let bad = PodNetwork { annotations: BTreeMap::from([("kubernetes.io/ingress-bandwidth".into(), "9E".into())]), ..pod("b") };
    let fault = world.attach_pod(bad).await.unwrap_err();
    assert_eq!(fault.class, kernel::Class::InvalidArgument);
    world.detach("b").await.unwrap();
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_networks_make_several_interfaces_and_one_that_fails_undoes_the_others() {
    let world = world().await;
    let answers = |ip: &str| format!(r#"[ $CNI_COMMAND = ADD ] && sleep 0.3 && echo '{{"ips": [{{"address": "{ip}"}}]}}'; exit 0"#);
    world.plugin("one", &answers("10.0.0.1/8"));
    world.plugin("two", &answers("10.0.0.2/8"));
    world.list("1.conflist", "a", "1.0.0", serde_json::json!([{"type": "one"}])).await;
    world.list("2.conflist", "b", "0.3.1", serde_json::json!([{"type": "two"}])).await;
    let began = Instant::now();
    let attached = world.attach("p").await.unwrap();
    println!("two networks in {:?}", began.elapsed());
    assert_eq!(attached.ips, ["10.0.0.1"], "the second network's address is eth1's");
    assert!(world.said("one", "ADD")[0].contains(" eth0 ") && world.said("two", "ADD")[0].contains(" eth1 "));
    world.detach("p").await.unwrap();
    assert!(!world.said("two", "DEL")[0].contains("prevResult"), "before 0.4.0 DEL has no result");
    world.clean().await;
    world.plugin("two", "[ $CNI_COMMAND = DEL ] && exit 0; exit 1");
    world.attach("q").await.unwrap_err();
    world.detach("q").await.unwrap();
    assert_eq!(world.said("one", "DEL").len(), 2);
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_come_and_go_are_noticed() {
    let world = world().await;
    world.plugin("fine", FINE);
    let not_ready = world.status().await;
    assert!(!not_ready.ready && not_ready.reason == "NetworkPluginNotReady" && not_ready.message.contains("cni plugin not initialized"));
    assert!(world.attach("early").await.unwrap_err().message.contains("cni plugin not initialized"));
    world.detach("early").await.unwrap();
    let list = r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "fine"}]}"#;
    write(&world.path("elsewhere"), list);
    std::fs::rename(world.path("elsewhere"), world.path("conf/10.conflist")).unwrap();
    world.until("moved in", |s| s.ready).await;
    write(&world.path("conf/00.conflist"), "{");
    let broken = world.until("broken", |s| !s.ready).await;
    assert!(broken.message.contains("00.conflist") && broken.info["lastCNILoadStatus"].contains("00.conflist"), "{broken:?}");
    std::fs::remove_file(world.path("conf/00.conflist")).unwrap();
    world.until("mended", |s| s.ready).await;
    std::fs::remove_dir_all(world.path("conf")).unwrap();
    world.until("the directory is gone", |s| !s.ready).await;
    std::fs::create_dir_all(world.path("conf")).unwrap();
    write(&world.path("conf/10.conflist"), list);
    world.until("the directory is back", |s| s.ready).await;
    // A handler with a directory of its own.
    assert!(world.status().await.info["lastCNILoadStatus.vm"].contains("vm/conf"));
    write(&world.path("vm/conf/1.conf"), r#"{"cniVersion": "1.0.0", "name": "v", "type": "fine"}"#);
    world.until("the handler's", |s| s.info["lastCNILoadStatus.vm"] == "OK").await;
    world.attach_pod(PodNetwork { handler: "vm".into(), ..pod("v") }).await.unwrap();
    world.detach("v").await.unwrap();
    assert!(world.said("fine", "DEL")[0].contains("\"name\":\"v\""));
    world.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn from_1_1_on_status_is_asked_and_garbage_is_named() {
    let world = world().await;
    let ill = world.path("ill");
    world.plugin("new", &format!(r#"[ $CNI_COMMAND = STATUS ] && [ -e {} ] && {{ echo '{{"code": 50, "msg": "no BGP yet"}}'; exit 1; }}; [ $CNI_COMMAND = STATUS ] && exit 0; {FINE}"#, ill.display()));
    write(&ill, "");
    world.list("1.conflist", "n", "1.1.0", serde_json::json!([{"type": "new"}])).await;
    let status = world.until("STATUS is told", |s| s.message.contains("no BGP yet")).await;
    assert!(!status.ready);
    std::fs::remove_file(&ill).unwrap();
    world.until("STATUS is asked again", |s| s.ready).await;
    world.attach("kept").await.unwrap();
    // Another runtime's pod on the same network.
    write(
        &world.path("cache/results/n-foreign-eth0"),
        r#"{"kind": "cniCacheV1", "containerId": "foreign", "ifName": "eth0", "networkName": "n"}"#,
    );
    world.system.shutdown(Duration::from_secs(2)).await;
    let (_system, _network) = boot(world.dir.path(), &world.rows, &prometheus::Registry::new(), |_| {}).await;
    let end = Instant::now() + Duration::from_secs(10);
    while world.said("new", "GC").is_empty() {
        assert!(Instant::now() < end, "GC is run after a start");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let gc = world.said("new", "GC").pop().unwrap();
    for valid in [r#"{"containerID":"foreign","ifname":"eth0"}"#, r#"{"containerID":"kept","ifname":"eth0"}"#] {
        assert!(gc.contains("cni.dev/valid-attachments") && gc.contains(valid), "{gc}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_is_rendered_once_and_overwrites_nothing() {
    let world = world().await;
    let configure = async |cidr: &str| {
        let op = world.system.root("test", None, None);
        world.network.call(&op.cx, Configure { pod_cidr: cidr.into() }).await
    };
    write(
        &world.path("template"),
        r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "ptp", "ranges": [{{range $i, $r := .PodCIDRRanges}}{{if $i}},{{end}}"{{$r}}"{{end}}]}]}"#,
    );
    assert!(configure("10.5.0.0/16,nonsense").await.is_err());
    configure("10.5.0.0/16,fd05::/64").await.unwrap();
    let path = world.path("conf/10-containerd-net.conflist");
    assert!(std::fs::read_to_string(&path).unwrap().contains(r#""ranges": ["10.5.0.0/16","fd05::/64"]"#));
    assert!(world.status().await.ready);
    configure("10.6.0.0/16").await.unwrap();
    assert!(std::fs::read_to_string(&path).unwrap().contains("10.5.0.0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_before_its_record_is_given_back_by_whoever_knows_the_pod() {
    let world = world().await;
    world.plugin("fine", FINE);
    world.chain(serde_json::json!([{"type": "fine"}])).await;
    let op = world.system.root("test", None, None);
    world.network.call(&op.cx, Prepare(pod("a"))).await.unwrap();
    world.network.call(&op.cx, Detach { id: "a".into(), pod: Some(Box::new(pod("a"))) }).await.unwrap();
    assert_eq!(world.said("fine", "DEL").len(), 1);
    world.clean().await;
}

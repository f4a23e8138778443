#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use kernel::testing;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

/// A store in memory.
#[derive(Clone, Default)]
struct Rows(Arc<std::sync::Mutex<std::collections::BTreeMap<String, Vec<u8>>>>);
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
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let rows = Rows::default();
    let system = testing::system(&[testing::spec("store", 0), testing::spec("network", 10)]).unwrap();
    let store = system.start::<MemoryStore>(rows.clone()).await.unwrap();
    let args = Args {
        bin_dirs: vec![dir.path().join("bin"), "/usr/lib/cni".into()],
        conf_dir: dir.path().join("conf"),
        max_conf_num: 1,
        netns_dir: dir.path().join("netns"),
        ip_pref: String::new(),
        plugin_timeout: Duration::from_millis(700),
        store,
    };
    let network = system.start::<NetworkActor>(args).await.unwrap();
    World { dir, rows, system, network }
}

impl World {
    fn plugin(&self, name: &str, script: &str) {
        let path = self.dir.path().join("bin").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\ncat >/dev/null\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    fn chain(&self, plugins: serde_json::Value) {
        let path = self.dir.path().join("conf");
        std::fs::create_dir_all(&path).unwrap();
        let list = serde_json::json!({"cniVersion": "1.0.0", "name": "t", "plugins": plugins});
        std::fs::write(path.join("1.conflist"), list.to_string()).unwrap();
    }
    fn clean(&self) {
        assert!(self.rows.0.lock().unwrap().is_empty(), "no row is left");
        assert_eq!(std::fs::read_dir(self.dir.path().join("netns")).map_or(0, Iterator::count), 0, "no namespace is left");
        assert!(
            !Path::new("/proc/self/mountinfo").exists()
                || !std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&*self.dir.path().to_string_lossy())
        );
    }
    async fn attach(&self, id: &str) -> Result<Attachment> {
        let op = self.system.root("test", None, Some(Duration::from_secs(20)));
        self.network.call(&op.cx, Attach(PodNetwork { id: id.into(), name: id.into(), ..Default::default() })).await
    }
    async fn detach(&self, id: &str) -> Result<()> {
        let op = self.system.root("test", None, None);
        self.network.call(&op.cx, Detach { id: id.into() }).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_bridge_plugin_gives_an_address_and_takes_it_back() {
    let world = world().await;
    let bridge = format!("trpn{}", std::process::id() % 100_000);
    let data = world.dir.path().join("ipam");
    world.chain(serde_json::json!([{"type": "bridge", "bridge": bridge, "ipam": {"type": "host-local", "dataDir": data, "ranges": [[{"subnet": "10.189.3.0/24"}]]}}]));
    let began = Instant::now();
    let attached = world.attach("a").await;
    println!("attached in {:?}", began.elapsed());
    let again = world.attach("a").await;
    let detached = world.detach("a").await;
    let twice = world.detach("a").await;
    let _ = std::process::Command::new("ip").args(["link", "del", &bridge]).status();
    let attached = attached.unwrap();
    assert!(attached.ips[0].starts_with("10.189.3."), "{attached:?}");
    assert_eq!(again.unwrap().ips, attached.ips);
    detached.unwrap();
    twice.unwrap();
    let addresses =
        std::fs::read_dir(data.join("t")).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().starts_with("10.")).count();
    assert_eq!(addresses, 0);
    world.clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_that_hang_crash_or_lie_are_explained_and_undone() {
    let world = world().await;
    world.plugin("hang", "[ $CNI_COMMAND = DEL ] && exit 0; sleep 100");
    world.plugin("crash", "[ $CNI_COMMAND = DEL ] && exit 0; echo '{\"code\": 11, \"msg\": \"no more ports\"}'; exit 1");
    world.plugin("lie", "[ $CNI_COMMAND = DEL ] && exit 0; echo hello");
    world.plugin("nobody", "echo '{\"cniVersion\": \"1.0.0\"}'");
    for (kind, text) in
        [("hang", "did not end"), ("crash", "no more ports"), ("lie", "not JSON"), ("nobody", "no address"), ("absent", "no plugin")]
    {
        world.chain(serde_json::json!([{ "type": kind }]));
        let fault = world.attach(kind).await.unwrap_err();
        assert!(fault.message.contains(text), "{kind}: {fault}");
        if kind == "absent" {
            // DEL cannot be acknowledged without the plugin: the row stays until it can.
            world.plugin("absent", "exit 0");
            world.detach("absent").await.unwrap();
        }
        world.clean();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_plugin_delays_no_other_pod_and_del_is_repeated_until_acknowledged() {
    let world = world().await;
    let flag = world.dir.path().join("flag");
    world.plugin("slow", &format!("[ $CNI_COMMAND = DEL ] && {{ [ -e {} ]; exit $?; }}; [ $CNI_CONTAINERID = stuck ] && sleep 100; echo '{{\"cniVersion\": \"1.0.0\", \"ips\": [{{\"address\": \"fd00::2/64\"}}, {{\"address\": \"10.1.2.3/24\"}}]}}'", flag.display()));
    world.chain(serde_json::json!([{"type": "slow"}]));
    let (stuck, other) = tokio::join!(world.attach("stuck"), async {
        let began = Instant::now();
        (world.attach("other").await, began.elapsed())
    });
    assert!(stuck.is_err());
    assert!(other.1 < Duration::from_millis(600), "{:?}", other.1);
    assert_eq!(other.0.unwrap().ips, ["10.1.2.3", "fd00::2"], "the preferred family comes first");
    assert!(world.detach("other").await.is_err(), "DEL is not acknowledged");
    std::fs::write(&flag, "").unwrap();
    world.detach("other").await.unwrap();
    world.detach("stuck").await.unwrap();
    world.clean();
}

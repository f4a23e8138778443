#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use kernel::testing;
use messages::store::{Op, decode};

async fn world(path: &Path) -> (kernel::System, kernel::Addr<Store>) {
    let system = testing::system(&[testing::spec("store", 0)]).unwrap();
    let store = system.start::<StoreActor>(open(path).unwrap()).await.unwrap();
    (system, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_are_atomic_and_scans_are_ordered() {
    let dir = tempfile::tempdir().unwrap();
    let (system, store) = world(&dir.path().join("x.db")).await;
    let op = system.root("test", None, None);
    let put = |k: &str, v: u32| Op::put(table::LEASES, k, &v).unwrap();
    store.call(&op.cx, Commit { ops: vec![put("b/2", 2), put("b/1", 1), put("a", 0)] }).await.unwrap();
    let conflict = vec![put("b/3", 3), Op::insert(table::LEASES, "a", &9).unwrap()];
    assert!(store.call(&op.cx, Commit { ops: conflict }).await.unwrap_err().is_already_exists());
    let rows = store.call(&op.cx, Scan { table: table::LEASES, prefix: "b/".into() }).await.unwrap();
    let rows: Vec<(String, u32)> = rows.into_iter().map(|(k, v)| (k, decode(&v).unwrap())).collect();
    assert_eq!(rows, [("b/1".into(), 1), ("b/2".into(), 2)], "the refused commit left no half");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_loses_no_answered_commit() {
    if let Ok(path) = std::env::var("TROUPE_STORE_VICTIM") {
        let (system, store) = world(Path::new(&path)).await;
        let op = system.root("victim", None, None);
        for n in 0u32.. {
            store.call(&op.cx, Commit { ops: vec![Op::put(table::LEASES, format!("{n:08}"), &n).unwrap()] }).await.unwrap();
            println!("answered {n}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.db");
    for round in 0..3u64 {
        use std::io::BufRead;
        let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "tests::a_killed_process_loses_no_answered_commit"])
            .env("TROUPE_STORE_VICTIM", &path)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let lines = std::io::BufReader::new(victim.stdout.take().unwrap()).lines();
        let mut last = None;
        for line in lines.map_while(std::result::Result::ok) {
            if let Some(n) = line.split("answered ").nth(1) {
                last = n.parse::<u32>().ok();
                if last > Some(40 + round as u32 * 7) {
                    victim.kill().unwrap();
                }
            }
        }
        victim.wait().unwrap();
        let (system, store) = world(&path).await;
        let op = system.root("after", None, None);
        let last = last.expect("the victim answered commits");
        let row = store.call(&op.cx, Get { table: table::LEASES, key: format!("{last:08}") }).await.unwrap();
        assert_eq!(row.map(|r| decode::<u32>(&r).unwrap()), Some(last));
        drop(op);
        system.shutdown(std::time::Duration::from_secs(1)).await;
        drop((store, system));
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

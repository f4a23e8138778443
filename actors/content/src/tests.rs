#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use kernel::testing;

struct NoStore(BTreeMap<String, Vec<u8>>);
impl Actor for NoStore {
    type Proto = Store;
    type Args = ();
    async fn start(_: (), _: Cx) -> Result<Self> {
        Ok(NoStore(BTreeMap::new()))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<store::Get>().on::<store::Commit>()
    }
}
impl Handle<store::Get> for NoStore {
    fn handle(&mut self, m: store::Get, _: Cx) -> Reply<Option<Vec<u8>>> {
        Reply::ok(self.0.get(&m.key).cloned())
    }
}
impl Handle<store::Commit> for NoStore {
    fn handle(&mut self, m: store::Commit, _: Cx) -> Reply<()> {
        for op in m.ops {
            match op {
                Op::Put { key, value, .. } | Op::Insert { key, value, .. } => self.0.insert(key, value),
                Op::Delete { key, .. } => self.0.remove(&key),
            };
        }
        Reply::ok(())
    }
}

async fn boot(root: &Path) -> (kernel::System, Addr<Content>) {
    let system = testing::system(&[testing::spec("store", 0), testing::spec("content", 10)]).unwrap();
    let store = system.start::<NoStore>(()).await.unwrap();
    let content = system.start::<ContentActor>(Args::new(root, store)).await.unwrap();
    (system, content)
}

const HELLO: &str = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

#[tokio::test(flavor = "multi_thread")]
async fn an_ingest_is_resumed_verified_and_made_visible_once() {
    let dir = tempfile::tempdir().unwrap();
    let (system, content) = boot(dir.path()).await;
    let op = system.root("test", None, None);
    let begin = |digest: &str| Begin { ref_: "r".into(), digest: digest.into(), size: 5 };

    let mut first = content.call(&op.cx, begin(HELLO)).await.unwrap();
    first.write(b"hel").unwrap();
    drop(first);
    let mut second = content.call(&op.cx, begin(HELLO)).await.unwrap();
    assert_eq!(second.offset(), 3, "resumed");
    assert!(content.call(&op.cx, Info { digest: HELLO.into() }).await.unwrap().is_none(), "not visible before its commit");
    second.write(b"lo").unwrap();
    let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
    let commit = op.cx.blocking("commit", IO, {
        let labels = labels.clone();
        move || second.commit(labels)
    });
    assert_eq!(commit.await.unwrap().size, 5);
    assert_eq!(content.call(&op.cx, Info { digest: HELLO.into() }).await.unwrap().unwrap().labels, labels);
    assert_eq!(std::fs::read_dir(dir.path().join("io.containerd.content.v1.content/ingest")).unwrap().count(), 0);
    assert_eq!(content.call(&op.cx, ReadAll { digest: HELLO.into() }).await.unwrap(), b"hello");
    assert!(content.call(&op.cx, begin(HELLO)).await.err().unwrap().is_already_exists());

    let other = HELLO.replace("2cf2", "3cf2");
    let mut wrong = content.call(&op.cx, begin(&other)).await.unwrap();
    wrong.write(b"hello").unwrap();
    assert_eq!(wrong.commit(BTreeMap::new()).unwrap_err().class, kernel::Class::DataLoss);
    assert!(content.call(&op.cx, Info { digest: "../../etc/passwd".into() }).await.is_err());
}

/// A file system of 1 MiB, taken away with it.
struct Small(tempfile::TempDir);
impl Small {
    fn new() -> Small {
        let dir = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(dir.path()).status().unwrap();
        assert!(mounted.success(), "this test needs root");
        Small(dir)
    }
}
impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_keeps_what_was_downloaded_and_says_so() {
    let disk = Small::new();
    let (system, content) = boot(disk.0.path()).await;
    let op = system.root("test", None, None);
    let ballast = disk.0.path().join("ballast");
    std::fs::write(&ballast, vec![1; 600 << 10]).unwrap();
    let bytes: Vec<u8> = (0..700u32 << 8).flat_map(u32::to_le_bytes).collect();
    let digest = format!("sha256:{}", writer::text(&<sha2::Sha256 as sha2::Digest>::digest(&bytes)));
    let begin = || Begin { ref_: "r".into(), digest: digest.clone(), size: bytes.len() as u64 };

    let mut first = content.call(&op.cx, begin()).await.unwrap();
    let fault = bytes.chunks(64 << 10).find_map(|chunk| first.write(chunk).err()).unwrap();
    assert_eq!(fault.class, kernel::Class::ResourceExhausted);
    assert!(fault.message.contains("free some space"), "{fault}");
    let kept = first.offset();
    assert!(kept > 100 << 10);
    std::fs::remove_file(&ballast).unwrap();
    // The same writer can go on, and so can a later one.
    first.write(&bytes[kept as usize..kept as usize + 10]).unwrap();
    drop(first);
    let mut second = content.call(&op.cx, begin()).await.unwrap();
    assert_eq!(second.offset(), kept + 10, "nothing of a failed write was left behind");
    second.write(&bytes[second.offset() as usize..]).unwrap();
    op.cx.blocking("commit", IO, move || second.commit(BTreeMap::new())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_writers_of_one_ref_make_one_blob_and_ingests_in_use_are_not_swept() {
    let dir = tempfile::tempdir().unwrap();
    let (system, content) = boot(dir.path()).await;
    let op = system.root("test", None, None);
    let begin = || Begin { ref_: "r".into(), digest: HELLO.into(), size: 5 };
    let mut first = content.call(&op.cx, begin()).await.unwrap();
    let (addr, cx) = (content.clone(), op.cx.clone());
    let second = tokio::spawn(async move { addr.call(&cx, begin()).await.map(|_| ()) });
    first.write(b"hello").unwrap();
    assert_eq!(content.call(&op.cx, SweepIngests { older_than_s: 0 }).await.unwrap(), 0);
    assert!(!second.is_finished());
    op.cx.blocking("commit", IO, move || first.commit(BTreeMap::new())).await.unwrap();
    assert!(second.await.unwrap().unwrap_err().is_already_exists());
    // Left by a crash in the middle of a download.
    let left = dir.path().join("io.containerd.content.v1.content/ingest/abc");
    std::fs::create_dir(&left).unwrap();
    assert_eq!(content.call(&op.cx, SweepIngests { older_than_s: 0 }).await.unwrap(), 1);
    assert!(!left.exists());
}

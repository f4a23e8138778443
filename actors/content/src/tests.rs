#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use kernel::testing;

struct NoStore;
impl Actor for NoStore {
    type Proto = Store;
    type Args = ();
    async fn start(_: (), _: Cx) -> Result<Self> {
        Ok(NoStore)
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<store::Get>()
    }
}
impl Handle<store::Get> for NoStore {
    fn handle(&mut self, _: store::Get, _: Cx) -> Reply<Option<Vec<u8>>> {
        Reply::ok(None)
    }
}

const HELLO: &str = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

#[tokio::test(flavor = "multi_thread")]
async fn an_ingest_is_resumed_verified_and_made_visible_once() {
    let dir = tempfile::tempdir().unwrap();
    let system = testing::system(&[testing::spec("store", 0), testing::spec("content", 10)]).unwrap();
    let store = system.start::<NoStore>(()).await.unwrap();
    let content = system.start::<ContentActor>(Args::new(dir.path(), store)).await.unwrap();
    let op = system.root("test", None, None);
    let begin = |digest: &str| Begin { ref_: "r".into(), digest: digest.into(), size: 5 };

    let mut first = content.call(&op.cx, begin(HELLO)).await.unwrap();
    first.write(b"hel").unwrap();
    drop(first);
    let mut second = content.call(&op.cx, begin(HELLO)).await.unwrap();
    assert_eq!(second.offset(), 3, "resumed");
    assert!(content.call(&op.cx, Info { digest: HELLO.into() }).await.unwrap().is_none(), "not visible before its commit");
    second.write(b"lo").unwrap();
    assert_eq!(second.commit(BTreeMap::new()).unwrap().size, 5);
    assert_eq!(content.call(&op.cx, ReadAll { digest: HELLO.into() }).await.unwrap(), b"hello");
    assert!(content.call(&op.cx, begin(HELLO)).await.err().unwrap().is_already_exists());

    let other = HELLO.replace("2cf2", "3cf2");
    let mut wrong = content.call(&op.cx, begin(&other)).await.unwrap();
    wrong.write(b"hello").unwrap();
    assert_eq!(wrong.commit(BTreeMap::new()).unwrap_err().class, kernel::Class::DataLoss);
    assert!(content.call(&op.cx, Info { digest: "../../etc/passwd".into() }).await.is_err());
}

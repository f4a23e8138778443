//! Registries that lie, stall, refuse and vanish; disks that are full; clients that go away; actors that die in the middle. Each row of the fault table
//! for pulls has its test here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::path::Path;
use std::time::{Duration, Instant};
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::eventually;
use troupe_tests::registry::{Fault, Guard, Layer, Registry, busybox_layer, put};

/// Bytes that no compression makes smaller.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    };
    std::iter::repeat_with(next).flatten().take(bytes).collect()
}

fn layer(name: &str, mib: usize, seed: u64) -> Layer {
    let mut layer = Layer::new(Vec::new());
    put(&mut layer, name, tar::EntryType::Regular, 0o644, &noise(mib << 20, seed));
    layer
}

fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).map_or(0, Iterator::count)
}

fn snapshots(daemon: &Daemon) -> usize {
    count(&daemon.dir.join("root/io.containerd.snapshotter.v1.overlayfs/snapshots"))
}

fn ingests(daemon: &Daemon) -> usize {
    count(&daemon.dir.join("root/io.containerd.content.v1.content/ingest"))
}

async fn listed(cri: &mut Cri) -> Vec<Image> {
    cri.image.list_images(ListImagesRequest::default()).await.unwrap().into_inner().images
}

fn hosts(daemon: &Daemon, registry: &str, text: &str) {
    let dir = daemon.dir.join("certs").join(registry);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("hosts.toml"), text).unwrap();
}

async fn refused(cri: &mut Cri, image: &str) -> tonic::Status {
    let spec = ImageSpec { image: image.into(), ..Default::default() };
    cri.image.pull_image(PullImageRequest { image: Some(spec), ..Default::default() }).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_off_again_and_again_is_resumed_by_range() {
    let registry = Registry::start().await;
    let image = registry.add("big/image:1", vec![layer("a", 4, 1)], serde_json::json!({}));
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    // More often than there are attempts: what gets on is not given up.
    registry.misbehave(&[Fault::Truncate; 5]);
    cri.pull(&image).await.unwrap();
    let ranges: Vec<String> = registry.requests().into_iter().filter(|r| r.contains("bytes=")).collect();
    assert_eq!(ranges.len(), 5, "each attempt goes on where the last one ended: {ranges:?}");
    assert!(!ranges.iter().any(|r| r.ends_with("bytes=0-")), "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_wrong_bytes_is_left_for_the_next_one() {
    let (liar, honest) = (Registry::start().await, Registry::start().await);
    for registry in [&liar, &honest] {
        registry.add_busybox().unwrap();
    }
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    hosts(&daemon, "x.example", &format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", honest.address, liar.address));
    let mut cri = daemon.cri().await.unwrap();
    liar.misbehave(&[Fault::Corrupt; 8]);
    cri.pull("x.example/library/busybox").await.unwrap();
    let blobs = |r: &Registry| r.seen().iter().filter(|s| s.path.contains("/blobs/")).count();
    assert!(blobs(&liar) > 0 && blobs(&honest) > 0);
    eventually("the bad unpacking is swept", || snapshots(&daemon) == 1 && ingests(&daemon) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_is_down_is_passed_over_and_told_whom_it_stands_for() {
    let registry = Registry::start().await;
    registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let text =
        format!("[host.\"http://127.0.0.1:1\"]\n[host.\"http://{}\"]\n[host.\"http://{0}\".header]\nx-test = \"yes\"\n", registry.address);
    hosts(&daemon, "_default", &text);
    let mut cri = daemon.cri().await.unwrap();
    let began = Instant::now();
    cri.pull("up.example/library/busybox").await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "a dead mirror costs no retries: {:?}", began.elapsed());
    assert!(registry.seen().iter().all(|s| s.query == "ns=up.example" && s.extra == "yes"), "{:?}", registry.seen());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalling_registry_is_given_up_after_the_progress_time_out_and_resumed() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start_with(&Options::default(), |text| {
        text.replace("snapshotter = \"overlayfs\"", "snapshotter = \"overlayfs\"\nimage_pull_progress_timeout = \"1s\"")
    })
    .await
    .unwrap();
    let mut cri = daemon.cri().await.unwrap();
    registry.misbehave(&[Fault::Stall]);
    let began = Instant::now();
    cri.pull(&image).await.unwrap();
    assert!((1..10).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    cri.image.remove_image(RemoveImageRequest { image: Some(ImageSpec { image: image.clone(), ..Default::default() }) }).await.unwrap();
    eventually("the removal is collected", || snapshots(&daemon) == 0).await;
    registry.misbehave(&[Fault::Stall; 32]);
    let refused = refused(&mut cri, &image).await;
    assert!(refused.message().contains("no byte within"), "{refused}");
    eventually("the failed pull gives its snapshot back", || snapshots(&daemon) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_requests_are_waited_out_within_bounds() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    registry.misbehave(&[Fault::TooMany]);
    registry.patience(3600);
    let told = refused(&mut cri, &image).await;
    assert!(told.message().contains("429") && told.code() == tonic::Code::ResourceExhausted, "an hour is not waited: {told}");
    registry.patience(2);
    registry.misbehave(&[Fault::TooMany]);
    let began = Instant::now();
    cri.pull(&image).await.unwrap();
    assert!((2..6).contains(&began.elapsed().as_secs()), "Retry-After is honoured: {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_refuses_for_ever_and_one_that_redirects_for_ever_are_given_up() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    registry.misbehave(&[Fault::Loop; 64]);
    let told = refused(&mut cri, &image).await;
    assert!(told.message().contains("more than 10 redirects"), "{told}");
    registry.behave();
    registry.guard(Guard::Basic("user:right".into()));
    let before = registry.seen().len();
    let auth = AuthConfig { username: "user".into(), password: "wrong-secret".into(), ..Default::default() };
    let spec = ImageSpec { image: image.clone(), ..Default::default() };
    let request = PullImageRequest { image: Some(spec), auth: Some(auth), ..Default::default() };
    let told = cri.image.pull_image(request).await.unwrap_err();
    assert_eq!(told.code(), tonic::Code::Unauthenticated, "{told}");
    assert!(!told.message().contains("wrong-secret"), "{told}");
    assert_eq!(registry.seen().len() - before, 2, "asked once without and once with credentials");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_takes_its_pull_along() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let request = |limit: Duration| {
        let spec = ImageSpec { image: image.clone(), ..Default::default() };
        let mut request = tonic::Request::new(PullImageRequest { image: Some(spec), ..Default::default() });
        request.set_timeout(limit);
        request
    };
    let told = cri.image.pull_image(request(Duration::from_millis(1))).await.unwrap_err();
    assert!(matches!(told.code(), tonic::Code::DeadlineExceeded | tonic::Code::Cancelled), "{told}");
    registry.misbehave(&[Fault::Stall]);
    let began = Instant::now();
    let told = cri.image.pull_image(request(Duration::from_millis(700))).await.unwrap_err();
    assert!(matches!(told.code(), tonic::Code::DeadlineExceeded | tonic::Code::Cancelled), "{told}");
    assert!(began.elapsed() < Duration::from_secs(3));
    eventually("the unpacking is swept", || snapshots(&daemon) == 0).await;
    assert!(listed(&mut cri).await.is_empty(), "no partial tag");
    let ops = || daemon.cli(&["ops"]).unwrap();
    eventually("the operation ends", || !ops().contains("PullImage")).await;
    // The abandoned pull holds no lock that this one would wait for.
    let began = Instant::now();
    cri.pull(&image).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(ingests(&daemon), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_and_headers_stay_with_their_host() {
    let (registry, store) = (Registry::start().await, Registry::start().await);
    let image = registry.add_busybox().unwrap();
    registry.redirect_blobs(&store);
    registry.guard(Guard::Bearer("user:secret".into(), "token-1".into()));
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    hosts(&daemon, &registry.address, &format!("server = \"http://{}\"\n[header]\nx-test = \"ours\"\n", registry.address));
    let mut cri = daemon.cri().await.unwrap();
    let pull = |auth: AuthConfig| {
        let spec = ImageSpec { image: image.clone(), ..Default::default() };
        PullImageRequest { image: Some(spec), auth: Some(auth), ..Default::default() }
    };
    let password = AuthConfig { username: "user".into(), password: "secret".into(), ..Default::default() };
    let other = AuthConfig { server_address: "https://elsewhere.example".into(), ..password.clone() };
    assert_eq!(cri.image.pull_image(pull(other)).await.unwrap_err().code(), tonic::Code::Unauthenticated, "anonymous for another host");
    assert!(registry.seen().iter().all(|s| s.authorization.is_empty()), "{:?}", registry.seen());
    cri.image.pull_image(pull(password)).await.unwrap();
    let blobs: Vec<_> = store.seen().into_iter().filter(|s| s.path.contains("/blobs/")).collect();
    assert!(!blobs.is_empty() && blobs.iter().all(|s| s.authorization.is_empty() && s.extra.is_empty()), "{blobs:?}");
    assert!(registry.seen().iter().filter(|s| s.path.contains("/blobs/")).all(|s| s.extra == "ours"));
    // The signature of a redirect is a secret, too.
    store.misbehave(&[Fault::Corrupt; 8]);
    let remove = RemoveImageRequest { image: Some(ImageSpec { image: image.clone(), ..Default::default() }) };
    cri.image.remove_image(remove).await.unwrap();
    eventually("the removal is collected", || snapshots(&daemon) == 0).await;
    let token = AuthConfig { registry_token: "token-1".into(), ..Default::default() };
    let told = cri.image.pull_image(pull(token)).await.unwrap_err();
    assert!(!told.message().contains("signature"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_of_credentials_opens_the_door() {
    let basic = Registry::start().await;
    let bearer = Registry::start().await;
    let images = [basic.add_busybox().unwrap(), bearer.add_busybox().unwrap()];
    basic.guard(Guard::Basic("user:secret".into()));
    bearer.guard(Guard::Bearer("refresh".into(), "token-2".into()));
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let form = |change: &dyn Fn(&mut AuthConfig)| {
        let mut auth = AuthConfig::default();
        change(&mut auth);
        auth
    };
    let forms: [(usize, AuthConfig); 5] = [
        (0, form(&|a| (a.username, a.password) = ("user".into(), "secret".into()))),
        (0, form(&|a| a.auth = "dXNlcjpzZWNyZXQ=".into())),
        (0, form(&|a| (a.auth, a.server_address) = ("dXNlcjpzZWNyZXQ=".into(), format!("http://{}", basic.address)))),
        (1, form(&|a| a.identity_token = "refresh".into())),
        (1, form(&|a| a.registry_token = "token-2".into())),
    ];
    for (number, auth) in forms {
        let spec = ImageSpec { image: images[number].clone(), ..Default::default() };
        let request = PullImageRequest { image: Some(spec), auth: Some(auth.clone()), ..Default::default() };
        cri.image.pull_image(request).await.unwrap_or_else(|e| panic!("form {auth:?}: {e}"));
    }
    assert_eq!(
        refused(&mut cri, &images[0]).await.code(),
        tonic::Code::Unauthenticated,
        "what is here is not given to whoever may not pull it"
    );
    let odd = AuthConfig { auth: "bm8tY29sb24tc2VjcmV0".into(), ..Default::default() };
    let spec = ImageSpec { image: images[0].clone(), ..Default::default() };
    let told = cri.image.pull_image(PullImageRequest { image: Some(spec), auth: Some(odd), ..Default::default() }).await.unwrap_err();
    assert!(told.code() == tonic::Code::InvalidArgument && !told.message().contains("no-colon"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_fails_the_pull_and_nothing_else() {
    let registry = Registry::start().await;
    let small = registry.add_busybox().unwrap();
    let large = registry.add("too/large:1", vec![busybox_layer().unwrap(), layer("a", 24, 2), layer("b", 24, 3)], serde_json::json!({}));
    let daemon = Daemon::start(&Options { root_mib: 40, ..Default::default() }).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&small).await.unwrap();
    let told = refused(&mut cri, &large).await;
    assert!(told.code() == tonic::Code::ResourceExhausted && told.message().contains("space"), "{told}");
    eventually("the failed pull gives its space back", || snapshots(&daemon) == 1 && ingests(&daemon) == 0).await;
    assert_eq!(listed(&mut cri).await.len(), 1, "what was there is there");
    let sandbox = cri.pod("full", true, &daemon.logs());
    let pod = cri.run_pod(&sandbox).await.unwrap();
    let config = cri.container("c", &small, &["sleep", "100"]);
    let id = cri.run(&pod, &config, &sandbox).await.unwrap();
    assert_eq!(cri.exec(&id, &["echo", "well"], 10).await.unwrap().stdout, b"well\n");
    cri.drop_pod(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn actors_that_die_in_the_middle_of_a_pull_cost_one_attempt() {
    let registry = Registry::start().await;
    let image = registry.add("three/layers:1", vec![layer("a", 1, 4), layer("b", 1, 5), layer("c", 1, 6)], serde_json::json!({}));
    let extra = "[plugins.\"io.troupe.kernel.v1.kernel\"]\nmax_restarts = 100000".to_owned();
    let daemon = Daemon::start(&Options { chaos: true, extra, ..Default::default() }).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let restarts = || -> u64 {
        let actors: serde_json::Value = serde_json::from_str(&daemon.cli(&["--json", "actors"]).unwrap()).unwrap();
        actors.as_array().unwrap().iter().filter_map(|a| a["restarts"].as_u64()).sum()
    };
    for (message, nth) in
        [("image.Pull", "1"), ("content.Begin", "3"), ("content.Hold", "2"), ("snapshot.Apply", "2"), ("snapshot.Commit", "1")]
    {
        let (actor, before) = (message.split('.').next().unwrap(), restarts());
        daemon.cli(&["chaos", "add", "--actor", actor, "--message", message, "--fault", "panic", "--nth", nth]).unwrap();
        registry.misbehave(&[Fault::Truncate]);
        if cri.pull(&image).await.is_err() {
            cri.pull(&image).await.unwrap_or_else(|e| panic!("after {message} #{nth} was killed: {e:?}"));
        }
        assert!(restarts() > before, "{message} #{nth} was killed");
        daemon.cli(&["chaos", "clear"]).unwrap();
        start_over(&registry, &daemon, &mut cri, &image).await;
    }
    // The image actor dies while the registry stalls: the pull begins again by itself or by its client, and does not wait for the dead one's writer.
    registry.misbehave(&[Fault::Stall]);
    let pull = {
        let (mut cri, image) = (cri.clone(), image.clone());
        tokio::spawn(async move { cri.pull(&image).await })
    };
    let writing = || daemon.http("/blocking").unwrap().contains("write layer");
    eventually("a layer stalls", || registry.to_come() == 0 && writing()).await;
    daemon.cli(&["chaos", "add", "--actor", "image", "--message", "image.FsInfo", "--fault", "panic", "--nth", "1"]).unwrap();
    let before = restarts();
    let _ = cri.image.image_fs_info(ImageFsInfoRequest {}).await;
    assert!(restarts() > before);
    let again = async {
        if pull.await.unwrap().is_err() {
            cri.pull(&image).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), again).await.expect("the stall was the dead generation's (its limit is five minutes)");
    eventually("no writer is left", || !writing()).await;
    start_over(&registry, &daemon, &mut cri, &image).await;
}

/// Nothing is left half done of a pull that worked in the end, and nothing at all after its removal.
async fn start_over(registry: &Registry, daemon: &Daemon, cri: &mut Cri, image: &str) {
    registry.behave();
    assert_eq!(listed(cri).await.len(), 1);
    eventually("nothing is left half unpacked", || snapshots(daemon) == 3 && ingests(daemon) == 0).await;
    let remove = RemoveImageRequest { image: Some(ImageSpec { image: image.into(), ..Default::default() }) };
    cri.image.remove_image(remove).await.unwrap();
    eventually("the removal is collected", || snapshots(daemon) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_layers_come_in_pieces_side_by_side_where_that_is_configured() {
    let registry = Registry::start().await;
    let image = registry.add("in/pieces:1", vec![layer("a", 5, 7)], serde_json::json!({}));
    let daemon = Daemon::start_with(&Options::default(), |text| {
        text.replace("snapshotter = \"overlayfs\"", "snapshotter = \"overlayfs\"\nconcurrent_layer_fetch_buffer = 1048576")
    })
    .await
    .unwrap();
    let mut cri = daemon.cri().await.unwrap();
    registry.misbehave(&[Fault::Truncate, Fault::TooMany]);
    cri.pull(&image).await.unwrap();
    let ranges: Vec<String> = registry.requests().into_iter().filter(|r| r.contains("bytes=")).collect();
    assert!(ranges.len() >= 5 && ranges.iter().any(|r| r.contains("bytes=1048576-2097151")), "{ranges:?}");
}

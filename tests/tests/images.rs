//! Pulling from a registry that behaves and from one that does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use std::path::Path;
use std::time::Duration;
use troupe_tests::cri::Cri;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::registry::{Fault, Layer, Registry, busybox_layer, put};
use troupe_tests::{census, eventually};

/// A layer of one file.
fn one_file(name: &str, text: &str) -> Layer {
    let mut layer = Layer::new(Vec::new());
    put(&mut layer, name, tar::EntryType::Regular, 0o644, text.as_bytes());
    layer
}

fn spec(image: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: image.into(), ..Default::default() })
}

async fn status(cri: &mut Cri, image: &str) -> Option<Image> {
    let request = ImageStatusRequest { image: spec(image), verbose: false };
    cri.image.image_status(request).await.unwrap().into_inner().image
}

async fn listed(cri: &mut Cri) -> Vec<Image> {
    cri.image.list_images(ListImagesRequest::default()).await.unwrap().into_inner().images
}

async fn remove(cri: &mut Cri, image: &str) {
    cri.image.remove_image(RemoveImageRequest { image: spec(image) }).await.unwrap();
}

fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).map_or(0, Iterator::count)
}

fn image_mount(image: &str, at: &str, below: &str) -> Mount {
    Mount { container_path: at.into(), image: spec(image), image_sub_path: below.into(), readonly: true, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_truncates_and_refuses_is_overcome() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    registry.misbehave(&[Fault::Truncate, Fault::TooMany, Fault::Truncate]);
    cri.pull(&image).await.unwrap();
    assert!(registry.requests().iter().any(|r| r.contains("bytes=")), "the pull was resumed: {:?}", registry.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_with_other_bytes_is_never_kept() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    registry.misbehave(&[Fault::Corrupt; 64]);
    let refused = cri.pull(&image).await.unwrap_err().to_string();
    assert!(refused.contains("digest") || refused.contains("sha256"), "{refused}");
    assert!(cri.image.list_images(ListImagesRequest::default()).await.unwrap().into_inner().images.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_used_as_hosts_toml_says_and_removal_gives_the_space_back() {
    let registry = Registry::start().await;
    registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let certs = daemon.dir.join("certs/docker.io");
    std::fs::create_dir_all(&certs).unwrap();
    std::fs::write(
        certs.join("hosts.toml"),
        format!("server = \"http://127.0.0.1:1\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", registry.address),
    )
    .unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull("busybox").await.unwrap();
    let images = cri.image.list_images(ListImagesRequest::default()).await.unwrap().into_inner().images;
    assert_eq!(images[0].repo_tags, ["docker.io/library/busybox:latest"]);
    assert!(images[0].size > 100_000);
    let by_id = ImageStatusRequest { image: Some(ImageSpec { image: images[0].id.clone(), ..Default::default() }), verbose: true };
    assert_eq!(cri.image.image_status(by_id).await.unwrap().into_inner().image.unwrap().id, images[0].id);
    let used = cri.image.image_fs_info(ImageFsInfoRequest {}).await.unwrap().into_inner().image_filesystems;
    assert!(used[0].used_bytes.as_ref().unwrap().value > 0);
    let request = RemoveImageRequest { image: Some(ImageSpec { image: "busybox".into(), ..Default::default() }) };
    cri.image.remove_image(request.clone()).await.unwrap();
    cri.image.remove_image(request).await.unwrap();
    let blobs = daemon.dir.join("root/io.containerd.content.v1.content/blobs/sha256");
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while std::fs::read_dir(&blobs).unwrap().count() > 0 && std::time::Instant::now() < end {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(std::fs::read_dir(&blobs).unwrap().count(), 0, "blobs of a removed image are collected");
    let snapshots = daemon.dir.join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    assert_eq!(std::fs::read_dir(&snapshots).unwrap().count(), 0, "snapshots too");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_registry_is_explained() {
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let refused = cri.pull("127.0.0.1:1/some/image:1").await.unwrap_err().to_string();
    assert!(refused.contains("127.0.0.1:1") && refused.contains("trace="), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_of_reference_finds_the_same_image() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let other = registry.tag("library/busybox:latest", "another/name:2");
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&other).await.unwrap();
    let id = cri.pull(&image).await.unwrap();
    let by_digest = format!("{}@{}", image.trim_end_matches(":latest"), registry.digest_of("library/busybox:latest"));
    cri.pull(&by_digest).await.unwrap();
    let whole = status(&mut cri, &id).await.unwrap();
    assert_eq!(whole.repo_tags, [other.clone(), image.clone()], "sorted");
    assert_eq!(whole.repo_digests.len(), 2);
    assert!(whole.repo_digests.is_sorted() && whole.repo_digests.contains(&by_digest));
    let hex = id.trim_start_matches("sha256:");
    let tagged = by_digest.replace('@', ":whatever@");
    for reference in [&image, &other, &by_digest, &tagged, hex, &hex[..13], &format!("sha256:{}", &hex[..12])] {
        assert_eq!(status(&mut cri, reference).await.as_ref(), Some(&whole), "{reference}");
    }
    assert!(status(&mut cri, "nothing:1").await.is_none());
    let filter = |image: &str| ListImagesRequest { filter: Some(ImageFilter { image: spec(image) }) };
    let found = |list: ListImagesResponse| list.images.len();
    assert_eq!(found(cri.image.list_images(filter(&other)).await.unwrap().into_inner()), 1);
    assert_eq!(found(cri.image.list_images(filter("nothing")).await.unwrap().into_inner()), 0);
    for bad in ["UPPER/case:1", "a b", "x//y"] {
        let told = cri.image.pull_image(PullImageRequest { image: spec(bad), ..Default::default() }).await.unwrap_err();
        assert_eq!(told.code(), tonic::Code::InvalidArgument, "{bad}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_moves_leaves_the_old_image_its_digest_and_a_pull_by_digest_gives_no_tag() {
    let registry = Registry::start().await;
    let image = registry.add("a/b:1", vec![one_file("f", "old")], serde_json::json!({"User": "1000:5"}));
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let old = cri.pull(&image).await.unwrap();
    let before = registry.requests().len();
    cri.pull(&image).await.unwrap();
    let again: Vec<String> = registry.requests().split_off(before);
    assert!(again.len() == 1 && again[0].starts_with("HEAD "), "what is here is not fetched again: {again:?}");
    registry.add("a/b:1", vec![one_file("f", "new")], serde_json::json!({"User": "web:grp"}));
    let new = cri.pull(&image).await.unwrap();
    let old = status(&mut cri, &old).await.unwrap();
    assert!(old.repo_tags.is_empty() && old.repo_digests.len() == 1, "{old:?}");
    assert_eq!((old.uid.as_ref().map(|u| u.value), old.username.as_str()), (Some(1000), ""));
    let new = status(&mut cri, &new).await.unwrap();
    assert_eq!((new.repo_tags.as_slice(), new.uid.is_none(), new.username.as_str()), ([image.clone()].as_slice(), true, "web"));
    let third = registry.add("a/c:1", vec![one_file("f", "third")], serde_json::json!({}));
    let by_digest = format!("{}@{}", third.trim_end_matches(":1"), registry.digest_of("a/c:1"));
    let id = cri.pull(&by_digest).await.unwrap();
    let third = status(&mut cri, &id).await.unwrap();
    assert!(third.repo_tags.is_empty() && third.repo_digests == [by_digest] && third.uid.is_none() && third.username.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_is_seen_at_once_by_everybody_and_breaks_no_container() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start_with(&Options::default(), |text| {
        let pinned = format!("[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{image}\"\n");
        text.replace("[plugins.\"io.containerd.cri.v1.images\".registry]", &(pinned + "[plugins.\"io.containerd.cri.v1.images\".registry]"))
    })
    .await
    .unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let id = cri.pull(&image).await.unwrap();
    assert!(status(&mut cri, &id).await.unwrap().pinned);
    let sandbox = cri.pod("keeps", true, &daemon.logs());
    let pod = cri.run_pod(&sandbox).await.unwrap();
    let running = cri.run(&pod, &cri.container("running", &id, &["sleep", "1000"]), &sandbox).await.unwrap();
    let created = cri.create(&pod, &cri.container("created", &id, &["sleep", "1000"]), &sandbox).await.unwrap();
    let removals = (0..5).map(|_| {
        let (mut cri, image) = (cri.clone(), image.clone());
        tokio::spawn(async move { remove(&mut cri, &image).await })
    });
    for removal in removals.collect::<Vec<_>>() {
        removal.await.unwrap();
        assert!(status(&mut cri, &id).await.is_none(), "gone as soon as the first answer is there");
    }
    assert!(listed(&mut cri).await.is_empty());
    tokio::time::sleep(Duration::from_secs(1)).await;
    cri.start(&created).await.unwrap();
    for container in [&running, &created] {
        assert_eq!(cri.exec(container, &["echo", "x"], 10).await.unwrap().exit_code, 0);
        assert_eq!(cri.status(container).await.unwrap().state, ContainerState::ContainerRunning as i32);
        cri.stop(container, 0).await.unwrap();
    }
    cri.drop_pod(&pod).await.unwrap();
    let snapshots = daemon.dir.join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    eventually("the last container takes the image along", || count(&snapshots) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_a_volume_once_for_each_pod_and_across_a_restart() {
    let registry = Registry::start().await;
    let busybox = registry.add_busybox().unwrap();
    let mut data = one_file("data/sub/file", "from the image");
    put(&mut data, "data/other", tar::EntryType::Regular, 0o644, b"x");
    let volume = registry.add("some/data:1", vec![data, one_file("top", "second layer")], serde_json::json!({}));
    let mut daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&busybox).await.unwrap();
    let sandbox = cri.pod("vol", true, &daemon.logs());
    let pod = cri.run_pod(&sandbox).await.unwrap();
    let mut config = cri.container("a", &busybox, &["sleep", "1000"]);
    config.mounts = vec![image_mount(&volume, "/whole", ""), image_mount(&volume, "/part", "data/sub")];
    let told = cri.create(&pod, &config, &sandbox).await.unwrap_err();
    assert!(format!("{told:?}").contains("ImageVolumeMountFailed") && format!("{told:?}").contains("pull it first"), "{told:?}");
    cri.pull(&volume).await.unwrap();
    for (below, text) in [("data/other", "only directory subpath is supported"), ("../..", "leaves the image"), ("nothing", "nothing")] {
        let mut bad = config.clone();
        bad.mounts = vec![image_mount(&volume, "/part", below)];
        let told = format!("{:?}", cri.create(&pod, &bad, &sandbox).await.unwrap_err());
        assert!(told.contains("ImageVolumeMountFailed") && told.contains(text), "{told}");
    }
    let mut writable = config.clone();
    writable.mounts[0].readonly = false;
    assert!(format!("{:?}", cri.create(&pod, &writable, &sandbox).await.unwrap_err()).contains("ImageVolumeMountFailed"));
    let first = cri.run(&pod, &config, &sandbox).await.unwrap();
    let volumes = |daemon: &Daemon| {
        let dir = format!("{}/state/image-volumes/", daemon.dir.display());
        census::mounts_below(&daemon.dir).into_iter().filter(|m| m.starts_with(&dir)).collect::<Vec<_>>()
    };
    let read = |id: String| {
        let mut cri = cri.clone();
        async move { cri.exec(&id, &["sh", "-c", "cat /whole/data/sub/file /part/file /whole/top; touch /whole/x"], 10).await.unwrap() }
    };
    let seen = read(first).await;
    assert_eq!(String::from_utf8_lossy(&seen.stdout), "from the imagefrom the imagesecond layer");
    assert!(seen.exit_code != 0 && String::from_utf8_lossy(&seen.stderr).contains("Read-only"), "{seen:?}");
    assert_eq!(volumes(&daemon).len(), 1, "mounted once");
    // Removed, it stays for as long as it is mounted.
    remove(&mut cri, &volume).await;
    daemon.kill();
    daemon.spawn().await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&volume).await.unwrap();
    let mut again = config.clone();
    again.metadata.as_mut().unwrap().name = "b".into();
    let second = cri.run(&pod, &again, &sandbox).await.unwrap();
    assert!(cri.exec(&second, &["test", "-f", "/part/file"], 10).await.unwrap().exit_code == 0);
    assert_eq!(volumes(&daemon).len(), 1, "the same mount after a restart");
    cri.runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    assert!(volumes(&daemon).is_empty(), "given back when the pod stops");
    cri.drop_pod(&pod).await.unwrap();
    for image in [&volume, &busybox] {
        remove(&mut cri, image).await;
    }
    let snapshots = daemon.dir.join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    eventually("no view is left", || count(&snapshots) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_is_a_volume_of_its_files() {
    let registry = Registry::start().await;
    let busybox = registry.add_busybox().unwrap();
    let model = vec![42u8; 300_000];
    let artifact = registry.add_artifact("my/model:1", &[("model/weights.bin", &model), ("README.md", b"read me")]);
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&busybox).await.unwrap();
    let id = cri.pull(&artifact).await.unwrap();
    assert_eq!(id, registry.digest_of("my/model:1"), "artifacts are told apart by their manifests");
    let sandbox = cri.pod("art", true, &daemon.logs());
    let pod = cri.run_pod(&sandbox).await.unwrap();
    let mut config = cri.container("a", &busybox, &["sleep", "1000"]);
    config.mounts = vec![image_mount(&artifact, "/m", ""), image_mount(&artifact, "/w", "model")];
    let container = cri.run(&pod, &config, &sandbox).await.unwrap();
    let seen = cri.exec(&container, &["sh", "-c", "cat /m/README.md; wc -c < /m/model/weights.bin; ls /w"], 10).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&seen.stdout), "read me300000\nweights.bin\n");
    let told = cri.create(&pod, &cri.container("b", &artifact, &[]), &sandbox).await.unwrap_err();
    assert!(format!("{told:?}").contains("no command"), "{told:?}");
    cri.drop_pod(&pod).await.unwrap();
    for image in [&artifact, &busybox] {
        remove(&mut cri, image).await;
    }
    let blobs = daemon.dir.join("root/io.containerd.content.v1.content/blobs/sha256");
    eventually("the artifact's files are collected", || count(&blobs) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_image_has_below_its_volumes_is_copied_up() {
    let registry = Registry::start().await;
    let mut layer = busybox_layer().unwrap();
    for (path, kind, mode, uid) in [("vol/", tar::EntryType::Directory, 0o1770, 65534), ("vol/file", tar::EntryType::Regular, 0o640, 1000)]
    {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(uid);
        header.set_gid(uid);
        header.set_mtime(1_700_000_000);
        let data: &[u8] = if kind == tar::EntryType::Regular { b"copied" } else { b"" };
        header.set_size(data.len() as u64);
        layer.append_data(&mut header, path, data).unwrap();
    }
    let config = serde_json::json!({"Env": ["PATH=/bin"], "Volumes": {"/vol": {}, "nowhere/": {}, "/mine": {}}});
    let image = registry.add("with/volumes:1", vec![layer], config);
    for ignore in [false, true] {
        let daemon = Daemon::start_with(&Options::default(), |text| {
            text.replace(
                "restrict_oom_score_adj = true",
                &format!("restrict_oom_score_adj = true\nignore_image_defined_volumes = {ignore}"),
            )
        })
        .await
        .unwrap();
        let mut cri = daemon.cri().await.unwrap();
        cri.pull(&image).await.unwrap();
        let sandbox = cri.pod("volumes", true, &daemon.logs());
        let pod = cri.run_pod(&sandbox).await.unwrap();
        let mut config = cri.container("c", &image, &["sleep", "1000"]);
        config.mounts =
            vec![Mount { container_path: "/mine".into(), host_path: daemon.logs().display().to_string(), ..Default::default() }];
        let id = cri.run(&pod, &config, &sandbox).await.unwrap();
        let look = "stat -c '%u %a' /vol /vol/file; cat /vol/file; echo changed > /vol/file; grep -c -E ' /(vol|nowhere|mine) ' /proc/self/mountinfo";
        let seen = cri.exec(&id, &["sh", "-c", look], 10).await.unwrap();
        let mounts = if ignore { 1 } else { 3 };
        assert_eq!(String::from_utf8_lossy(&seen.stdout), format!("65534 1770\n1000 640\ncopied{mounts}\n"), "{seen:?}");
        let volumes = daemon.dir.join("root/containers").join(&id);
        assert_eq!(volumes.exists(), !ignore);
        cri.remove(&id).await.unwrap();
        assert!(!volumes.exists(), "removed with the container");
        cri.drop_pod(&pod).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_with_a_snapshotter_of_its_own_gets_the_image_unpacked_there() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let extra = "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.plain]\n\
        [plugins.\"io.containerd.cri.v1.images\".runtime_platforms.plain]\nsnapshotter = \"native\"\n";
    let daemon = Daemon::start(&Options { extra: extra.into(), ..Default::default() }).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let dir = |name: &str| daemon.dir.join(format!("root/io.containerd.snapshotter.v1.{name}/snapshots"));
    cri.pull(&image).await.unwrap();
    assert_eq!((count(&dir("overlayfs")), count(&dir("native"))), (1, 0));
    let sandbox = cri.pod("plain", true, &daemon.logs());
    let request = RunPodSandboxRequest { config: Some(sandbox.clone()), runtime_handler: "plain".into() };
    let pod = cri.runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
    let config = cri.container("c", &image, &["sleep", "1000"]);
    let id = cri.run(&pod, &config, &sandbox).await.unwrap();
    assert_eq!((count(&dir("overlayfs")), count(&dir("native"))), (1, 2), "unpacked on demand, and the container's own");
    assert_eq!(cri.exec(&id, &["echo", "x"], 10).await.unwrap().exit_code, 0);
    cri.drop_pod(&pod).await.unwrap();
    remove(&mut cri, &image).await;
    eventually("both are collected", || count(&dir("overlayfs")) + count(&dir("native")) == 0).await;
    let pull = |handler: &str| {
        let image = Some(ImageSpec { image: image.clone(), runtime_handler: handler.into(), ..Default::default() });
        PullImageRequest { image, ..Default::default() }
    };
    cri.image.pull_image(pull("plain")).await.unwrap();
    assert_eq!((count(&dir("overlayfs")), count(&dir("native"))), (0, 1));
    assert_eq!(cri.image.pull_image(pull("nobody")).await.unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_discarded_where_that_is_wanted_and_come_back_when_they_are_needed() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let extra = "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.plain]\nsnapshotter = \"native\"\n";
    let daemon = Daemon::start_with(&Options { extra: extra.into(), ..Default::default() }, |text| {
        text.replace("snapshotter = \"overlayfs\"", "snapshotter = \"overlayfs\"\ndiscard_unpacked_layers = true")
    })
    .await
    .unwrap();
    let mut cri = daemon.cri().await.unwrap();
    let blobs = daemon.dir.join("root/io.containerd.content.v1.content/blobs/sha256");
    cri.pull(&image).await.unwrap();
    eventually("the layer goes", || count(&blobs) == 2).await;
    let before = registry.requests().len();
    cri.pull(&image).await.unwrap();
    assert!(!registry.requests()[before..].iter().any(|r| r.contains("/blobs/")), "{:?}", &registry.requests()[before..]);
    let sandbox = cri.pod("plain", true, &daemon.logs());
    let request = RunPodSandboxRequest { config: Some(sandbox.clone()), runtime_handler: "plain".into() };
    let pod = cri.runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
    cri.run(&pod, &cri.container("c", &image, &["sleep", "1000"]), &sandbox).await.unwrap();
    cri.drop_pod(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_whole_is_hidden_until_it_is_pulled_again() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let mut daemon = Daemon::start(&Options::default()).await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    cri.pull(&image).await.unwrap();
    let snapshots = daemon.dir.join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    let blobs = daemon.dir.join("root/io.containerd.content.v1.content/blobs/sha256");
    // Only the snapshot: the layers are there to unpack it again.
    daemon.kill();
    std::fs::remove_dir_all(&snapshots).unwrap();
    daemon.spawn().await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    assert_eq!(listed(&mut cri).await.len(), 1);
    let sandbox = cri.pod("heals", true, &daemon.logs());
    let pod = cri.run_pod(&sandbox).await.unwrap();
    let config = cri.container("c", &image, &["sleep", "1000"]);
    cri.run(&pod, &config, &sandbox).await.unwrap();
    cri.drop_pod(&pod).await.unwrap();
    // The layers, too.
    daemon.kill();
    std::fs::remove_dir_all(&snapshots).unwrap();
    for blob in std::fs::read_dir(&blobs).unwrap().flatten().filter(|b| b.metadata().unwrap().len() > 100_000) {
        std::fs::remove_file(blob.path()).unwrap();
    }
    daemon.spawn().await.unwrap();
    let mut cri = daemon.cri().await.unwrap();
    assert!(listed(&mut cri).await.is_empty(), "not shown");
    assert!(status(&mut cri, &image).await.is_none());
    cri.pull(&image).await.unwrap();
    assert_eq!(listed(&mut cri).await[0].repo_tags, std::slice::from_ref(&image));
    let pod = cri.run_pod(&sandbox).await.unwrap();
    cri.run(&pod, &config, &sandbox).await.unwrap();
    cri.drop_pod(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_under_way_shows_its_bytes_and_rate() {
    let registry = Registry::start().await;
    let image = registry.add_busybox().unwrap();
    let daemon = Daemon::start(&Options::default()).await.unwrap();
    let cri = daemon.cri().await.unwrap();
    registry.misbehave(&[Fault::Truncate, Fault::Stall]);
    let pull = tokio::spawn(async move { cri.clone().pull(&image).await });
    let mut seen = String::new();
    eventually("bytes and rate in the list of operations", || {
        seen = daemon.cli(&["ops"]).unwrap();
        let line = seen.lines().find(|l| l.contains("PullImage")).unwrap_or_default();
        line.contains("layers 0/1 done, 1 fetching") && line.contains("MiB/s") && !line.contains(" 0.0/")
    })
    .await;
    pull.abort();
    eventually("the operation ends with its client", || !daemon.cli(&["ops"]).unwrap().contains("PullImage")).await;
}

//! Pulling from a registry that behaves and from one that does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
use proto::cri::*;
use troupe_tests::daemon::{Daemon, Options};
use troupe_tests::registry::{Fault, Registry};

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

//! Disk usage of images and containers, as the kubelet's garbage collection wants it.
use crate::World;
use kernel::{Cx, Result};
use messages::snapshot;
use proto::cri;
use std::time::{Instant, SystemTime};

/// A measurement and when it was made.
pub(crate) type Known = (Instant, cri::ImageFsInfoResponse);

impl World {
    /// What the catalogue's change has made wrong is measured again at the next question.
    pub fn forget_usage(&self) {
        self.usage.borrow_mut().take();
    }

    /// ImageFsInfo: the default snapshotter's file system. Images and containers share it, so it is told as both.
    pub async fn fs_info(&self, cx: &Cx) -> Result<cri::ImageFsInfoResponse> {
        if let Some((_, known)) = self.usage.borrow().as_ref().filter(|(at, _)| at.elapsed() < self.args.usage_period) {
            return Ok(known.clone());
        }
        let (mut bytes, mut inodes) = (0, 0);
        let list = snapshot::List { snapshotter: self.args.snapshotter.clone() };
        for s in self.args.snapshots.call(cx, list).await? {
            let get = snapshot::GetUsage { snapshotter: s.snapshotter, key: s.key };
            // Removed in the meantime.
            let Ok(usage) = self.args.snapshots.call(cx, get).await else { continue };
            bytes += usage.bytes;
            inodes += usage.inodes;
        }
        let mountpoint = self.args.root.join(format!("io.containerd.snapshotter.v1.{}", self.args.snapshotter)).display().to_string();
        let usage = cri::FilesystemUsage {
            timestamp: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64),
            fs_id: Some(cri::FilesystemIdentifier { mountpoint }),
            used_bytes: Some(cri::UInt64Value { value: bytes }),
            inodes_used: Some(cri::UInt64Value { value: inodes }),
        };
        let answer = cri::ImageFsInfoResponse { image_filesystems: vec![usage.clone()], container_filesystems: vec![usage] };
        *self.usage.borrow_mut() = Some((Instant::now(), answer.clone()));
        Ok(answer)
    }
}

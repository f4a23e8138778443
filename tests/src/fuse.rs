//! A file system that never answers: it takes FUSE requests and is silent. What `stat` does to a dead NFS server, without a server.
use anyhow::{Context, Result};
use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Mounted; every request to it hangs until this is dropped.
pub struct Silent {
    /// Where.
    pub path: PathBuf,
    device: Option<Arc<std::fs::File>>,
    server: Option<std::thread::JoinHandle<()>>,
}

/// Opcode of the one request that is answered.
const INIT: u32 = 26;

impl Silent {
    /// Mounts it at `path`, which is made.
    pub fn mount(path: &Path) -> Result<Silent> {
        std::fs::create_dir_all(path)?;
        let device = std::fs::File::options().read(true).write(true).open("/dev/fuse").context("open /dev/fuse")?;
        let options = CString::new(format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd()))?;
        let target = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: mount(2) with strings that outlive the call.
        let mounted = unsafe { libc::mount(c"silent".as_ptr(), target.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast()) };
        anyhow::ensure!(mounted == 0, "mount a FUSE file system: {}", std::io::Error::last_os_error());
        let device = Arc::new(device);
        let served = device.clone();
        let server = std::thread::spawn(move || serve(&served));
        Ok(Silent { path: path.to_owned(), device: Some(device), server: Some(server) })
    }
}

/// Answers the greeting, reads all else and says nothing.
fn serve(device: &std::fs::File) {
    let mut buffer = vec![0u8; 1 << 20];
    while let Ok(n) = (&*device).read(&mut buffer) {
        if n < 40 || u32::from_ne_bytes([buffer[4], buffer[5], buffer[6], buffer[7]]) != INIT {
            continue;
        }
        // fuse_out_header, then fuse_init_out of version 7.31: major, minor, max_readahead, flags, max_background + congestion_threshold, max_write, time_gran.
        let mut answer = Vec::new();
        answer.extend((16u32 + 64).to_ne_bytes());
        answer.extend(0i32.to_ne_bytes());
        answer.extend(&buffer[8..16]);
        for word in [7u32, 31, 0, 0, 0, 4096, 1] {
            answer.extend(word.to_ne_bytes());
        }
        answer.resize(16 + 64, 0);
        let _ = (&*device).write(&answer);
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let target = CString::new(self.path.as_os_str().as_bytes()).unwrap_or_default();
        // The connection's number is the device's; aborting it ends every request that hangs, and the server's read.
        if let Ok(table) = std::fs::read_to_string("/proc/self/mountinfo") {
            let own = self.path.display().to_string();
            let line = table.lines().find(|l| l.split(' ').nth(4) == Some(own.as_str()));
            if let Some(minor) = line.and_then(|l| l.split(' ').nth(2)).and_then(|d| d.split(':').nth(1)) {
                let _ = std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
            }
        }
        // SAFETY: umount2(2) with a string that outlives the call; MNT_FORCE aborts the requests where /sys could not.
        unsafe {
            libc::umount2(target.as_ptr(), libc::MNT_FORCE);
            libc::umount2(target.as_ptr(), libc::MNT_DETACH);
        }
        self.device.take();
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
        let _ = std::fs::remove_dir(&self.path);
    }
}

//! Room kept back for the day the disk is full: deleting writes, too, and a node that cannot write cannot even make room.
use kernel::{Fault, Result, ResultExt};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes kept back: the database rewrites some pages for each commit and reuses them; this is enough for thousands of deletions.
const SIZE: usize = 4 << 20;

/// The reserve: a file beside the database.
pub struct Reserve(PathBuf);

impl Reserve {
    /// Beside the database `path`; laid in if there is room.
    pub fn beside(path: &Path) -> Reserve {
        let reserve = Reserve(path.with_extension("reserve"));
        if let Err(error) = reserve.lay_in() {
            tracing::warn!(%error, "no room is kept back for the metadata database");
        }
        reserve
    }
    /// Lays it in again, with as much to spare. Fails when the disk is still full.
    pub fn lay_in(&self) -> Result<()> {
        if self.0.metadata().is_ok_and(|m| m.len() == SIZE as u64) {
            return Ok(());
        }
        let what = || format!("keep room back in {}", self.0.display());
        let spare = self.0.with_extension("spare");
        let written = write(&self.0).and_then(|()| write(&spare));
        let _ = std::fs::remove_file(spare);
        if written.is_err() {
            self.give_up();
        }
        written.map_err(Fault::from).with_context(what)
    }
    /// Gives its room to the database.
    pub fn give_up(&self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Real blocks, not a hole.
fn write(path: &Path) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    let block = [0x5a; 1 << 16];
    for _ in 0..SIZE / block.len() {
        file.write_all(&block)?;
    }
    file.sync_data()
}

//! OCI artifacts as image volumes: every layer is a file, named by its title. They become one tar, and that one snapshot like any other, so that views,
//! mounts and the collector need not know of artifacts.
use crate::manifest::Descriptor;
use kernel::{Fault, Result, ResultExt};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Take};
use std::path::PathBuf;

/// The layer's file name.
pub(crate) const TITLE: &str = "org.opencontainers.image.title";

/// Size of a tar's block.
const BLOCK: usize = 512;

/// File name of a layer: its title, or its digest's digits.
pub(crate) fn title(d: &Descriptor) -> String {
    let named = d.annotations.get(TITLE).map(|t| t.trim_matches('/')).filter(|t| !t.is_empty());
    named.map_or_else(|| d.digest.trim_start_matches("sha256:").to_owned(), str::to_owned)
}

/// A tar of these files (name, path, bytes), read as it is needed.
pub(crate) fn tar(files: Vec<(String, PathBuf, u64)>) -> Result<Files> {
    let mut parts = VecDeque::new();
    for (name, path, size) in files {
        let mut header = Vec::new();
        let mut entry = tar::Header::new_gnu();
        entry.set_entry_type(tar::EntryType::Regular);
        entry.set_mode(0o644);
        entry.set_uid(0);
        entry.set_gid(0);
        entry.set_mtime(0);
        entry.set_size(size);
        // The builder writes long names as GNU does; the content comes from the file.
        let mut builder = tar::Builder::new(&mut header);
        builder.append_data(&mut entry, &name, std::io::empty()).map_err(|e| Fault::invalid_argument(format!("title {name:?}: {e}")))?;
        drop(builder);
        header.truncate(header.len().saturating_sub(2 * BLOCK));
        parts.push_back(Part::Bytes(header, 0));
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        parts.push_back(Part::File(file.take(size)));
        let padding = (BLOCK - (size as usize % BLOCK)) % BLOCK;
        parts.push_back(Part::Bytes(vec![0; padding], 0));
    }
    parts.push_back(Part::Bytes(vec![0; 2 * BLOCK], 0));
    Ok(Files(parts))
}

enum Part {
    Bytes(Vec<u8>, usize),
    File(Take<File>),
}

/// The tar.
pub(crate) struct Files(VecDeque<Part>);

impl Read for Files {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let read = match self.0.front_mut() {
                None => return Ok(0),
                Some(Part::File(file)) => file.read(into)?,
                Some(Part::Bytes(bytes, at)) => {
                    let n = into.len().min(bytes.len() - *at);
                    into[..n].copy_from_slice(&bytes[*at..*at + n]);
                    *at += n;
                    n
                }
            };
            if read > 0 || into.is_empty() {
                return Ok(read);
            }
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn files_become_a_tar() {
        let dir = std::env::temp_dir().join(format!("troupe-artifact-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let long = format!("models/{}.bin", "x".repeat(150));
        let contents = [("a.txt".to_owned(), b"hello".to_vec()), (long, vec![7u8; 1024]), ("empty".to_owned(), vec![])];
        let files = contents.iter().enumerate().map(|(n, (name, bytes))| {
            std::fs::write(dir.join(n.to_string()), bytes).unwrap();
            (name.clone(), dir.join(n.to_string()), bytes.len() as u64)
        });
        let mut archive = tar::Archive::new(tar(files.collect()).unwrap());
        let mut found = vec![];
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut bytes = vec![];
            entry.read_to_end(&mut bytes).unwrap();
            found.push((entry.path().unwrap().to_string_lossy().into_owned(), bytes));
        }
        assert_eq!(found, contents);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

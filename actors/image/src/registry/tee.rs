//! From the download to whoever unpacks it meanwhile: a bounded pipe that tells the end of the bytes from the end of the connection.
use bytes::Bytes;
use std::io::{Error, ErrorKind, Read, Result};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Chunks under way: they are at most 256 KiB each.
const CHUNKS: usize = 32;

/// The writing end.
pub struct Tee(SyncSender<Option<Bytes>>);

impl Tee {
    /// Waits for room; false when nobody reads any more.
    pub fn send(&self, chunk: Bytes) -> bool {
        self.0.send(Some(chunk)).is_ok()
    }
    /// Says that these were all bytes.
    pub fn end(self) {
        // A reader that has gone away needs no end.
        let _ = self.0.send(None);
    }
}

/// The reading end.
pub struct Pipe {
    chunks: Receiver<Option<Bytes>>,
    rest: Bytes,
    ended: bool,
}

/// A new pipe.
pub fn tee() -> (Tee, Pipe) {
    let (sender, chunks) = sync_channel(CHUNKS);
    (Tee(sender), Pipe { chunks, rest: Bytes::new(), ended: false })
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        while self.rest.is_empty() && !self.ended {
            match self.chunks.recv() {
                Ok(Some(chunk)) => self.rest = chunk,
                Ok(None) => self.ended = true,
                Err(_) => return Err(Error::new(ErrorKind::UnexpectedEof, "the download ended before the layer did")),
            }
        }
        let n = self.rest.len().min(into.len());
        into[..n].copy_from_slice(&self.rest.split_to(n));
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_end_and_a_break_are_told_apart() {
        let (to, mut from) = tee();
        assert!(to.send(Bytes::from_static(b"ab")));
        to.end();
        let mut all = vec![];
        from.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"ab");
        let (to, mut from) = tee();
        drop(to);
        assert_eq!(from.read(&mut [0; 4]).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}

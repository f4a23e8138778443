//! Who reads a stream live: attached clients, and the one client of an exec's terminal.
//!
//! Owns: for each client a queue and a task that carries it into the client's FIFO. The container's output waits for nobody long: a client that
//! is [`QUEUE`] pieces behind and takes nothing for [`PATIENCE`] is cut off, which it is told by a file beside its FIFO (`<fifo>.cut`); the log has
//! everything. One that reads, however slowly, loses nothing. The client of an exec is waited for: nobody else reads that stream.
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Pieces of at most 16 KiB that wait for a client: 1 MiB, taken only while it is behind.
const QUEUE: usize = 64;
/// How long one that is that far behind may take nothing.
const PATIENCE: Duration = Duration::from_millis(250);

struct Client {
    queue: mpsc::Sender<Arc<[u8]>>,
    carrier: AbortHandle,
    /// `None`: it is waited for.
    cut: Option<PathBuf>,
}

impl Client {
    fn new(fifo: pipe::Sender, cut: Option<PathBuf>) -> Client {
        let (queue, pieces) = mpsc::channel(QUEUE);
        let carrier = tokio::spawn(carry(fifo, pieces)).abort_handle();
        Client { queue, carrier, cut }
    }
    /// Gives it a piece; `false` when it is gone or cut off.
    async fn give(&self, piece: &Arc<[u8]>) -> bool {
        match self.queue.try_send(piece.clone()) {
            Ok(()) => return true,
            Err(mpsc::error::TrySendError::Closed(_)) => return false,
            Err(mpsc::error::TrySendError::Full(_)) => {}
        }
        let Some(cut) = &self.cut else { return self.queue.send(piece.clone()).await.is_ok() };
        match self.queue.send_timeout(piece.clone(), PATIENCE).await {
            Ok(()) => true,
            Err(mpsc::error::SendTimeoutError::Closed(_)) => false,
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                // Before the end that the client will see. If it cannot be told it sees the end alone.
                let _ = std::fs::File::create(cut);
                self.carrier.abort();
                false
            }
        }
    }
}

async fn carry(mut fifo: pipe::Sender, mut pieces: mpsc::Receiver<Arc<[u8]>>) {
    while let Some(piece) = pieces.recv().await {
        if fifo.write_all(&piece).await.is_err() {
            return;
        }
    }
}

/// The clients of one stream; all clones are the same.
#[derive(Clone)]
pub struct Clients(Arc<Mutex<Option<Vec<Client>>>>);

impl Default for Clients {
    fn default() -> Self {
        Clients(Arc::new(Mutex::new(Some(vec![]))))
    }
}

impl Clients {
    fn all(&self) -> MutexGuard<'_, Option<Vec<Client>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn add(&self, client: Client) {
        // A stream that has ended shows its end at once.
        if let Some(all) = self.all().as_mut() {
            all.push(client);
        }
    }
    /// Adds the client behind a FIFO that somebody reads already.
    pub fn attach(&self, path: &str) -> io::Result<()> {
        self.add(Client::new(pipe::OpenOptions::new().open_sender(path)?, Some(format!("{path}.cut").into())));
        Ok(())
    }
    /// Adds the one whose stream it is.
    pub fn own(&self, fifo: pipe::Sender) {
        self.add(Client::new(fifo, None));
    }
    /// Gives all of them a piece.
    pub async fn give(&self, bytes: &[u8]) {
        let mut now = self.all().as_mut().map(std::mem::take).unwrap_or_default();
        if now.is_empty() {
            return;
        }
        let piece: Arc<[u8]> = bytes.into();
        let mut kept = Vec::with_capacity(now.len());
        for client in now.drain(..) {
            if client.give(&piece).await {
                kept.push(client);
            }
        }
        // Some may have come meanwhile.
        if let Some(all) = self.all().as_mut() {
            all.append(&mut kept);
        }
    }
    /// No more comes: each sees the end behind what it was given.
    pub fn end(&self) {
        self.all().take();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Instant;
    use tokio::io::AsyncReadExt;

    fn fifo(name: &str) -> (String, pipe::Receiver) {
        let path = std::env::temp_dir().join(format!("troupe-clients-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        (path.to_string_lossy().into_owned(), reader)
    }

    #[tokio::test]
    async fn one_that_never_reads_is_cut_off_and_told_and_costs_others_little() {
        let ((stuck, mut silent), (lively, mut reader)) = (fifo("stuck"), fifo("lively"));
        let clients = Clients::default();
        clients.attach(&stuck).unwrap();
        clients.attach(&lively).unwrap();
        let reading = tokio::spawn(async move {
            let mut all = vec![];
            reader.read_to_end(&mut all).await.unwrap();
            all.len()
        });
        let began = Instant::now();
        let piece = [b'x'; 16 << 10];
        for _ in 0..1000 {
            clients.give(&piece).await;
        }
        clients.end();
        assert_eq!(reading.await.unwrap(), 1000 * piece.len(), "the other lost nothing");
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        let cut = PathBuf::from(format!("{stuck}.cut"));
        assert!(cut.exists(), "it is told");
        let mut rest = vec![];
        tokio::time::timeout(Duration::from_secs(5), silent.read_to_end(&mut rest)).await.unwrap().unwrap();
        for path in [stuck.into(), lively.into(), cut] {
            let _ = std::fs::remove_file(path);
        }
    }

    #[tokio::test]
    async fn one_that_comes_after_the_end_sees_it() {
        let (path, mut reader) = fifo("late");
        let clients = Clients::default();
        clients.end();
        clients.attach(&path).unwrap();
        let mut all = vec![];
        tokio::time::timeout(Duration::from_secs(5), reader.read_to_end(&mut all)).await.unwrap().unwrap();
        let _ = std::fs::remove_file(path);
    }
}

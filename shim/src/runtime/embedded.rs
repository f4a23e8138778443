//! The embedded engine, seen from the server: each step is a request to the engine's process ([`crate::engine`]).
use super::{Checkpoint, ChildIo, EMBEDDED, note};
use crate::engine::{Engine, Request};
use std::io;
use std::path::{Path, PathBuf};

/// libcontainer in the engine's process.
#[derive(Clone)]
pub struct Embedded {
    engine: Engine,
    root: PathBuf,
    systemd: bool,
}

impl Embedded {
    /// Over `root`, the directory of its state.
    pub fn new(engine: Engine, root: &Path, systemd: bool) -> Embedded {
        Embedded { engine, root: root.into(), systemd }
    }
    fn request(&self, step: &str, id: &str) -> Request {
        Request { step: step.into(), id: id.into(), root: self.root.clone(), systemd: self.systemd, ..Default::default() }
    }
    async fn ask(&self, mut request: Request, io: Option<ChildIo>) -> io::Result<u32> {
        let mut fds = Vec::new();
        match io {
            Some(ChildIo::Streams(s)) => fds.extend([s.stdin, s.stdout, s.stderr]),
            Some(ChildIo::Terminal(socket)) => request.console = Some(socket),
            None => {}
        }
        self.engine.ask(&request, fds).await
    }
    /// Creates.
    pub async fn create(&self, id: &str, bundle: &Path, io: ChildIo) -> io::Result<u32> {
        std::fs::create_dir_all(&self.root)?;
        note(bundle, EMBEDDED, &self.root, self.systemd)?;
        self.ask(Request { bundle: bundle.into(), ..self.request("create", id) }, Some(io)).await
    }
    /// Starts.
    pub async fn start(&self, id: &str) -> io::Result<()> {
        self.ask(self.request("start", id), None).await.map(drop)
    }
    /// Runs a further process.
    pub async fn exec(&self, id: &str, exec_id: &str, bundle: &Path, process: &[u8], io: ChildIo) -> io::Result<u32> {
        let file = bundle.join(format!("{exec_id}.json"));
        std::fs::write(&file, process)?;
        let done = self.ask(Request { file: Some(file.clone()), bundle: bundle.into(), ..self.request("exec", id) }, Some(io)).await;
        let _ = std::fs::remove_file(file);
        done
    }
    /// Deletes.
    pub async fn delete(&self, id: &str, bundle: &Path) -> io::Result<()> {
        self.ask(Request { bundle: bundle.into(), ..self.request("delete", id) }, None).await.map(drop)
    }
    /// Pauses or resumes.
    pub async fn freeze(&self, id: &str, pause: bool) -> io::Result<()> {
        self.ask(self.request(if pause { "pause" } else { "resume" }, id), None).await.map(drop)
    }
    /// Writes the processes down with CRIU.
    pub async fn checkpoint(&self, id: &str, bundle: &Path, wish: &Checkpoint) -> io::Result<()> {
        let file = bundle.join("checkpoint.json");
        std::fs::write(&file, wish.json().to_string())?;
        let done = self.ask(Request { file: Some(file.clone()), bundle: bundle.into(), ..self.request("checkpoint", id) }, None).await;
        let _ = std::fs::remove_file(file);
        done.map(drop)
    }
    /// Updates resources.
    pub async fn update(&self, id: &str, bundle: &Path, resources: &[u8]) -> io::Result<()> {
        let file = bundle.join("resources.json");
        std::fs::write(&file, resources)?;
        let done = self.ask(Request { file: Some(file.clone()), ..self.request("update", id) }, None).await.map(drop);
        let _ = std::fs::remove_file(file);
        done
    }
}

//! The embedded engine, seen from the server: each step is a request to the engine's process ([`crate::engine`]).
use super::{Checkpoint, ChildIo, DELETION, EMBEDDED, note};
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

/// A file of one step, removed with it.
struct Passing(PathBuf);

impl Drop for Passing {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
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
    pub async fn start(&self, id: &str, bundle: &Path) -> io::Result<()> {
        self.ask(Request { bundle: bundle.into(), ..self.request("start", id) }, None).await.map(drop)
    }
    /// Runs a further process.
    pub async fn exec(&self, id: &str, exec_id: &str, bundle: &Path, process: &[u8], io: ChildIo) -> io::Result<u32> {
        let file = bundle.join(format!("{exec_id}.json"));
        std::fs::write(&file, process)?;
        let _file = Passing(file.clone());
        self.ask(Request { file: Some(file), bundle: bundle.into(), ..self.request("exec", id) }, Some(io)).await
    }
    /// Deletes. A hook that hangs keeps nobody from that.
    pub async fn delete(&self, id: &str, bundle: &Path) -> io::Result<()> {
        let step = |step| self.ask(Request { bundle: bundle.into(), ..self.request(step, id) }, None);
        match tokio::time::timeout(DELETION, step("delete")).await {
            Ok(done) => done.map(drop),
            Err(_) => step("give back").await.map(drop),
        }
    }
    /// Pauses or resumes.
    pub async fn freeze(&self, id: &str, pause: bool) -> io::Result<()> {
        self.ask(self.request(if pause { "pause" } else { "resume" }, id), None).await.map(drop)
    }
    /// Writes the processes down with CRIU.
    pub async fn checkpoint(&self, id: &str, bundle: &Path, wish: &Checkpoint) -> io::Result<()> {
        let file = bundle.join("checkpoint.json");
        std::fs::write(&file, wish.json().to_string())?;
        let _file = Passing(file.clone());
        self.ask(Request { file: Some(file), bundle: bundle.into(), ..self.request("checkpoint", id) }, None).await.map(drop)
    }
    /// Updates resources.
    pub async fn update(&self, id: &str, bundle: &Path, resources: &[u8]) -> io::Result<()> {
        let file = bundle.join("resources.json");
        std::fs::write(&file, resources)?;
        let _file = Passing(file.clone());
        self.ask(Request { file: Some(file), ..self.request("update", id) }, None).await.map(drop)
    }
}

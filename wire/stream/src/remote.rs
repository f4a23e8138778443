//! Exec and Attach: a client's channels become the backend's [`Io`]; the result goes out on the error channel.
use crate::spdy::Connection;
use crate::{Config, Io, Request, Server, Wanted, status};
use kernel::{Fault, Result};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

/// Bytes of a terminal's size at most.
const SIZE: usize = 1024;

/// What the client made.
#[derive(Default)]
pub(crate) struct Channels {
    pub stdin: Option<DuplexStream>,
    pub stdout: Option<DuplexStream>,
    pub stderr: Option<DuplexStream>,
    pub error: Option<DuplexStream>,
    pub resize: Option<DuplexStream>,
}

/// Takes the streams of a SPDY client as they come.
pub(crate) async fn gather(connection: &mut Connection, wanted: &Wanted, version: u8, config: &Config) -> Result<Channels> {
    let mut all = Channels::default();
    let complete = |all: &Channels| {
        all.error.is_some()
            && (!wanted.stdin || all.stdin.is_some())
            && (!wanted.stdout || all.stdout.is_some())
            && (!wanted.stderr || all.stderr.is_some())
            && (!wanted.tty || version < 3 || all.resize.is_some())
    };
    let gathering = async {
        while !complete(&all) {
            let Some(stream) = connection.streams.recv().await else { return Err(Fault::unavailable("the client is gone")) };
            match stream.headers.get("streamType") {
                "stdin" => all.stdin = Some(stream.io),
                "stdout" => all.stdout = Some(stream.io),
                "stderr" => all.stderr = Some(stream.io),
                "error" => all.error = Some(stream.io),
                "resize" => all.resize = Some(stream.io),
                other => return Err(Fault::invalid_argument(format!("stream {} has the unknown type {other:?}", stream.id))),
            }
        }
        Ok(())
    };
    tokio::time::timeout(config.creation, gathering).await.unwrap_or_else(|_| Err(status::late("exec or attach")))?;
    Ok(all)
}

/// Runs a request over the channels, and tells its end. `gone` is done when the client is.
pub(crate) async fn run(server: &Server, request: Request, channels: Channels, version: u8, gone: impl Future<Output = ()>) {
    let Channels { stdin, stdout, stderr, error, resize } = channels;
    let (sizes, receiver) = mpsc::channel(4);
    let resizing = resize.map(|from| tokio::spawn(read_sizes(from, sizes)));
    let (backend, config) = (&server.0.backend, &server.0.config);
    let (leaves, work) = match request {
        Request::Exec { container, command, wanted } => {
            let io = io(&wanted, stdin, stdout, stderr, receiver);
            // A command with a terminal has lost its user. One without has the time to come to an end: its input has ended.
            (wanted.tty, backend.exec(container, command, wanted.tty, io))
        }
        Request::Attach { container, wanted } => {
            let io = io(&wanted, stdin, stdout, stderr, receiver);
            let work = backend.attach(container, io);
            (true, Box::pin(async move { work.await.map(|()| 0) }) as futures::future::BoxFuture<'_, Result<i32>>)
        }
        Request::PortForward { .. } => return,
    };
    let left = async {
        gone.await;
        if !leaves {
            tokio::time::sleep(config.grace).await;
        }
    };
    let result = tokio::select! {
        result = work => Some(result),
        () = left => None,
    };
    if let Some(task) = resizing {
        task.abort();
    }
    if let (Some(result), Some(mut error)) = (result, error) {
        // The client may be gone.
        let _ = error.write_all(&status::encode(version, &result)).await;
        let _ = error.shutdown().await;
    }
}

fn io(
    wanted: &Wanted,
    stdin: Option<DuplexStream>,
    stdout: Option<DuplexStream>,
    stderr: Option<DuplexStream>,
    resize: mpsc::Receiver<(u16, u16)>,
) -> Io {
    Io {
        stdin: stdin.filter(|_| wanted.stdin).map(|s| Box::new(s) as _),
        stdout: stdout.filter(|_| wanted.stdout).map(|s| Box::new(s) as _),
        stderr: stderr.filter(|_| wanted.stderr).map(|s| Box::new(s) as _),
        resize,
    }
}

/// Sizes come as JSON objects, one after another.
async fn read_sizes(mut from: DuplexStream, to: mpsc::Sender<(u16, u16)>) {
    let mut text = Vec::new();
    let mut buffer = [0; 256];
    loop {
        let n = from.read(&mut buffer).await.unwrap_or(0);
        if n == 0 || text.len() > SIZE {
            return;
        }
        text.extend_from_slice(&buffer[..n]);
        while let Some(end) = text.iter().position(|b| *b == b'}') {
            let object: Vec<u8> = text.drain(..=end).collect();
            let Ok(size) = serde_json::from_slice::<Value>(&object) else { continue };
            let number = |key: &str| size[key].as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
            if let (Some(width), Some(height)) = (number("Width"), number("Height"))
                && to.send((width, height)).await.is_err()
            {
                return;
            }
        }
    }
}

//! The command line's side of the control API: JSON over HTTP/1 on a unix socket.
pub mod actors;
pub mod chaos;
pub mod events;
pub mod ops;
pub mod trace;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use std::time::Duration;

/// A daemon to talk to.
pub struct Client {
    /// Its control socket.
    pub socket: PathBuf,
    /// Print JSON instead of tables.
    pub json: bool,
}

impl Client {
    fn block_on<T>(&self, f: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(f)
    }

    async fn open(&self, method: Method, path: &str, body: String) -> anyhow::Result<Response<Incoming>> {
        let stream = tokio::net::UnixStream::connect(&self.socket).await;
        let stream = stream
            .with_context(|| format!("connect to {}: is the daemon running? (--control names another socket)", self.socket.display()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "troupe").body(Full::new(Bytes::from(body)))?;
        Ok(sender.send_request(request).await?)
    }

    /// One request; answers its body, or the daemon's error text.
    pub fn request(&self, method: Method, path: &str, body: String) -> anyhow::Result<String> {
        self.block_on(async {
            let response = self.open(method, path, body).await?;
            let status = response.status();
            let text = String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?;
            if !status.is_success() {
                let message = serde_json::from_str::<serde_json::Value>(&text).ok().and_then(|v| v["message"].as_str().map(str::to_owned));
                bail!("{}", message.unwrap_or(text));
            }
            Ok(text)
        })
    }

    /// A GET, decoded. With `--json` the body is printed instead and `None` comes back.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<Option<T>> {
        let text = self.request(Method::GET, path, String::new())?;
        if self.json {
            println!("{text}");
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&text)?))
    }

    /// A GET whose body is followed line by line.
    pub fn follow(&self, path: &str, mut each: impl FnMut(&str)) -> anyhow::Result<()> {
        self.block_on(async {
            let mut body = self.open(Method::GET, path, String::new()).await?.into_body();
            let mut rest = String::new();
            while let Some(frame) = body.frame().await {
                if let Ok(data) = frame?.into_data() {
                    rest.push_str(&String::from_utf8_lossy(&data));
                    while let Some((line, after)) = rest.split_once('\n') {
                        each(line);
                        rest = after.to_owned();
                    }
                }
            }
            Ok(())
        })
    }
}

/// `troupe health`.
pub fn health(client: &Client) -> anyhow::Result<()> {
    println!("{}", client.request(Method::GET, "/healthz", String::new())?);
    Ok(())
}

/// A duration in the unit that suits it.
pub fn human(d: Duration) -> String {
    match d.as_micros() {
        0..1_000 => format!("{}us", d.as_micros()),
        1_000..1_000_000 => format!("{:.1}ms", d.as_secs_f64() * 1e3),
        1_000_000..60_000_000 => format!("{:.1}s", d.as_secs_f64()),
        _ => format!("{}m{:02}s", d.as_secs() / 60, d.as_secs() % 60),
    }
}

/// Prints rows in columns; the last column is not padded.
pub fn table(header: &[&str], rows: &[Vec<String>]) {
    let width = |n: usize| rows.iter().map(|r| r[n].chars().count()).chain([header[n].len()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells
            .iter()
            .enumerate()
            .map(|(n, cell)| if n + 1 == cells.len() { (*cell).to_owned() } else { format!("{cell:w$}", w = widths[n]) });
        println!("{}", padded.collect::<Vec<_>>().join("  "));
    };
    line(header.to_vec());
    for row in rows {
        line(row.iter().map(String::as_str).collect());
    }
}

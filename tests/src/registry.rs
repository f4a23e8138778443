//! A small image registry on loopback, so that tests and the demonstration pull through the real pull path on a machine without one.
//! It serves images assembled here from Debian's static busybox, and can be told to misbehave.
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Only layers are misbehaved with; configurations are smaller than this.
const LARGE: usize = 100_000;

/// A tar being written.
pub type Layer = tar::Builder<Vec<u8>>;

/// Ways to misbehave, one request at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Half of the blob, then the connection ends.
    Truncate,
    /// Other bytes than the digest says.
    Corrupt,
    /// `429 Too Many Requests`.
    TooMany,
    /// Headers, then nothing.
    Stall,
    /// A redirect to itself, for ever.
    Loop,
}

/// Who may read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// Whoever shows this `user:password`.
    Basic(String),
    /// Whoever shows this token; the registry's own token server gives it to whoever shows this `user:password` or refresh token.
    Bearer(String, String),
}

/// A request as it came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// `GET`.
    pub method: String,
    /// Path below `/v2/`, or of the token server.
    pub path: String,
    /// Query.
    pub query: String,
    /// `Authorization`, empty = none.
    pub authorization: String,
    /// `x-test`, empty = none.
    pub extra: String,
    /// Body of a POST.
    pub body: String,
}

#[derive(Default)]
struct Shelf {
    blobs: BTreeMap<String, Vec<u8>>,
    tags: BTreeMap<String, String>,
    faults: Vec<Fault>,
    requests: Vec<String>,
    seen: Vec<Seen>,
    guard: Option<Guard>,
    /// Blobs are elsewhere: the client is sent there.
    elsewhere: Option<String>,
    /// What `Retry-After` says.
    patience_s: u64,
    address: String,
}

/// The registry. Stops when dropped.
pub struct Registry {
    /// `127.0.0.1:port`.
    pub address: String,
    shelf: Arc<Mutex<Shelf>>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// `sha256:…` of bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

impl Registry {
    /// Starts on a free port of 127.0.0.1.
    pub async fn start() -> Registry {
        let shelf = Arc::new(Mutex::new(Shelf::default()));
        let app = Router::new()
            .route("/v2/", axum::routing::get(|| async { "{}" }))
            .route("/v2/{*path}", axum::routing::get(serve))
            .route("/token", axum::routing::get(token).post(token))
            .with_state(shelf.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (shelf.lock().unwrap().address, shelf.lock().unwrap().patience_s) = (address.clone(), 1);
        let server = tokio::spawn(async move {
            let _ = axum::serve(listener, app).await;
        });
        Registry { address, shelf, server }
    }

    /// The next blob requests misbehave so, in this order.
    pub fn misbehave(&self, faults: &[Fault]) {
        self.shelf.lock().unwrap().faults.extend_from_slice(faults);
    }

    /// Misbehaviours that are still to come.
    pub fn to_come(&self) -> usize {
        self.shelf.lock().unwrap().faults.len()
    }

    /// Requests so far, `METHOD path range`.
    pub fn requests(&self) -> Vec<String> {
        self.shelf.lock().unwrap().requests.clone()
    }

    /// No more misbehaviour.
    pub fn behave(&self) {
        self.shelf.lock().unwrap().faults.clear();
    }

    /// Requests so far, whole.
    pub fn seen(&self) -> Vec<Seen> {
        self.shelf.lock().unwrap().seen.clone()
    }

    /// Only these may read from now on.
    pub fn guard(&self, guard: Guard) {
        self.shelf.lock().unwrap().guard = Some(guard);
    }

    /// Blobs are at this registry (`http://host:port`) from now on: clients are redirected, with a signature in the query.
    pub fn redirect_blobs(&self, to: &Registry) {
        to.shelf.lock().unwrap().blobs = self.shelf.lock().unwrap().blobs.clone();
        self.shelf.lock().unwrap().elsewhere = Some(format!("http://{}", to.address));
    }

    /// What `429` answers say from now on.
    pub fn patience(&self, seconds: u64) {
        self.shelf.lock().unwrap().patience_s = seconds;
    }

    /// Adds a tag for an image that is there; answers its full reference.
    pub fn tag(&self, from: &str, to: &str) -> String {
        let mut shelf = self.shelf.lock().unwrap();
        let key = |name: &str| name.rsplit_once(':').map(|(r, t)| format!("{r}/manifests/{t}")).unwrap();
        let digest = shelf.tags[&key(from)].clone();
        shelf.tags.insert(key(to), digest.clone());
        let repository = to.rsplit_once(':').unwrap().0;
        shelf.tags.insert(format!("{repository}/manifests/{digest}"), digest);
        format!("{}/{to}", self.address)
    }

    /// Digest of the manifest that `repository:tag` points to.
    pub fn digest_of(&self, name: &str) -> String {
        let (repository, tag) = name.rsplit_once(':').unwrap();
        self.shelf.lock().unwrap().tags[&format!("{repository}/manifests/{tag}")].clone()
    }

    /// Adds an OCI artifact of these files (title, bytes).
    pub fn add_artifact(&self, name: &str, files: &[(&str, &[u8])]) -> String {
        let mut shelf = self.shelf.lock().unwrap();
        let mut layers = vec![];
        for (title, bytes) in files {
            let mut descriptor = shelf.put("application/octet-stream", bytes.to_vec());
            descriptor["annotations"] = serde_json::json!({"org.opencontainers.image.title": title});
            layers.push(descriptor);
        }
        let config = shelf.put("application/vnd.oci.empty.v1+json", b"{}".to_vec());
        let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/x.files",
            "config": config, "layers": layers});
        let digest = shelf.put(MANIFEST, manifest.to_string().into_bytes())["digest"].as_str().unwrap().to_owned();
        let (repository, tag) = name.rsplit_once(':').unwrap();
        shelf.tags.insert(format!("{repository}/manifests/{tag}"), digest.clone());
        shelf.tags.insert(format!("{repository}/manifests/{digest}"), digest);
        format!("{}/{name}", self.address)
    }

    /// Adds an image of these layers (gzip); `name` as `repository:tag`. Answers the full reference.
    pub fn add(&self, name: &str, layers: Vec<Layer>, config: serde_json::Value) -> String {
        let mut shelf = self.shelf.lock().unwrap();
        let (mut diff_ids, mut descriptors) = (vec![], vec![]);
        for layer in layers {
            let tar = layer.into_inner().unwrap();
            diff_ids.push(digest(&tar));
            let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gz.write_all(&tar).unwrap();
            let blob = gz.finish().unwrap();
            descriptors.push(shelf.put("application/vnd.oci.image.layer.v1.tar+gzip", blob));
        }
        let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = shelf.put("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
        let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": descriptors});
        let descriptor = shelf.put(MANIFEST, manifest.to_string().into_bytes());
        let (repository, tag) = name.rsplit_once(':').unwrap();
        let digest = descriptor["digest"].as_str().unwrap().to_owned();
        shelf.tags.insert(format!("{repository}/manifests/{tag}"), digest.clone());
        shelf.tags.insert(format!("{repository}/manifests/{digest}"), digest);
        format!("{}/{name}", self.address)
    }

    /// Adds `busybox:latest` made of the machine's static busybox.
    pub fn add_busybox(&self) -> anyhow::Result<String> {
        Ok(self.add("library/busybox:latest", vec![busybox_layer()?], serde_json::json!({"Env": ["PATH=/bin"], "Cmd": ["sh"]})))
    }
}

impl Shelf {
    fn put(&mut self, media_type: &str, blob: Vec<u8>) -> serde_json::Value {
        let digest = digest(&blob);
        let descriptor = serde_json::json!({"mediaType": media_type, "digest": digest, "size": blob.len()});
        self.blobs.insert(digest, blob);
        descriptor
    }
}

/// A layer with busybox and links for its applets, `/etc/passwd`, `/tmp` and `/proc`.
pub fn busybox_layer() -> anyhow::Result<Layer> {
    let path = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| std::path::Path::new(p).exists());
    let path = path.ok_or_else(|| anyhow::anyhow!("no static busybox on this machine: apt-get install busybox-static"))?;
    let mut layer = Layer::new(Vec::new());
    for (dir, mode) in
        [("bin/", 0o755), ("etc/", 0o755), ("tmp/", 0o1777), ("proc/", 0o555), ("sys/", 0o555), ("dev/", 0o755), ("root/", 0o700)]
    {
        put(&mut layer, dir, tar::EntryType::Directory, mode, b"");
    }
    put(&mut layer, "bin/busybox", tar::EntryType::Regular, 0o755, &std::fs::read(path)?);
    put(&mut layer, "etc/passwd", tar::EntryType::Regular, 0o644, b"root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n");
    put(&mut layer, "etc/group", tar::EntryType::Regular, 0o644, b"root:x:0:\nweb:x:1000:\nextra:x:2000:web\n");
    let applets = std::process::Command::new(path).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|a| *a != "busybox" && !a.is_empty()) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_mode(0o777);
        header.set_size(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    Ok(layer)
}

/// Appends an entry owned by root.
pub fn put(layer: &mut Layer, path: &str, kind: tar::EntryType, mode: u32, data: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(data.len() as u64);
    header.set_mtime(1_700_000_000);
    header.set_uid(0);
    header.set_gid(0);
    layer.append_data(&mut header, path, data).unwrap();
}

/// The token server.
async fn token(
    State(shelf): State<Arc<Mutex<Shelf>>>,
    method: Method,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
    body: String,
) -> Response {
    let mut shelf = shelf.lock().unwrap();
    let seen = Seen { body, ..seen(&method, "token", query, &headers) };
    shelf.seen.push(seen.clone());
    let Some(Guard::Bearer(secret, token)) = &shelf.guard else { return StatusCode::NOT_FOUND.into_response() };
    let refresh = seen.body.contains("grant_type=refresh_token") && seen.body.contains(&format!("refresh_token={secret}"));
    if refresh || seen.authorization == basic(secret) {
        return serde_json::json!({"token": token}).to_string().into_response();
    }
    StatusCode::UNAUTHORIZED.into_response()
}

fn basic(pair: &str) -> String {
    // base64 by hand would be longer than the dependency it saves; the shell has it.
    let child =
        std::process::Command::new("base64").arg("-w0").stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn();
    let mut child = child.unwrap();
    child.stdin.take().unwrap().write_all(pair.as_bytes()).unwrap();
    format!("Basic {}", String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap())
}

fn seen(method: &Method, path: &str, query: Option<String>, headers: &HeaderMap) -> Seen {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    Seen {
        method: method.to_string(),
        path: path.into(),
        query: query.unwrap_or_default(),
        authorization: header("authorization"),
        extra: header("x-test"),
        body: String::new(),
    }
}

/// What a client that may not read is told.
fn refusal(shelf: &Shelf, authorization: &str) -> Option<Response> {
    let (wanted, challenge) = match shelf.guard.as_ref()? {
        Guard::Basic(pair) => (basic(pair), "Basic realm=\"test\"".to_owned()),
        Guard::Bearer(_, token) => (format!("Bearer {token}"), format!("Bearer realm=\"http://{}/token\",service=\"test\"", shelf.address)),
    };
    (authorization != wanted).then(|| (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, challenge)]).into_response())
}

async fn serve(
    State(shelf): State<Arc<Mutex<Shelf>>>,
    method: Method,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
    Path(path): Path<String>,
) -> Response {
    let range = headers.get(header::RANGE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let (blob, kind, digest, fault, patience_s) = {
        let mut shelf = shelf.lock().unwrap();
        shelf.requests.push(format!("{method} {path} {range}"));
        let seen = seen(&method, &path, query, &headers);
        shelf.seen.push(seen.clone());
        if let Some(refusal) = refusal(&shelf, &seen.authorization) {
            return refusal;
        }
        if let Some(to) = shelf.elsewhere.as_ref().filter(|_| path.contains("/blobs/")) {
            return (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, format!("{to}/v2/{path}?signature=secret"))]).into_response();
        }
        let is_blob = path.contains("/blobs/");
        let digest = match (is_blob, shelf.tags.get(&path)) {
            (true, _) => path.rsplit('/').next().unwrap_or_default().to_owned(),
            (false, Some(digest)) => digest.clone(),
            (false, None) => return (StatusCode::NOT_FOUND, r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#).into_response(),
        };
        let Some(blob) = shelf.blobs.get(&digest).cloned() else { return StatusCode::NOT_FOUND.into_response() };
        let fault = (is_blob && blob.len() > LARGE && method == Method::GET && !shelf.faults.is_empty()).then(|| shelf.faults.remove(0));
        (blob, if is_blob { "application/octet-stream" } else { MANIFEST }, digest, fault, shelf.patience_s)
    };
    match fault {
        Some(Fault::TooMany) => (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, patience_s.to_string())]).into_response(),
        Some(Fault::Loop) => (StatusCode::FOUND, [(header::LOCATION, format!("/v2/{path}"))]).into_response(),
        _ => answer(method, blob, kind, &digest, &range, fault),
    }
}

fn answer(method: Method, mut blob: Vec<u8>, kind: &str, digest: &str, range: &str, fault: Option<Fault>) -> Response {
    let total = blob.len();
    let mut ends = range.strip_prefix("bytes=").unwrap_or_default().split('-').map(|n| n.parse::<usize>().ok());
    let (from, to) = (ends.next().flatten().unwrap_or(0), ends.next().flatten());
    if from > total {
        return StatusCode::RANGE_NOT_SATISFIABLE.into_response();
    }
    blob.truncate(to.map_or(total, |to| to + 1));
    blob.drain(..from);
    let length = blob.len();
    let status = if range.is_empty() { StatusCode::OK } else { StatusCode::PARTIAL_CONTENT };
    let mut response = Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, kind)
        .header("Docker-Content-Digest", digest)
        .header(header::CONTENT_LENGTH, length)
        .header(header::ACCEPT_RANGES, "bytes");
    if !range.is_empty() {
        response = response.header(header::CONTENT_RANGE, format!("bytes {from}-{}/{total}", (from + length).saturating_sub(1)));
    }
    let body = match (method, fault) {
        (Method::HEAD, _) => Body::empty(),
        (_, Some(Fault::Corrupt)) => {
            blob.iter_mut().for_each(|b| *b ^= 0x55);
            Body::from(blob)
        }
        (_, Some(Fault::Truncate)) => {
            blob.truncate(length / 2);
            Body::new(Cut(Some(blob.into()), false))
        }
        (_, Some(Fault::Stall)) => Body::new(Cut(None, true)),
        (_, _) => Body::from(blob),
    };
    response.body(body).unwrap()
}

/// A body that sends a piece and then breaks off, or stalls for ever.
struct Cut(Option<axum::body::Bytes>, bool);

impl axum::body::HttpBody for Cut {
    type Data = axum::body::Bytes;
    type Error = std::io::Error;
    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        match (self.0.take(), self.1) {
            (Some(piece), _) => std::task::Poll::Ready(Some(Ok(http_body::Frame::data(piece)))),
            (None, true) => std::task::Poll::Pending,
            (None, false) => std::task::Poll::Ready(Some(Err(std::io::Error::other("cut off")))),
        }
    }
}

impl Registry {
    /// Adds an image of about `bytes` bytes made of this machine's libraries in four layers, once with gzip and once with zstd layers.
    pub fn add_big(&self, bytes: usize) -> anyhow::Result<Vec<(&'static str, String)>> {
        let mut layers: Vec<Layer> = Vec::new();
        let mut files = Vec::new();
        collect(std::path::Path::new("/usr/lib"), &mut files);
        let mut files = files.into_iter();
        for _ in 0..4 {
            let mut layer = Layer::new(Vec::new());
            while layer.get_ref().len() < bytes / 4 {
                let Some(path) = files.next() else { break };
                let Ok(data) = std::fs::read(&path) else { continue };
                put(&mut layer, &path.to_string_lossy()[1..], tar::EntryType::Regular, 0o644, &data);
            }
            layers.push(layer);
        }
        let tars: Vec<Vec<u8>> = layers.into_iter().map(|l| l.into_inner().unwrap()).collect();
        let gzip = self.add_compressed("bench/gzip:1", &tars, "gzip")?;
        let zstd = self.add_compressed("bench/zstd:1", &tars, "zstd")?;
        Ok(vec![("cold pull gzip", gzip), ("cold pull zstd", zstd)])
    }

    fn add_compressed(&self, name: &str, tars: &[Vec<u8>], how: &str) -> anyhow::Result<String> {
        let mut shelf = self.shelf.lock().unwrap();
        let (mut diff_ids, mut descriptors) = (vec![], vec![]);
        for (number, tar) in tars.iter().enumerate() {
            // A different first entry in each image, so that the second pull finds no layer of the first.
            let mut own = Layer::new(Vec::new());
            put(&mut own, &format!("{how}{number}"), tar::EntryType::Regular, 0o644, how.as_bytes());
            let mut own = own.into_inner()?;
            own.truncate(1024);
            own.extend_from_slice(tar);
            diff_ids.push(digest(&own));
            let blob = if how == "zstd" {
                zstd::encode_all(&own[..], 3)?
            } else {
                let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
                gz.write_all(&own)?;
                gz.finish()?
            };
            descriptors.push(shelf.put(&format!("application/vnd.oci.image.layer.v1.tar+{how}"), blob));
        }
        let config =
            serde_json::json!({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = shelf.put("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
        let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": descriptors});
        let descriptor = shelf.put(MANIFEST, manifest.to_string().into_bytes());
        let (repository, tag) = name.rsplit_once(':').unwrap();
        let digest = descriptor["digest"].as_str().unwrap().to_owned();
        shelf.tags.insert(format!("{repository}/manifests/{tag}"), digest.clone());
        shelf.tags.insert(format!("{repository}/manifests/{digest}"), digest);
        Ok(format!("{}/{name}", self.address))
    }
}

fn collect(dir: &std::path::Path, into: &mut Vec<std::path::PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        let Ok(meta) = path.symlink_metadata() else { continue };
        if meta.is_dir() {
            collect(&path, into);
        } else if meta.is_file() {
            into.push(path);
        }
    }
}

/// A `docker save` archive of a busybox image, for daemons that import instead of pulling.
pub fn archive(name: &str, command: &[&str]) -> anyhow::Result<Vec<u8>> {
    let tar = busybox_layer()?.into_inner()?;
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": {"Entrypoint": command, "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(&tar)]}});
    let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    let mut out = Layer::new(Vec::new());
    put(&mut out, "config.json", tar::EntryType::Regular, 0o644, config.to_string().as_bytes());
    put(&mut out, "layer.tar", tar::EntryType::Regular, 0o644, &tar);
    put(&mut out, "manifest.json", tar::EntryType::Regular, 0o644, manifest.to_string().as_bytes());
    Ok(out.into_inner()?)
}

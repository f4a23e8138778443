//! `troupe daemon`: configuration, sockets, actors, signals.
use crate::config::{self, Config};
use crate::{CONFIG, DaemonArgs, compose, logs, otlp, settings};
use anyhow::Context;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Runs until SIGTERM or SIGINT.
pub fn run(args: &DaemonArgs) -> anyhow::Result<()> {
    let path = args.config.clone().unwrap_or_else(|| PathBuf::from(CONFIG));
    let loaded = config::load(&path, args.config.is_some())?;
    let config = with_flags(loaded.config, args);
    logs::init(&config.debug.level, &config.debug.format);
    for warning in loaded.warnings {
        tracing::warn!("{warning}");
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("troupe-front").enable_all().build()?;
    runtime.block_on(serve(&config))
}

fn with_flags(mut config: Config, args: &DaemonArgs) -> Config {
    if let Some(root) = &args.root {
        config.root.clone_from(root);
    }
    if let Some(state) = &args.state {
        config.state.clone_from(state);
    }
    if let Some(address) = &args.address {
        config.plugins.grpc.address.clone_from(address);
    }
    if let Some(level) = &args.log_level {
        config.debug.level.clone_from(level);
    }
    config
}

fn prepare(config: &Config) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for (dir, mode) in [(&config.root, 0o700), (&config.state, 0o711)] {
        std::fs::create_dir_all(dir).with_context(|| format!("create {dir}"))?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode)).with_context(|| format!("set the mode of {dir}"))?;
    }
    if config.oom_score != 0
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", config.oom_score.to_string())
    {
        tracing::warn!(%error, oom_score = config.oom_score, "the daemon's OOM score could not be set");
    }
    Ok(())
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    prepare(config)?;
    // Bound before anything starts: a daemon that cannot have its address says so and touches nothing.
    let cri = front::socket::bind(Path::new(&config.grpc_address())).await?;
    let events = front::socket::bind(Path::new(&config.ttrpc_address())).await?;
    let control = front::socket::bind(Path::new(&config.control_address())).await?;
    let daemon = compose::start(config).await?;
    let system = daemon.system.clone();
    if otlp::start(&system)? {
        tracing::info!("spans are exported over OTLP");
    }
    let (stop, stopped) = watch::channel(false);
    let until = || {
        let mut stopped = stopped.clone();
        async move {
            // An error means that the sender is gone, which is a stop as well.
            let _ = stopped.wait_for(|s| *s).await;
        }
    };
    let systemd_cgroup = settings::systemd_cgroup(config);
    let about = front::cri::About { runtime_name: "troupe".into(), runtime_version: env!("CARGO_PKG_VERSION").into(), systemd_cgroup };
    let streams = &config.plugins.cri;
    let address = (stream_address(&streams.stream_server_address)?, streams.stream_server_port.parse::<u16>().unwrap_or_default());
    let listener = tokio::net::TcpListener::bind(&address).await.with_context(|| format!("bind the streaming server to {address:?}"))?;
    let idle = config::schema::duration("stream_idle_timeout", &streams.stream_idle_timeout)?;
    let tls = tls(streams, listener.local_addr()?)?;
    let settings = stream::Config { idle, tls, ..Default::default() };
    let backend = Arc::new(front::cri::streams::Streams::new(system.clone(), daemon.pods.clone()));
    let streams = stream::Server::new(backend, listener.local_addr()?, settings);
    let service = front::cri::Cri::new(system.clone(), daemon.pods, daemon.images, about, streams.clone())?;
    let mut servers = tokio::task::JoinSet::new();
    servers.spawn(front::cri::serve(service, cri, until()));
    servers.spawn(streams.serve(listener, until()));
    servers.spawn(front::events::serve(system.clone(), events, until()));
    servers.spawn(front::control::serve(system.clone(), control, until()));
    let metrics = config.plugins.metrics.address.clone();
    if !metrics.is_empty() {
        let (system, until) = (system.clone(), until());
        servers.spawn(async move { front::metrics::serve_at(system, &metrics, until).await });
    }
    tracing::info!(address = config.grpc_address(), version = env!("CARGO_PKG_VERSION"), "troupe serves");
    notify("READY=1");
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let failed = tokio::select! {
        _ = term.recv() => None,
        _ = interrupt.recv() => None,
        ended = servers.join_next() => ended,
    };
    notify("STOPPING=1");
    stop.send_replace(true);
    let _ = tokio::time::timeout(Duration::from_secs(5), async { while servers.join_next().await.is_some() {} }).await;
    system.shutdown(Duration::from_secs(5)).await;
    match failed {
        Some(Ok(Err(fault))) => Err(fault.into()),
        Some(Err(error)) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Where the streaming server listens: with no address, the one that leads out of this machine.
fn stream_address(configured: &str) -> anyhow::Result<String> {
    if !configured.is_empty() {
        return Ok(configured.trim_start_matches('[').trim_end_matches(']').to_owned());
    }
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // Sends nothing, but has the kernel choose an address. This one is for documentation (RFC 5737).
    let chosen = socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr());
    Ok(chosen.map_or_else(|_| "127.0.0.1".to_owned(), |a| a.ip().to_string()))
}

/// The certificate of the streaming server: from files, or one of its own; none without TLS.
fn tls(streams: &config::schema::CriServer, address: std::net::SocketAddr) -> anyhow::Result<Option<stream::Tls>> {
    let pair = &streams.x509_key_pair_streaming;
    Ok(match (streams.enable_tls_streaming, pair.tls_cert_file.is_empty()) {
        (false, _) => None,
        (true, true) => Some(stream::Tls::self_signed(address)?),
        (true, false) => Some(stream::Tls::from_files(Path::new(&pair.tls_cert_file), Path::new(&pair.tls_key_file))?),
    })
}

/// Tells systemd, if it listens.
fn notify(state: &str) {
    let Ok(path) = std::env::var("NOTIFY_SOCKET") else { return };
    let sent = match path.strip_prefix('@') {
        Some(name) => {
            use std::os::linux::net::SocketAddrExt;
            let address = std::os::unix::net::SocketAddr::from_abstract_name(name);
            address.and_then(|a| std::os::unix::net::UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &a))
        }
        None => std::os::unix::net::UnixDatagram::unbound().and_then(|s| s.send_to(state.as_bytes(), &path)),
    };
    if let Err(error) = sent {
        tracing::warn!(%error, "systemd could not be told {state}");
    }
}

//! The composition root: every actor gets what it needs, from the bottom up. Nothing else in the house knows all of them.
use crate::config::schema::{Config, duration, kernel};
use crate::manifest::MANIFEST;
use crate::settings;
use kernel::System;
use messages::{image, sandbox};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use troupe_image::registry;

/// Kernel from which overlays can be volatile (`volatile` in the kernel's `overlayfs.rst`).
const VOLATILE: (u32, u32) = (5, 10);

/// Networks of an earlier boot's pods that are released side by side: each is some processes.
const NETWORK_TURNS: usize = 4;

/// What runs.
pub struct Daemon {
    /// The kernel.
    pub system: System,
    /// Pods and containers.
    pub pods: Arc<sandbox::View>,
    /// Images.
    pub images: Arc<image::View>,
}

/// Starts all actors.
pub async fn start(config: &Config) -> anyhow::Result<Daemon> {
    let plugins = &config.plugins;
    let options = kernel::Options {
        threads: plugins.kernel.threads,
        recorder_spans: plugins.kernel.recorder_spans,
        watchdog_period: Duration::from_millis(plugins.kernel.watchdog_period_ms.max(100)),
        chaos_enabled: plugins.chaos.enabled,
        chaos_seed: plugins.chaos.seed,
        max_restarts: Some(plugins.kernel.max_restarts).filter(|n| *n > 0),
    };
    let system = System::boot(MANIFEST, options)?;
    if plugins.chaos.enabled {
        tracing::warn!(seed = system.chaos().seed(), "fault injection is enabled");
    }
    let (root, state) = (Path::new(&config.root), Path::new(&config.state));
    let store = system.start::<troupe_store::StoreActor>(troupe_store::open(&root.join("troupe.db"))?).await?;
    let events = system.start::<troupe_events::EventsActor>(troupe_events::Bus::default()).await?;
    let content = system.start::<troupe_content::ContentActor>(troupe_content::Args::new(root, store.clone())).await?;
    let default = plugins.images.snapshotter.clone();
    let volatile = kernel() >= VOLATILE;
    let snapshots = troupe_snapshot::Args { root: root.into(), volatile, default: default.clone(), store: store.clone() };
    let snapshots = system.start::<troupe_snapshot::SnapshotActor>(snapshots).await?;
    let network = system.start::<troupe_network::NetworkActor>(network(config, &system, store.clone())?).await?;
    let images = Arc::new(image::View::default());
    let image_args = troupe_image::Args {
        registry: registry(&plugins.images)?,
        downloads: plugins.images.max_concurrent_downloads,
        handlers: plugins.runtime.containerd.runtimes.keys().map(|h| (h.clone(), snapshotter(config, h))).collect(),
        snapshotter: default,
        pinned: plugins.images.pinned_images.values().cloned().collect(),
        discard_layers: plugins.images.discard_unpacked_layers,
        usage_period: Duration::from_secs(plugins.images.stats_collect_period),
        root: root.into(),
        view: images.clone(),
        store: store.clone(),
        events: events.clone(),
        content: content.clone(),
        snapshots: snapshots.clone(),
    };
    let image = system.start::<troupe_image::ImageActor>(image_args).await?;
    let tasks = system.start::<troupe_task::Parent>(tasks(config)?).await?;
    let gc = troupe_gc::Args {
        store: store.clone(),
        events: events.clone(),
        content,
        snapshots: snapshots.clone(),
        discard_layers: plugins.images.discard_unpacked_layers,
        tracked: Default::default(),
    };
    system.start::<troupe_gc::GcActor>(gc).await?;
    let pods = Arc::new(sandbox::View::default());
    let stats = troupe_stats::Args {
        view: pods.clone(),
        snapshots: snapshots.clone(),
        root: root.into(),
        period: or_default("stats_collect_period", &plugins.runtime.stats_collect_period, Duration::from_secs(1))?,
        retention: or_default("stats_retention_period", &plugins.runtime.stats_retention_period, Duration::from_secs(120))?,
        disk_period: Duration::from_secs(plugins.images.stats_collect_period.max(1)),
    };
    system.start::<troupe_stats::StatsActor>(stats).await?;
    let sandbox = troupe_sandbox::Args {
        root: root.into(),
        state: state.into(),
        settings: Arc::new(settings::of(config)?),
        view: pods.clone(),
        store,
        events,
        network,
        images: image,
        snapshots,
        tasks,
        slots: Default::default(),
        selinux: Arc::new(troupe_sandbox::spec::selinux::SeLinux::new(
            plugins.runtime.enable_selinux,
            plugins.runtime.selinux_category_range,
        )),
        turns: Arc::new(tokio::sync::Semaphore::new(NETWORK_TURNS)),
        userns: Default::default(),
    };
    system.start::<troupe_sandbox::SandboxActor>(sandbox).await?;
    Ok(Daemon { system, pods, images })
}

/// An empty duration means the default.
fn or_default(key: &str, text: &str, default: Duration) -> anyhow::Result<Duration> {
    let period = duration(key, text)?;
    Ok(if period.is_zero() { default } else { period })
}

/// The snapshotter of a runtime handler: what its images' table says, then its own, then the default.
pub fn snapshotter(config: &Config, handler: &str) -> String {
    let (images, runtimes) = (&config.plugins.images, &config.plugins.runtime.containerd.runtimes);
    let platform = images.runtime_platforms.get(handler).map(|p| p.snapshotter.as_str());
    let own = runtimes.get(handler).map(|h| h.snapshotter.as_str());
    let named = [platform, own].into_iter().flatten().find(|s| !s.is_empty());
    named.unwrap_or(&images.snapshotter).to_owned()
}

/// How to reach registries.
fn registry(images: &crate::config::schema::Images) -> anyhow::Result<registry::Config> {
    let table = &images.registry;
    let auth = |a: &crate::config::schema::RegistryAuth| proto::cri::AuthConfig {
        username: a.username.clone(),
        password: a.password.clone(),
        auth: a.auth.clone(),
        identity_token: a.identitytoken.clone(),
        ..Default::default()
    };
    Ok(registry::Config {
        dirs: table.config_path.split(':').filter(|d| !d.is_empty()).map(PathBuf::from).collect(),
        mirrors: table.mirrors.iter().map(|(name, m)| (name.clone(), m.endpoint.clone())).collect(),
        auths: table.credentials().into_iter().map(|(host, a)| (host, auth(a))).collect(),
        progress_timeout: patience(&images.image_pull_progress_timeout)?,
        headers: table.headers.iter().map(|(k, v)| (k.clone(), v.join(", "))).collect(),
        // containerd takes anything smaller as a mistake, too.
        piece: Some(images.concurrent_layer_fetch_buffer).filter(|b| *b >= 512).unwrap_or(0),
        pieces: images.max_concurrent_downloads.max(1),
        clients: Default::default(),
    })
}

/// A time-out of zero means none; a day is none enough.
fn patience(text: &str) -> anyhow::Result<Duration> {
    let limit = duration("image_pull_progress_timeout", text)?;
    Ok(if limit.is_zero() { Duration::from_secs(24 * 3600) } else { limit })
}

fn network(config: &Config, system: &System, store: kernel::Addr<messages::store::Store>) -> anyhow::Result<troupe_network::Args> {
    let (runtime, ours) = (&config.plugins.runtime, &config.plugins.network);
    let cni = &runtime.cni;
    let mut bin_dirs: Vec<PathBuf> = cni.bin_dirs.iter().map(PathBuf::from).collect();
    if !cni.bin_dir.is_empty() {
        bin_dirs = vec![cni.bin_dir.clone().into()];
    }
    let own = runtime.containerd.runtimes.iter().filter(|(_, h)| !h.cni_conf_dir.is_empty()).map(|(name, h)| {
        let most = if h.cni_max_conf_num > 0 { h.cni_max_conf_num } else { cni.max_conf_num };
        (name.clone(), (PathBuf::from(&h.cni_conf_dir), most))
    });
    let default = (String::new(), (PathBuf::from(&cni.conf_dir), cni.max_conf_num));
    let under_state = Path::new(&config.state).join("netns");
    Ok(troupe_network::Args {
        bin_dirs,
        conf: own.chain([default]).collect(),
        serially: cni.setup_serially,
        template: Some(&cni.conf_template).filter(|t| !t.is_empty()).map(PathBuf::from),
        netns_dir: if runtime.netns_mounts_under_state_dir { under_state } else { "/var/run/netns".into() },
        cache_dir: ours.cache_dir.clone().into(),
        ip_pref: cni.ip_pref.clone(),
        plugin_timeout: duration("plugin_timeout", &ours.plugin_timeout)?,
        retry_after: duration("retry_after", &ours.retry_after)?.max(Duration::from_millis(10)),
        meter: troupe_network::Meter::new(system.metrics())?,
        store,
    })
}

fn tasks(config: &Config) -> anyhow::Result<troupe_task::Args> {
    let shim = &config.plugins.shim;
    let socket_dir = if shim.socket_dir.is_empty() { format!("{}/s", config.state) } else { shim.socket_dir.clone() };
    let mut timeouts = troupe_task::Timeouts::default();
    for (name, limit) in [
        ("io.troupe.timeout.shim.start", &mut timeouts.start),
        ("io.containerd.timeout.shim.load", &mut timeouts.load),
        ("io.containerd.timeout.shim.cleanup", &mut timeouts.cleanup),
        ("io.containerd.timeout.shim.shutdown", &mut timeouts.shutdown),
        ("io.containerd.timeout.task.state", &mut timeouts.state),
        ("io.containerd.timeout.metrics.shimstats", &mut timeouts.stats),
    ] {
        if let Some(text) = config.timeouts.get(name) {
            *limit = duration(name, text)?;
        }
    }
    let env = shim.env.iter().filter_map(|e| e.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    Ok(troupe_task::Args {
        root: config.root.clone().into(),
        state: config.state.clone().into(),
        exe: std::env::current_exe()?,
        grpc_address: config.grpc_address(),
        ttrpc_address: config.ttrpc_address(),
        socket_dir: Some(socket_dir.into()),
        env,
        debug: matches!(config.debug.level.as_str(), "debug" | "trace"),
        timeouts,
        logs: Default::default(),
        drain: match duration("drain_exec_sync_io_timeout", &config.plugins.runtime.drain_exec_sync_io_timeout)? {
            Duration::ZERO => troupe_task::Drain::Lenient,
            limit => troupe_task::Drain::Strict(limit),
        },
    })
}

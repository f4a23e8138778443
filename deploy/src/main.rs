//! `troupe`: the daemon and its command line in one.
mod cli;
mod compose;
mod config;
mod daemon;
mod logs;
mod manifest;
mod otlp;
mod settings;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Where the configuration is by default.
const CONFIG: &str = "/etc/troupe/config.toml";

/// Troupe, a node daemon for containers.
#[derive(Parser)]
#[command(name = "troupe", version, disable_help_subcommand = true)]
struct Cli {
    /// Control socket of the daemon to talk to.
    #[arg(long, global = true, default_value = "/run/troupe/control.sock")]
    control: PathBuf,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// containerd's flags.
#[derive(Args, Clone, Debug)]
pub struct DaemonArgs {
    /// Configuration file (containerd's format).
    #[arg(short, long)]
    config: Option<PathBuf>,
    /// Socket of CRI.
    #[arg(short, long)]
    address: Option<String>,
    /// Directory of persistent state.
    #[arg(long)]
    root: Option<String>,
    /// Directory of state that a reboot may lose.
    #[arg(long)]
    state: Option<String>,
    /// trace, debug, info, warn, error, fatal, panic.
    #[arg(short, long)]
    log_level: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon.
    Daemon(DaemonArgs),
    /// The tree of actors: state, generation, restarts, mailbox, oldest message.
    Actors,
    /// Operations under way: step, age, what they wait for; and blocking calls.
    Ops,
    /// The waterfall of a trace; without an id, the recent ones.
    Trace {
        /// 32 hex digits, or a unique prefix of a recent one.
        id: Option<String>,
        /// The latest whose name contains this.
        #[arg(long)]
        last: Option<String>,
    },
    /// Follow the event bus.
    Events {
        /// Topics that begin with this.
        #[arg(long)]
        topic: Option<String>,
    },
    /// Fault injection: list, add, clear.
    #[command(subcommand)]
    Chaos(cli::chaos::Chaos),
    /// Health of the daemon.
    Health,
    /// Print a configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// The defaults.
    Default,
    /// What a file amounts to, brought to the current version.
    #[command(alias = "migrate")]
    Dump {
        /// The file.
        #[arg(short, long, default_value = CONFIG)]
        config: PathBuf,
    },
}

fn main() {
    let cli = Cli::parse();
    if let Err(error) = run(cli) {
        eprintln!("troupe: {error:#}");
        std::process::exit(1);
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let client = cli::Client { socket: cli.control, json: cli.json };
    match cli.command {
        Command::Daemon(args) => daemon::run(&args),
        Command::Config(ConfigCommand::Default) => {
            print!("{}", toml::to_string(&config::Config::default())?);
            Ok(())
        }
        Command::Config(ConfigCommand::Dump { config }) => {
            let loaded = config::load(&config, true)?;
            for warning in loaded.warnings {
                eprintln!("# {warning}");
            }
            print!("{}", toml::to_string(&loaded.config)?);
            Ok(())
        }
        Command::Actors => cli::actors::run(&client),
        Command::Ops => cli::ops::run(&client),
        Command::Trace { id, last } => cli::trace::run(&client, id.as_deref(), last.as_deref()),
        Command::Events { topic } => cli::events::run(&client, topic.as_deref()),
        Command::Chaos(command) => cli::chaos::run(&client, command),
        Command::Health => cli::health(&client),
    }
}

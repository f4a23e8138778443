//! `troupe chaos`.
use super::{Client, table};
use clap::{Subcommand, ValueEnum};
use hyper::Method;
use serde::Deserialize;
use serde_json::json;

/// Fault injection. Refused unless the configuration enables it.
#[derive(Subcommand)]
pub enum Chaos {
    /// The rules and how often they hit.
    List,
    /// Adds a rule; prints its id.
    Add {
        /// Actor (or template of children) that receives the message; empty = any.
        #[arg(long, default_value = "")]
        actor: String,
        /// Message such as `snapshot.Prepare`; empty = any.
        #[arg(long, default_value = "")]
        message: String,
        /// What happens.
        #[arg(long)]
        fault: Kind,
        /// Only the n-th match.
        #[arg(long)]
        nth: Option<u64>,
        /// With this probability.
        #[arg(long)]
        probability: Option<f64>,
        /// Milliseconds of a delay.
        #[arg(long, default_value_t = 1000)]
        delay_ms: u64,
    },
    /// Removes one rule, or all.
    Clear {
        /// Id of a rule.
        id: Option<u64>,
    },
}

/// Kinds of faults.
#[derive(Clone, Copy, ValueEnum)]
pub enum Kind {
    /// The receiver panics.
    Panic,
    /// The caller gets an error.
    Error,
    /// Delivered late.
    Delay,
    /// Never delivered.
    Drop,
    /// Delivered twice.
    Duplicate,
    /// Never answered.
    Hang,
    /// The receiver's thread hangs.
    Block,
}

#[derive(Deserialize)]
struct Rule {
    id: u64,
    actor: String,
    message: String,
    fault: String,
    nth: Option<u64>,
    probability: Option<f64>,
    matches: u64,
    hits: u64,
}

/// Runs it.
pub fn run(client: &Client, command: Chaos) -> anyhow::Result<()> {
    match command {
        Chaos::List => {
            let Some(rules) = client.get::<Vec<Rule>>("/chaos")? else { return Ok(()) };
            let any = |s: &str| if s.is_empty() { "any".to_owned() } else { s.to_owned() };
            let when =
                |r: &Rule| r.nth.map(|n| format!("nth {n}")).or(r.probability.map(|p| format!("p {p}"))).unwrap_or_else(|| "always".into());
            let row = |r: &Rule| {
                vec![r.id.to_string(), any(&r.actor), any(&r.message), r.fault.clone(), when(r), r.matches.to_string(), r.hits.to_string()]
            };
            table(&["RULE", "ACTOR", "MESSAGE", "FAULT", "WHEN", "MATCHES", "HITS"], &rules.iter().map(row).collect::<Vec<_>>());
        }
        Chaos::Add { actor, message, fault, nth, probability, delay_ms } => {
            let fault = fault.to_possible_value().map(|v| v.get_name().to_owned());
            let rule =
                json!({"actor": actor, "message": message, "fault": fault, "nth": nth, "probability": probability, "delay_ms": delay_ms});
            println!("{}", client.request(Method::POST, "/chaos", rule.to_string())?);
        }
        Chaos::Clear { id } => {
            let path = id.map_or_else(|| "/chaos".to_owned(), |id| format!("/chaos/{id}"));
            client.request(Method::DELETE, &path, String::new())?;
        }
    }
    Ok(())
}

//! `troupe actors`.
use super::{Client, human, table};
use serde::Deserialize;
use std::time::Duration;

#[derive(Deserialize)]
struct Actor {
    name: String,
    layer: u8,
    state: String,
    generation: u64,
    restarts: u64,
    mailbox: usize,
    mailbox_bound: usize,
    oldest: Option<(String, Duration)>,
    handled: u64,
    last_crash: String,
}

/// Prints the tree: children below their template's parent.
pub fn run(client: &Client) -> anyhow::Result<()> {
    let Some(actors) = client.get::<Vec<Actor>>("/actors")? else { return Ok(()) };
    let rows: Vec<Vec<String>> = actors
        .iter()
        .map(|a| {
            let (template, child) = a.name.split_once('/').map_or((a.name.as_str(), None), |(t, c)| (t, Some(c)));
            let name = child.map_or_else(|| template.to_owned(), |c| format!("  {template}/{}", c.get(..13).unwrap_or(c)));
            let oldest = a.oldest.as_ref().map_or_else(|| "-".into(), |(m, age)| format!("{m} {}", human(*age)));
            let crash: String = a.last_crash.chars().take(60).collect();
            vec![
                name,
                a.layer.to_string(),
                a.state.clone(),
                a.generation.to_string(),
                a.restarts.to_string(),
                format!("{}/{}", a.mailbox, a.mailbox_bound),
                oldest,
                a.handled.to_string(),
                crash,
            ]
        })
        .collect();
    table(&["ACTOR", "LAYER", "STATE", "GEN", "RESTARTS", "MAILBOX", "OLDEST", "HANDLED", "LAST CRASH"], &rows);
    Ok(())
}

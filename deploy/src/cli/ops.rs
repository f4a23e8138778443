//! `troupe ops`.
use super::{Client, human, table};
use serde::Deserialize;
use std::time::Duration;

#[derive(Deserialize)]
struct Op {
    id: u64,
    name: String,
    actor: String,
    step: String,
    waiting_on: String,
    trace_id: String,
    age: Duration,
}

#[derive(Deserialize)]
struct Blocking {
    name: String,
    actor: String,
    age: Duration,
    abandoned: bool,
}

/// Prints outside requests first, oldest first; then background work; then blocking calls.
pub fn run(client: &Client) -> anyhow::Result<()> {
    let Some(mut ops) = client.get::<Vec<Op>>("/ops")? else { return Ok(()) };
    ops.sort_by_key(|o| (o.actor != "-", std::cmp::Reverse(o.age)));
    let dash = |s: &str| if s.is_empty() { "-".to_owned() } else { s.to_owned() };
    let rows: Vec<Vec<String>> = ops
        .iter()
        .map(|o| {
            vec![o.id.to_string(), human(o.age), o.name.clone(), o.actor.clone(), dash(&o.step), dash(&o.waiting_on), o.trace_id.clone()]
        })
        .collect();
    table(&["OP", "AGE", "NAME", "OWNER", "STEP", "WAITS FOR", "TRACE"], &rows);
    let Some(calls) = client.get::<Vec<Blocking>>("/blocking")? else { return Ok(()) };
    if !calls.is_empty() {
        println!();
        let rows: Vec<Vec<String>> = calls
            .iter()
            .map(|c| vec![c.name.clone(), human(c.age), c.actor.clone(), if c.abandoned { "given up".into() } else { "running".into() }])
            .collect();
        table(&["BLOCKING CALL", "AGE", "ACTOR", "STATE"], &rows);
    }
    Ok(())
}

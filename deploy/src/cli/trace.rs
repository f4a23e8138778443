//! `troupe trace`: a waterfall in the terminal, drawn from the flight recorder without any collector.
use super::{Client, human, table};
use anyhow::{Context, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

/// Columns of the bar.
const WIDTH: usize = 40;

#[derive(Deserialize, Clone)]
struct Span {
    trace_id: String,
    span_id: String,
    parent_id: String,
    name: String,
    actor: String,
    start: SystemTime,
    queue_wait: Duration,
    duration: Duration,
    outcome: String,
    attrs: Vec<(String, String)>,
}

/// Draws a trace, or lists the recent ones.
pub fn run(client: &Client, id: Option<&str>, last: Option<&str>) -> anyhow::Result<()> {
    let id = match (id, last) {
        (Some(id), _) if id.len() == 32 => id.to_owned(),
        (None, None) => return recent(client),
        (id, last) => {
            let quiet = Client { socket: client.socket.clone(), json: false };
            let roots: Vec<Span> = quiet.get("/traces")?.context("no answer")?;
            let fits = |r: &&Span| id.is_some_and(|id| r.trace_id.starts_with(id)) || last.is_some_and(|l| r.name.contains(l));
            match roots.iter().find(fits) {
                Some(root) => root.trace_id.clone(),
                None => bail!("no recent trace fits {:?}", id.or(last).unwrap_or_default()),
            }
        }
    };
    let Some(spans) = client.get::<Vec<Span>>(&format!("/trace/{id}"))? else { return Ok(()) };
    draw(&spans);
    Ok(())
}

fn recent(client: &Client) -> anyhow::Result<()> {
    let Some(roots) = client.get::<Vec<Span>>("/traces")? else { return Ok(()) };
    let rows: Vec<Vec<String>> =
        roots.iter().map(|r| vec![r.trace_id.clone(), human(r.duration), r.name.clone(), r.outcome.clone()]).collect();
    table(&["TRACE", "TOOK", "NAME", "OUTCOME"], &rows);
    Ok(())
}

fn draw(spans: &[Span]) {
    let Some(begin) = spans.iter().map(|s| s.start).min() else { return };
    let total = spans.iter().map(|s| s.start.duration_since(begin).unwrap_or_default() + s.duration).max().unwrap_or_default();
    let mut children: BTreeMap<&str, Vec<&Span>> = BTreeMap::new();
    let known = |id: &str| spans.iter().any(|s| s.span_id == id);
    for span in spans {
        let parent = if known(&span.parent_id) { span.parent_id.as_str() } else { "" };
        children.entry(parent).or_default().push(span);
    }
    for list in children.values_mut() {
        list.sort_by_key(|s| s.start);
    }
    println!("trace {}  {} spans, {}", spans[0].trace_id, spans.len(), human(total));
    println!("{:WIDTH$}  {:>8} {:>8}  SPAN", "", "TOOK", "QUEUE");
    let mut stack: Vec<(&Span, usize)> = children.get("").into_iter().flatten().rev().map(|s| (*s, 0)).collect();
    while let Some((span, depth)) = stack.pop() {
        line(span, depth, begin, total);
        stack.extend(children.get(span.span_id.as_str()).into_iter().flatten().rev().map(|s| (*s, depth + 1)));
    }
}

fn line(span: &Span, depth: usize, begin: SystemTime, total: Duration) {
    let scale = |d: Duration| (d.as_secs_f64() / total.as_secs_f64().max(1e-9) * WIDTH as f64) as usize;
    let from = scale(span.start.duration_since(begin).unwrap_or_default()).min(WIDTH - 1);
    let wait = scale(span.queue_wait).min(WIDTH - from);
    let bar = scale(span.duration).saturating_sub(wait).clamp(1, (WIDTH - from - wait).max(1));
    let drawn = format!("{}{}{}", " ".repeat(from), "·".repeat(wait), "█".repeat(bar));
    let queue = if span.queue_wait.is_zero() { String::new() } else { human(span.queue_wait) };
    let actor = if span.actor == "-" { String::new() } else { format!("  [{}]", short(&span.actor)) };
    let attrs: String = span.attrs.iter().map(|(k, v)| format!(" {k}={v}")).collect();
    let failed = if span.outcome == "ok" { String::new() } else { format!("  ✗ {}", span.outcome) };
    println!("{drawn:WIDTH$}  {:>8} {queue:>8}  {}{}{actor}{attrs}{failed}", human(span.duration), "  ".repeat(depth), span.name);
}

fn short(actor: &str) -> String {
    match actor.split_once('/') {
        Some((template, id)) => format!("{template}/{}", id.get(..8).unwrap_or(id)),
        None => actor.to_owned(),
    }
}

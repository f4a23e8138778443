//! `troupe events`.
use super::Client;

/// Prints events as they come.
pub fn run(client: &Client, topic: Option<&str>) -> anyhow::Result<()> {
    let topic = topic.map(|t| format!("&topic={t}")).unwrap_or_default();
    let json = client.json;
    client.follow(&format!("/events?follow=true{topic}"), |line| {
        let event: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        if json || event.is_null() {
            return println!("{line}");
        }
        if let Some(missed) = event.get("missed") {
            return println!("-- {missed} events missed: this reader was too slow --");
        }
        let text = |key: &str| event.get(key).map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).unwrap_or_default();
        println!("{} {} {} {} {}", text("seq"), text("time"), text("namespace"), text("topic"), text("event"));
    })
}

//! Reading configuration files: imports, merging, unknown keys (`contracts/core.md` §8.3).
use super::migrate;
use anyhow::{Context, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Reads `path` and everything that it imports, each file brought to the current version by itself, then merged: later files win.
pub fn load(path: &Path, warnings: &mut Vec<String>) -> anyhow::Result<Table> {
    let mut merged = Table::new();
    let mut seen = BTreeSet::new();
    visit(path, &mut merged, &mut seen, warnings)?;
    Ok(merged)
}

fn visit(path: &Path, merged: &mut Table, seen: &mut BTreeSet<PathBuf>, warnings: &mut Vec<String>) -> anyhow::Result<()> {
    let real = path.canonicalize().with_context(|| format!("configuration {}", path.display()))?;
    if !seen.insert(real.clone()) {
        return Ok(());
    }
    let text = std::fs::read_to_string(&real).with_context(|| format!("read {}", real.display()))?;
    let mut table: Table = text.parse().with_context(|| format!("parse {}", real.display()))?;
    migrate::to_current(&mut table, &real, warnings)?;
    let imports = imports_of(&table, &real)?;
    merge(merged, table);
    for import in imports {
        visit(&import, merged, seen, warnings)?;
    }
    Ok(())
}

fn imports_of(table: &Table, from: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let Some(imports) = table.get("imports") else { return Ok(vec![]) };
    let Some(list) = imports.as_array() else { bail!("{}: imports must be a list of paths", from.display()) };
    let mut found = Vec::new();
    for pattern in list {
        let Some(pattern) = pattern.as_str() else { bail!("{}: imports must hold strings", from.display()) };
        let full = from.parent().unwrap_or(Path::new("/")).join(pattern);
        let mut paths: Vec<PathBuf> = glob::glob(&full.to_string_lossy())?.collect::<Result<_, _>>()?;
        paths.sort();
        found.append(&mut paths);
    }
    Ok(found)
}

/// Deep merge: tables key by key, everything else is replaced.
pub fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// Lists keys of `user` that `known` (the same configuration written back) does not have. Plugin tables that Troupe does not have are passed over:
/// the same file may drive containerd with plugins of its own.
pub fn unknown_keys(path: &str, user: &Table, known: &Table, warnings: &mut Vec<String>) {
    for (key, value) in user {
        let here = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (value, known.get(key)) {
            (Value::Table(u), Some(Value::Table(k))) => unknown_keys(&here, u, k, warnings),
            (_, Some(_)) => {}
            (_, None) if path == "plugins" => {}
            (_, None) => warnings.push(format!("configuration key {here} is unknown and ignored")),
        }
    }
}

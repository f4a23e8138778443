//! Group commit: one thread takes all commits that wait, applies each by itself or not at all, and makes them durable with one fsync.
use crate::reserve::Reserve;
use crate::{File, definition, fault};
use kernel::{Class, Fault, Result, ResultExt};
use messages::store::{Op, table};
use redb::{Database, ReadableTable};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;

/// Commits that share one transaction at most.
const GROUP: usize = 256;

type Waiting = (Vec<Op>, oneshot::Sender<Result<()>>);

/// Hands commits to the writer's thread.
#[derive(Clone)]
pub(crate) struct Writer(Sender<Waiting>);

impl Writer {
    pub fn start(file: Arc<File>, reserve: Reserve) -> Result<Writer> {
        let (sender, receiver) = channel();
        std::thread::Builder::new()
            .name("troupe-store".into())
            .stack_size(512 << 10)
            .spawn(move || run(&Disk { file, reserve, full: Cell::new(false) }, &receiver))
            .context("start the store's writer")?;
        Ok(Writer(sender))
    }
    pub fn submit(&self, ops: Vec<Op>) -> oneshot::Receiver<Result<()>> {
        let (done, answer) = oneshot::channel();
        if let Err(refused) = self.0.send((ops, done)) {
            let _ = refused.0.1.send(Err(Fault::unavailable("the store's writer ended")));
        }
        answer
    }
}

/// The database and how its disk is.
struct Disk {
    file: Arc<File>,
    reserve: Reserve,
    /// No room for more rows.
    full: Cell<bool>,
}

fn run(disk: &Disk, receiver: &Receiver<Waiting>) {
    while let Ok(first) = receiver.recv() {
        let mut group = vec![first];
        while group.len() < GROUP
            && let Ok(next) = receiver.try_recv()
        {
            group.push(next);
        }
        let results = disk.commit(&group);
        for (number, (_, done)) in group.into_iter().enumerate() {
            let result = match &results {
                Ok(each) => each.get(number).cloned().unwrap_or(Ok(())),
                Err(fault) => Err(fault.clone()),
            };
            let _ = done.send(result);
        }
    }
}

impl Disk {
    fn commit(&self, group: &[Waiting]) -> Result<Vec<Result<()>>> {
        if self.full.get() && self.reserve.lay_in().is_ok() {
            tracing::info!("the metadata database has room again");
            self.full.set(false);
        }
        let first = self.attempt(group);
        match first {
            Err(fault) if fault.class == Class::ResourceExhausted && !self.full.replace(true) => {
                tracing::error!(%fault, "the disk of the metadata database is full: rows are changed and deleted, but none is added");
                self.reserve.give_up();
                self.attempt(group)
            }
            other => other,
        }
    }
    fn attempt(&self, group: &[Waiting]) -> Result<Vec<Result<()>>> {
        let full = self.full.get();
        let result = self.file.with(|database| commit(database, group, full));
        if result.is_err() {
            // After a failure of the disk a handle is of no more use.
            self.file.close();
        }
        result
    }
}

/// Applies a group in one transaction; nothing that adds a row when the disk is full. An outer error failed all; an inner one failed only that commit.
fn commit(database: &Database, group: &[Waiting], full: bool) -> Result<Vec<Result<()>>> {
    let write = database.begin_write().map_err(fault).context("begin a commit")?;
    let mut results = Vec::with_capacity(group.len());
    {
        let mut tables = BTreeMap::new();
        for name in table::ALL {
            tables.insert(*name, write.open_table(definition(name)).map_err(fault)?);
        }
        for (ops, _) in group {
            // Conflicts are looked for before anything is written, so that a refused commit leaves no half.
            let conflict = ops.iter().find_map(|op| match op {
                Op::Insert { table, key, .. } => match tables.get(table).map(|t| t.get(key.as_str())) {
                    Some(Ok(None)) => None,
                    Some(Ok(Some(_))) => Some(Fault::already_exists(format!("{table}/{key} exists"))),
                    Some(Err(e)) => Some(fault(e)),
                    None => Some(Fault::invalid_argument(format!("there is no table {table}"))),
                },
                Op::Put { table, key, .. } if full && tables.get(table).is_some_and(|t| matches!(t.get(key.as_str()), Ok(None))) => {
                    Some(Fault::resource_exhausted(format!(
                        "the disk of the metadata database is full: {table}/{key} is not added; free some room"
                    )))
                }
                Op::Put { table, .. } | Op::Delete { table, .. } => {
                    (!tables.contains_key(table)).then(|| Fault::invalid_argument(format!("there is no table {table}")))
                }
            });
            if let Some(conflict) = conflict {
                results.push(Err(conflict));
                continue;
            }
            for op in ops {
                match op {
                    Op::Put { table, key, value } | Op::Insert { table, key, value } => {
                        if let Some(t) = tables.get_mut(table) {
                            t.insert(key.as_str(), value.as_slice()).map_err(fault)?;
                        }
                    }
                    Op::Delete { table, key } => {
                        if let Some(t) = tables.get_mut(table) {
                            t.remove(key.as_str()).map_err(fault)?;
                        }
                    }
                }
            }
            results.push(Ok(()));
        }
    }
    write.commit().map_err(fault).context("make a commit durable")?;
    Ok(results)
}

//! `store`: the metadata database, on redb.
//!
//! Owns: one database file. Talks to: nobody. States: none of its own; everything is in the [`Database`] handle, which outlives generations.
//! On a crash: the next generation goes on with the same handle; a commit that was answered is durable, one that was not either happened whole or
//! not at all. Spans: each message is a hop. Limits: one writer; commits that wait together share one transaction and one fsync ([`writer`]). On a full
//! disk, what adds rows is refused, and what changes or deletes them goes on, in room that was kept back for it ([`reserve`]).
mod reserve;
mod writer;

use kernel::{Actor, Class, Cx, Fault, Handle, Reply, Result, ResultExt, Routes};
use messages::store::{Commit, Count, Get, Scan, Store, table};
use redb::{Database, ReadableDatabase, ReadableTableMetadata, TableDefinition};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

/// Rows of one kind: key to JSON.
pub(crate) type Table = TableDefinition<'static, &'static str, &'static [u8]>;

/// The definition of a table named in [`table`].
pub(crate) fn definition(name: &'static str) -> Table {
    TableDefinition::new(name)
}

pub(crate) fn fault(e: impl Into<redb::Error>) -> Fault {
    match e.into() {
        redb::Error::Io(e) => Fault::from(e),
        e @ redb::Error::Corrupted(_) => Fault::data_loss(e.to_string()),
        e => Fault::internal(e.to_string()),
    }
}

/// An opened database; a file can be opened once in a process, so the handle is shared by all generations.
#[derive(Clone)]
pub struct Handles {
    file: Arc<File>,
    writer: writer::Writer,
}

/// The database file. redb gives a handle up after the first failure of the disk; it is opened again then.
pub(crate) struct File {
    path: PathBuf,
    handle: RwLock<Option<Database>>,
}

impl File {
    fn open(path: &Path) -> Result<Database> {
        let what = || format!("open the metadata database {}", path.display());
        let database = Database::builder().set_cache_size(8 << 20).create(path).map_err(fault).with_context(what)?;
        let begin = database.begin_write().map_err(fault)?;
        for name in table::ALL {
            begin.open_table(definition(name)).map_err(fault)?;
        }
        begin.commit().map_err(fault).with_context(what)?;
        Ok(database)
    }
    /// Closes it; whoever needs it next opens it again.
    pub fn close(&self) {
        // The handle holds the file's lock until it is dropped.
        drop(self.handle.write().unwrap_or_else(PoisonError::into_inner).take());
    }
    /// Works with the handle.
    pub fn with<T>(&self, f: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        let handle = self.handle.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(database) = handle.as_ref() {
            return f(database);
        }
        drop(handle);
        let mut handle = self.handle.write().unwrap_or_else(PoisonError::into_inner);
        if handle.is_none() {
            tracing::warn!("the metadata database is opened again after a failure");
            *handle = Some(File::open(&self.path)?);
        }
        f(handle.as_ref().ok_or_else(|| Fault::unavailable("the metadata database is closed"))?)
    }
}

/// Opens (or makes) the database and all its tables. `DataLoss` if the file is damaged: it is never replaced silently.
pub fn open(path: &Path) -> Result<Handles> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let file = Arc::new(File { path: path.to_owned(), handle: RwLock::new(Some(File::open(path)?)) });
    let writer = writer::Writer::start(file.clone(), reserve::Reserve::beside(path))?;
    Ok(Handles { file, writer })
}

/// The actor.
pub struct StoreActor(Handles);

impl Actor for StoreActor {
    type Proto = Store;
    type Args = Handles;
    async fn start(args: Handles, _: Cx) -> Result<Self> {
        Ok(StoreActor(args))
    }
    fn routes() -> Routes<Self> {
        Routes::new().on::<Get>().on::<Scan>().on::<Commit>().on::<Count>()
    }
}

fn known(name: &'static str) -> Result<Table> {
    if table::ALL.contains(&name) {
        Ok(definition(name))
    } else {
        Err(Fault::new(Class::InvalidArgument, format!("there is no table {name}")))
    }
}

impl Handle<Get> for StoreActor {
    fn handle(&mut self, m: Get, _: Cx) -> Reply<Option<Vec<u8>>> {
        let get = |database: &Database| -> Result<Option<Vec<u8>>> {
            let read = database.begin_read().map_err(fault)?;
            let rows = read.open_table(known(m.table)?).map_err(fault)?;
            Ok(rows.get(m.key.as_str()).map_err(fault)?.map(|v| v.value().to_vec()))
        };
        self.0.file.with(get).into()
    }
}

impl Handle<Scan> for StoreActor {
    fn handle(&mut self, m: Scan, _: Cx) -> Reply<Vec<(String, Vec<u8>)>> {
        let scan = |database: &Database| -> Result<Vec<(String, Vec<u8>)>> {
            let read = database.begin_read().map_err(fault)?;
            let rows = read.open_table(known(m.table)?).map_err(fault)?;
            let mut found = Vec::new();
            for row in rows.range(m.prefix.as_str()..).map_err(fault)? {
                let (key, value) = row.map_err(fault)?;
                if !key.value().starts_with(&m.prefix) {
                    break;
                }
                found.push((key.value().to_owned(), value.value().to_vec()));
            }
            Ok(found)
        };
        self.0.file.with(scan).into()
    }
}

impl Handle<Count> for StoreActor {
    fn handle(&mut self, _: Count, _: Cx) -> Reply<Vec<(&'static str, u64)>> {
        let count = |database: &Database| -> Result<Vec<(&'static str, u64)>> {
            let read = database.begin_read().map_err(fault)?;
            let len = |name: &&'static str| Ok((*name, read.open_table(definition(name)).map_err(fault)?.len().map_err(fault)?));
            table::ALL.iter().map(len).collect()
        };
        self.0.file.with(count).into()
    }
}

impl Handle<Commit> for StoreActor {
    fn handle(&mut self, m: Commit, _: Cx) -> Reply<()> {
        let done = self.0.writer.submit(m.ops);
        Reply::op(async move { done.await.map_err(|_| Fault::unavailable("the store's writer ended"))? })
    }
}

#[cfg(test)]
mod tests;

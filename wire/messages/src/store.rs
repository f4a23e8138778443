//! `store`: the metadata database. Rows are JSON values under `(table, key)`; a commit of several operations is atomic and durable.
use kernel::{Protocol, Result};
use serde::{Serialize, de::DeserializeOwned};

/// The store actor's protocol.
pub struct Store;
impl Protocol for Store {
    const ACTOR: &'static str = "store";
}

/// Tables that exist. A new kind of record gets its row here, so that the census knows every kind.
pub mod table {
    /// Images by `namespace/name`.
    pub const IMAGES: &str = "images";
    /// Snapshots by `snapshotter/key`.
    pub const SNAPSHOTS: &str = "snapshots";
    /// Content labels by digest.
    pub const CONTENT: &str = "content";
    /// Pod sandboxes by id.
    pub const SANDBOXES: &str = "sandboxes";
    /// Containers by id.
    pub const CONTAINERS: &str = "containers";
    /// Tasks (shim endpoints) by container or sandbox id.
    pub const TASKS: &str = "tasks";
    /// Network attachments by sandbox id.
    pub const NETWORKS: &str = "networks";
    /// Leases by id.
    pub const LEASES: &str = "leases";
    /// Journals of sagas by `saga/id`.
    pub const INTENTS: &str = "intents";
    /// All of them.
    pub const ALL: &[&str] = &[IMAGES, SNAPSHOTS, CONTENT, SANDBOXES, CONTAINERS, TASKS, NETWORKS, LEASES, INTENTS];
}

/// One operation of a commit.
#[derive(Clone, Debug)]
pub enum Op {
    /// Insert or replace.
    Put {
        /// Table, one of [`table`].
        table: &'static str,
        /// Key.
        key: String,
        /// JSON bytes.
        value: Vec<u8>,
    },
    /// Insert; the whole commit fails with `AlreadyExists` if the key is there.
    Insert {
        /// Table.
        table: &'static str,
        /// Key.
        key: String,
        /// JSON bytes.
        value: Vec<u8>,
    },
    /// Remove if present.
    Delete {
        /// Table.
        table: &'static str,
        /// Key.
        key: String,
    },
}

impl Op {
    /// A [`Op::Put`] of a value as JSON. Fails with `Internal` if the value cannot be written as JSON.
    pub fn put<T: Serialize>(table: &'static str, key: impl Into<String>, value: &T) -> Result<Op> {
        Ok(Op::Put { table, key: key.into(), value: encode(value)? })
    }
    /// A [`Op::Insert`] of a value as JSON.
    pub fn insert<T: Serialize>(table: &'static str, key: impl Into<String>, value: &T) -> Result<Op> {
        Ok(Op::Insert { table, key: key.into(), value: encode(value)? })
    }
    /// A [`Op::Delete`].
    pub fn delete(table: &'static str, key: impl Into<String>) -> Op {
        Op::Delete { table, key: key.into() }
    }
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| kernel::Fault::internal(format!("encode a record: {e}")))
}

/// Reads a record back. `DataLoss` if it is not what `T` expects.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| kernel::Fault::data_loss(format!("decode a record: {e}")))
}

/// One row.
#[derive(Clone, Debug)]
pub struct Get {
    /// Table.
    pub table: &'static str,
    /// Key.
    pub key: String,
}
/// All rows whose key begins with `prefix`, in key order.
#[derive(Clone, Debug)]
pub struct Scan {
    /// Table.
    pub table: &'static str,
    /// Prefix, may be empty.
    pub prefix: String,
}
/// Applies all operations or none; answers after they are durable (fsync). Group commit: commits that wait together share one fsync.
#[derive(Clone, Debug)]
pub struct Commit {
    /// Operations, in order.
    pub ops: Vec<Op>,
}
/// Number of rows in each table, for the census.
#[derive(Clone, Debug)]
pub struct Count;

kernel::messages! { Store = "store" => {
    Get -> Option<Vec<u8>> as idempotent,
    Scan -> Vec<(String, Vec<u8>)> as idempotent,
    Commit -> () as idempotent,
    Count -> Vec<(&'static str, u64)> as idempotent,
} }

/// The journal of sagas in the store, table [`table::INTENTS`].
#[derive(Clone)]
pub struct StoreJournal(pub kernel::Addr<Store>);

impl kernel::Journal for StoreJournal {
    fn put<'a>(&'a self, cx: &'a kernel::Cx, id: &'a str, bytes: Vec<u8>) -> futures::future::BoxFuture<'a, Result<()>> {
        Box::pin(
            async move { self.0.call(cx, Commit { ops: vec![Op::Put { table: table::INTENTS, key: id.to_owned(), value: bytes }] }).await },
        )
    }
    fn delete<'a>(&'a self, cx: &'a kernel::Cx, id: &'a str) -> futures::future::BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.0.call(cx, Commit { ops: vec![Op::delete(table::INTENTS, id)] }).await })
    }
    fn list<'a>(&'a self, cx: &'a kernel::Cx, prefix: &'a str) -> futures::future::BoxFuture<'a, Result<Vec<(String, Vec<u8>)>>> {
        Box::pin(self.0.call(cx, Scan { table: table::INTENTS, prefix: prefix.to_owned() }))
    }
}

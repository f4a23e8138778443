//! Messages as JSON, for people and scripts that read verbose statuses.
use serde::Serializer;

/// Bytes that are text nearly always: an environment variable's value.
pub fn text<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&String::from_utf8_lossy(bytes))
}

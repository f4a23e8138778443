//! PAX extended header records: `"<length> <key>=<value>\n"`, where a value may hold any byte.
use super::tar_reader::SPARSE_MAX_REGIONS;
use super::{Fail, Result};

/// The records of one entry that matter to a layer.
#[derive(Default)]
pub(super) struct Records {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<(i64, u32)>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: Sparse,
}

#[derive(Default)]
struct Sparse {
    name: Option<Vec<u8>>,
    major: Option<u64>,
    real_size: Option<u64>,
    /// Formats 0.0 and 0.1: offsets and lengths in turn.
    numbers: Vec<u64>,
    found: bool,
}

impl Records {
    /// Adds the records of one extended header. An empty value takes a record back, as POSIX says.
    pub fn parse(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            let broken = || Fail::refused("a malformed PAX record");
            let space = data.iter().position(|b| *b == b' ').ok_or_else(broken)?;
            let length = usize::try_from(decimal(&data[..space])?).map_err(|_| broken())?;
            if length <= space + 1 || length > data.len() || data[length - 1] != b'\n' {
                return Err(broken());
            }
            let record = &data[space + 1..length - 1];
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(broken)?;
            self.set(&record[..equals], &record[equals + 1..])?;
            data = &data[length..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let text = || (!value.is_empty()).then(|| value.to_vec());
        let small = || -> Result<Option<u32>> {
            let number = (!value.is_empty()).then(|| decimal(value)).transpose()?;
            number.map(|n| u32::try_from(n).map_err(|_| Fail::refused(format!("PAX uid or gid {n} is out of range")))).transpose()
        };
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link = text(),
            b"size" => self.size = (!value.is_empty()).then(|| decimal(value)).transpose()?,
            b"uid" => self.uid = small()?,
            b"gid" => self.gid = small()?,
            b"mtime" => self.mtime = if value.is_empty() { None } else { Some(time(value)?) },
            b"GNU.sparse.name" => self.sparse.name = text(),
            b"GNU.sparse.major" => self.sparse.major = Some(decimal(value)?),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.real_size = Some(decimal(value)?),
            b"GNU.sparse.numblocks" => self.sparse.found = true,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse_number(value)?,
            b"GNU.sparse.map" => value.split(|b| *b == b',').filter(|n| !n.is_empty()).try_for_each(|n| self.sparse_number(n))?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.retain(|(had, _)| had != name);
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }

    fn sparse_number(&mut self, value: &[u8]) -> Result<()> {
        self.sparse.found = true;
        self.sparse.numbers.push(decimal(value)?);
        if self.sparse.numbers.len() > 2 * SPARSE_MAX_REGIONS { Err(Fail::refused("a sparse file with too many regions")) } else { Ok(()) }
    }

    pub fn is_sparse(&self) -> bool {
        self.sparse.found || self.sparse_map_in_data()
    }

    pub fn sparse_map_in_data(&self) -> bool {
        self.sparse.major == Some(1)
    }

    pub fn take_sparse_name(&mut self) -> Option<Vec<u8>> {
        if self.is_sparse() { self.sparse.name.take() } else { None }
    }

    pub fn sparse_real_size(&self) -> Option<u64> {
        self.sparse.real_size
    }

    pub fn take_sparse_map(&mut self) -> Result<Vec<(u64, u64)>> {
        let (pairs, rest) = self.sparse.numbers.as_chunks::<2>();
        if rest.is_empty() { Ok(pairs.iter().map(|[o, l]| (*o, *l)).collect()) } else { Err(Fail::refused("the map of a sparse file is odd")) }
    }
}

pub(super) fn decimal(text: &[u8]) -> Result<u64> {
    let bad = || Fail::refused(format!("{:?} is not a number in a PAX record", String::from_utf8_lossy(text)));
    if !text.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    std::str::from_utf8(text).ok().and_then(|t| t.parse().ok()).ok_or_else(bad)
}

/// `seconds[.fraction]`, perhaps negative; times before the epoch become the epoch, as in containerd.
fn time(text: &[u8]) -> Result<(i64, u32)> {
    if text.starts_with(b"-") {
        return Ok((0, 0));
    }
    let (seconds, fraction) = match text.iter().position(|b| *b == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    let mut nanos = [b'0'; 9];
    let digits = fraction.len().min(9);
    nanos[..digits].copy_from_slice(&fraction[..digits]);
    Ok((i64::try_from(decimal(seconds)?).unwrap_or(0), decimal(&nanos)? as u32))
}

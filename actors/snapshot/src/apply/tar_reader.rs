//! Reads a tar stream entry by entry: ustar, PAX, GNU long names, base256 numbers, sparse files (GNU and PAX).
//!
//! Field decoding is the `tar` crate's. The walk over blocks is ours, because that crate splits PAX records at newlines, and a file capability
//! may hold the byte 0x0a: the record would be refused, or worse, a `size` record behind it be overlooked and the stream read out of step.
//! Where readers differ, this one does what Go's does, since nearly all layers are written and checked by Go.
use super::{Fail, Result, pax};
use std::io::{BufRead, ErrorKind};

const BLOCK: usize = 512;
/// Extended headers and long names are small; more than this is an attack on memory.
const EXTENDED_MAX_BYTES: u64 = 1 << 20;
/// Regions of a sparse file; a map larger than this is refused.
pub(super) const SPARSE_MAX_REGIONS: usize = 1 << 16;

/// What an entry makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Dir,
    Symlink,
    Link,
    Char,
    Block,
    Fifo,
}

/// One entry, with its extended headers folded in.
#[derive(Debug)]
pub(crate) struct Entry {
    pub kind: Kind,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Length of the file when it is written out.
    pub real_size: u64,
    /// Where the data of a sparse file goes: offset and length, ascending.
    pub sparse: Option<Vec<(u64, u64)>>,
}

/// The reader. Data not taken is skipped by the next [`TarReader::next`].
pub(crate) struct TarReader<R> {
    input: R,
    left: u64,
    padding: u64,
}

impl<R: BufRead> TarReader<R> {
    pub fn new(input: R) -> Self {
        TarReader { input, left: 0, padding: 0 }
    }

    /// The next entry; `None` at the end of the archive.
    pub fn next(&mut self) -> Result<Option<Entry>> {
        let mut pax = pax::Records::default();
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let rest = self.left + self.padding;
            self.skip(rest)?;
            (self.left, self.padding) = (0, 0);
            let Some(block) = self.block()? else { return Ok(None) };
            let header = tar::Header::from_byte_slice(&block);
            verify_checksum(header)?;
            let size = number(header.entry_size(), "size")?;
            match header.entry_type().as_byte() {
                b'x' => pax.parse(&self.extended(size)?)?,
                b'g' => drop(self.extended(size)?),
                b'L' => long_name = Some(trim_nul(self.extended(size)?)),
                b'K' => long_link = Some(trim_nul(self.extended(size)?)),
                _ => return self.entry(header, size, pax, long_name, long_link).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &tar::Header,
        size: u64,
        mut pax: pax::Records,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry> {
        let sparse_name = pax.take_sparse_name();
        let path = sparse_name.or(pax.path.take()).or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax.link.take().or(long_link).or_else(|| header.link_name_bytes().map(|l| l.into_owned())).unwrap_or_default();
        let type_byte = header.entry_type().as_byte();
        let kind = match type_byte {
            b'0' | 0 | b'7' | b'S' if path.ends_with(b"/") && type_byte != b'S' => Kind::Dir,
            b'0' | 0 | b'S' => Kind::File,
            b'1' => Kind::Link,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Dir,
            b'6' => Kind::Fifo,
            other => return Err(Fail::refused(format!("{}: unsupported tar entry type {:?}", show(&path), other as char))),
        };
        let size = pax.size.unwrap_or(size);
        // Only files have data: what the size field of other types says does not count (as in Go's reader).
        let stored = if matches!(type_byte, b'0' | 0 | b'7' | b'S') { size } else { 0 };
        if stored > i64::MAX as u64 {
            return Err(Fail::refused(format!("{}: size {stored} is too large", show(&path))));
        }
        self.left = stored;
        self.padding = padding_of(stored);
        let mut real_size = stored;
        let mut sparse = None;
        if type_byte == b'S' {
            (sparse, real_size) = self.gnu_sparse(header)?;
        } else if kind == Kind::File && pax.is_sparse() {
            let map = if pax.sparse_map_in_data() { self.pax_sparse_map()? } else { pax.take_sparse_map()? };
            real_size = pax.sparse_real_size().unwrap_or(stored);
            sparse = Some(map);
        }
        if let Some(map) = &sparse {
            check_sparse(map, real_size, self.left).map_err(|e| e.at(&path))?;
        }
        let mtime = pax.mtime.unwrap_or_else(|| (header.mtime().map_or(0, |m| i64::try_from(m).unwrap_or(0)), 0));
        Ok(Entry {
            kind,
            link,
            mode: number(header.mode().map(u64::from), "mode")? as u32 & 0o7777,
            uid: pax.uid.map_or_else(|| id(header.uid(), "uid"), Ok)?,
            gid: pax.gid.map_or_else(|| id(header.gid(), "gid"), Ok)?,
            mtime: if mtime.0 < 0 { (0, 0) } else { mtime },
            device: device(header, kind)?,
            xattrs: std::mem::take(&mut pax.xattrs),
            real_size,
            sparse,
            path,
        })
    }

    /// Gives the data of the present entry piece by piece, without copying it.
    pub fn data(&mut self, mut sink: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        while self.left > 0 {
            let buffer = self.fill()?;
            let take = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            sink(&buffer[..take])?;
            self.input.consume(take);
            self.left -= take as u64;
        }
        Ok(())
    }

    /// Reads the stream to its end, so that the digest covers what follows the archive.
    pub fn drain(&mut self) -> Result<()> {
        loop {
            let n = self.input.fill_buf().map_err(Fail::stream)?.len();
            if n == 0 {
                return Ok(());
            }
            self.input.consume(n);
        }
    }

    fn fill(&mut self) -> Result<&[u8]> {
        let buffer = self.input.fill_buf().map_err(Fail::stream)?;
        if buffer.is_empty() { Err(Fail::stream(ErrorKind::UnexpectedEof.into())) } else { Ok(buffer) }
    }

    fn skip(&mut self, mut n: u64) -> Result<()> {
        while n > 0 {
            let take = self.fill()?.len().min(usize::try_from(n).unwrap_or(usize::MAX));
            self.input.consume(take);
            n -= take as u64;
        }
        Ok(())
    }

    fn read_exact(&mut self, out: &mut [u8]) -> Result<()> {
        self.input.read_exact(out).map_err(Fail::stream)
    }

    /// A header block; `None` at the end: no bytes left, or two blocks of zeroes.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        for zeroes in 0..2 {
            if self.input.fill_buf().map_err(Fail::stream)?.is_empty() {
                return Ok(None);
            }
            self.read_exact(&mut block)?;
            if block.iter().any(|b| *b != 0) {
                return if zeroes == 0 { Ok(Some(block)) } else { Err(Fail::refused("a tar header follows a block of zeroes")) };
            }
        }
        Ok(None)
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > EXTENDED_MAX_BYTES {
            return Err(Fail::refused(format!("a tar extended header of {size} bytes is over the limit of {EXTENDED_MAX_BYTES}")));
        }
        let mut data = vec![0; size as usize];
        self.read_exact(&mut data)?;
        self.skip(padding_of(size))?;
        Ok(data)
    }

    fn gnu_sparse(&mut self, header: &tar::Header) -> Result<(Option<Vec<(u64, u64)>>, u64)> {
        let gnu = header.as_gnu().ok_or_else(|| Fail::refused("a sparse entry without a GNU header"))?;
        let mut map = Vec::new();
        push_regions(&gnu.sparse, &mut map)?;
        let mut more = gnu.is_extended();
        while more {
            let mut extension = tar::GnuExtSparseHeader::new();
            self.read_exact(extension.as_mut_bytes())?;
            push_regions(&extension.sparse, &mut map)?;
            more = extension.is_extended();
        }
        Ok((Some(map), number(gnu.real_size(), "real size")?))
    }

    /// The map of PAX sparse format 1.0: decimal lines at the start of the data, padded to a block.
    fn pax_sparse_map(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut numbers: Vec<u64> = Vec::new();
        let (mut wanted, mut line) = (1usize, Vec::new());
        while numbers.len() < wanted {
            if self.left < BLOCK as u64 {
                return Err(Fail::refused("the map of a sparse file is cut short"));
            }
            let mut block = [0; BLOCK];
            self.read_exact(&mut block)?;
            self.left -= BLOCK as u64;
            for byte in block {
                if numbers.len() == wanted {
                    break;
                }
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                numbers.push(pax::decimal(&line)?);
                line.clear();
                if numbers.len() == 1 {
                    let regions = usize::try_from(numbers[0]).ok().filter(|n| *n <= SPARSE_MAX_REGIONS);
                    wanted = 1 + 2 * regions.ok_or_else(|| Fail::refused("a sparse file with too many regions"))?;
                }
            }
        }
        Ok(numbers[1..].as_chunks::<2>().0.iter().map(|[offset, length]| (*offset, *length)).collect())
    }
}

fn push_regions(found: &[tar::GnuSparseHeader], map: &mut Vec<(u64, u64)>) -> Result<()> {
    for region in found.iter().filter(|r| !r.is_empty()) {
        map.push((number(region.offset(), "sparse offset")?, number(region.length(), "sparse length")?));
    }
    if map.len() > SPARSE_MAX_REGIONS { Err(Fail::refused("a sparse file with too many regions")) } else { Ok(()) }
}

fn check_sparse(map: &[(u64, u64)], real_size: u64, stored: u64) -> Result<()> {
    let (mut end, mut sum) = (0u64, 0u64);
    for (offset, length) in map {
        let next = offset.checked_add(*length).filter(|n| *offset >= end && *n <= real_size);
        end = next.ok_or_else(|| Fail::refused("the regions of a sparse file overlap or leave it"))?;
        sum += length;
    }
    if sum == stored { Ok(()) } else { Err(Fail::refused(format!("a sparse file holds {stored} bytes but its map says {sum}"))) }
}

fn device(header: &tar::Header, kind: Kind) -> Result<(u32, u32)> {
    if !matches!(kind, Kind::Char | Kind::Block) {
        return Ok((0, 0));
    }
    let part = |field: std::io::Result<Option<u32>>| field.map(Option::unwrap_or_default).map_err(|e| Fail::refused(format!("device number: {e}")));
    Ok((part(header.device_major())?, part(header.device_minor())?))
}

fn verify_checksum(header: &tar::Header) -> Result<()> {
    let bytes = header.as_bytes();
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for (at, byte) in bytes.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte as i8);
    }
    let said = i64::from(header.cksum().map_err(|e| Fail::refused(format!("tar header: {e}")))?);
    if said == unsigned || said == signed { Ok(()) } else { Err(Fail::refused("a tar header with a wrong checksum: the layer is not a tar, or damaged")) }
}

fn number(field: std::io::Result<u64>, what: &str) -> Result<u64> {
    field.map_err(|e| Fail::refused(format!("tar header, {what}: {e}")))
}

fn id(field: std::io::Result<u64>, what: &str) -> Result<u32> {
    let value = number(field, what)?;
    u32::try_from(value).map_err(|_| Fail::refused(format!("tar header: {what} {value} is out of range")))
}

fn padding_of(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

fn trim_nul(mut name: Vec<u8>) -> Vec<u8> {
    if let Some(end) = name.iter().position(|b| *b == 0) {
        name.truncate(end);
    }
    name
}

pub(crate) fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

//! Header blocks: names and values, compressed by one zlib stream for each direction of a connection, with SPDY/3's dictionary.
use bytes::{BufMut, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::collections::HashMap;
use std::io;

/// Bytes of an unpacked block at most.
const LARGEST: usize = 64 << 10;
/// The dictionary's words, which stand in it with their lengths, as in a header block (SPDY/3, section 2.6.10.1).
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow authorization \
    cache-control connection content-base content-encoding content-language content-length content-location content-md5 content-range content-type \
    date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards \
    pragma proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade user-agent vary via \
    warning www-authenticate method get status 200+OK version HTTP/1.1 url public set-cookie keep-alive origin";
/// And the text behind them.
const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative Information\
    204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented\
    503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,\
    image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdch\
    charset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut all = Vec::with_capacity(1423);
    for word in WORDS.split_whitespace() {
        let word = word.replace('+', " ");
        all.extend_from_slice(&(word.len() as u32).to_be_bytes());
        all.extend_from_slice(word.as_bytes());
    }
    all.extend_from_slice(TEXT.as_bytes());
    all
}

/// Headers by their lower-case names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Headers(HashMap<String, String>);

impl Headers {
    /// A header, empty if it is missing.
    pub(crate) fn get(&self, name: &str) -> &str {
        self.0.get(&name.to_lowercase()).map_or("", String::as_str)
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Headers {
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a str)>>(all: I) -> Self {
        Headers(all.into_iter().map(|(k, v)| (k.to_lowercase(), v.to_owned())).collect())
    }
}

/// Compresses what we send.
pub(crate) struct Packer(Compress);

impl Packer {
    pub(crate) fn new() -> Packer {
        let mut zlib = Compress::new(Compression::fast(), true);
        // Fails only for a raw stream, which this is not.
        let _ = zlib.set_dictionary(&dictionary());
        Packer(zlib)
    }
    pub(crate) fn pack(&mut self, headers: &Headers) -> Vec<u8> {
        let mut plain = BytesMut::new();
        plain.put_u32(headers.0.len() as u32);
        for text in headers.0.iter().flat_map(|(k, v)| [k, v]) {
            plain.put_u32(text.len() as u32);
            plain.put_slice(text.as_bytes());
        }
        let mut packed = Vec::with_capacity(plain.len() + 256);
        let before = self.0.total_in();
        loop {
            let rest = &plain[(self.0.total_in() - before) as usize..];
            let _ = self.0.compress_vec(rest, &mut packed, FlushCompress::Sync);
            if packed.len() < packed.capacity() {
                return packed;
            }
            packed.reserve(256);
        }
    }
}

/// Decompresses what we get.
pub(crate) struct Unpacker(Decompress);

impl Unpacker {
    pub(crate) fn new() -> Unpacker {
        Unpacker(Decompress::new(true))
    }

    pub(crate) fn unpack(&mut self, packed: &[u8]) -> io::Result<Headers> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("SPDY headers: {what}"));
        let mut plain = Vec::with_capacity(1024);
        let before = self.0.total_in();
        loop {
            let rest = &packed[(self.0.total_in() - before) as usize..];
            match self.0.decompress_vec(rest, &mut plain, FlushDecompress::Sync) {
                Err(e) if e.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&dictionary()).map_err(|_| bad("another dictionary"))?;
                    continue;
                }
                Err(_) => return Err(bad("not zlib")),
                Ok(Status::StreamEnd) => break,
                Ok(_) => {}
            }
            if self.0.total_in() - before == packed.len() as u64 && plain.len() < plain.capacity() {
                break;
            }
            if plain.len() >= LARGEST {
                return Err(bad("too large"));
            }
            plain.reserve(1024);
        }
        parse(&plain).ok_or_else(|| bad("cut short"))
    }
}

fn parse(mut plain: &[u8]) -> Option<Headers> {
    let number = |from: &mut &[u8]| {
        let (n, rest) = from.split_first_chunk::<4>()?;
        *from = rest;
        Some(u32::from_be_bytes(*n) as usize)
    };
    let text = |from: &mut &[u8]| {
        let n = number(from)?;
        let (text, rest) = from.split_at_checked(n)?;
        *from = rest;
        Some(String::from_utf8_lossy(text).into_owned())
    };
    let count = number(&mut plain)?;
    let mut all = HashMap::new();
    for _ in 0..count {
        let (name, value) = (text(&mut plain)?, text(&mut plain)?);
        // Several values of one name are parted by NUL; the first counts.
        all.insert(name.to_lowercase(), value.split('\0').next().unwrap_or_default().to_owned());
    }
    Some(Headers(all))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_dictionary_is_the_standard_s() {
        let all = dictionary();
        // Its Adler-32 is the id by which zlib knows it.
        let (a, b) = all.iter().fold((1u32, 0u32), |(a, b), x| ((a + u32::from(*x)) % 65521, (b + a + u32::from(*x)) % 65521));
        assert_eq!((all.len(), b << 16 | a), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn blocks_come_through_one_after_another() {
        let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
        for n in 0..50 {
            let text = format!("{n}{}", "x".repeat(n * 20));
            let headers: Headers = [("streamType", "stdin"), ("Port", text.as_str())].into_iter().collect();
            let back = unpacker.unpack(&packer.pack(&headers)).unwrap();
            assert_eq!((back.get("streamtype"), back.get("port")), ("stdin", text.as_str()));
        }
        assert!(unpacker.unpack(b"garbage").is_err());
    }
}

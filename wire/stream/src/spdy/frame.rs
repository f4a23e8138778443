//! SPDY/3.1 frames.
use super::headers::{Headers, Packer, Unpacker};
use bytes::{BufMut, Bytes, BytesMut};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Largest frame that we take; peers send 32 KiB at most.
const LARGEST: usize = 1 << 20;
const VERSION: u16 = 3;
const FIN: u8 = 1;
/// REFUSED_STREAM.
pub(crate) const REFUSED: u32 = 3;

/// A frame, as far as we care.
pub(crate) enum Frame {
    SynStream {
        id: u32,
        headers: Headers,
        fin: bool,
    },
    SynReply {
        id: u32,
    },
    Reset {
        id: u32,
        status: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    Data {
        id: u32,
        bytes: Bytes,
        fin: bool,
    },
    /// SETTINGS, HEADERS, WINDOW_UPDATE and what is to come: read and dropped.
    Other,
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("SPDY: {what}"))
}

fn word(body: &[u8], at: usize) -> io::Result<u32> {
    let bytes = body.get(at..at + 4).ok_or_else(|| bad("a frame is too short"))?;
    Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

impl Frame {
    /// Reads the next one.
    pub(crate) async fn read<R: AsyncRead + Unpin>(from: &mut R, unpacker: &mut Unpacker) -> io::Result<Frame> {
        let mut head = [0; 8];
        from.read_exact(&mut head).await?;
        let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let (flags, length) = (head[4], u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize);
        if length > LARGEST {
            return Err(bad("a frame is too large"));
        }
        let mut body = vec![0; length];
        from.read_exact(&mut body).await?;
        let fin = flags & FIN != 0;
        if first >> 31 == 0 {
            return Ok(Frame::Data { id: first, bytes: body.into(), fin });
        }
        if (first >> 16) as u16 & 0x7fff != VERSION {
            return Err(bad("not version 3"));
        }
        let id = |at| word(&body, at).map(|w| w & 0x7fff_ffff);
        Ok(match first as u16 {
            // Header blocks share one compressor, so each must be unpacked, wanted or not.
            1 => Frame::SynStream { id: id(0)?, headers: unpacker.unpack(body.get(10..).unwrap_or_default())?, fin },
            2 | 8 => {
                unpacker.unpack(body.get(4..).unwrap_or_default())?;
                Frame::Other
            }
            3 => Frame::Reset { id: id(0)?, status: word(&body, 4)? },
            6 => Frame::Ping { id: word(&body, 0)? },
            7 => Frame::GoAway,
            _ => Frame::Other,
        })
    }

    /// As bytes.
    pub(crate) fn encode(&self, packer: &mut Packer) -> Bytes {
        let mut out = BytesMut::new();
        let control = |out: &mut BytesMut, kind: u16, body: &[u8]| {
            out.put_u16(0x8000 | VERSION);
            out.put_u16(kind);
            out.put_u32(body.len() as u32);
            out.put_slice(body);
        };
        match self {
            Frame::Data { id, bytes, fin } => {
                out.put_u32(*id);
                out.put_u32(u32::from(if *fin { FIN } else { 0 }) << 24 | bytes.len() as u32);
                out.put_slice(bytes);
            }
            Frame::SynStream { id, headers, fin } => {
                let mut body = BytesMut::new();
                body.put_u32(*id);
                body.put_slice(&[0; 6]);
                body.put_slice(&packer.pack(headers));
                control(&mut out, 1, &body);
                out[4] = if *fin { FIN } else { 0 };
            }
            Frame::SynReply { id } => {
                let mut body = BytesMut::new();
                body.put_u32(*id);
                body.put_slice(&packer.pack(&Headers::default()));
                control(&mut out, 2, &body);
            }
            Frame::Reset { id, status } => control(&mut out, 3, &[id.to_be_bytes(), status.to_be_bytes()].concat()),
            Frame::Ping { id } => control(&mut out, 6, &id.to_be_bytes()),
            Frame::GoAway => control(&mut out, 7, &[0; 8]),
            Frame::Other => {}
        }
        out.freeze()
    }
}

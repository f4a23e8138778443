//! As much of D-Bus as it takes to ask systemd for a scope: two calls, by root, over systemd's own socket.
//!
//! That socket (`/run/systemd/private`, what `systemctl` uses too) has no bus daemon in between, so a bus that hangs or is not installed costs nothing.
//! Where it is missing, the system bus is asked. Every read and write has a deadline: a manager that does not answer is an error, not a wait.
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// systemd's own socket, and that of the system bus.
const SOCKETS: [(&str, bool); 2] = [("/run/systemd/private", false), ("/run/dbus/system_bus_socket", true)];
/// For each read and write. A busy manager answers within milliseconds; one that reloads a big machine's units, within seconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest answer that is read.
const LARGEST: usize = 1 << 20;

const CALL: u8 = 1;
const ANSWER: u8 = 2;
const ERROR: u8 = 3;

/// A value of a property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Variant {
    /// `s`
    Text(String),
    /// `b`
    Flag(bool),
    /// `t`
    Number(u64),
    /// `ay`
    Bytes(Vec<u8>),
    /// `au`
    Numbers(Vec<u32>),
}

/// Named values.
pub type Properties = Vec<(&'static str, Variant)>;

/// The body of a message, as it grows.
#[derive(Default)]
pub struct Body(Vec<u8>);

impl Body {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }
    fn u32(&mut self, n: u32) {
        self.align(4);
        self.0.extend(n.to_le_bytes());
    }
    /// `s`, and `o`.
    pub fn text(&mut self, text: &str) {
        self.u32(text.len() as u32);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }
    /// `b`.
    pub fn flag(&mut self, flag: bool) {
        self.u32(flag.into());
    }
    fn signature(&mut self, text: &str) {
        self.0.push(text.len() as u8);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }
    fn array(&mut self, alignment: usize, fill: impl FnOnce(&mut Body)) {
        self.u32(0);
        let at = self.0.len() - 4;
        // The length leaves out what aligns the first element.
        self.align(alignment);
        let start = self.0.len();
        fill(self);
        let length = (self.0.len() - start) as u32;
        self.0[at..at + 4].copy_from_slice(&length.to_le_bytes());
    }
    fn variant(&mut self, value: &Variant) {
        match value {
            Variant::Text(text) => {
                self.signature("s");
                self.text(text);
            }
            Variant::Flag(flag) => {
                self.signature("b");
                self.flag(*flag);
            }
            Variant::Number(n) => {
                self.signature("t");
                self.align(8);
                self.0.extend(n.to_le_bytes());
            }
            Variant::Bytes(bytes) => {
                self.signature("ay");
                self.array(1, |b| b.0.extend(bytes));
            }
            Variant::Numbers(all) => {
                self.signature("au");
                self.array(4, |b| all.iter().for_each(|n| b.u32(*n)));
            }
        }
    }
    /// `a(sv)`.
    pub fn properties(&mut self, all: &Properties) {
        self.array(8, |b| {
            for (name, value) in all {
                b.align(8);
                b.text(name);
                b.variant(value);
            }
        });
    }
    /// `a(sa(sv))`, empty.
    pub fn no_units(&mut self) {
        self.array(8, |_| {});
    }
}

/// A connection to the manager.
pub struct Bus {
    stream: UnixStream,
    serial: u32,
}

impl Bus {
    /// Connects as root.
    pub fn connect() -> io::Result<Bus> {
        let mut failed = io::Error::other("there is no systemd on this machine");
        for (path, greet) in SOCKETS {
            match Bus::open(path, greet) {
                Ok(bus) => return Ok(bus),
                Err(e) => failed = io::Error::new(e.kind(), format!("systemd does not answer on {path}: {e}")),
            }
        }
        Err(failed)
    }

    fn open(path: &str, greet: bool) -> io::Result<Bus> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        // "30" is "0", root's number, in hexadecimal; the kernel vouches for it.
        stream.write_all(b"\0AUTH EXTERNAL 30\r\n")?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            line.push(byte[0]);
            if line.len() > 4096 {
                return Err(io::Error::other("no answer to the greeting"));
            }
        }
        if !line.starts_with(b"OK ") {
            return Err(io::Error::other(format!("refused: {}", String::from_utf8_lossy(&line).trim())));
        }
        stream.write_all(b"BEGIN\r\n")?;
        let mut bus = Bus { stream, serial: 0 };
        if greet {
            bus.call(("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus"), "Hello", "", Body::default())?;
        }
        Ok(bus)
    }

    /// Calls a method of systemd's manager and waits for its answer.
    pub fn manager(&mut self, member: &str, signature: &str, body: Body) -> io::Result<()> {
        let manager = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");
        self.call(manager, member, signature, body)
    }

    fn call(&mut self, (to, path, interface): (&str, &str, &str), member: &str, signature: &str, body: Body) -> io::Result<()> {
        self.serial += 1;
        let mut message = Body(vec![b'l', CALL, 0, 1]);
        message.u32(body.0.len() as u32);
        message.u32(self.serial);
        message.array(8, |b| {
            for (code, kind, text) in [(1, "o", path), (6, "s", to), (2, "s", interface), (3, "s", member)] {
                b.align(8);
                b.0.push(code);
                b.signature(kind);
                b.text(text);
            }
            if !signature.is_empty() {
                b.align(8);
                b.0.push(8);
                b.signature("g");
                b.signature(signature);
            }
        });
        message.align(8);
        message.0.extend(body.0);
        self.stream.write_all(&message.0)?;
        loop {
            let (kind, reply_to, body) = self.read()?;
            match kind {
                ANSWER if reply_to == Some(self.serial) => return Ok(()),
                ERROR if reply_to == Some(self.serial) => return Err(io::Error::other(format!("systemd: {}", text(&body)))),
                // A signal, or a late answer.
                _ => {}
            }
        }
    }

    /// One message: its kind, the serial that it answers, its body.
    fn read(&mut self) -> io::Result<(u8, Option<u32>, Vec<u8>)> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        if head[0] != b'l' {
            return Err(io::Error::other("systemd answers in another byte order"));
        }
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
        let (body, fields) = (word(4), word(12));
        if body > LARGEST || fields > LARGEST {
            return Err(io::Error::other("systemd answers with too much"));
        }
        let mut rest = vec![0; fields.next_multiple_of(8) + body];
        self.stream.read_exact(&mut rest)?;
        let reply_to = reply_serial(&rest[..fields]);
        Ok((head[1], reply_to, rest.split_off(fields.next_multiple_of(8))))
    }
}

/// Field 5 of a header: fields are a code, a signature of one letter, and a value.
fn reply_serial(fields: &[u8]) -> Option<u32> {
    let mut at = 0usize;
    loop {
        at = at.next_multiple_of(8);
        let (code, kind) = (*fields.get(at)?, *fields.get(at + 2)?);
        at += 4;
        let word = |at: usize| Some(u32::from_le_bytes(fields.get(at..at + 4)?.try_into().ok()?));
        match kind {
            b'u' if code == 5 => return word(at),
            b'u' => at += 4,
            b'g' => at += usize::from(*fields.get(at)?) + 2,
            _ => at += 4 + word(at)? as usize + 1,
        }
    }
}

/// The string that an error's body begins with.
fn text(body: &[u8]) -> String {
    String::from_utf8_lossy(body.get(4..).unwrap_or_default()).trim_end_matches('\0').to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn values_are_aligned_as_the_protocol_wants() {
        let mut b = Body::default();
        b.text("x.scope");
        b.text("fail");
        b.properties(&vec![
            ("A", Variant::Number(7)),
            ("B", Variant::Bytes(vec![1, 2])),
            ("C", Variant::Numbers(vec![9])),
            ("D", Variant::Flag(true)),
        ]);
        b.no_units();
        let text = |t: &str| [&(t.len() as u32).to_le_bytes(), t.as_bytes(), &[0]].concat();
        assert_eq!(b.0[..12], text("x.scope")[..]);
        assert_eq!(b.0[12..21], text("fail")[..]);
        // The array's length at 24, its first structure at 32: name, signature, padding, the number at 48.
        assert_eq!(b.0[32..38], text("A")[..]);
        assert_eq!(b.0[38..41], [1, b't', 0]);
        assert_eq!(b.0[48..56], 7u64.to_le_bytes());
        assert_eq!(b.0[56..62], text("B")[..]);
        assert_eq!(b.0[62..66], [2, b'a', b'y', 0]);
        assert_eq!(b.0[68..74], [2, 0, 0, 0, 1, 2]);
        // The length counts from the first structure to the end of the last.
        let length = u32::from_le_bytes(b.0[24..28].try_into().unwrap()) as usize;
        assert_eq!(b.0.len(), (32 + length).next_multiple_of(4) + 4 + (8 - ((32 + length).next_multiple_of(4) + 4) % 8) % 8);
    }

    #[test]
    fn the_serial_is_found_among_other_fields() {
        let mut b = Body::default();
        b.0.extend([7, 1, b's', 0]);
        b.text(":1.5");
        b.align(8);
        b.0.extend([8, 1, b'g', 0]);
        b.signature("o");
        b.align(8);
        b.0.extend([5, 1, b'u', 0]);
        b.u32(42);
        assert_eq!(reply_serial(&b.0), Some(42));
        assert_eq!(reply_serial(&b.0[..20]), None);
    }
}

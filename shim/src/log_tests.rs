#![allow(clippy::unwrap_used)]
use super::*;

struct Bed(PathBuf, Arc<Log>);

impl Bed {
    fn new(name: &str, limit: i64) -> Bed {
        let path = std::env::temp_dir().join(format!("troupe-log-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let log = Log::open(&format!("{}?max_line={limit}", path.display())).unwrap();
        Bed(path, Arc::new(log))
    }
    /// Writes the pieces as one stream; answers tag and content of every entry.
    fn run(&self, pieces: &[&[u8]]) -> Vec<(String, Vec<u8>)> {
        let mut lines = Lines::new("stdout");
        pieces.iter().for_each(|p| lines.push(&self.1, p));
        lines.finish(&self.1);
        if let Some((entries, read)) = lines.gathered() {
            self.1.write(&entries, read);
        }
        self.entries()
    }
    fn entries(&self) -> Vec<(String, Vec<u8>)> {
        let text = std::fs::read(&self.0).unwrap();
        assert!(text.is_empty() || text.ends_with(b"\n"), "every entry ends");
        let entry = |line: &[u8]| {
            let mut parts = line.splitn(4, |b| *b == b' ');
            let (stamp, stream) = (parts.next().unwrap().to_vec(), parts.next().unwrap());
            let stamp = String::from_utf8(stamp).unwrap();
            assert!(stamp.len() >= 20 && &stamp[10..11] == "T" && stream == b"stdout", "{stamp}");
            (String::from_utf8(parts.next().unwrap().to_vec()).unwrap(), parts.next().unwrap().to_vec())
        };
        text.split_inclusive(|b| *b == b'\n').map(|l| entry(l.strip_suffix(b"\n").unwrap())).collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn texts(all: &[(String, Vec<u8>)]) -> Vec<String> {
    all.iter().map(|(tag, text)| format!("{tag}:{}", String::from_utf8_lossy(text))).collect()
}

#[test]
fn lines_are_cut_and_tagged_as_cri_has_it() {
    for (name, pieces, expected) in [
        ("plain", vec![&b"a\nb\n"[..]], vec!["F:a", "F:b"]),
        ("empty", vec![b"\n\n"], vec!["F:", "F:"]),
        ("no end", vec![b"a\nrest"], vec!["F:a", "P:rest"]),
        ("pieces", vec![b"he", b"llo", b"\n"], vec!["F:hello"]),
        ("cr", vec![b"a\r\nb\rc\n"], vec!["F:a", "F:b\rc"]),
        ("cr in two reads", vec![b"a\r", b"\n"], vec!["F:a"]),
        ("cr alone", vec![b"\r\n"], vec!["F:"]),
        ("last cr", vec![b"a\r"], vec!["P:a\r"]),
        ("two crs", vec![b"a\r\r\n"], vec!["F:a\r"]),
        ("limit", vec![b"12345678\n"], vec!["F:12345678"]),
        ("limit in pieces", vec![b"1234", b"5678", b"\n"], vec!["F:12345678"]),
        ("limit and cr", vec![b"12345678\r\n"], vec!["F:12345678"]),
        ("limit and cr in two reads", vec![b"12345678\r", b"\n"], vec!["F:12345678"]),
        ("limit and a cr that is none", vec![b"12345678\r", b"x\n"], vec!["P:12345678", "F:\rx"]),
        ("longer", vec![b"123456789\n"], vec!["P:12345678", "F:9"]),
        ("twice the limit", vec![b"1234567812345678\n"], vec!["P:12345678", "F:12345678"]),
        ("long and no end", vec![b"12345678123"], vec!["P:12345678", "P:123"]),
    ] {
        let bed = Bed::new(&name.replace(' ', "-"), 8);
        assert_eq!(texts(&bed.run(&pieces)), expected, "{name}");
    }
}

#[test]
fn a_lifted_limit_still_bounds_memory() {
    let bed = Bed::new("lifted", -1);
    let all = bed.run(&[&vec![b'x'; 100_000], b"\n"]);
    assert_eq!((all.len(), all[0].0.as_str(), all[0].1.len()), (1, "F", 100_000));
    let mut lines = Lines::new("stdout");
    for _ in 0..100 {
        lines.push(&bed.1, &[b'y'; 64 << 10]);
        lines.gathered();
        assert!(lines.line.len() <= LIFTED + (64 << 10));
    }
}

#[test]
fn counters_tell_what_was_read_and_written() {
    let bed = Bed::new("counters", 8);
    let told = bed.0.with_extension("count");
    bed.1.count_in(&told).unwrap();
    bed.run(&[b"a\n12345678123\nrest"]);
    let bytes = std::fs::read(&told).unwrap();
    let _ = std::fs::remove_file(&told);
    let numbers: Vec<u64> = bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect();
    let written = std::fs::metadata(&bed.0).unwrap().len();
    assert_eq!(numbers, [3, 4, 18, written, 2, 12, 0, 0]);
}

#[tokio::test]
async fn a_full_disk_loses_whole_entries_and_counts_them() {
    // /dev/full takes nothing.
    let log = Arc::new(Log::open("/dev/full?max_line=8").unwrap());
    let mut lines = Lines::new("stdout");
    lines.push(&log, b"a\nb\n");
    let bytes = lines.out.len() as u64;
    log.take(&mut lines).await;
    let c = log.inner().counters;
    assert_eq!((c.input_entries, c.output_entries, c.output_bytes, c.lost_entries, c.lost_bytes), (2, 0, 0, 2, bytes));
}

#[tokio::test]
async fn a_reopened_log_is_there_at_once() {
    let bed = Bed::new("reopen", 8);
    bed.run(&[b"old\n"]);
    let aside = bed.0.with_extension("1");
    std::fs::rename(&bed.0, &aside).unwrap();
    bed.1.clone().reopen().await.unwrap();
    assert_eq!(bed.entries(), []);
    bed.run(&[b"new\n"]);
    assert_eq!(texts(&bed.entries()), ["F:new"]);
    assert!(std::fs::read_to_string(&aside).unwrap().ends_with("F old\n"));
    let _ = std::fs::remove_file(aside);
}

#[test]
fn timestamps_are_rfc3339() {
    assert_eq!(civil(1_709_210_096), "2024-02-29T12:34:56");
    assert_eq!((zone(0).as_str(), zone(19800).as_str(), zone(-12600).as_str()), ("Z", "+05:30", "-03:30"));
    let mut out = vec![];
    let at = UNIX_EPOCH + std::time::Duration::new(1_709_210_096, 120_000_000);
    Clock::default().stamp(at, &mut out);
    assert!(String::from_utf8(out).unwrap().contains(".12"));
}

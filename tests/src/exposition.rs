//! Prometheus' text format, checked as its own tools check it.
use std::collections::{BTreeMap, BTreeSet};

/// One sample: name, labels, value.
pub type Sample = (String, BTreeMap<String, String>, f64);

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.chars().enumerate().all(|(i, c)| c.is_ascii_alphabetic() || c == '_' || c == ':' || (i > 0 && c.is_ascii_digit()))
}

fn sample(line: &str) -> Sample {
    let (head, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
    let value = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
    let (name, labels) = head.split_once('{').map_or((head, ""), |(n, l)| (n, l.strip_suffix('}').expect("an open brace")));
    assert!(is_name(name), "no name: {line}");
    let mut all = BTreeMap::new();
    let mut rest = labels;
    while !rest.is_empty() {
        let (key, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("no label: {line}"));
        assert!(is_name(key), "no label: {line}");
        let mut end = None;
        let mut escaped = false;
        for (at, c) in after.char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => {
                    end = Some(at);
                    break;
                }
                _ => {}
            }
        }
        let end = end.expect("an open quote");
        assert!(all.insert(key.to_owned(), after[..end].to_owned()).is_none(), "a label twice: {line}");
        rest = after[end + 1..].trim_start_matches(',');
    }
    (name.to_owned(), all, value)
}

/// Parses a page and checks it: each family once with help and type before its samples, no series twice, counters end in `_total`, histograms add up.
pub fn check(page: &str) -> Vec<Sample> {
    let (mut types, mut helps, mut seen) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
    let mut samples: Vec<Sample> = vec![];
    for line in page.lines().filter(|l| !l.is_empty()) {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').unwrap();
            assert!(!text.trim().is_empty() && helps.insert(name.to_owned()), "help: {line}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "a type twice: {line}");
            // The one exception is containerd's own name.
            let excused = name == "containerd_cri_sandboxed_in_progress_image_pulls_total";
            assert_eq!(name.ends_with("_total"), kind == "counter" || excused, "{line}");
        } else {
            let (name, labels, value) = sample(line);
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s).filter(|f| types.contains_key(*f)));
            let family = family.unwrap_or(&name);
            assert!(types.contains_key(family) && helps.contains(family), "a sample without type and help: {line}");
            assert!(seen.insert((name.clone(), labels.clone())), "a series twice: {line}");
            samples.push((name, labels, value));
        }
    }
    for (family, _) in types.iter().filter(|(_, kind)| *kind == "histogram") {
        let mut buckets: BTreeMap<BTreeMap<String, String>, Vec<(f64, f64)>> = BTreeMap::new();
        for (name, labels, value) in samples.iter().filter(|(n, ..)| *n == format!("{family}_bucket")) {
            let mut rest = labels.clone();
            let bound = rest.remove("le").unwrap_or_else(|| panic!("{name} without a bound"));
            buckets.entry(rest).or_default().push((bound.replace("+Inf", "inf").parse().unwrap(), *value));
        }
        for (labels, bounds) in buckets {
            assert!(bounds.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{family} {labels:?} {bounds:?}");
            let count = samples.iter().find(|(n, l, _)| *n == format!("{family}_count") && *l == labels).unwrap().2;
            assert_eq!(bounds.last().unwrap(), &(f64::INFINITY, count), "{family} {labels:?}");
        }
    }
    samples
}

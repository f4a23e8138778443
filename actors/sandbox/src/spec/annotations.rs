//! Annotations of the specification: those that the configuration lets through, and those by which others recognise a container.
use proto::cri::PodSandboxConfig;
use serde_json::{Map, Value};
use std::collections::HashMap;

/// Does a shell pattern match the whole name? `*` and `?` do not match `/` (Go's `path.Match`, which containerd's users know).
pub fn matches(pattern: &str, name: &str) -> bool {
    fn from(p: &[char], n: &[char]) -> bool {
        match p.first() {
            None => n.is_empty(),
            Some('*') => (0..=n.iter().take_while(|c| **c != '/').count()).any(|k| from(&p[1..], &n[k..])),
            Some('?') => n.first().is_some_and(|c| *c != '/') && from(&p[1..], &n[1..]),
            Some('[') => match class(&p[1..], n.first().copied()) {
                Some((true, used)) => from(&p[1 + used..], &n[1..]),
                _ => false,
            },
            Some('\\') if p.len() > 1 => n.first() == Some(&p[1]) && from(&p[2..], &n[1..]),
            Some(c) => n.first() == Some(c) && from(&p[1..], &n[1..]),
        }
    }
    from(&pattern.chars().collect::<Vec<_>>(), &name.chars().collect::<Vec<_>>())
}

/// A character class behind its bracket: whether it matches, and how long it is. `None` when it has no end.
fn class(p: &[char], c: Option<char>) -> Option<(bool, usize)> {
    let negated = p.first() == Some(&'^');
    let first = usize::from(negated);
    let (mut at, mut hit) = (first, false);
    loop {
        if at > first && p.get(at) == Some(&']') {
            return Some((c.is_some_and(|c| hit != negated && c != '/'), at + 1));
        }
        // One end of a range; a bare bracket or dash is none.
        let take = |at: &mut usize| {
            let escaped = p.get(*at) == Some(&'\\');
            *at += usize::from(escaped) + 1;
            p.get(*at - 1).copied().filter(|c| escaped || !matches!(c, '-' | ']'))
        };
        let low = take(&mut at)?;
        let mut high = low;
        if p.get(at) == Some(&'-') {
            at += 1;
            high = take(&mut at)?;
        }
        hit |= c.is_some_and(|c| (low..=high).contains(&c));
    }
}

/// Those of `all` that one of `patterns` matches.
pub fn passed(all: &HashMap<String, String>, patterns: &[String], into: &mut Map<String, Value>) {
    let through = all.iter().filter(|(key, _)| patterns.iter().any(|p| matches(p, key)));
    into.extend(through.map(|(k, v)| (k.clone(), v.as_str().into())));
}

/// What identifies a container, or with an empty `container` a pod. Written last, so that no client can claim to be another.
pub fn identity(pod_id: &str, pod: &PodSandboxConfig, container: &str, image: &str, into: &mut Map<String, Value>) {
    let metadata = pod.metadata.clone().unwrap_or_default();
    let mut set = |key: &str, value: &str| into.insert(format!("io.kubernetes.cri.{key}"), value.into());
    set("sandbox-id", pod_id);
    set("sandbox-name", &metadata.name);
    set("sandbox-namespace", &metadata.namespace);
    set("sandbox-uid", &metadata.uid);
    if container.is_empty() {
        set("container-type", "sandbox");
        set("sandbox-log-directory", &pod.log_directory);
        let resources = pod.linux.as_ref().and_then(|l| l.resources.as_ref());
        for (key, value) in resources.into_iter().flat_map(|r| {
            [
                ("sandbox-cpu-period", r.cpu_period),
                ("sandbox-cpu-quota", r.cpu_quota),
                ("sandbox-cpu-shares", r.cpu_shares),
                ("sandbox-memory", r.memory_limit_in_bytes),
            ]
        }) {
            set(key, &value.to_string());
        }
    } else {
        set("container-type", "container");
        set("container-name", container);
        set("image-name", image);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_as_go_has_them() {
        for (pattern, name, want) in [
            ("io.kata.*", "io.kata.cpu", true),
            ("io.kata.*", "io.kata.cpu/x", false),
            ("*", "a/b", false),
            ("*/*", "a/b", true),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            ("[]a]", "]", false),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("a*b*c", "aXXbYYc", true),
            ("", "", true),
            ("[a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), want, "{pattern} {name}");
        }
    }

    #[test]
    fn nobody_claims_to_be_another() {
        let claims = HashMap::from([("io.kubernetes.cri.sandbox-id".to_owned(), "other".to_owned()), ("x.y/z".to_owned(), "1".to_owned())]);
        let mut all = Map::new();
        passed(&claims, &["io.kubernetes.cri.*".into(), "x.y/*".into()], &mut all);
        assert_eq!(all["io.kubernetes.cri.sandbox-id"], "other");
        identity("me", &PodSandboxConfig::default(), "c", "busybox", &mut all);
        assert_eq!((all["io.kubernetes.cri.sandbox-id"].as_str(), all["x.y/z"].as_str()), (Some("me"), Some("1")));
    }
}

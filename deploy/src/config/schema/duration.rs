//! Go's durations.
use std::time::Duration;

/// Reads a Go duration such as `5m0s`, `300ms`, `1.5h`. The error names `key`.
pub fn duration(key: &str, text: &str) -> anyhow::Result<Duration> {
    let bad = || anyhow::anyhow!("{key}: {text:?} is not a duration such as 5m0s");
    if text.is_empty() || text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut total) = (text, 0.0);
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let value: f64 = rest[..number].parse().map_err(|_| bad())?;
        rest = &rest[number..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += value
            * match &rest[..unit] {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(bad()),
            };
        rest = &rest[unit..];
    }
    Ok(Duration::from_secs_f64(total))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn go_durations() {
        for (text, ms) in [("5m0s", 300_000), ("300ms", 300), ("1.5h", 5_400_000), ("0s", 0), ("", 0), ("1m30s", 90_000)] {
            assert_eq!(duration("k", text).unwrap().as_millis(), ms, "{text}");
        }
        for text in ["5", "x", "5 m", "-1s", "5y"] {
            assert!(duration("k", text).unwrap_err().to_string().starts_with("k:"), "{text}");
        }
    }
}

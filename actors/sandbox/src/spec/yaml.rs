//! Reads the YAML that people write for devices and classes, into JSON values: block and flow collections, quoted and plain scalars, block scalars,
//! comments, one document. Anchors, tags, complex keys and several documents are refused with the line's number, never misread.
use serde_json::{Map, Value};

/// Nesting at most: a file cannot exhaust the stack.
const DEEPEST: usize = 64;

/// What is wrong, and where.
pub type Error = String;

struct Line<'a> {
    number: usize,
    indent: usize,
    text: &'a str,
}

/// Reads a document. JSON is YAML, too, and goes to the JSON parser.
pub fn parse(text: &str) -> Result<Value, Error> {
    if text.trim_start().starts_with(['{', '[']) {
        return serde_json::from_str(text).or_else(|json| document(text).map_err(|yaml| format!("{yaml}; as JSON: {json}")));
    }
    document(text)
}

fn document(text: &str) -> Result<Value, Error> {
    let mut lines = vec![];
    for (n, full) in text.lines().enumerate() {
        let body = full.trim_start_matches(' ');
        if body.starts_with('\t') {
            return Err(format!("line {}: a tab indents; YAML wants spaces", n + 1));
        }
        lines.push(Line { number: n + 1, indent: full.len() - body.len(), text: body.trim_end() });
    }
    let mut reader = Reader { lines, at: 0 };
    reader.skip();
    if reader.peek().is_some_and(|l| l.text == "---") {
        reader.at += 1;
        reader.skip();
    }
    let Some(first) = reader.peek() else { return Ok(Value::Null) };
    let indent = first.indent;
    let value = reader.block(indent, 0)?;
    reader.skip();
    match reader.peek() {
        Some(l) if l.text != "..." => Err(format!("line {}: {:?} does not belong to what stands above", l.number, l.text)),
        _ => Ok(value),
    }
}

struct Reader<'a> {
    lines: Vec<Line<'a>>,
    at: usize,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<&Line<'a>> {
        self.lines.get(self.at)
    }
    /// Over empty lines and comments.
    fn skip(&mut self) {
        while self.peek().is_some_and(|l| l.text.is_empty() || l.text.starts_with('#')) {
            self.at += 1;
        }
    }
    fn fault<T>(&self, what: &str) -> Result<T, Error> {
        let number = self.peek().or(self.lines.last()).map_or(0, |l| l.number);
        Err(format!("line {number}: {what}"))
    }

    /// A collection or a scalar whose lines are indented by `indent`.
    fn block(&mut self, indent: usize, depth: usize) -> Result<Value, Error> {
        if depth > DEEPEST {
            return self.fault("too deeply nested");
        }
        let Some(line) = self.peek() else { return Ok(Value::Null) };
        let text = line.text;
        if text == "-" || text.starts_with("- ") {
            self.sequence(indent, depth)
        } else if split_key(text).is_some() {
            self.mapping(indent, depth)
        } else {
            let value = self.flow_or_scalar(text)?;
            Ok(value)
        }
    }

    fn sequence(&mut self, indent: usize, depth: usize) -> Result<Value, Error> {
        let mut all = vec![];
        loop {
            self.skip();
            let Some(line) = self.peek().filter(|l| l.indent == indent && (l.text == "-" || l.text.starts_with("- "))) else { break };
            let rest = line.text[1..].trim_start();
            if rest.is_empty() || rest.starts_with('#') {
                self.at += 1;
                all.push(self.nested(indent + 1, depth)?);
                continue;
            }
            // What stands behind the dash begins a block of its own, indented to where it stands.
            let inner = indent + line.text.len() - rest.len();
            let at = self.at;
            let number = line.number;
            self.lines[at] = Line { number, indent: inner, text: rest };
            all.push(self.block(inner, depth + 1)?);
        }
        if self.peek().is_some_and(|l| l.indent > indent) {
            return self.fault("this line is indented more than its neighbours");
        }
        Ok(all.into())
    }

    fn mapping(&mut self, indent: usize, depth: usize) -> Result<Value, Error> {
        let mut all = Map::new();
        loop {
            self.skip();
            let Some(line) = self.peek().filter(|l| l.indent == indent) else { break };
            let Some((key, rest)) = split_key(line.text) else {
                if line.text == "..." || line.text == "---" {
                    break;
                }
                return self.fault("a key and a colon are expected");
            };
            let Value::String(key) = as_key(key).or_else(|e| self.fault(&e))? else {
                return self.fault("a key must be a plain or quoted word");
            };
            let rest = rest.trim_start();
            let value = if rest.is_empty() || rest.starts_with('#') {
                self.at += 1;
                self.skip();
                // A list may stand at the key's own indentation.
                let list = self.peek().is_some_and(|l| l.indent == indent && (l.text == "-" || l.text.starts_with("- ")));
                if list { self.sequence(indent, depth + 1)? } else { self.nested(indent + 1, depth)? }
            } else if rest.starts_with(['|', '>']) {
                self.block_scalar(indent, rest)?
            } else {
                self.flow_or_scalar(rest)?
            };
            if all.insert(key.clone(), value).is_some() {
                return Err(format!("the key {key:?} is given twice"));
            }
        }
        if self.peek().is_some_and(|l| l.indent > indent) {
            return self.fault("this line is indented more than its neighbours");
        }
        Ok(all.into())
    }

    /// What is indented by at least `least`; null when nothing is.
    fn nested(&mut self, least: usize, depth: usize) -> Result<Value, Error> {
        self.skip();
        match self.peek().map(|l| l.indent).filter(|i| *i >= least) {
            Some(indent) => self.block(indent, depth + 1),
            None => Ok(Value::Null),
        }
    }

    /// A value on one line, or a flow collection over several. Leaves the reader behind it.
    fn flow_or_scalar(&mut self, text: &'a str) -> Result<Value, Error> {
        let mut all = text.to_owned();
        self.at += 1;
        let open = text.starts_with(['[', '{', '"', '\'']);
        loop {
            let mut flow = Flow { text: &all, at: 0 };
            let done = if open { flow.value(0).and_then(|v| flow.end().map(|()| v)) } else { return self.plain(&all) };
            match done {
                Ok(value) => return Ok(value),
                // It goes on in the next line.
                Err(e) if e == UNFINISHED && self.at < self.lines.len() => {
                    all = format!("{all} {}", self.lines[self.at].text);
                    self.at += 1;
                }
                Err(e) => {
                    self.at = self.at.saturating_sub(1);
                    return self.fault(&e);
                }
            }
        }
    }

    fn plain(&mut self, text: &str) -> Result<Value, Error> {
        let text = without_comment(text);
        if text.starts_with(['&', '*', '!', '@', '`', '%', '?']) && text.len() > 1 {
            self.at = self.at.saturating_sub(1);
            return self.fault(&format!("{text:?}: anchors, tags and complex keys are not supported; quote it if it is text"));
        }
        Ok(scalar(text))
    }

    /// `|` keeps lines, `>` folds them; `-` takes the last line end away.
    fn block_scalar(&mut self, indent: usize, head: &str) -> Result<Value, Error> {
        let head = without_comment(head);
        let (fold, keep_end) = (head.starts_with('>'), !head.contains('-'));
        if !matches!(&head[1..], "" | "-" | "+") {
            return self.fault("this kind of block scalar is not supported");
        }
        self.at += 1;
        let (mut lines, mut inner) = (Vec::<String>::new(), None);
        while let Some(line) = self.peek() {
            if !line.text.is_empty() && line.indent <= indent {
                break;
            }
            let own = *inner.get_or_insert(line.indent.max(indent + 1));
            let pad = line.indent.saturating_sub(own);
            lines.push(if line.text.is_empty() { String::new() } else { format!("{}{}", " ".repeat(pad), line.text) });
            self.at += 1;
        }
        while lines.last().is_some_and(String::is_empty) {
            lines.pop();
        }
        let text = lines.join(if fold { " " } else { "\n" });
        Ok(Value::String(if keep_end && !text.is_empty() { text + "\n" } else { text }))
    }
}

/// `key: rest`. Quoted keys may contain colons.
fn split_key(text: &str) -> Option<(&str, &str)> {
    let end = match text.chars().next()? {
        quote @ ('"' | '\'') => 1 + text[1..].find(quote)? + 1,
        '[' | '{' | '#' => return None,
        _ => text.find(": ").or_else(|| text.strip_suffix(':').map(str::len))?,
    };
    let rest = text[end..].trim_start().strip_prefix(':')?;
    (rest.is_empty() || rest.starts_with(' ')).then_some((&text[..end], rest))
}

fn as_key(text: &str) -> Result<Value, Error> {
    if text.starts_with(['"', '\'']) {
        return Flow { text, at: 0 }.value(0);
    }
    if text.starts_with(['&', '*', '!', '?']) {
        Err(format!("key {text:?}: anchors, tags and complex keys are not supported"))
    } else {
        Ok(text.into())
    }
}

fn without_comment(text: &str) -> &str {
    text.find(" #").map_or(text, |n| &text[..n]).trim()
}

/// A plain scalar: null, a boolean, a number, or text.
fn scalar(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return true.into(),
        "false" | "False" | "FALSE" => return false.into(),
        _ => {}
    }
    let octal = text.strip_prefix("0o").and_then(|t| i64::from_str_radix(t, 8).ok());
    let hexadecimal = text.strip_prefix("0x").and_then(|t| i64::from_str_radix(t, 16).ok());
    // As older YAML has it, and as people write modes of files.
    let old_octal = text.strip_prefix('0').filter(|t| !t.is_empty()).and_then(|t| i64::from_str_radix(t, 8).ok());
    if let Some(n) = octal.or(hexadecimal).or(old_octal).or_else(|| text.parse().ok()) {
        return n.into();
    }
    let numeric = text.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '+' || c == '.');
    match text.parse::<f64>() {
        Ok(n) if numeric && n.is_finite() => n.into(),
        _ => text.into(),
    }
}

const UNFINISHED: &str = "this value has no end";

/// Flow style: what JSON has, with plain words.
struct Flow<'a> {
    text: &'a str,
    at: usize,
}

impl Flow<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }
    fn blank(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }
    fn take(&mut self, c: char) -> bool {
        self.blank();
        let hit = self.rest().starts_with(c);
        self.at += if hit { c.len_utf8() } else { 0 };
        hit
    }
    fn end(&mut self) -> Result<(), Error> {
        self.blank();
        if self.rest().is_empty() || self.rest().starts_with('#') {
            Ok(())
        } else {
            Err(format!("{:?} stands behind a value", self.rest()))
        }
    }
    fn value(&mut self, depth: usize) -> Result<Value, Error> {
        self.blank();
        match self.rest().chars().next() {
            _ if depth > DEEPEST => Err("too deeply nested".into()),
            None => Err(UNFINISHED.into()),
            Some('[') => self.list(depth),
            Some('{') => self.map(depth),
            Some('"') => self.double_quoted(),
            Some('\'') => self.single_quoted(),
            Some(_) => {
                let length = self.rest().find([',', ']', '}']).unwrap_or(self.rest().len());
                let length = self.rest()[..length].find(": ").unwrap_or(length);
                let word = self.rest()[..length].trim().trim_end_matches(':').to_owned();
                self.at += length;
                Ok(scalar(&word))
            }
        }
    }
    fn list(&mut self, depth: usize) -> Result<Value, Error> {
        let mut all = vec![];
        self.take('[');
        while !self.take(']') {
            all.push(self.value(depth + 1)?);
            self.next(']')?;
        }
        Ok(all.into())
    }
    fn map(&mut self, depth: usize) -> Result<Value, Error> {
        let mut all = Map::new();
        self.take('{');
        while !self.take('}') {
            let key = match self.value(depth + 1)? {
                Value::String(key) => key,
                other => other.to_string(),
            };
            self.take(':');
            self.blank();
            let value = if self.rest().starts_with([',', '}']) { Value::Null } else { self.value(depth + 1)? };
            all.insert(key, value);
            self.next('}')?;
        }
        Ok(all.into())
    }
    /// A comma, or the end ahead.
    fn next(&mut self, end: char) -> Result<(), Error> {
        if self.take(',') {
            return Ok(());
        }
        self.blank();
        match self.rest().chars().next() {
            None => Err(UNFINISHED.into()),
            Some(c) if c == end => Ok(()),
            Some(c) => Err(format!("{c:?} stands where a comma or {end:?} is expected")),
        }
    }
    fn double_quoted(&mut self) -> Result<Value, Error> {
        let mut escaped = false;
        let end = self.rest().char_indices().skip(1).find(|(_, c)| {
            let hit = *c == '"' && !escaped;
            escaped = *c == '\\' && !escaped;
            hit
        });
        let Some((end, _)) = end else { return Err(UNFINISHED.into()) };
        let text = self.rest()[..=end].to_owned();
        self.at += end + 1;
        serde_json::from_str(&text).map_err(|e| format!("{text}: {e}"))
    }
    fn single_quoted(&mut self) -> Result<Value, Error> {
        let mut all = String::new();
        self.at += 1;
        loop {
            let Some(end) = self.rest().find('\'') else { return Err(UNFINISHED.into()) };
            all.push_str(&self.rest()[..end]);
            self.at += end + 1;
            if !self.rest().starts_with('\'') {
                return Ok(all.into());
            }
            all.push('\'');
            self.at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn what_device_vendors_write() {
        let text = r#"---
# made by a tool
cdiVersion: 0.5.0
kind: nvidia.com/gpu   # a comment
containerEdits:
  deviceNodes:
  - path: /dev/nvidiactl
    major: 195
    fileMode: 0666
  - path: "/dev/nvidia: modeset"
    permissions: 'r''w'
  hooks:
    - hookName: createContainer
      args: [nvidia-ctk, "hook", '--link', "a::b"]
      env: []
      timeout: 5
  env:
  - "NVIDIA_VISIBLE_DEVICES=void"
  - A=b=c
devices:
- name: "0"
  containerEdits:
    deviceNodes:
      - path: /dev/nvidia0
- name: all
  annotations: {a: b, "c": 1}
text: |
  one
    two

folded: >-
  one
  two
empty:
last: ~
"#;
        let want = json!({
            "cdiVersion": "0.5.0", "kind": "nvidia.com/gpu",
            "containerEdits": {
                "deviceNodes": [{"path": "/dev/nvidiactl", "major": 195, "fileMode": 0o666}, {"path": "/dev/nvidia: modeset", "permissions": "r'w"}],
                "hooks": [{"hookName": "createContainer", "args": ["nvidia-ctk", "hook", "--link", "a::b"], "env": [], "timeout": 5}],
                "env": ["NVIDIA_VISIBLE_DEVICES=void", "A=b=c"]},
            "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}},
                {"name": "all", "annotations": {"a": "b", "c": 1}}],
            "text": "one\n  two\n", "folded": "one two", "empty": null, "last": null});
        assert_eq!(parse(text).unwrap(), want);
    }

    #[test]
    fn lists_of_lists_scalars_and_flow_over_lines() {
        assert_eq!(parse("- - 1\n  - 2\n- a: 1\n  b: 2\n-\n  c: 3\n").unwrap(), json!([[1, 2], {"a": 1, "b": 2}, {"c": 3}]));
        assert_eq!(parse("a: [1,\n  2.5, true]\nb: {x: y,\n z: []}\n").unwrap(), json!({"a": [1, 2.5, true], "b": {"x": "y", "z": []}}));
        assert_eq!(
            parse("a: http://x/y#z\nb: 1e3\nc: -5\nd: 0x1f\ne: 50M\n").unwrap(),
            json!({"a": "http://x/y#z", "b": 1000.0, "c": -5, "d": 31, "e": "50M"})
        );
        assert_eq!(parse("{\"a\": [1]}").unwrap(), json!({"a": [1]}));
        assert_eq!(parse("").unwrap(), Value::Null);
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_line() {
        for (text, part) in [
            ("a: &x 1\n", "line 1"),
            ("a: *x\n", "line 1"),
            ("a: 1\n  b: 2\n", "line 2"),
            ("a: [1, 2\n", "no end"),
            ("a: 1\na: 2\n", "twice"),
            ("\ta: 1\n", "tab"),
            ("a: 1\njust text\n", "line 2"),
            ("a: 1\n---\nb: 2\n", "line 2"),
            ("a: !!str 1\n", "tags"),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.contains(part), "{text:?}: {said}");
        }
        let deep = "[".repeat(10_000);
        assert!(parse(&format!("a: {deep}")).is_err());
    }
}

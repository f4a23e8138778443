//! From a template's text to its parts.
use kernel::{Fault, Result};
use serde_json::Value;

/// A part of a template.
#[derive(Debug)]
pub(super) enum Part {
    /// Text as it is.
    Text(String),
    /// The value of a pipeline.
    Show(Expr),
    /// `$name := pipeline`.
    Set(String, Expr),
    /// The first branch whose condition holds; a branch without one always does.
    If(Vec<(Option<Expr>, Vec<Part>)>),
    /// `with`: the value becomes the dot.
    With(Expr, Vec<Part>, Vec<Part>),
    /// `range`: variables for key and element, the list, body, and what stands for an empty list.
    Range(Vec<String>, Expr, Vec<Part>, Vec<Part>),
}

/// A value to compute.
#[derive(Debug)]
pub(super) enum Expr {
    Literal(Value),
    /// `.` and fields of it.
    Dot(Vec<String>),
    /// `$name` and fields of it.
    Variable(String, Vec<String>),
    Call(String, Vec<Expr>),
}

fn wrong(what: impl Into<String>) -> Fault {
    Fault::failed_precondition(what)
}

/// Parses a template.
pub(super) fn parse(text: &str) -> Result<Vec<Part>> {
    let mut pieces = pieces(text)?.into_iter();
    match block(&mut pieces)? {
        (parts, None) => Ok(parts),
        (_, Some(stop)) => Err(wrong(format!("{{{{{stop}}}}} belongs to nothing"))),
    }
}

enum Piece {
    Text(String),
    Action(String),
}

/// Cuts a template at its actions; `{{-` and `-}}` take the space beside them away.
fn pieces(mut rest: &str) -> Result<Vec<Piece>> {
    let mut all = vec![];
    while let Some(start) = rest.find("{{") {
        let (before, after) = (&rest[..start], &rest[start + 2..]);
        let end =
            after.find("}}").ok_or_else(|| wrong(format!("an action has no }}}}: {:?}", after.chars().take(30).collect::<String>())))?;
        let (mut action, mut next) = (&after[..end], &after[end + 2..]);
        let mut before = before;
        if let Some(trimmed) = action.strip_prefix("- ") {
            (action, before) = (trimmed, before.trim_end());
        }
        if let Some(trimmed) = action.strip_suffix(" -") {
            (action, next) = (trimmed, next.trim_start());
        }
        all.push(Piece::Text(before.to_owned()));
        let action = action.trim();
        if !(action.starts_with("/*") && action.ends_with("*/")) {
            all.push(Piece::Action(action.to_owned()));
        }
        rest = next;
    }
    all.push(Piece::Text(rest.to_owned()));
    Ok(all)
}

/// Parts up to `else…` or `end`, which is answered, too.
fn block(pieces: &mut std::vec::IntoIter<Piece>) -> Result<(Vec<Part>, Option<String>)> {
    let mut parts = vec![];
    while let Some(piece) = pieces.next() {
        let action = match piece {
            Piece::Text(text) => {
                parts.push(Part::Text(text));
                continue;
            }
            Piece::Action(action) => action,
        };
        let (word, rest) = action.split_once(char::is_whitespace).unwrap_or((&action, ""));
        parts.push(match word {
            "end" | "else" => return Ok((parts, Some(action))),
            "if" => choice(rest, pieces)?,
            "with" => {
                let (body, other) = body(word, pieces)?;
                Part::With(expression(rest)?, body, other)
            }
            "range" => range(rest, pieces)?,
            _ => match action.split_once(":=") {
                Some((name, value)) if name.trim().starts_with('$') => Part::Set(name.trim().to_owned(), expression(value)?),
                _ => Part::Show(expression(&action)?),
            },
        });
    }
    Ok((parts, None))
}

fn choice(condition: &str, pieces: &mut std::vec::IntoIter<Piece>) -> Result<Part> {
    let (mut branches, mut condition) = (vec![], Some(expression(condition)?));
    loop {
        let (parts, stop) = block(pieces)?;
        branches.push((condition.take(), parts));
        let stop = stop.ok_or_else(|| wrong("an {{if}} has no {{end}}"))?;
        match stop.strip_prefix("else").map(str::trim) {
            None => return Ok(Part::If(branches)),
            Some("") => {}
            Some(more) => {
                let more = more.strip_prefix("if ").ok_or_else(|| wrong(format!("{{{{{stop}}}}} is not understood")))?;
                condition = Some(expression(more)?);
            }
        }
    }
}

/// The body of a `range` or `with`, and what follows its `else`.
fn body(word: &str, pieces: &mut std::vec::IntoIter<Piece>) -> Result<(Vec<Part>, Vec<Part>)> {
    let unended = || wrong(format!("a {{{{{word}}}}} has no {{{{end}}}}"));
    let (body, stop) = block(pieces)?;
    match stop.ok_or_else(unended)?.as_str() {
        "end" => Ok((body, vec![])),
        "else" => match block(pieces)? {
            (other, Some(stop)) if stop == "end" => Ok((body, other)),
            _ => Err(unended()),
        },
        other => Err(wrong(format!("{{{{{other}}}}} is not understood in a {{{{{word}}}}}"))),
    }
}

fn range(head: &str, pieces: &mut std::vec::IntoIter<Piece>) -> Result<Part> {
    let (names, list) = head.split_once(":=").unwrap_or(("", head));
    let names: Vec<String> = names.split(',').map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()).collect();
    if names.len() > 2 || names.iter().any(|n| !n.starts_with('$')) {
        return Err(wrong(format!("{{{{range {head}}}}} is not understood")));
    }
    let list = expression(list)?;
    let (body, other) = body("range", pieces)?;
    Ok(Part::Range(names, list, body, other))
}

/// A pipeline: each value is the last argument of the next call.
fn expression(text: &str) -> Result<Expr> {
    let mut words = words(text)?.into_iter().peekable();
    let mut value = None;
    loop {
        value = Some(call(&mut words, value, text)?);
        match words.next().as_deref() {
            None => break,
            Some("|") => {}
            Some(other) => return Err(wrong(format!("{other:?} is not understood in {text:?}"))),
        }
    }
    value.ok_or_else(|| wrong("an action is empty"))
}

type Words = std::iter::Peekable<std::vec::IntoIter<String>>;

fn call(words: &mut Words, piped: Option<Expr>, all: &str) -> Result<Expr> {
    let is_name = words.peek().is_some_and(|w| w.starts_with(char::is_alphabetic) && !["true", "false"].contains(&w.as_str()));
    if !is_name {
        return match piped {
            None => operand(words, all),
            Some(_) => Err(wrong(format!("a pipe must lead to a function in {all:?}"))),
        };
    }
    let name = words.next().unwrap_or_default();
    let mut arguments = vec![];
    while words.peek().is_some_and(|w| w != "|" && w != ")") {
        arguments.push(operand(words, all)?);
    }
    arguments.extend(piped);
    Ok(Expr::Call(name, arguments))
}

fn operand(words: &mut Words, all: &str) -> Result<Expr> {
    let word = words.next().ok_or_else(|| wrong(format!("a value is missing in {all:?}")))?;
    let fields = |path: &str| path.split('.').filter(|f| !f.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    Ok(match word.as_str() {
        "(" => {
            let mut value = call(words, None, all)?;
            while words.peek().is_some_and(|w| w == "|") {
                words.next();
                value = call(words, Some(value), all)?;
            }
            match words.next().as_deref() {
                Some(")") => value,
                _ => return Err(wrong(format!("a parenthesis is not closed in {all:?}"))),
            }
        }
        path if path.starts_with('.') => Expr::Dot(fields(path)),
        path if path.starts_with('$') => {
            let (name, rest) = path.split_once('.').unwrap_or((path, ""));
            Expr::Variable(name.to_owned(), fields(rest))
        }
        literal => match serde_json::from_str(literal) {
            Ok(value) => Expr::Literal(value),
            Err(_) => return Err(wrong(format!("{literal:?} is not understood in {all:?}"))),
        },
    })
}

/// Words, texts in quotes as JSON, and the signs `(`, `)` and `|`.
fn words(text: &str) -> Result<Vec<String>> {
    let mut all = vec![];
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let end = match first {
            '(' | ')' | '|' => 1,
            '"' | '`' => {
                let mut escaped = false;
                let end = rest.char_indices().skip(1).find(|(_, c)| {
                    let ends = *c == first && !escaped;
                    escaped = *c == '\\' && !escaped && first == '"';
                    ends
                });
                end.ok_or_else(|| wrong(format!("a text has no end: {rest:?}")))?.0 + 1
            }
            _ => rest.find(|c: char| c.is_whitespace() || "()|".contains(c)).unwrap_or(rest.len()),
        };
        let word = &rest[..end];
        all.push(if first == '`' { Value::from(word.trim_matches('`')).to_string() } else { word.to_owned() });
        rest = rest[end..].trim_start();
    }
    Ok(all)
}

//! From a template's parts and data to text.
use super::parse::{Expr, Part};
use kernel::{Fault, Result};
use serde_json::Value;

fn wrong(what: impl Into<String>) -> Fault {
    Fault::failed_precondition(what)
}

/// Renders.
pub(super) fn render(parts: &[Part], data: &Value) -> Result<String> {
    let mut scope = Scope { dot: data.clone(), variables: vec![("$".to_owned(), data.clone())], out: String::new() };
    scope.all(parts)?;
    Ok(scope.out)
}

struct Scope {
    dot: Value,
    variables: Vec<(String, Value)>,
    out: String,
}

impl Scope {
    fn all(&mut self, parts: &[Part]) -> Result<()> {
        let depth = self.variables.len();
        for part in parts {
            self.one(part)?;
        }
        self.variables.truncate(depth);
        Ok(())
    }

    fn one(&mut self, part: &Part) -> Result<()> {
        match part {
            Part::Text(text) => self.out.push_str(text),
            Part::Show(value) => {
                let text = text(&self.value(value)?);
                self.out.push_str(&text);
            }
            Part::Set(name, value) => {
                let value = self.value(value)?;
                self.variables.push((name.clone(), value));
            }
            Part::If(branches) => {
                for (condition, body) in branches {
                    if condition.as_ref().map_or(Ok(true), |c| self.value(c).map(|v| holds(&v)))? {
                        return self.all(body);
                    }
                }
            }
            Part::With(value, body, other) => {
                let value = self.value(value)?;
                match holds(&value) {
                    true => self.within(value, vec![], body)?,
                    false => self.all(other)?,
                }
            }
            Part::Range(names, list, body, other) => {
                let list = self.value(list)?;
                let list = list.as_array().ok_or_else(|| wrong(format!("{{{{range}}}} over {list}, which is no list")))?;
                for (number, element) in list.iter().enumerate() {
                    let values = [Value::from(number), element.clone()];
                    // One variable is the element, two are its number and itself.
                    let named = names.iter().cloned().zip(values.into_iter().skip(if names.len() == 1 { 1 } else { 0 }));
                    self.within(element.clone(), named.collect(), body)?;
                }
                if list.is_empty() {
                    self.all(other)?;
                }
            }
        }
        Ok(())
    }

    fn within(&mut self, dot: Value, named: Vec<(String, Value)>, body: &[Part]) -> Result<()> {
        let (before, depth) = (std::mem::replace(&mut self.dot, dot), self.variables.len());
        self.variables.extend(named);
        self.all(body)?;
        self.variables.truncate(depth);
        self.dot = before;
        Ok(())
    }

    fn value(&self, value: &Expr) -> Result<Value> {
        match value {
            Expr::Literal(value) => Ok(value.clone()),
            Expr::Dot(path) => field(&self.dot, path),
            Expr::Variable(name, path) => {
                let found = self.variables.iter().rev().find(|(n, _)| n == name);
                field(&found.ok_or_else(|| wrong(format!("there is no variable {name}")))?.1, path)
            }
            Expr::Call(name, arguments) => {
                let arguments = arguments.iter().map(|a| self.value(a)).collect::<Result<Vec<_>>>()?;
                call(name, &arguments)
            }
        }
    }
}

fn field(value: &Value, path: &[String]) -> Result<Value> {
    let mut value = value;
    for name in path {
        value = value.get(name).ok_or_else(|| wrong(format!("there is no field {name}; there are PodCIDR, PodCIDRRanges and Routes")))?;
    }
    Ok(value.clone())
}

fn call(name: &str, arguments: &[Value]) -> Result<Value> {
    match (name, arguments) {
        ("len", [Value::Array(list)]) => Ok(list.len().into()),
        ("len", [Value::String(text)]) => Ok(text.len().into()),
        ("index", [Value::Array(list), number]) => {
            let found = number.as_u64().and_then(|n| list.get(n as usize));
            found.cloned().ok_or_else(|| wrong(format!("the list has {} elements and no number {number}", list.len())))
        }
        ("not", [value]) => Ok((!holds(value)).into()),
        ("and", [.., last]) => Ok(arguments.iter().find(|a| !holds(a)).unwrap_or(last).clone()),
        ("or", [.., last]) => Ok(arguments.iter().find(|a| holds(a)).unwrap_or(last).clone()),
        ("eq", [first, others @ ..]) if !others.is_empty() => Ok(others.contains(first).into()),
        ("ne", [one, other]) => Ok((one != other).into()),
        ("print", _) => Ok(arguments.iter().map(text).collect::<String>().into()),
        _ => Err(wrong(format!("the function {name} with {} arguments is not known here", arguments.len()))),
    }
}

/// Go's notion of truth: neither false nor zero nor empty.
fn holds(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

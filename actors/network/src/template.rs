//! `UpdateRuntimeConfig`: a CNI configuration rendered from a template, for nodes whose pod addresses only the kubelet knows.
//!
//! The template's language is that part of Go's `text/template` which a list of networks needs: fields of the data (`.PodCIDR`, `.PodCIDRRanges`,
//! `.Routes`), variables, `if`, `range`, `with`, `else`, comments, trimming, pipes, and the functions `index`, `len`, `not`, `and`, `or`, `eq`, `ne`,
//! `print`. What else stands there is an error that names it.
mod parse;
mod render;

use crate::conf;
use crate::state::State;
use kernel::{Cx, Fault, Result, ResultExt};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A small file is read and another written.
const IO: Duration = Duration::from_secs(10);
/// Where the configuration goes. Containerd's name, so that whoever comes from there has one file and not two.
const FILE: &str = "10-containerd-net.conflist";

impl State {
    /// Renders the template, if there is one and the default network is not ready: what somebody else has configured is not overwritten.
    pub async fn configure(&self, cx: &Cx, pod_cidr: &str) -> Result<()> {
        let Some(template) = self.args.template.clone() else { return Ok(()) };
        let set = self.set("");
        if pod_cidr.is_empty() || set.networks().is_ok() {
            return Ok(());
        }
        let data = data(pod_cidr)?;
        let dir = set.dir.clone();
        cx.blocking("render a CNI configuration", IO, move || write(&template, &dir, &data)).await?;
        set.load(cx).await;
        Ok(())
    }
}

/// What the template can say.
fn data(pod_cidr: &str) -> Result<serde_json::Value> {
    let ranges: Vec<&str> = pod_cidr.split(',').map(str::trim).collect();
    let mut routes: Vec<&str> = vec![];
    for range in &ranges {
        let address = range.split_once('/').and_then(|(ip, length)| {
            let (ip, length): (std::net::IpAddr, u8) = (ip.parse().ok()?, length.parse().ok()?);
            (length <= if ip.is_ipv4() { 32 } else { 128 }).then_some(ip)
        });
        let address = address.ok_or_else(|| Fault::invalid_argument(format!("pod_cidr: {range:?} is no range of addresses")))?;
        let route = if address.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        if !routes.contains(&route) {
            routes.push(route);
        }
    }
    Ok(json!({"PodCIDR": ranges.first(), "PodCIDRRanges": ranges, "Routes": routes}))
}

fn write(template: &Path, dir: &Path, data: &serde_json::Value) -> Result<()> {
    let text = std::fs::read_to_string(template).with_context(|| format!("read cni.conf_template {}", template.display()))?;
    let rendered = parse::parse(&text).and_then(|t| render::render(&t, data));
    let rendered = rendered.with_context(|| format!("cni.conf_template {}", template.display()))?;
    let path: PathBuf = dir.join(FILE);
    let value = serde_json::from_str(&rendered).class(kernel::Class::FailedPrecondition, format!("what {} renders", template.display()))?;
    conf::network(&value, &path).with_context(|| format!("what {} renders", template.display()))?;
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    // A name that is no configuration's, then a rename: nobody reads half a file.
    let draft = dir.join(format!(".{FILE}.draft"));
    std::fs::write(&draft, rendered).with_context(|| format!("write {}", draft.display()))?;
    std::fs::rename(&draft, &path).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn show(template: &str, pod_cidr: &str) -> Result<String> {
        render::render(&parse::parse(template)?, &data(pod_cidr)?)
    }

    #[test]
    fn the_templates_that_people_have_are_rendered() {
        let ranges = r#"[{{range $i, $r := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$r}}"}]{{end}}]"#;
        assert_eq!(show(ranges, "10.0.0.0/24, fd00::/64").unwrap(), r#"[[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00::/64"}]]"#);
        let routes = "{{- /* all */ -}}\n{{range .Routes -}} {\"dst\": \"{{ . }}\"} {{- else}}none{{end}}";
        assert_eq!(show(routes, "fd00::/64").unwrap(), "{\"dst\": \"::/0\"}");
        assert_eq!(
            show("{{.PodCIDR}} {{index .PodCIDRRanges 1}} {{len .Routes}}", "10.0.0.0/24,10.1.0.0/24").unwrap(),
            "10.0.0.0/24 10.1.0.0/24 1"
        );
        let choice = r#"{{$n := len .PodCIDRRanges}}{{if eq $n 1}}one{{else if and (ne $n 1) (not false)}}more{{else}}none{{end}} {{with $.PodCIDR}}{{. | print "a"}}{{end}}"#;
        assert_eq!(show(choice, "10.0.0.0/24,fd00::/64").unwrap(), "more a10.0.0.0/24");
    }

    #[test]
    fn what_is_wrong_with_a_template_is_named() {
        for (template, text) in [
            ("{{range .Routes}}", "end"),
            ("{{.Nothing}}", "Nothing"),
            ("{{printf \"%s\" .}}", "printf"),
            ("{{end}}", "end"),
            ("{{.PodCIDR", "}}"),
            ("{{$x}}", "$x"),
            ("{{index .Routes 7}}", "7"),
        ] {
            let fault = show(template, "10.0.0.0/24").unwrap_err();
            assert!(fault.message.contains(text), "{template}: {fault}");
        }
        assert!(data("10.0.0.0/33").is_err() && data("here").is_err() && data("").is_err());
    }
}

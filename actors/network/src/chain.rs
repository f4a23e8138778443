//! Chains of plugins as the specification says: ADD in order with each result handed on, DEL in reverse, CHECK, STATUS, GC and VERSION from the
//! version on that has them.
use crate::capability;
use crate::conf::{Network, kind};
use crate::plugin::{self, Cancel, Run};
use crate::{Args, outcome};
use kernel::{Class, Cx, Fault, Result, ResultExt};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Plugins answer questions about themselves in milliseconds; nobody waits for these answers, but a process must not hang about.
const QUESTION: Duration = Duration::from_secs(5);

/// One interface of one pod.
pub(crate) struct Call<'a> {
    pub args: &'a Args,
    pub id: &'a str,
    /// `CNI_ARGS` in order.
    pub arguments: &'a [(&'static str, String)],
    /// Capability arguments.
    pub offered: &'a Map<String, Value>,
    /// Path of the namespace, empty when it is gone.
    pub netns: &'a str,
    pub ifname: String,
    pub cancel: Option<Cancel>,
    /// A plugin without a binary is passed over by DEL: where ADD failed, it may be that very lack that made it fail.
    pub lenient: bool,
}

impl Call<'_> {
    /// ADD; answers the last plugin's result.
    pub async fn add(&self, cx: &Cx, network: &Network) -> Result<Value> {
        let mut previous = None;
        for plugin in &network.plugins {
            let out = self.run(cx, "ADD", network, plugin, previous.as_ref()).await?;
            let result = outcome::read(&out, &network.cni_version);
            previous = Some(result.with_context(|| format!("plugin type={:?} failed (add)", kind(plugin)))?);
        }
        previous.ok_or_else(|| Fault::internal(format!("network {} has no plugins", network.name)))
    }

    /// DEL; stops at the first plugin that fails, for an address must not be given back while rules still lead to it.
    pub async fn del(&self, cx: &Cx, network: &Network, result: Option<&Value>) -> Result<()> {
        let result = result.filter(|_| network.since(0, 4));
        for plugin in network.plugins.iter().rev() {
            match self.run(cx, "DEL", network, plugin, result).await {
                Err(fault) if self.lenient && fault.is_not_found() => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// CHECK.
    pub async fn check(&self, cx: &Cx, network: &Network, result: Option<&Value>) -> Result<()> {
        if network.disable_check || !network.since(0, 4) {
            return Ok(());
        }
        for plugin in &network.plugins {
            self.run(cx, "CHECK", network, plugin, result).await?;
        }
        Ok(())
    }

    fn input(&self, network: &Network, plugin: &Value, previous: Option<&Value>) -> String {
        let mut more = Map::new();
        if let Some(previous) = previous {
            more.insert("prevResult".into(), previous.clone());
        }
        let wanted = capability::wanted(plugin, self.offered);
        if !wanted.is_empty() {
            more.insert("runtimeConfig".into(), wanted.into());
        }
        input(network, plugin, more)
    }

    async fn run(&self, cx: &Cx, verb: &'static str, network: &Network, plugin: &Value, previous: Option<&Value>) -> Result<Vec<u8>> {
        let arguments: Vec<String> = self.arguments.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let env = vec![
            ("CNI_CONTAINERID", self.id.to_owned()),
            ("CNI_NETNS", self.netns.to_owned()),
            ("CNI_IFNAME", self.ifname.clone()),
            ("CNI_ARGS", arguments.join(";")),
        ];
        let (input, limit) = (self.input(network, plugin, previous), self.args.plugin_timeout);
        let attributes = [("container.id", self.id), ("cni.interface", &self.ifname)];
        execute(cx, self.args, verb, (network, plugin), env, input, (limit, self.cancel.clone()), &attributes).await
    }
}

/// The configuration that a plugin reads.
fn input(network: &Network, plugin: &Value, more: Map<String, Value>) -> String {
    let mut input = plugin.as_object().cloned().unwrap_or_default();
    input.insert("name".into(), network.name.as_str().into());
    input.insert("cniVersion".into(), network.cni_version.as_str().into());
    input.extend(more);
    Value::from(input).to_string()
}

/// Asks every plugin of a network that has STATUS whether it could serve an ADD.
pub(crate) async fn status(cx: &Cx, args: &Args, network: &Network) -> Result<()> {
    if network.since(1, 1) {
        for plugin in &network.plugins {
            question(cx, args, "STATUS", network, plugin, Map::new()).await?;
        }
    }
    Ok(())
}

/// Tells every plugin of a network that has GC which attachments there are (container and interface): what it holds beyond them is garbage.
pub(crate) async fn gc(cx: &Cx, args: &Args, network: &Network, valid: &[(String, String)]) -> Result<()> {
    if !network.since(1, 1) || network.disable_gc {
        return Ok(());
    }
    let valid: Vec<Value> = valid.iter().map(|(id, ifname)| json!({"containerID": id, "ifname": ifname})).collect();
    // The second name is an older one, which plugins of the first hour read.
    let more = ["cni.dev/valid-attachments", "cni.dev/attachments"].map(|key| (key.to_owned(), json!(valid)));
    let mut failed = None;
    for plugin in &network.plugins {
        let done = question(cx, args, "GC", network, plugin, more.iter().cloned().collect()).await;
        failed = failed.or(done.err());
    }
    failed.map_or(Ok(()), Err)
}

/// The versions of the specification that a plugin says it speaks.
pub(crate) async fn versions(cx: &Cx, args: &Args, network: &Network, plugin: &Value) -> Result<Vec<String>> {
    let out = question(cx, args, "VERSION", network, plugin, Map::new()).await?;
    let answer: Value = serde_json::from_slice(&out).class(Class::Internal, "the answer to VERSION")?;
    let listed = answer.get("supportedVersions").and_then(Value::as_array).into_iter().flatten();
    Ok(listed.filter_map(Value::as_str).map(str::to_owned).collect())
}

async fn question(
    cx: &Cx,
    args: &Args,
    verb: &'static str,
    network: &Network,
    plugin: &Value,
    more: Map<String, Value>,
) -> Result<Vec<u8>> {
    let limit = (QUESTION.min(args.plugin_timeout), None);
    execute(cx, args, verb, (network, plugin), vec![], input(network, plugin, more), limit, &[]).await
}

#[allow(clippy::too_many_arguments, reason = "a plugin's execution has that many parts")]
async fn execute(
    cx: &Cx,
    args: &Args,
    verb: &'static str,
    (network, plugin): (&Network, &Value),
    mut env: Vec<(&'static str, String)>,
    input: String,
    (limit, cancel): (Duration, Option<Cancel>),
    attributes: &[(&'static str, &str)],
) -> Result<Vec<u8>> {
    let kind = kind(plugin);
    let dirs: Vec<String> = args.bin_dirs.iter().map(|d| d.display().to_string()).collect();
    env.extend([("CNI_COMMAND", verb.to_owned()), ("CNI_PATH", dirs.join(":"))]);
    let ran = cx.run(format!("cni {verb} {kind}"), |cx| async move {
        [("cni.command", verb), ("cni.network", network.name.as_str()), ("cni.plugin", kind)].into_iter().for_each(|(k, v)| cx.attr(k, v));
        attributes.iter().for_each(|(k, v)| cx.attr(k, v));
        env.push(("TRACEPARENT", cx.traceparent()));
        let limit = cx.remaining().map_or(limit, |r| r.min(limit));
        let output = plugin::run(&cx, Run { dirs: &args.bin_dirs, kind, env, input, limit, cancel }).await?;
        if output.status.success() { Ok(output.out) } else { Err(told(&output)) }
    });
    ran.await.with_context(|| format!("plugin type={kind:?} failed ({})", verb.to_lowercase()))
}

/// The plugin's own words: its error object, else all that it printed.
fn told(output: &plugin::Output) -> Fault {
    let error: Value = serde_json::from_slice(&output.out).unwrap_or_default();
    let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default().trim();
    let mut words: Vec<&str> = [text("msg"), text("details")].into_iter().filter(|w| !w.is_empty()).collect();
    let out = String::from_utf8_lossy(&output.out[..output.out.len().min(1000)]).trim().to_owned();
    if words.is_empty() && !out.is_empty() {
        words.push(&out);
    }
    if !output.err.is_empty() {
        words.push(&output.err);
    }
    let status = output.status.to_string();
    if words.is_empty() {
        words.push(&status);
    }
    // 11: try again later; 50, 51: not available at the moment.
    let class = match error.get("code").and_then(Value::as_u64) {
        Some(11 | 50 | 51) => Class::Unavailable,
        _ => Class::Internal,
    };
    Fault::new(class, words.join("; "))
}

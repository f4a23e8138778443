//! Running plugin chains as the CNI specification says: ADD in order with each result handed on, DEL in reverse.
use crate::conf::{Network, kind};
use crate::{Args, sys};
use kernel::{Cx, Fault, Result, ResultExt};
use messages::network::PodNetwork;
use serde_json::{Value, json};
use std::process::Stdio;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Output of a plugin that is read; more is cut off.
const OUTPUT: u64 = 1 << 20;

/// One interface of one pod.
pub(crate) struct Call<'a> {
    pub args: &'a Args,
    pub pod: &'a PodNetwork,
    pub netns: &'a str,
    pub ifname: String,
}

impl Call<'_> {
    /// ADD; answers the last plugin's result.
    pub async fn add(&self, cx: &Cx, network: &Network) -> Result<Value> {
        let mut previous = None;
        for plugin in &network.plugins {
            previous = self.run(cx, "ADD", network, plugin, previous.as_ref()).await?;
        }
        previous.ok_or_else(|| Fault::internal(format!("network {} gave no result", network.name)))
    }

    /// DEL; what is gone already is no error.
    pub async fn del(&self, cx: &Cx, network: &Network, result: Option<&Value>) -> Result<()> {
        for plugin in network.plugins.iter().rev() {
            self.run(cx, "DEL", network, plugin, result).await?;
        }
        Ok(())
    }

    /// CHECK, from version 0.4.0 on.
    pub async fn check(&self, cx: &Cx, network: &Network, result: Option<&Value>) -> Result<()> {
        if network.disable_check
            || network.cni_version.is_empty()
            || network.cni_version.starts_with("0.1")
            || network.cni_version.starts_with("0.2")
            || network.cni_version.starts_with("0.3")
        {
            return Ok(());
        }
        for plugin in &network.plugins {
            self.run(cx, "CHECK", network, plugin, result).await?;
        }
        Ok(())
    }

    fn input(&self, network: &Network, plugin: &Value, previous: Option<&Value>) -> Value {
        let mut input = plugin.clone();
        if let Some(map) = input.as_object_mut() {
            map.insert("name".into(), network.name.as_str().into());
            map.insert("cniVersion".into(), network.cni_version.as_str().into());
            if let Some(previous) = previous {
                map.insert("prevResult".into(), previous.clone());
            }
            let wants = |name: &str| plugin.pointer(&format!("/capabilities/{name}")) == Some(&Value::Bool(true));
            let mut runtime = serde_json::Map::new();
            if wants("portMappings") {
                let ports: Vec<&_> = self.pod.ports.iter().filter(|p| p.host_port > 0).collect();
                runtime.insert("portMappings".into(), json!(ports));
            }
            if wants("dns") {
                let (servers, searches, options) = &self.pod.dns;
                runtime.insert("dns".into(), json!({"servers": servers, "searches": searches, "options": options}));
            }
            if wants("cgroupPath") {
                runtime.insert("cgroupPath".into(), json!(self.pod.cgroup_parent));
            }
            if wants("io.kubernetes.cri.pod-annotations") {
                runtime.insert("io.kubernetes.cri.pod-annotations".into(), json!(self.pod.annotations));
            }
            if wants("bandwidth")
                && let Some(bandwidth) = bandwidth(&self.pod.annotations)
            {
                runtime.insert("bandwidth".into(), bandwidth);
            }
            if !runtime.is_empty() {
                map.insert("runtimeConfig".into(), runtime.into());
            }
        }
        input
    }

    async fn run(&self, cx: &Cx, verb: &'static str, network: &Network, plugin: &Value, previous: Option<&Value>) -> Result<Option<Value>> {
        let kind = kind(plugin);
        let input = self.input(network, plugin, previous).to_string();
        cx.run(format!("cni {verb} {kind}"), |cx| async move {
            self.exec(&cx, verb, kind, input).await.with_context(|| format!("plugin type=\"{kind}\" {verb} failed"))
        })
        .await
    }

    async fn exec(&self, cx: &Cx, verb: &str, kind: &str, input: String) -> Result<Option<Value>> {
        let binary = self.args.bin_dirs.iter().map(|d| d.join(kind)).find(|p| p.is_file());
        let binary = binary.ok_or_else(|| Fault::not_found(format!("no plugin {kind:?} in {:?}", self.args.bin_dirs)))?;
        let dirs: Vec<String> = self.args.bin_dirs.iter().map(|d| d.display().to_string()).collect();
        let pod = self.pod;
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            pod.namespace, pod.name, pod.id, pod.uid
        );
        let mut child = tokio::process::Command::new(&binary)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", if std::path::Path::new(self.netns).exists() { self.netns } else { "" })
            .env("CNI_IFNAME", &self.ifname)
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", dirs.join(":"))
            .env("TRACEPARENT", cx.traceparent())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", binary.display()))?;
        let pid = child.id().unwrap_or(0);
        cx.attr("process.pid", pid);
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let talk = async {
            let feed = async {
                if let Some(mut stdin) = stdin {
                    // A plugin that does not read its input says so by its exit code.
                    let _ = stdin.write_all(input.as_bytes()).await;
                }
            };
            let ((), out, err, status) = tokio::join!(feed, read(stdout), read(stderr), child.wait());
            status.map(|s| (s, out, err))
        };
        let limit = cx.remaining().map_or(self.args.plugin_timeout, |r| r.min(self.args.plugin_timeout));
        let (status, out, err) = match tokio::time::timeout(limit, talk).await {
            Ok(done) => done.context("wait for the plugin")?,
            Err(_) => {
                sys::kill_group(pid);
                return Err(Fault::deadline_exceeded(format!("did not end within {limit:?}; its process group {pid} was killed")));
            }
        };
        cx.attr("process.exit.code", status.code().unwrap_or(-1));
        let value: Option<Value> = serde_json::from_slice(&out).ok();
        if !status.success() {
            let told = value.as_ref().and_then(|v| v.get("msg")).and_then(Value::as_str).map(str::to_owned);
            let details = value.as_ref().and_then(|v| v.get("details")).and_then(Value::as_str).unwrap_or_default();
            let text = told.unwrap_or_else(|| format!("{status}: {}{}", String::from_utf8_lossy(&out), String::from_utf8_lossy(&err)));
            return Err(Fault::internal(format!("{text} {details}").trim()));
        }
        match (verb, value) {
            ("ADD", None) => Err(Fault::internal(format!("its result is not JSON: {:?}", String::from_utf8_lossy(&out)))),
            ("ADD", value) => Ok(value),
            _ => Ok(None),
        }
    }
}

async fn read(from: Option<impl tokio::io::AsyncRead + Unpin>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(from) = from {
        let _ = from.take(OUTPUT).read_to_end(&mut all).await;
    }
    all
}

/// Kubernetes' bandwidth annotations (`10M`) in bits a second.
fn bandwidth(annotations: &std::collections::BTreeMap<String, String>) -> Option<Value> {
    let rate = |name: &str| {
        let text = annotations.get(name)?;
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let unit = match &text[split..] {
            "" => 1u64,
            "k" | "K" => 1_000,
            "M" => 1_000_000,
            "G" => 1_000_000_000,
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            _ => return None,
        };
        text[..split].parse::<u64>().ok()?.checked_mul(unit)
    };
    let (ingress, egress) = (rate("kubernetes.io/ingress-bandwidth"), rate("kubernetes.io/egress-bandwidth"));
    let burst = u32::MAX;
    let mut all = serde_json::Map::new();
    if let Some(rate) = ingress {
        all.extend([("ingressRate".to_owned(), json!(rate)), ("ingressBurst".to_owned(), json!(burst))]);
    }
    if let Some(rate) = egress {
        all.extend([("egressRate".to_owned(), json!(rate)), ("egressBurst".to_owned(), json!(burst))]);
    }
    (!all.is_empty()).then(|| all.into())
}

/// Addresses of the pod in a result, the preferred family first.
pub(crate) fn addresses(result: &Value, preference: &str) -> Vec<String> {
    let listed = result.get("ips").and_then(Value::as_array).cloned().unwrap_or_default();
    let plain = |v: &Value| Some(v.get("address")?.as_str()?.split('/').next()?.to_owned());
    let mut all: Vec<String> = listed.iter().filter_map(plain).collect();
    match preference {
        "cni" => {}
        "ipv6" => all.sort_by_key(|ip| !ip.contains(':')),
        _ => all.sort_by_key(|ip| ip.contains(':')),
    }
    all
}

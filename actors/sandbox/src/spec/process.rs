//! What runs in the container: command, environment, working directory.
use kernel::{Fault, Result};
use proto::cri;
use serde_json::Value;

/// Where programs are, if nobody says.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A list of strings of the image's configuration.
fn strings(image: &Value, key: &str) -> Vec<String> {
    let list = image.get("config").and_then(|c| c.get(key)).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

/// The command: the client's over the image's, as Kubernetes documents it. A client's command drops the image's arguments, too.
pub fn args(config: &cri::ContainerConfig, image: &Value) -> Result<Vec<String>> {
    let (mut command, mut arguments) = (config.command.clone(), config.args.clone());
    if command.is_empty() {
        if arguments.is_empty() {
            arguments = strings(image, "Cmd");
        }
        command = strings(image, "Entrypoint");
        if command == [""] {
            // How an image takes back the entrypoint of the one it was built on.
            command.clear();
        }
    }
    command.extend(arguments);
    if command.is_empty() {
        return Err(Fault::invalid_argument("no command specified: neither the container nor its image names one"));
    }
    Ok(command)
}

/// The environment: what stands first can be replaced by what stands later, and keeps its place in the list.
pub fn environment(base: &[String], config: &cri::ContainerConfig, image: &Value, hostname: &str) -> Vec<String> {
    let mut all: Vec<String> = base.to_vec();
    set(&mut all, PATH.into());
    if config.tty {
        set(&mut all, "TERM=xterm".into());
    }
    set(&mut all, format!("HOSTNAME={hostname}"));
    strings(image, "Env").into_iter().for_each(|entry| set(&mut all, entry));
    for pair in &config.envs {
        set(&mut all, format!("{}={}", pair.key, String::from_utf8_lossy(&pair.value)));
    }
    all
}

fn set(all: &mut Vec<String>, entry: String) {
    let key = entry.split('=').next().unwrap_or_default().to_owned();
    let place = all.iter().position(|e| e.split('=').next() == Some(&key));
    match (entry.contains('='), place) {
        // A bare name takes the variable away.
        (false, Some(n)) => drop(all.remove(n)),
        (false, None) => {}
        (true, Some(n)) => all[n] = entry,
        (true, None) => all.push(entry),
    }
}

/// The working directory: the client's, the image's, the root.
pub fn directory(config: &cri::ContainerConfig, image: &Value) -> String {
    let of_image = image.pointer("/config/WorkingDir").and_then(Value::as_str).unwrap_or_default();
    let first = [config.working_dir.as_str(), of_image].into_iter().find(|d| !d.is_empty());
    first.unwrap_or("/").to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn config(command: &[&str], args: &[&str]) -> cri::ContainerConfig {
        let own = |l: &[&str]| l.iter().map(|s| s.to_string()).collect();
        cri::ContainerConfig { command: own(command), args: own(args), ..Default::default() }
    }

    #[test]
    fn commands_as_kubernetes_documents_them() {
        let image = json!({"config": {"Entrypoint": ["/ep"], "Cmd": ["a", "b"]}});
        assert_eq!(args(&config(&[], &[]), &image).unwrap(), ["/ep", "a", "b"]);
        assert_eq!(args(&config(&["/c"], &[]), &image).unwrap(), ["/c"]);
        assert_eq!(args(&config(&[], &["x"]), &image).unwrap(), ["/ep", "x"]);
        assert_eq!(args(&config(&["/c"], &["x"]), &image).unwrap(), ["/c", "x"]);
        let undone = json!({"config": {"Entrypoint": [""], "Cmd": ["a"]}});
        assert_eq!(args(&config(&[], &[]), &undone).unwrap(), ["a"]);
        assert!(args(&config(&[], &[]), &json!({})).unwrap_err().message.contains("no command specified"));
    }

    #[test]
    fn a_variable_set_again_keeps_its_place() {
        let image = json!({"config": {"Env": ["PATH=/image", "HOSTNAME=image", "LANG=C", "HOME"]}});
        let pair = |k: &str, v: &str| cri::KeyValue { key: k.into(), value: v.into() };
        let config = cri::ContainerConfig { tty: true, envs: vec![pair("TERM", "dumb"), pair("NEW", "1=2")], ..Default::default() };
        let all = environment(&["HOME=/base".into(), "KEPT=1".into()], &config, &image, "pod");
        assert_eq!(all, ["KEPT=1", "PATH=/image", "TERM=dumb", "HOSTNAME=image", "LANG=C", "NEW=1=2"]);
    }
}

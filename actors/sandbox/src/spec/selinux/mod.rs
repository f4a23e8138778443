//! SELinux: labels of pods and containers, by hand (no library: what is needed are two small files, one extended attribute and a pool of numbers).
//!
//! A label is `user:role:type:level`. Each pod gets a level of its own, two categories `s0:c1,c2`, which its containers share; so a process of one pod
//! cannot touch files of another though both have the same type.
mod levels;
mod relabel;

pub use levels::Levels;
pub use relabel::relabel;

use kernel::{Fault, Result};
use proto::cri::SeLinuxOption;
use std::path::PathBuf;

/// A label in its parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label {
    user: String,
    role: String,
    kind: String,
    level: String,
}

impl Label {
    /// Reads `user:role:type[:level]`.
    pub fn parse(text: &str) -> Option<Label> {
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let label = Label { user: parts.next()?, role: parts.next()?, kind: parts.next()?, level: parts.next().unwrap_or_default() };
        (!label.kind.is_empty()).then_some(label)
    }
    /// Its level.
    pub fn level(&self) -> &str {
        &self.level
    }
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        if self.level.is_empty() { Ok(()) } else { write!(f, ":{}", self.level) }
    }
}

/// Labels of a container: of its process and of its files. Empty where SELinux is off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// `process.selinuxLabel`.
    pub process: String,
    /// `linux.mountLabel`.
    pub mount: String,
}

/// SELinux on this node.
#[derive(Debug)]
pub struct SeLinux {
    /// `/etc/selinux`.
    etc: PathBuf,
    /// The configuration wants it and the kernel has it.
    on: bool,
    levels: Levels,
}

/// A level as clients may write it: `s0`, `s0-s1`, `s0:c1,c5.c7`. Each number has its own bound.
fn level_is_whole(level: &str) -> bool {
    let number = |text: &str, letter: char, digits: usize| {
        text.strip_prefix(letter).is_some_and(|n| (1..=digits).contains(&n.len()) && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let (sensitivity, categories) = level.split_once(':').map_or((level, None), |(s, c)| (s, Some(c)));
    let sensitivities = sensitivity.split('-').count() <= 2 && sensitivity.split('-').all(|s| number(s, 's', 1));
    let range = |text: &str| text.split('.').count() <= 2 && text.split('.').all(|c| number(c, 'c', 4));
    sensitivities && categories.is_none_or(|all| all.split(',').all(range))
}

impl SeLinux {
    /// `wanted` by the configuration; `range` is the number of categories.
    pub fn new(wanted: bool, range: u32) -> SeLinux {
        let kernel = std::path::Path::new("/sys/fs/selinux/enforce").exists();
        if wanted && !kernel {
            tracing::warn!("enable_selinux is set, but this kernel runs without SELinux: containers get no labels");
        }
        SeLinux { etc: "/etc/selinux".into(), on: wanted && kernel, levels: Levels::new(range) }
    }

    /// Labels are given.
    pub fn on(&self) -> bool {
        self.on
    }

    /// Labels for a pod, or for a container of the pod with this process label. What they reserve is given back by [`SeLinux::release`].
    pub fn labels(&self, options: Option<&SeLinuxOption>, pod: Option<&str>) -> Result<Labels> {
        let options = options.cloned().unwrap_or_default();
        if !options.level.is_empty() && !level_is_whole(&options.level) {
            return Err(Fault::invalid_argument(format!(
                "selinux_options.level: the format of 'level' {:?} is not correct: it is like s0:c1,c2",
                options.level
            )));
        }
        if !self.on {
            return Ok(Labels::default());
        }
        let (mut process, mut mount) = self.defaults()?;
        let none = options == SeLinuxOption::default();
        match pod.and_then(Label::parse).filter(|_| none) {
            // Nothing asked for: everything like the pod, so that its containers can share files.
            Some(of_pod) => {
                mount.level.clone_from(&of_pod.level);
                process = of_pod;
            }
            None => {
                let set = |to: &mut String, from: &str| {
                    if !from.is_empty() {
                        from.clone_into(to)
                    }
                };
                for label in [&mut process, &mut mount] {
                    set(&mut label.user, &options.user);
                    set(&mut label.role, &options.role);
                }
                set(&mut process.kind, &options.r#type);
                // Files keep the role of files.
                "object_r".clone_into(&mut mount.role);
                let level = match (options.level.is_empty(), pod.and_then(Label::parse)) {
                    (false, _) => options.level,
                    (true, Some(of_pod)) => of_pod.level,
                    (true, None) => self.levels.take()?,
                };
                (process.level, mount.level) = (level.clone(), level);
            }
        }
        self.levels.reserve(&process.level);
        Ok(Labels { process: process.to_string(), mount: mount.to_string() })
    }

    /// Remembers a label that is in use since before this start.
    pub fn reserve(&self, process: &str) {
        if let Some(label) = Label::parse(process) {
            self.levels.reserve(&label.level);
        }
    }

    /// A pod or container with this process label is gone.
    pub fn release(&self, process: &str) {
        if let Some(label) = Label::parse(process) {
            self.levels.release(&label.level);
        }
    }

    /// The policy's labels of container processes and their files.
    fn defaults(&self) -> Result<(Label, Label)> {
        let config = std::fs::read_to_string(self.etc.join("config")).unwrap_or_default();
        let policy = config.lines().find_map(|l| l.trim().strip_prefix("SELINUXTYPE=")).unwrap_or("targeted").trim().to_owned();
        let file = self.etc.join(policy).join("contexts/lxc_contexts");
        let text = std::fs::read_to_string(&file);
        let text = text.map_err(|e| Fault::from(e).context(format!("labels of containers: {}", file.display())))?;
        let of = |key: &str| {
            let mut pairs = text.lines().filter_map(|l| l.split_once('='));
            let found = pairs.find(|(k, _)| k.trim() == key).and_then(|(_, v)| Label::parse(v.trim().trim_matches('"')));
            found.ok_or_else(|| Fault::failed_precondition(format!("{} has no label {key:?}", file.display())))
        };
        Ok((of("process")?, of("file")?))
    }
}

/// The label of a virtual machine's process instead of a container's.
pub fn for_machine(process: &str) -> String {
    match Label::parse(process) {
        Some(label) => Label { kind: "container_kvm_t".into(), ..label }.to_string(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn node(dir: &std::path::Path) -> SeLinux {
        std::fs::create_dir_all(dir.join("targeted/contexts")).unwrap();
        std::fs::write(dir.join("config"), "# a comment\nSELINUX=enforcing\nSELINUXTYPE=targeted\n").unwrap();
        let contexts =
            "process = \"system_u:system_r:container_t:s0\"\ncontent = \"x\"\nfile = \"system_u:object_r:container_file_t:s0\"\n";
        std::fs::write(dir.join("targeted/contexts/lxc_contexts"), contexts).unwrap();
        SeLinux { etc: dir.into(), on: true, levels: Levels::new(1024) }
    }

    #[test]
    fn pods_differ_and_their_containers_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let (a, b) = (node.labels(None, None).unwrap(), node.labels(None, None).unwrap());
        assert!(
            a.process.starts_with("system_u:system_r:container_t:s0:c") && a.mount.starts_with("system_u:object_r:container_file_t:s0:c")
        );
        assert_ne!(a, b);
        let inside = node.labels(None, Some(&a.process)).unwrap();
        assert_eq!(inside, a);
        let level = |l: &str| Label::parse(l).unwrap().level;
        let asked = SeLinuxOption { r#type: "spc_t".into(), ..Default::default() };
        let typed = node.labels(Some(&asked), Some(&a.process)).unwrap();
        assert!(typed.process.contains(":spc_t:") && level(&typed.process) == level(&a.process), "{typed:?}");
        let asked = SeLinuxOption { level: "s0:c4,c5".into(), ..Default::default() };
        let own = node.labels(Some(&asked), Some(&a.process)).unwrap();
        assert_eq!((level(&own.process).as_str(), level(&own.mount).as_str()), ("s0:c4,c5", "s0:c4,c5"));
        assert_eq!(for_machine(&own.process), "system_u:system_r:container_kvm_t:s0:c4,c5");
    }

    #[test]
    fn levels_are_checked_even_where_selinux_is_off() {
        for good in ["s0", "s0-s0", "s0:c1", "s0:c1,c2", "s0:c1.c3,c1023", "s0-s1:c0.c1023"] {
            assert!(level_is_whole(good), "{good}");
        }
        for bad in ["", "c1", "s", "s10", "s0:", "s0:c12345", "s0:c1,", "s0:c1.c2.c3", "x0:c1", "s0:c1:c2", "s0-s1-s2"] {
            assert!(!level_is_whole(bad), "{bad}");
        }
        let off = SeLinux { etc: "/no".into(), on: false, levels: Levels::new(1024) };
        let asked = SeLinuxOption { level: "wrong".into(), ..Default::default() };
        assert!(off.labels(Some(&asked), None).unwrap_err().message.contains("wrong"));
        assert_eq!(off.labels(None, None).unwrap(), Labels::default());
    }
}

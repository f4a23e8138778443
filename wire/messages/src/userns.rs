//! User namespaces of pods.
use serde::{Deserialize, Serialize};

/// Label of a snapshot: its users, as `<container>:<host>:<size>`.
pub const UID_LABEL: &str = "containerd.io/snapshot/uidmapping";
/// Label of a snapshot: its groups.
pub const GID_LABEL: &str = "containerd.io/snapshot/gidmapping";

/// A range of ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// First id in the namespace.
    pub container: u32,
    /// First id outside of it.
    pub host: u32,
    /// How many.
    pub size: u32,
}

impl IdMap {
    /// As in `/proc/<pid>/uid_map`.
    pub fn line(&self) -> String {
        format!("{} {} {}\n", self.container, self.host, self.size)
    }
    /// As in labels and mount options.
    pub fn label(&self) -> String {
        format!("{}:{}:{}", self.container, self.host, self.size)
    }
    /// The id outside of the namespace for one inside.
    pub fn outside(&self, id: u32) -> Option<u32> {
        id.checked_sub(self.container).filter(|n| *n < self.size).and_then(|n| self.host.checked_add(n))
    }
}

/// The users of a pod: one range of users, one of groups, as CRI has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNs {
    /// Users.
    pub uid: IdMap,
    /// Groups.
    pub gid: IdMap,
}

impl UserNs {
    /// Who root of the namespace is outside of it. Validation has seen that root is mapped; an unmapped one would be nobody.
    pub fn root(&self) -> (u32, u32) {
        (self.uid.outside(0).unwrap_or(65534), self.gid.outside(0).unwrap_or(65534))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_looked_up_within_their_range_only() {
        let map = IdMap { container: 10, host: 1000, size: 5 };
        assert_eq!((map.outside(10), map.outside(14), map.outside(15), map.outside(9)), (Some(1000), Some(1004), None, None));
        assert_eq!((map.line().as_str(), map.label().as_str()), ("10 1000 5\n", "10:1000:5"));
    }
}

//! A process group that does not outlive the interest in it.
use crate::sys;

/// Killed when this is dropped, unless it has ended.
pub struct Group(Option<u32>);

impl Group {
    /// The group of this leader, which lives or is not known to have been reaped: its number is nobody else's.
    pub fn of(leader: u32) -> Group {
        Group(Some(leader))
    }
    /// Its leader has ended as it should; what that has left running is meant to.
    pub fn ended(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            sys::kill_group(leader);
        }
    }
}

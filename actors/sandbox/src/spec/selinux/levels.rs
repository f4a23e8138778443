//! The pool of levels: pairs of categories, each held by one pod and as many of its containers as there are.
use kernel::{Fault, Result};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Levels in use, and by how many.
#[derive(Debug)]
pub struct Levels {
    range: u32,
    used: Mutex<BTreeMap<String, usize>>,
}

impl Levels {
    /// Categories `c0` to `c<range-1>`.
    pub fn new(range: u32) -> Levels {
        Levels { range: range.max(2), used: Mutex::default() }
    }

    fn used(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A level that nobody has; not reserved yet. Begins at a random pair, so that levels do not tell the order of pods.
    pub fn take(&self) -> Result<String> {
        let used = self.used();
        let pairs = u64::from(self.range) * u64::from(self.range - 1) / 2;
        let start = (uuid::Uuid::new_v4().as_u128() as u64) % pairs;
        let all = (0..pairs).map(|n| self.pair((start + n) % pairs));
        let free = all.into_iter().find(|level| !used.contains_key(level));
        free.ok_or_else(|| Fault::resource_exhausted(format!("all {pairs} SELinux levels are in use: raise selinux_category_range")))
    }

    /// The n-th pair of two different categories.
    fn pair(&self, mut n: u64) -> String {
        let mut low = 0;
        loop {
            let row = u64::from(self.range) - 1 - low;
            if n < row {
                return format!("s0:c{low},c{}", low + 1 + n);
            }
            n -= row;
            low += 1;
        }
    }

    /// One more holder.
    pub fn reserve(&self, level: &str) {
        if !level.is_empty() {
            *self.used().entry(level.to_owned()).or_default() += 1;
        }
    }

    /// One holder less.
    pub fn release(&self, level: &str) {
        let mut used = self.used();
        if let Some(n) = used.get_mut(level) {
            *n = n.saturating_sub(1);
            if *n == 0 {
                used.remove(level);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_pair_is_given_once_until_its_last_holder_is_gone() {
        let levels = Levels::new(4);
        let mut all = vec![];
        for _ in 0..6 {
            let level = levels.take().unwrap();
            levels.reserve(&level);
            all.push(level);
        }
        all.sort();
        assert_eq!(all, ["s0:c0,c1", "s0:c0,c2", "s0:c0,c3", "s0:c1,c2", "s0:c1,c3", "s0:c2,c3"]);
        assert!(levels.take().unwrap_err().message.contains("selinux_category_range"));
        levels.reserve("s0:c1,c2");
        levels.release("s0:c1,c2");
        assert!(levels.take().is_err(), "a container still has it");
        levels.release("s0:c1,c2");
        assert_eq!(levels.take().unwrap(), "s0:c1,c2");
    }
}

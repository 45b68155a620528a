//! The policies that the server works by at the moment.

use std::sync::{Arc, PoisonError, RwLock};

use super::PolicySet;

/// Holds the current set; replaced whole, or not at all.
///
/// A call takes its set once, at its beginning, and keeps it: a reload changes
/// nothing for what already runs.
#[derive(Debug)]
pub struct PolicyStore {
    current: RwLock<Arc<PolicySet>>,
}

impl PolicyStore {
    /// Begins with `set`.
    #[must_use]
    pub fn new(set: PolicySet) -> Self {
        Self { current: RwLock::new(Arc::new(set)) }
    }

    /// The set in force.
    #[must_use]
    pub fn current(&self) -> Arc<PolicySet> {
        // Only whole pointers are ever stored, so a poisoned lock still holds a good one.
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts `set` in force and returns the one before.
    pub fn replace(&self, set: PolicySet) -> Arc<PolicySet> {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut current, Arc::new(set))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::names::Digest;

    #[test]
    fn a_call_keeps_the_set_it_began_with() {
        let set = |content| PolicySet { digest: Digest::of(content), policies: BTreeMap::new() };
        let store = PolicyStore::new(set(b"old"));
        let kept = store.current();
        assert_eq!(store.replace(set(b"new")).digest, Digest::of(b"old"));
        assert_eq!(kept.digest, Digest::of(b"old"));
        assert_eq!(store.current().digest, Digest::of(b"new"));
    }
}

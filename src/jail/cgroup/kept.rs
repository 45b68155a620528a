//! Cgroups of v1, used again.
//!
//! Making one in every hierarchy and removing it again is dear, and one of v1 can be
//! made as good as new: its peaks can be reset, its share of processors refilled, and what
//! stays charged to it is seen. Where v2 is there beside it, without controllers, its
//! directory there is made anew. (Nothing of v2 can be reset: where that has the
//! controllers each run has a new one.) A cgroup is used again only
//!
//! - for the very limits that it was made with, and that no call has tightened;
//! - where nobody was killed for want of memory in it: that count is for ever;
//! - where its most processes ever are what any run has, init and the program: that
//!   count is for ever too;
//! - once no process is in it, not even a dead one, and next to no memory is charged to it.

use std::collections::VecDeque;

use super::{Cgroup, CgroupLimits};

/// Most that are kept.
const KEPT_MAX: usize = 64;

/// Those whose last run is gone.
#[derive(Debug, Default)]
pub struct KeptCgroups {
    /// The longest kept first: the kernel gives memory back a little later.
    kept: VecDeque<Cgroup>,
}

impl KeptCgroups {
    /// How many are kept.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// One that is as good as a new one with these limits.
    pub fn take(&mut self, limits: &CgroupLimits) -> Option<Cgroup> {
        let index = self.kept.iter().position(|cgroup| cgroup.has_limits(limits))?;
        let mut cgroup = self.kept.remove(index)?;
        if cgroup.renew() {
            return Some(cgroup);
        }
        // Not to be in the way of others that are ready.
        self.kept.push_back(cgroup);
        None
    }

    /// Keeps one whose run is gone, if it could be used again; removes it if not.
    ///
    /// # Errors
    /// It, as of [`Cgroup::remove`].
    pub fn give_back(&mut self, cgroup: Cgroup) -> Result<(), Box<Cgroup>> {
        if self.kept.len() < KEPT_MAX && cgroup.is_reusable() {
            self.kept.push_back(cgroup);
            return Ok(());
        }
        cgroup.remove()
    }

    /// Removes one. Gives it back where that can't be done yet.
    ///
    /// # Errors
    /// As of [`Cgroup::remove`].
    pub fn let_one_go(&mut self) -> Result<(), Box<Cgroup>> {
        self.kept.pop_front().map_or(Ok(()), Cgroup::remove)
    }
}

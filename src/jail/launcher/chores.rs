//! What nobody waits for: clearing away after runs that were answered for, and
//! building jails ahead.
//!
//! Where processors are few, this would slow the calls that run meanwhile. So it
//! waits for a quiet moment, and where none comes it is done many at a time: then
//! most calls are not disturbed at all.

use std::time::{Duration, Instant};

use super::{Launcher, Leftover};

/// When nothing has happened for so long, it is quiet.
const QUIET: Duration = Duration::from_millis(5);
/// So many runs to clear away after don't wait for that, until so few are left.
const GOING_MANY: usize = 24;
const GOING_FEW: usize = 4;

impl Launcher {
    /// When there is something to do; `None` for never.
    pub(super) fn next_chore(&mut self, now: Instant) -> Option<Instant> {
        let quiet = self.last_heard + QUIET;
        let build = self.ahead.due(self.most_ahead(), now, quiet);
        let remains = !self.gone.is_empty() || !self.over.is_empty();
        let at_once = self.hurries() || self.is_crowded(now);
        let free = remains.then_some(if at_once { now } else { quiet });
        let spare = self.kept() > 0;
        build.into_iter().chain(free).chain(spare.then_some(quiet)).min()
    }

    /// Whether clearing away can't wait.
    pub(super) fn hurries(&mut self) -> bool {
        self.hurried = self.going >= if self.hurried { GOING_FEW } else { GOING_MANY };
        self.hurried || self.ending.is_some()
    }

    /// Whether calls come several at a time. Then there is no call to be left undisturbed,
    /// and what is put off would only come at a worse moment.
    pub(super) fn is_crowded(&self, now: Instant) -> bool {
        self.crowded_until > now
    }

    /// Does one thing, so that what comes in meanwhile waits for no more than that.
    pub(super) fn do_a_chore(&mut self) {
        let now = Instant::now();
        let is_quiet = now >= self.last_heard + QUIET;
        if self.is_crowded(now) && !is_quiet {
            while self.free_one() {}
            self.build_ahead(now, true);
            return;
        }
        if (is_quiet || self.hurries()) && self.free_one() {
            return;
        }
        if self.ending.is_none() && self.build_ahead(now, is_quiet) {
            return;
        }
        if is_quiet {
            self.let_one_go();
        }
    }

    /// How much is kept for a next run; each has that many descriptors, or one more.
    fn kept(&self) -> usize {
        self.networks.kept() + self.ids.kept() + self.roots.kept() + self.cgroups.kept()
    }

    /// Lets go of something that was kept for a next run. False where there is nothing.
    pub(super) fn let_one_go(&mut self) -> bool {
        if self.networks.kept() > 0 {
            self.networks.let_one_go();
        } else if self.ids.kept() > 0 {
            self.ids.let_one_go();
        } else if self.roots.kept() > 0 {
            self.roots.let_one_go();
        } else if self.cgroups.kept() > 0 {
            if let Err(cgroup) = self.cgroups.let_one_go() {
                self.quarantine(Leftover { cgroup, ids: None, run: None });
            }
        } else {
            return false;
        }
        true
    }

    /// Clears away after a run that was answered for, if there is one: its init is
    /// let go first, and its cgroup when init is gone. False where there is none.
    fn free_one(&mut self) -> bool {
        if let Some(remains) = self.gone.pop_front() {
            self.going -= 1;
            self.free(remains);
        } else if let Some(serial) = self.over.pop_front() {
            let now = Instant::now();
            self.with_run(serial, |run| run.dismiss(now));
        } else {
            return false;
        }
        true
    }
}

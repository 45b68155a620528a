//! What is asked of a run that lives for many calls.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::{Phase, Run};
use crate::jail::{
    cgroup::Cgroup,
    message::{ServiceSocket, Sight},
};

/// Connections that may be asked for while there is no program yet.
const WANTED_MAX: usize = 8;

impl Run {
    /// A connection is asked for. Or too many are: then those that are denied, in order.
    pub fn want_connection(&mut self, to: ServiceSocket) -> Option<Vec<ServiceSocket>> {
        self.wanted.push(to);
        (self.wanted.len() > WANTED_MAX).then(|| std::mem::take(&mut self.wanted))
    }

    /// Whether any is asked for.
    #[must_use]
    pub fn has_wanted(&self) -> bool {
        !self.wanted.is_empty()
    }

    /// The first that is asked for, once it can be had or never will be.
    pub fn next_wanted(&mut self) -> Option<ServiceSocket> {
        let is_yet_to_come = match self.phase {
            Phase::Building | Phase::Waiting => true,
            Phase::Running => !self.filtered,
            Phase::Ending | Phase::Quarantined => false,
        };
        let waits = is_yet_to_come && self.service.is_some();
        (!waits && self.has_wanted()).then(|| self.wanted.remove(0))
    }

    /// A connection to one of its sockets. Never blocks.
    ///
    /// # Errors
    /// As of `FromLauncher::Connected`.
    pub fn connect(&mut self, to: ServiceSocket) -> Result<OwnedFd, Errno> {
        let service = self.service.as_mut().ok_or(Errno::INVAL)?;
        match self.phase {
            // Before that it is our own code that has the socket.
            Phase::Running if self.filtered => {
                let connection = service.connect(to)?;
                // In direct mode others are the same user: theirs is another cgroup.
                let ours = || self.cgroup.as_ref().is_none_or(|it| it.has_peer(&connection));
                if to == ServiceSocket::Own && !ours() {
                    return Err(Errno::PERM);
                }
                Ok(connection)
            }
            Phase::Building | Phase::Waiting | Phase::Running => Err(Errno::NOENT),
            Phase::Ending | Phase::Quarantined => Err(Errno::SRCH),
        }
    }

    /// What it uses, and what is in force; nothing of one whose program wasn't started, or
    /// has ended.
    #[must_use]
    pub fn look(&self) -> Option<Sight> {
        let cgroup = self.cgroup.as_ref().filter(|_| self.phase == Phase::Running)?;
        let usage = Cgroup::usage(cgroup);
        Some(Sight {
            enforced: self.enforced_now(),
            runtime: None,
            user: usage.user,
            system: usage.system,
            memory_peak: usage.memory_peak,
            pids_peak: usage.pids_peak,
        })
    }

    /// Takes all processors away from it, or gives them back. Init as well: so it hears
    /// nothing meanwhile. But whoever is frozen by cgroup v2 can be killed, by us, and by the
    /// kernel when we are gone (`PR_SET_PDEATHSIG`). Nothing of one that isn't a program's
    /// yet: until then we wait for its word.
    pub fn freeze(&self, frozen: bool) {
        if self.phase == Phase::Running
            && self.filtered
            && let Some(cgroup) = &self.cgroup
        {
            cgroup.freeze(frozen);
        }
    }
}

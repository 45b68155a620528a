//! What is asked of a run that lives for many calls.

use std::{io, os::fd::OwnedFd};

use rustix::io::Errno;

use super::{Call, Phase, Run};
use crate::jail::{
    cgroup::Cgroup,
    message::{ServiceSocket, Sight},
};

impl Run {
    /// A connection to one of its sockets. Never blocks.
    ///
    /// # Errors
    /// As of `FromLauncher::Connected`.
    pub fn connect(&self, to: ServiceSocket) -> Result<OwnedFd, Errno> {
        let service = self.service.as_ref().ok_or(Errno::INVAL)?;
        match self.phase {
            // Before that it is our own code that has the socket.
            Phase::Running if self.filtered => service.connect(to),
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
    /// kernel when we are gone (`PR_SET_PDEATHSIG`).
    pub fn freeze(&self, frozen: bool) {
        if self.phase == Phase::Running
            && let Some(cgroup) = &self.cgroup
        {
            cgroup.freeze(frozen);
        }
    }

    /// The directory for a socket of its own came, as the jail was built.
    pub(super) fn take_directory(&mut self, directory: Option<OwnedFd>) -> io::Result<()> {
        let Some(service) = self.service.as_mut().filter(|service| service.place.is_none()) else {
            return Ok(());
        };
        service.directory = Some(directory.ok_or(Errno::BADF)?);
        Ok(())
    }

    /// The program has its listening socket, which nobody else may have: when it is gone,
    /// so is what could be connected to.
    pub(super) fn hand_over(&mut self, call: &mut Call) {
        if let (Some(service), Some(listening)) = (&mut self.service, call.listening.take()) {
            service.inherited = Some(listening.inode);
        }
    }
}

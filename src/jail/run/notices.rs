//! The system calls that a run's filter tells of, and their answers.

use std::{
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use super::Run;
use crate::jail::{
    message::StopCause,
    seccomp::{
        filter::{self, Decision},
        notify::Received,
    },
    step::Step,
};

/// Distinct refused calls that are told.
const REFUSED_MAX: usize = 16;
/// Refused calls answered at once; beyond that, `NOTICES_BATCH` a `NOTICES_PAUSE`:
/// a program that does nothing but forbidden calls must not keep the launcher busy.
const NOTICES_FREE: u32 = 4096;
const NOTICES_BATCH: u32 = 32;
const NOTICES_PAUSE: Duration = Duration::from_millis(1);

impl Run {
    /// The listener, unless it is paused.
    #[must_use]
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().filter(|_| self.notices_resume.is_none()).map(AsFd::as_fd)
    }

    /// Answers forbidden system calls. A deadly one is never answered: the
    /// program is killed while it waits.
    pub fn on_listener(&mut self, now: Instant) {
        for _ in 0..NOTICES_BATCH {
            let Some(listener) = &self.listener else { return };
            let call = match listener.receive() {
                Ok(Received::Call(call)) => call,
                Ok(Received::Nothing) => return,
                Ok(Received::Closed) => {
                    // Nobody is left whose call could be waiting in it, and it
                    // would be readable for ever.
                    self.listener = None;
                    return;
                }
                Err(error) => return self.unheard(Step::Listener, &error, now),
            };
            let decision = filter::decide(
                call.nr,
                call.arch,
                &call.args,
                &self.prepared.template.syscalls,
                self.prepared.filter_options(),
            );
            let (errno, name) = match decision {
                Decision::Deadly(name) => {
                    return self.deny(name, now);
                }
                Decision::Refuse(errno, name) => (errno, Some(name)),
                // The filter asked about a call that its own rules allow: it can't be.
                Decision::Continue => (libc::EPERM, None),
            };
            if listener.refuse(call.id, errno).is_err() {
                // Unanswered it would hang until the timeout, which is no worse.
                return;
            }
            name.into_iter().for_each(|name| self.note_refused(name));
            self.notices += 1;
        }
        if self.notices >= NOTICES_FREE {
            self.notices_resume = Some(now + NOTICES_PAUSE);
        }
    }

    /// A deadly call was made; its name, where it is known.
    pub(super) fn deny(&mut self, name: String, now: Instant) {
        self.denied.get_or_insert(name);
        self.stop(StopCause::Syscall, now);
    }

    fn note_refused(&mut self, name: String) {
        if self.refused.len() < REFUSED_MAX && !self.refused.contains(&name) {
            self.refused.push(name);
        }
    }
}

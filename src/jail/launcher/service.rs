//! Runs that listen: their sockets, and what is asked of them while they live.

use std::{io, os::fd::OwnedFd, time::Instant};

use rustix::io::Errno;

use super::{Launcher, QUARANTINE_RETRY, log};
use crate::{
    jail::{
        message::{FromLauncher, Refusal, ServiceSocket},
        places::{Listening, Place},
        plan::Template,
        run::{self, Run},
        step::{Step, StepError},
    },
    names::RunId,
};

/// Connections that may wait for a server that doesn't read.
pub(super) const CONNECTED_MAX: usize = 32;

impl Launcher {
    /// The socket for a run that listens.
    pub(super) fn listening(&mut self, template: &Template) -> Result<Option<Listening>, Refusal> {
        if !template.listens {
            return Ok(None);
        }
        self.places.listening().map(Some).map_err(|error| self.no_socket(1, &error))
    }

    /// The directory in which a run in direct mode may bind a socket of its own.
    pub(super) fn place(&mut self, owner: (u32, u32)) -> Result<Place, Refusal> {
        self.places.place(owner).map_err(|error| self.no_socket(0, &error))
    }

    /// Who runs the service is told where: the caller hears of the step alone.
    fn no_socket(&self, index: u16, error: &io::Error) -> Refusal {
        let parent = self.places.parent().display();
        log(&format!("a service can't have a socket in {parent}: {error}"));
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        run::refusal(StepError { step: Step::ServiceSocket, index, errno })
    }

    /// Answers with a new connection to a run.
    pub(super) fn connect(&mut self, id: RunId, to: ServiceSocket) {
        let connected = self.connection(id, to);
        let result = connected.as_ref().map(drop).map_err(|error| error.raw_os_error());
        self.tell_with(&FromLauncher::Connected { run: id, to, result }, connected.ok());
    }

    fn connection(&mut self, id: RunId, to: ServiceSocket) -> Result<OwnedFd, Errno> {
        if self.connected >= CONNECTED_MAX {
            return Err(Errno::AGAIN);
        }
        self.heard(id).ok_or(Errno::SRCH)?.connect(to)
    }

    /// Answers with what there is to see of a run.
    pub(super) fn look(&mut self, id: RunId) {
        let sight = self.heard(id).and_then(Run::look).map(Box::new);
        self.tell(&FromLauncher::Seen { run: id, sight });
    }

    /// Stops a run, or lets it go on.
    pub(super) fn freeze(&mut self, id: RunId, frozen: bool) {
        if let Some(run) = self.heard(id) {
            run.freeze(frozen);
        }
    }

    /// This call's run, whatever it has said so far heard: a program that was just started
    /// is not listened to for a while.
    fn heard(&mut self, id: RunId) -> Option<&Run> {
        self.on_control(*self.serials.get(&id)?);
        // It may have told its end.
        self.runs.get(self.serials.get(&id)?)
    }

    /// Removes a directory on the host whose run is gone; what is left of it later.
    pub(super) fn give_back_place(&mut self, place: Place) {
        self.places.give_back(place);
        if self.places.has_left() {
            self.leftovers_due.get_or_insert(Instant::now() + QUARANTINE_RETRY);
        }
    }
}

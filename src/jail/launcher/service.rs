//! Runs that listen: their sockets, and what is asked of them while they live.

use std::{io, os::fd::OwnedFd, time::Instant};

use rustix::io::Errno;

use super::{Launcher, QUARANTINE_RETRY, log};
use crate::{
    jail::{
        message::{FromLauncher, Refusal, ServiceSocket},
        places::{Place, Places},
        run::{self, Phase, Run},
        step::{Step, StepError},
    },
    names::RunId,
};

/// Connections that may wait for a server that doesn't read.
pub(super) const CONNECTED_MAX: usize = 32;

impl Launcher {
    /// The directory in which a run in direct mode may bind a socket of its own.
    pub(super) fn place(&mut self, owner: (u32, u32)) -> Result<Place, Refusal> {
        self.places.place(owner).map_err(|error| run::refusal(no_socket(&self.places, 0, &error)))
    }

    /// Answers with a new connection to a run, as soon as there is a program to connect to:
    /// to ask again and again would take longer, and more.
    pub(super) fn connect(&mut self, id: RunId, to: ServiceSocket) {
        let Some(run) = self.heard(id) else {
            return self.tell_connected(id, to, Err(Errno::SRCH));
        };
        if let Some(denied) = run.want_connection(to) {
            for to in denied {
                self.tell_connected(id, to, Err(Errno::AGAIN));
            }
            return;
        }
        let Some(serial) = self.serials.get(&id).copied() else { return };
        self.answer_connects(serial);
        if self.runs.get(&serial).is_some_and(Run::has_wanted) {
            self.heed(serial, true);
        }
    }

    /// Answers what was asked for while there was no program yet, in order.
    pub(super) fn answer_connects(&mut self, serial: u64) {
        while let Some(run) = self.runs.get_mut(&serial)
            && let Some(id) = run.id()
            && let Some(to) = run.next_wanted()
        {
            let connected = match self.connected >= CONNECTED_MAX {
                true => Err(Errno::AGAIN),
                false => run.connect(to),
            };
            self.tell_connected(id, to, connected);
        }
    }

    fn tell_connected(&mut self, run: RunId, to: ServiceSocket, made: Result<OwnedFd, Errno>) {
        let result = made.as_ref().map(drop).map_err(|error| error.raw_os_error());
        self.tell_with(&FromLauncher::Connected { run, to, result }, made.ok());
    }

    /// Answers with what there is to see of a run.
    pub(super) fn look(&mut self, id: RunId) {
        let sight = self.heard(id).and_then(|run| run.look()).map(Box::new);
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
    fn heard(&mut self, id: RunId) -> Option<&mut Run> {
        self.on_control(*self.serials.get(&id)?);
        // It may have told its end.
        self.runs.get_mut(self.serials.get(&id)?)
    }

    /// Removes a directory on the host whose run is gone; what is left of it later.
    pub(super) fn give_back_place(&mut self, place: Place) {
        self.places.give_back(place);
        if self.places.has_left() {
            self.leftovers_due.get_or_insert(Instant::now() + QUARANTINE_RETRY);
        }
    }
}

/// Has what a jail that was built has sent, and makes the sockets of one that listens: before
/// there is a call for it, where it was built ahead.
pub(super) fn equip(
    run: &mut Run,
    came: Vec<OwnedFd>,
    places: &mut Places,
    root: bool,
) -> Result<(), StepError> {
    // One that was stopped meanwhile needs none.
    let Some(service) = run.service.as_mut().filter(|_| run.phase == Phase::Building) else {
        return Ok(());
    };
    service.take(came, root).map_err(|error| StepError {
        step: Step::ServiceDirectory,
        index: 1,
        errno: error.raw_os_error().unwrap_or(libc::EIO),
    })?;
    let socket = service.make_sockets().map_err(|error| no_socket(places, 2, &error))?;
    let listening = places.listening(socket).map_err(|error| no_socket(places, 1, &error))?;
    service.listening = Some(listening);
    Ok(())
}

/// Who runs the dispatcher is told where: the caller hears of the step alone.
fn no_socket(places: &Places, index: u16, error: &io::Error) -> StepError {
    let parent = places.parent().display();
    log(&format!("a service can't have a socket (in {parent}): {error}"));
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    StepError { step: Step::ServiceSocket, index, errno }
}

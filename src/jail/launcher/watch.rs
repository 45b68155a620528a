//! Watching runs: what they report, when they are due, how they are freed.

use std::{os::fd::OwnedFd, time::Instant};

use rustix::event::epoll::{self, EventFlags};

use super::{
    GOING_MAX, Launcher, Leftover, QUARANTINE_RETRY, Remains, Source, log, reap, service::equip,
};
use crate::jail::{
    identity::HostIds,
    message::FromLauncher,
    run::{Heard, Phase, Run},
    step::{Report, Step, StepError},
};

impl Launcher {
    pub(super) fn register(&mut self, run: Run) -> u64 {
        let serial = run.serial;
        let watched = self
            .watch(&run.control, Source::Control(serial), EventFlags::IN)
            .and_then(|()| self.watch(&run.pidfd, Source::Init(serial), EventFlags::IN));
        self.runs.insert(serial, run);
        if let Err(error) = watched {
            log(&format!("a run can't be watched: {error}"));
            let now = Instant::now();
            self.with_run(serial, |run| run.unheard(Step::Handshake, &error, now));
        }
        self.reschedule(serial);
        serial
    }

    pub(super) fn with_run(&mut self, serial: u64, act: impl FnOnce(&mut Run)) {
        if let Some(run) = self.runs.get_mut(&serial) {
            act(run);
            self.reschedule(serial);
        }
    }

    pub(super) fn reschedule(&mut self, serial: u64) {
        let next = self.runs.get(&serial).and_then(Run::next_deadline);
        if self.scheduled.get(&serial).copied() == next {
            return;
        }
        if let Some(old) = self.scheduled.remove(&serial) {
            self.timers.remove(&(old, serial));
        }
        if let Some(at) = next {
            self.timers.insert((at, serial));
            self.scheduled.insert(serial, at);
        }
    }

    /// Whether to listen to a run's control socket. Not to one whose program was just
    /// started: its filter's listener comes there, and most programs have ended before
    /// it matters; to take it at once would only be in the program's way.
    pub(super) fn heed(&self, serial: u64, heed: bool) {
        let Some(run) = self.runs.get(&serial) else { return };
        let flags = if heed { EventFlags::IN } else { EventFlags::empty() };
        let data = epoll::EventData::new_u64(Source::Control(serial).token());
        // ENOENT: it is at its end already.
        epoll::modify(&self.epoll, &run.control, data, flags).ok();
    }

    /// Inits rang: each has reported.
    pub(super) fn on_bell(&mut self) {
        let mut rung = [0; 8 * 64];
        let length = rustix::io::read(&self.bell.0, &mut rung).unwrap_or(0);
        for serial in rung[..length].chunks_exact(8) {
            if let Ok(serial) = serial.try_into().map(u64::from_ne_bytes) {
                self.on_control(serial);
            }
        }
    }

    pub(super) fn on_control(&mut self, serial: u64) {
        loop {
            let Some(run) = self.runs.get_mut(&serial) else { return };
            match run.listen() {
                Ok(Heard::Report(report, fds)) => self.on_report(serial, report, fds),
                Ok(Heard::Nothing) => return,
                Ok(Heard::Closed) => {
                    // It stays readable until init is reaped. ENOENT: that is
                    // what we are here for, and it was heard before.
                    epoll::delete(&self.epoll, &run.control).ok();
                    run.closed(Instant::now());
                    return self.reschedule(serial);
                }
                Err(error) => {
                    log(&format!("{}: its control socket: {error}", run.name()));
                    epoll::delete(&self.epoll, &run.control).ok();
                    run.unheard(Step::Handshake, &error, Instant::now());
                    return self.reschedule(serial);
                }
            }
        }
    }

    pub(super) fn on_report(&mut self, serial: u64, report: Report, fds: Vec<OwnedFd>) {
        let now = Instant::now();
        let Some(run) = self.runs.get_mut(&serial) else { return };
        let step = match report {
            Report::NeedsMaps => Some(Step::Maps),
            Report::Ready => Some(Step::Start),
            _ => None,
        };
        if let Some(step) = step.filter(|step| self.fault.hits(*step)) {
            let error = StepError { step, index: 0, errno: libc::EIO };
            run.on_report(Report::Failed(error), None, now);
            return self.reschedule(serial);
        }
        let change = match report {
            Report::Ready => match equip(run, fds, &mut self.places, self.facts.root) {
                Ok(()) => run.on_report(report, None, now),
                Err(error) => run.on_report(Report::Failed(error), None, now),
            },
            _ => run.on_report(report, fds.into_iter().next(), now),
        };
        self.on_change(serial, change);
        self.answer_connects(serial);
        self.answer_if_over(serial, now);
    }

    pub(super) fn watch_listener(&mut self, serial: u64) {
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        if let Some(run) = self.runs.get(&serial)
            && let Some(listener) = run.listener()
            && let Err(error) = self.watch(listener, Source::Listener(serial), flags)
        {
            log(&format!("{}: its listener can't be watched: {error}", run.name()));
            let now = Instant::now();
            self.with_run(serial, |run| run.unheard(Step::Listener, &error, now));
        }
    }

    /// Answers for a run of whose program nothing is left. That its init, its
    /// mounts and its cgroup go as well is not waited for, unless many are going.
    fn answer_if_over(&mut self, serial: u64, now: Instant) {
        let Some(run) = self.runs.get_mut(&serial).filter(|run| run.is_over()) else { return };
        if self.going >= GOING_MAX {
            run.dismiss(now);
            return self.reschedule(serial);
        }
        run.answered = true;
        self.going += 1;
        self.over.push_back(serial);
        let answer = answer(run, now);
        self.forget(serial);
        if let Some(answer) = answer {
            self.tell(&answer);
        }
    }

    /// A run's id may be used again, and one call less runs.
    fn forget(&mut self, serial: u64) {
        self.answer_connects(serial);
        let Some(run) = self.runs.get(&serial) else { return };
        if let Some(launch) = run.launch() {
            self.serials.remove(&launch.run);
            self.ahead.count_running(run, launch, false);
        }
    }

    pub(super) fn rearm_listener(&mut self, serial: u64) {
        let Some(run) = self.runs.get(&serial) else { return };
        // A stopped run's pending call stays pending: it must never be answered.
        if run.phase != Phase::Running {
            return;
        }
        if let Some(listener) = run.listener() {
            let data = epoll::EventData::new_u64(Source::Listener(serial).token());
            let flags = EventFlags::IN | EventFlags::ONESHOT;
            epoll::modify(&self.epoll, listener, data, flags).ok();
        }
    }

    pub(super) fn on_time(&mut self, now: Instant) {
        while let Some((at, serial)) = self.timers.first().copied() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            self.scheduled.remove(&serial);
            let Some(run) = self.runs.get_mut(&serial) else { continue };
            let heed = run.heeds_from(now);
            if run.on_time(now) {
                log(&format!("{} would not end: its uid and cgroup are kept aside", run.name()));
                self.answer_connects(serial);
                let Some(run) = self.runs.get(&serial) else { continue };
                if !run.answered
                    && let Some(answer) = answer(run, now)
                {
                    self.tell(&answer);
                }
            }
            if heed {
                self.heed(serial, true);
            }
            self.reschedule(serial);
            self.rearm_listener(serial);
        }
        if self.outbox_due.is_some_and(|due| due <= now) {
            self.flush();
        }
        if self.leftovers_due.is_some_and(|due| due <= now) {
            self.retry_leftovers(now);
        }
    }

    /// Init is dead, and with it everything in its pid namespace. If the answer
    /// wasn't given before, it comes last: then nothing of the run is left.
    pub(super) fn on_init_gone(&mut self, serial: u64) {
        self.on_control(serial); // what it said last
        if self.runs.get(&serial).is_some_and(|run| !run.answered) {
            self.forget(serial);
        }
        let Some(run) = self.runs.remove(&serial) else { return };
        reap(&run.pidfd);
        if let Some(at) = self.scheduled.remove(&serial) {
            self.timers.remove(&(at, serial));
        }
        if run.answered {
            self.gone.push_back(Remains::of(run));
            return;
        }
        let Some(id) = run.id() else {
            self.on_loss_ahead(serial, &run);
            self.free(Remains::of(run));
            return;
        };
        let quarantined = run.phase == Phase::Quarantined;
        let answer = answer(&run, Instant::now());
        let freed = self.free(Remains { run: Some(id), ..Remains::of(run) });
        if quarantined {
            if freed {
                self.tell(&FromLauncher::Released { run: id });
            }
        } else if let Some(mut answer) = answer {
            if let FromLauncher::Ended { end, .. } = &mut answer {
                end.quarantined = !freed;
            }
            self.tell(&answer);
        }
    }

    /// Gives back what a run had. False where its cgroup is of no more use and can't be
    /// removed yet: then that and its uids wait in quarantine.
    pub(super) fn free(&mut self, remains: Remains) -> bool {
        if let Some(place) = remains.place {
            self.give_back_place(place);
        }
        match remains.cgroup.map(|cgroup| self.cgroups.give_back(cgroup)) {
            None | Some(Ok(())) => {
                // A socket that is left may hold what else is left.
                let network = remains.network;
                let clean = network.is_some_and(|network| self.networks.give_back(network));
                self.give_back(remains.ids, remains.user_namespace.filter(|_| clean));
                if let Some(root) = remains.root.filter(|_| clean) {
                    self.roots.give_back(root);
                }
                true
            }
            Some(Err(cgroup)) => {
                // Whatever is left in the cgroup may be in the network as well.
                self.quarantine(Leftover { cgroup, ids: remains.ids, run: remains.run });
                false
            }
        }
    }

    pub(super) fn quarantine(&mut self, leftover: Leftover) {
        self.leftovers.push(leftover);
        self.leftovers_due.get_or_insert(Instant::now() + QUARANTINE_RETRY);
    }

    fn give_back(&mut self, ids: Option<HostIds>, namespace: Option<OwnedFd>) {
        if let Some(ids) = ids {
            self.ids.give_back(ids, namespace);
        }
    }

    fn retry_leftovers(&mut self, now: Instant) {
        for leftover in std::mem::take(&mut self.leftovers) {
            match leftover.cgroup.remove() {
                Ok(()) => {
                    self.give_back(leftover.ids, None);
                    if let Some(run) = leftover.run {
                        log(&format!("what was left of run {run} is gone"));
                        self.tell(&FromLauncher::Released { run });
                    }
                }
                Err(cgroup) => self.leftovers.push(Leftover { cgroup, ..leftover }),
            }
        }
        self.places.clear_away();
        let left = self.places.has_left() || !self.leftovers.is_empty();
        self.leftovers_due = left.then(|| now + QUARANTINE_RETRY);
    }
}

/// How a run went, in the words of the protocol; nothing of one without a call.
fn answer(run: &Run, now: Instant) -> Option<FromLauncher> {
    let id = run.id()?;
    Some(match run.refusal() {
        Some(refusal) => FromLauncher::Refused { run: id, refusal },
        None => FromLauncher::Ended { run: id, end: Box::new(run.outcome(now)) },
    })
}

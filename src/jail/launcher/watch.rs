//! Watching runs: what they report, when they are due, how they are freed.

use std::{os::fd::OwnedFd, time::Instant};

use rustix::event::epoll::{self, EventFlags};

use super::{Launcher, Leftover, QUARANTINE_RETRY, Source, log, reap};
use crate::jail::{
    identity::HostIds,
    message::FromLauncher,
    run::{Change, Heard, Phase, Run},
    step::{Report, Step, StepError},
};

impl Launcher {
    pub(super) fn register(&mut self, run: Run) {
        let serial = self.next_serial;
        self.next_serial += 1;
        let watched = self
            .watch(&run.control, Source::Control(serial), EventFlags::IN)
            .and_then(|()| self.watch(&run.pidfd, Source::Init(serial), EventFlags::IN))
            .and_then(|()| match run.joined() {
                // It ended before it could be told; what it said last tells why.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
                told => told,
            });
        self.serials.insert(run.id, serial);
        self.runs.insert(serial, run);
        if let Err(error) = watched {
            log(&format!("a run can't be watched: {error}"));
            let now = Instant::now();
            self.with_run(serial, |run| run.unheard(Step::Handshake, &error, now));
        }
        self.reschedule(serial);
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

    pub(super) fn on_control(&mut self, serial: u64) {
        loop {
            let Some(run) = self.runs.get_mut(&serial) else { return };
            match run.listen() {
                Ok(Heard::Report(report, fd)) => self.on_report(serial, report, fd),
                Ok(Heard::Nothing) => return,
                Ok(Heard::Closed) => {
                    // It stays readable until init is reaped. ENOENT: that is
                    // what we are here for, and it was heard before.
                    epoll::delete(&self.epoll, &run.control).ok();
                    run.closed(Instant::now());
                    return self.reschedule(serial);
                }
                Err(error) => {
                    log(&format!("run {}: its control socket: {error}", run.id));
                    epoll::delete(&self.epoll, &run.control).ok();
                    run.unheard(Step::Handshake, &error, Instant::now());
                    return self.reschedule(serial);
                }
            }
        }
    }

    pub(super) fn on_report(&mut self, serial: u64, report: Report, fd: Option<OwnedFd>) {
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
        let change = run.on_report(report, fd, now);
        let id = run.id;
        match change {
            Change::None => {}
            Change::Started { setup } => {
                let at = std::time::SystemTime::now();
                self.tell(&FromLauncher::Started { run: id, at, setup });
            }
            Change::Listener => {
                let flags = EventFlags::IN | EventFlags::ONESHOT;
                if let Some(run) = self.runs.get(&serial)
                    && let Some(listener) = run.listener()
                    && let Err(error) = self.watch(listener, Source::Listener(serial), flags)
                {
                    log(&format!("run {id}: its listener can't be watched: {error}"));
                    self.with_run(serial, |run| run.unheard(Step::Listener, &error, now));
                }
            }
        }
        self.reschedule(serial);
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
            if run.on_time(now) {
                log(&format!("run {} would not end: its uid and cgroup are kept aside", run.id));
                if let Some(run) = self.runs.get(&serial) {
                    let answer = answer(run, now);
                    self.tell(&answer);
                }
            }
            self.reschedule(serial);
            self.rearm_listener(serial);
        }
        if self.leftovers_due.is_some_and(|due| due <= now) {
            self.retry_leftovers(now);
        }
    }

    /// Init is dead, and with it everything in its pid namespace. The answer
    /// comes last: when the caller has it, nothing of the run is left.
    pub(super) fn on_init_gone(&mut self, serial: u64) {
        self.on_control(serial); // what it said last
        let Some(run) = self.runs.remove(&serial) else { return };
        reap(&run.pidfd);
        self.serials.remove(&run.id);
        if let Some(at) = self.scheduled.remove(&serial) {
            self.timers.remove(&(at, serial));
        }
        let answered = run.phase == Phase::Quarantined;
        let id = run.id;
        let mut answer = answer(&run, Instant::now());
        let freed = self.free(run);
        if answered {
            if freed {
                self.tell(&FromLauncher::Released { run: id });
            }
            return;
        }
        if let FromLauncher::Ended { end, .. } = &mut answer {
            end.quarantined = !freed;
        }
        self.tell(&answer);
    }

    /// Gives back what a run had. False where its cgroup can't be removed yet:
    /// then that and its uids wait in quarantine.
    fn free(&mut self, mut run: Run) -> bool {
        run.listener = None;
        let Some(cgroup) = run.cgroup.take() else { return true };
        match cgroup.remove() {
            Ok(()) => {
                self.give_back(run.ids);
                true
            }
            Err(cgroup) => {
                self.leftovers.push(Leftover { cgroup, ids: run.ids.take(), run: run.id });
                self.leftovers_due.get_or_insert(Instant::now() + QUARANTINE_RETRY);
                false
            }
        }
    }

    fn give_back(&mut self, ids: Option<HostIds>) {
        if let Some(ids) = ids {
            self.ids.give_back(ids);
        }
    }

    fn retry_leftovers(&mut self, now: Instant) {
        for leftover in std::mem::take(&mut self.leftovers) {
            match leftover.cgroup.remove() {
                Ok(()) => {
                    log(&format!("what was left of run {} is gone", leftover.run));
                    self.give_back(leftover.ids);
                    self.tell(&FromLauncher::Released { run: leftover.run });
                }
                Err(cgroup) => self.leftovers.push(Leftover { cgroup, ..leftover }),
            }
        }
        self.leftovers_due = (!self.leftovers.is_empty()).then(|| now + QUARANTINE_RETRY);
    }
}

/// How a run went, in the words of the protocol.
fn answer(run: &Run, now: Instant) -> FromLauncher {
    match run.refusal() {
        Some(refusal) => FromLauncher::Refused { run: run.id, refusal },
        None => FromLauncher::Ended { run: run.id, end: Box::new(run.outcome(now)) },
    }
}

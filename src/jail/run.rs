//! One jail under supervision: from the clone to the last of it gone.
//!
//! ```text
//!              Ready      a call: Start           ended, stopped or failed
//!   Building ───────► Waiting ─────────► Running ─────────────────────────► Ending ──► (finished)
//!      │                 └──────────────────────────────────────────────────► │ teardown hung
//!      └────────────────────────────────────────────────────────────────────► ▼
//!                                                                        Quarantined
//! ```
//!
//! It gets its call ([`Run::assign`]) while it is built, or waits for one: how it is
//! built doesn't depend on that. The run itself does no I/O towards the server: it
//! changes state and says what happened; `launcher` sends it. `notices` answers
//! forbidden system calls, `clocks` looks at the time, `service` is what a run that listens
//! has more, `end` puts how it went into the words of the protocol.

mod clocks;
mod end;
mod notices;
mod service;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::{Duration, Instant},
};

use super::{
    cgroup::Cgroup,
    decide::Prepared,
    empty_root::EmptyRoot,
    identity::{self, HostIds, IdMap},
    message::{Launch, LaunchFds, ServiceSocket, StopCause, WaitStatus},
    network::EmptyNetwork,
    plan::{Control, Template},
    seccomp::notify::Listener,
    service::Service,
    step::{REPORT_LEN, Report, Start, Step, StepError, word},
};
use crate::{names::RunId, sys};

pub use clocks::cpu_limit;
pub use end::refusal;

/// How long a killed run may take to be gone before it is put in quarantine.
const TEARDOWN_GRACE: Duration = Duration::from_secs(2);
/// How long a run may take to be built: nothing of the tenant's runs yet.
const BUILD_GRACE: Duration = Duration::from_secs(10);
/// How long a program that was just started is not listened to.
const HEED_PAUSE: Duration = Duration::from_millis(2);
/// What the launcher has open for a run at most: init's pidfd, the control socket,
/// the listener, its user namespace, and what it is lent; and, until the program is
/// started, what the launch brought.
const OPEN: usize = 4 + Cgroup::DESCRIPTORS + EmptyNetwork::DESCRIPTORS + EmptyRoot::DESCRIPTORS;
const BROUGHT: usize = 5;

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Init builds; the program has not been started.
    Building,
    /// All is built; there is no call for it yet.
    Waiting,
    /// The program was started.
    Running,
    /// It ended, was stopped or failed; what is left is going.
    Ending,
    /// Something of it would not go in time.
    Quarantined,
}

/// One run.
#[derive(Debug)]
pub struct Run {
    /// Which it is, to the launcher and its init.
    pub serial: u64,
    /// Where it stands.
    pub phase: Phase,
    /// Its host ids; given back when it is gone.
    pub ids: Option<HostIds>,
    /// Its cgroup.
    pub cgroup: Option<Cgroup>,
    /// The network namespace that it has for its time.
    pub network: Option<EmptyNetwork>,
    /// The empty root likewise.
    pub root: Option<EmptyRoot>,
    /// The user namespace likewise.
    pub user_namespace: Option<OwnedFd>,
    /// Its sockets, where it listens.
    pub service: Option<Service>,
    /// Init; readable when it is dead, and with it all of the pid namespace.
    pub pidfd: OwnedFd,
    /// To init and, until exec, the program.
    pub control: OwnedFd,
    /// The seccomp listener. Held until the run is empty: were it closed, a
    /// pending call would be answered ENOSYS and the program would go on.
    pub listener: Option<Listener>,
    /// The server has been told how it went.
    pub answered: bool,
    /// Whether all is in place but exec itself.
    filtered: bool,
    /// The program ended by itself and init is the last of the pid namespace.
    alone: bool,
    name: String,
    pid: i32,
    prepared: Rc<Prepared>,
    namespaces: Vec<OwnedFd>,
    map: IdMap,
    enforced: Vec<Control>,
    call: Option<Call>,
    fds: Option<LaunchFds>,
    started: Option<Instant>,
    ended: Option<Instant>,
    wall_deadline: Option<Instant>,
    cpu_check: Option<Instant>,
    grace_deadline: Option<Instant>,
    notices_resume: Option<Instant>,
    /// When its control socket is listened to again.
    heed_at: Option<Instant>,
    notices: u32,
    /// Connections that are asked for and can't be had yet.
    wanted: Vec<ServiceSocket>,
    stopped: Option<StopCause>,
    status: WaitStatus,
    failure: Option<StepError>,
    denied: Option<String>,
    refused: Vec<String>,
}

/// What a run is made of, once init has been cloned.
#[derive(Debug)]
pub struct Parts {
    /// See [`Run`].
    pub serial: u64,
    /// Its name in logs and of its host; of its cgroups as well where they are new.
    pub name: String,
    /// See [`Run`].
    pub ids: Option<HostIds>,
    /// See [`Run`].
    pub cgroup: Cgroup,
    /// See [`Run`].
    pub network: Option<EmptyNetwork>,
    /// See [`Run`].
    pub root: Option<EmptyRoot>,
    /// See [`Run`].
    pub user_namespace: Option<OwnedFd>,
    /// See [`Run`].
    pub service: Option<Service>,
    /// Init.
    pub pid: i32,
    /// See [`Run`].
    pub pidfd: OwnedFd,
    /// See [`Run`].
    pub control: OwnedFd,
    /// The template, prepared.
    pub prepared: Rc<Prepared>,
    /// For idmapped binds.
    pub namespaces: Vec<OwnedFd>,
    /// How ids map.
    pub map: IdMap,
    /// Controls that will be in force, but for the cgroup's and the clocks'.
    pub enforced: Vec<Control>,
}

/// What a run is for.
#[derive(Debug)]
pub struct Call {
    /// What was asked.
    pub launch: Launch,
    /// From `check`.
    pub call_len: u32,
    /// How many processors' worth of time the run can use at most per second.
    pub cores: f64,
    /// When the launch was received.
    pub received: Instant,
}

/// What is heard on a run's control socket.
#[derive(Debug)]
pub enum Heard {
    /// A report, with what came along.
    Report(Report, Vec<OwnedFd>),
    /// Nothing for now.
    Nothing,
    /// Nothing any more: init is dead, and the program has no part of it.
    Closed,
}

/// What a report changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing that others need to know.
    None,
    /// The program was started.
    Started {
        /// From the launch's arrival to now.
        setup: Duration,
    },
    /// A listener came: watch it.
    Listener,
}

impl Run {
    /// A run whose init has just been cloned and waits.
    #[must_use]
    pub fn new(parts: Parts, now: Instant) -> Self {
        Self {
            serial: parts.serial,
            phase: Phase::Building,
            ids: parts.ids,
            cgroup: Some(parts.cgroup),
            network: parts.network,
            root: parts.root,
            user_namespace: parts.user_namespace,
            service: parts.service,
            pidfd: parts.pidfd,
            control: parts.control,
            listener: None,
            answered: false,
            filtered: false,
            alone: false,
            name: parts.name,
            pid: parts.pid,
            prepared: parts.prepared,
            namespaces: parts.namespaces,
            map: parts.map,
            enforced: parts.enforced,
            call: None,
            fds: None,
            started: None,
            ended: None,
            wall_deadline: None,
            cpu_check: None,
            grace_deadline: Some(now + BUILD_GRACE),
            notices_resume: None,
            heed_at: None,
            notices: 0,
            wanted: Vec::new(),
            stopped: None,
            status: WaitStatus::Unknown,
            failure: None,
            denied: None,
            refused: Vec::new(),
        }
    }

    /// Its call's id; `None` before it has one.
    #[must_use]
    pub fn id(&self) -> Option<RunId> {
        self.call.as_ref().map(|call| call.launch.run)
    }

    /// What was asked of it.
    #[must_use]
    pub fn launch(&self) -> Option<&Launch> {
        self.call.as_ref().map(|call| &call.launch)
    }

    /// Its name in the log.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The template that it was built by.
    #[must_use]
    pub fn prepared(&self) -> &Rc<Prepared> {
        &self.prepared
    }

    /// How many descriptors a jail without binds has while it waits.
    pub const DESCRIPTORS_WAITING: usize = OPEN + BROUGHT;

    /// How many descriptors the launcher must have for a run of this template,
    /// while it is built.
    #[must_use]
    pub fn descriptors_needed(template: &Template) -> usize {
        let service = if template.listens { Service::DESCRIPTORS } else { 0 };
        OPEN + BROUGHT + service + template.filesystem.binds.len()
    }

    /// How many descriptors this one takes, or comes to take.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        // A call may still come, with what it brings.
        let brought = if self.started.is_none() { BROUGHT } else { 0 };
        let service = if self.service.is_some() { Service::DESCRIPTORS } else { 0 };
        OPEN + brought + service + self.namespaces.len()
    }

    /// Gives it its call; `enforced` is the cgroup's and the clocks' share of the
    /// controls. It starts now, or as soon as it is built.
    ///
    /// # Errors
    /// What was given, where the jail died while it waited.
    pub fn assign(
        &mut self,
        call: Call,
        fds: LaunchFds,
        enforced: &[Control],
        now: Instant,
    ) -> Result<Change, Box<(Call, LaunchFds)>> {
        let change = match self.phase {
            Phase::Running | Phase::Ending | Phase::Quarantined => {
                return Err(Box::new((call, fds)));
            }
            Phase::Waiting => match self.start(&call, &fds, now) {
                Ok(change) => change,
                Err(_) => return Err(Box::new((call, fds))),
            },
            Phase::Building => {
                self.fds = Some(fds);
                Change::None
            }
        };
        self.call = Some(call);
        self.enforced.extend_from_slice(enforced);
        Ok(change)
    }

    /// Listens for what init or the program says.
    ///
    /// # Errors
    /// Those of recvmsg(2); EPROTO for what is no report, EMSGSIZE where a
    /// listener came that there was no descriptor left for. Tell [`Run::unheard`].
    pub fn listen(&self) -> io::Result<Heard> {
        let mut bytes = [0; REPORT_LEN];
        let received = match sys::receive_packet(&self.control, &mut bytes) {
            // The other side died without having read all of ours: told once,
            // before what it had said, unix(7).
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                sys::receive_packet(&self.control, &mut bytes)
            }
            received => received,
        };
        match received {
            Ok(Some((length, fds))) => match Report::decode(&bytes[..length]) {
                Some(report) => Ok(Heard::Report(report, fds)),
                None => Err(io::Error::from_raw_os_error(libc::EPROTO)),
            },
            Ok(None) => Ok(Heard::Closed),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Heard::Nothing),
            Err(error) => Err(error),
        }
    }

    /// The control socket is at its end. After a report of the end that is as it
    /// should be; before one, init was killed, and the rest of the run goes with it.
    pub fn closed(&mut self, now: Instant) {
        if self.is_alive() {
            self.kill();
            self.end(now);
        }
    }

    /// Something said on the control socket or by the listener was lost: what
    /// can't be followed any more is ended.
    pub fn unheard(&mut self, step: Step, error: &io::Error, now: Instant) {
        self.fail(step_error(step, error), now);
    }

    /// Acts on a report.
    pub fn on_report(&mut self, report: Report, fd: Option<OwnedFd>, now: Instant) -> Change {
        match report {
            // A run that was stopped meanwhile is not built any further.
            Report::NeedsMaps if self.phase == Phase::Building => self.write_maps(now),
            Report::Ready if self.phase == Phase::Building => return self.built(now),
            Report::NeedsMaps | Report::Ready => {}
            Report::Filtered => return self.filtered(fd, now),
            // Only our own code leaves by exit(2) before its filter is in place:
            // that is no status of the program's, even where the reason was lost.
            Report::Exited { .. } if !self.filtered => {
                let error = io::Error::from_raw_os_error(libc::EPROTO);
                self.fail(step_error(Step::Handshake, &error), now);
            }
            Report::Exited { code, alone } => {
                self.program_ended(WaitStatus::Exited(code), alone, now);
            }
            Report::Signalled { signal, alone } => {
                self.program_ended(WaitStatus::Signalled(signal), alone, now);
            }
            Report::Failed(error) => self.fail(error, now),
            Report::Denied => self.deny(String::new(), now),
        }
        Change::None
    }

    fn filtered(&mut self, fd: Option<OwnedFd>, now: Instant) -> Change {
        self.filtered = true;
        match fd.map(Listener::new).transpose() {
            Ok(listener) => {
                self.listener = listener;
                Change::Listener
            }
            Err(error) => {
                self.fail(step_error(Step::Listener, &error), now);
                Change::None
            }
        }
    }

    fn write_maps(&mut self, now: Instant) {
        let written = identity::write_maps(self.pid, self.map)
            .and_then(|()| sys::send_packet(&self.control, &[word::MAPPED], &[]));
        if let Err(error) = written {
            self.fail(self.told_or(step_error(Step::Maps, &error)), now);
        }
    }

    /// What init said of a failure of its own, if it did: then it is gone, and whatever failed
    /// here for that says less.
    fn told_or(&self, error: StepError) -> StepError {
        while let Ok(Heard::Report(report, _)) = self.listen() {
            if let Report::Failed(own) = report {
                return own;
            }
        }
        error
    }

    fn built(&mut self, now: Instant) -> Change {
        // From here to the program's start nothing of it does anything but wait.
        if let Some(cgroup) = &mut self.cgroup
            && let Err(error) = cgroup.start_measuring()
        {
            self.fail(step_error(Step::Start, &error), now);
            return Change::None;
        }
        self.namespaces.clear();
        self.grace_deadline = None;
        self.phase = Phase::Waiting;
        let (Some(call), Some(fds)) = (self.call.take(), self.fds.take()) else {
            return Change::None;
        };
        let started = self.start(&call, &fds, now);
        self.call = Some(call);
        started.unwrap_or_else(|error| {
            self.fail(self.told_or(step_error(Step::Start, &error)), now);
            Change::None
        })
    }

    /// Hands the program what its call brings. Nothing has changed where that fails.
    fn start(&mut self, call: &Call, fds: &LaunchFds, now: Instant) -> io::Result<Change> {
        let start = Start {
            argc: call.launch.argc,
            envc: call.launch.envc,
            call_len: call.call_len,
            copy_len: self.prepared.copy_len(&call.launch),
        };
        let brought = [&fds.executable, &fds.stdin, &fds.stdout, &fds.stderr, &fds.call];
        let mut descriptors = [fds.call.as_fd(); BROUGHT + 1];
        descriptors[..BROUGHT].copy_from_slice(&brought.map(AsFd::as_fd));
        let mut count = BROUGHT;
        let listening = self.service.as_ref().and_then(|service| service.listening.as_ref());
        if let Some(listening) = listening {
            descriptors[BROUGHT] = listening.socket.as_fd();
            count += 1;
        }
        sys::send_packet(&self.control, &start.encode(), &descriptors[..count])?;
        if let Some(service) = &mut self.service {
            service.hand_over();
        }
        self.wall_deadline = call.launch.timeout.and_then(|timeout| now.checked_add(timeout));
        self.cpu_check = self.first_cpu_check(call, now);
        self.phase = Phase::Running;
        self.started = Some(now);
        self.heed_at = Some(now + HEED_PAUSE);
        Ok(Change::Started { setup: now - call.received })
    }

    fn program_ended(&mut self, status: WaitStatus, alone: bool, now: Instant) {
        self.status = status;
        // Init exits now, and the kernel kills what is left before it is done.
        if self.is_alive() {
            self.alone = alone;
            self.end(now);
            if alone {
                self.grace_deadline = None; // init waits to be dismissed
            }
        }
    }

    /// Lets the init of a run that [`Run::is_over`] go.
    pub fn dismiss(&mut self, now: Instant) {
        self.grace_deadline = Some(now + TEARDOWN_GRACE);
        self.kill_init();
    }

    /// Whether nothing of the program's is left, though init is not gone yet: it
    /// ended by itself, and init, who saw it, has nobody left to wait for.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.alone && self.phase == Phase::Ending
    }

    /// Whether it may still be given a call.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.call.is_none() && matches!(self.phase, Phase::Building | Phase::Waiting)
    }

    /// What goes wrong once a run was stopped or has ended is no failure of its:
    /// it is being killed.
    fn fail(&mut self, error: StepError, now: Instant) {
        if self.is_alive() {
            self.failure = Some(error);
            self.kill();
            self.end(now);
        }
    }

    fn end(&mut self, now: Instant) {
        self.phase = Phase::Ending;
        self.ended = Some(now);
        self.wall_deadline = None;
        self.cpu_check = None;
        self.heed_at = None;
        self.grace_deadline = Some(now + TEARDOWN_GRACE);
    }

    /// Not stopped, failed or ended yet.
    fn is_alive(&self) -> bool {
        matches!(self.phase, Phase::Building | Phase::Waiting | Phase::Running)
    }

    /// Ends the run for this cause, unless it has ended already: a program
    /// that ended by itself keeps its status, and the first cause stands.
    pub fn stop(&mut self, cause: StopCause, now: Instant) {
        if self.is_alive() {
            self.stopped = Some(cause);
            self.kill();
            self.end(now);
        }
    }

    /// Kills everything of the run. Both ways, where there are both: the pid
    /// namespace ends with init, and cgroup.kill doesn't wait for it.
    pub fn kill(&self) {
        if let Some(cgroup) = &self.cgroup {
            // False where the kernel has no cgroup.kill: then init alone must do.
            let _by_cgroup = cgroup.kill();
        }
        self.kill_init();
    }

    fn kill_init(&self) {
        // ESRCH: it is dead already, which is what we want.
        rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL).ok();
    }
}

fn step_error(step: Step, error: &io::Error) -> StepError {
    StepError { step, index: 0, errno: error.raw_os_error().unwrap_or(libc::EIO) }
}

//! `dispatch-init`: PID 1 of each run, and the process that becomes the program.
//!
//! # Theory of operation
//!
//! The launcher clones init into new namespaces. Init builds the root, enters
//! the user namespace, and begins a second process (`family`). That one gives up every
//! privilege and waits for the program's descriptors; when they come it locks
//! itself in (Landlock, seccomp) and execs. Init gives up its privileges too,
//! as another user, and from then on only reaps and reports.
//!
//! Everything here runs in a copy of the launcher made by clone3(2): until
//! exec there are **only system calls**: no allocation, lock, log, drop of
//! shared things, or panic. What they need was decided in the [`Blueprint`].
//! A step that fails is reported by number and errno, and the process exits:
//! with init the whole pid namespace goes.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::{
    event::{PollFd, PollFlags},
    process::{DumpableBehavior, Resource, Rlimit, Signal},
    thread::LinkNameSpaceType,
};

mod family;

use self::family::{Begun, Score};
use super::{
    blueprint::Blueprint,
    identity, mounts, namespaces,
    step::{Report, Step, StepError, word},
};
use crate::sys::{self, Waited};

/// Where init keeps the control socket once the run is built.
const CONTROL: RawFd = 3;
/// And the bell.
const BELL: RawFd = 4;

/// How many dead processes that the program left behind are looked at.
const LEFT_BEHIND_MAX: u32 = 1024;

/// What both processes of a run carry through their steps.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub blueprint: &'a Blueprint,
    pub control: BorrowedFd<'a>,
}

impl Context<'_> {
    /// Turns a system call's result into a step's, injecting a fault where one is set.
    pub(super) fn at<T, E: Into<io::Error>>(
        &self,
        step: Step,
        result: Result<T, E>,
    ) -> Result<T, StepError> {
        if self.blueprint.fault.hits(step) {
            return Err(StepError { step, index: 0, errno: libc::EIO });
        }
        result.map_err(|error| StepError {
            step,
            index: 0,
            errno: error.into().raw_os_error().unwrap_or(libc::EIO),
        })
    }

    /// Tells the launcher. If it is gone, so are we in a moment.
    pub(super) fn report(&self, report: Report) -> io::Result<()> {
        sys::send_packet(self.control, &report.encode(), &[])
    }

    /// Reports the failure and ends this process, and with init the run.
    pub(super) fn fail(&self, error: StepError) -> ! {
        if self.report(Report::Failed(error)).is_err() {
            // Half way through placing its descriptors, the program's process
            // has the socket at the parked number only.
            // SAFETY: nothing else ever has that number; if it is closed, sending fails.
            let control = unsafe { BorrowedFd::borrow_raw(self.blueprint.control_fd) };
            // The launcher sees the end even where it can't be told why.
            drop(Context { control, ..*self }.report(Report::Failed(error)));
        }
        sys::exit_now(1)
    }
}

/// Runs in the child of `namespaces::clone`. `control` is its end of the run's
/// control socket; `keep` are the descriptors it needs, in ascending order,
/// `control` among them.
pub fn main(blueprint: &Blueprint, control: RawFd, keep: &[RawFd]) -> ! {
    // SAFETY: the launcher made this descriptor for us and `keep` has it.
    let borrowed = unsafe { BorrowedFd::borrow_raw(control) };
    let context = Context { blueprint, control: borrowed };
    // First of all: a copy of another run's socket kept here would hide that
    // run's end of file from it.
    if let Err(error) = context.at(Step::CloseFds, close_all_but(keep)) {
        context.fail(error);
    }
    // A busy launcher's numbers are high; ours must stay below those at which
    // the program's process parks what the filter lets pass.
    let low = match context.at(Step::CloseFds, rustix::io::fcntl_dupfd_cloexec(borrowed, 3)) {
        Ok(low) => low,
        Err(error) => context.fail(error),
    };
    let context = Context { blueprint, control: low.as_fd() };
    match context.at(Step::CloseFds, sys::close(control)).and_then(|()| build(context)) {
        Ok(begun) => supervise(context, begun),
        Err(error) => context.fail(error),
    }
}

/// Closes everything but 0 and `keep`; 1 and 2 become what 0 is: /dev/null.
fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    sys::dup_to_inherited(0, 1)?;
    sys::dup_to_inherited(0, 2)?;
    let mut first = 3;
    for fd in keep {
        let fd = *fd as u32;
        if first < fd {
            sys::close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    sys::close_range(first, u32::MAX)
}

/// The numbered list. Returns the process that becomes the program.
fn build(context: Context<'_>) -> Result<Begun, StepError> {
    let blueprint = context.blueprint;
    // 1. Its name, and the signal that tells of ended children.
    context.at(Step::Attributes, rustix::thread::set_name(c"dispatch-init"))?;
    context.at(Step::Attributes, sys::block_all_signals())?;
    rustix::process::umask(rustix::fs::Mode::empty());

    // 2. Into our cgroups: whatever we use from here on is the run's.
    for cgroup in &blueprint.cgroups {
        // SAFETY: it is one of `keep`; nothing else here has or closes this number.
        let cgroup = unsafe { OwnedFd::from_raw_fd(*cgroup) };
        context.at(Step::Attach, rustix::io::write(&cgroup, b"0"))?;
    }

    // 3. The network namespace, where the launcher chose one.
    if let Some(network) = blueprint.network {
        context.at(Step::EnterNetwork, enter(network, LinkNameSpaceType::Network))?;
    }

    // 4. Without privilege, the user namespace is already there and unmapped.
    //    An undumpable process's /proc files are root's: the launcher, which is
    //    no more than our user, could not write the maps (again undumpable in 13).
    if blueprint.maps_first {
        context.at(
            Step::Attributes,
            rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable),
        )?;
        ask_for_maps(context)?;
    }

    // 5. The cgroup namespace takes the cgroup we are in for its root: after 2.
    if blueprint.root.is_some() {
        context.at(Step::CgroupNamespace, sys::unshare(rustix::thread::UnshareFlags::NEWCGROUP))?;
    }

    // 6. No executable memfd in this pid namespace, sysctl/vm.rst: writing takes
    //    CAP_SYS_ADMIN over the namespace, so before 10.
    if let Some(sysctl) = blueprint.memfd_noexec {
        // SAFETY: the launcher keeps this descriptor open; it is only borrowed.
        let sysctl = unsafe { BorrowedFd::borrow_raw(sysctl) };
        context.at(Step::MemfdNoexec, rustix::io::write(sysctl, b"2"))?;
    }

    // 7. The host's /proc, for the one thing the program will do through it;
    //    the jail's own will be read-only.
    let host_proc = context.at(Step::Attributes, open_host_proc())?;

    // 8. The root. From here on the host's files are out of reach.
    match (&blueprint.root, blueprint.empty_root) {
        (Some(root), None) => mounts::enter_new_root(root, blueprint.fault)?,
        (Some(root), Some(lent)) => mounts::enter_copy_of(lent, root, blueprint.fault)?,
        (None, _) => {}
    }

    // 9. Host name and loopback take capabilities over the namespaces they are
    //    in: before 10 where those belong to the launcher's user namespace,
    //    after it where they are made inside.
    let made_inside = blueprint.inner_namespaces.contains(rustix::thread::UnshareFlags::NEWUTS);
    if !made_inside {
        name_and_connect(context)?;
    }

    // 10. The user namespace, and what must belong to it.
    if !blueprint.inner_namespaces.is_empty() {
        context.at(Step::UserNamespace, sys::unshare(blueprint.inner_namespaces))?;
        ask_for_maps(context)?;
    }
    if let Some(namespace) = blueprint.user_namespace {
        context.at(Step::UserNamespace, enter(namespace, LinkNameSpaceType::User))?;
    }
    if made_inside {
        name_and_connect(context)?;
    }

    // 11. The Landlock ruleset, while its paths can be opened by anybody.
    let landlock = match &blueprint.landlock {
        Some(rules) => match rules.create() {
            Ok(ruleset) => Some(context.at(Step::LandlockRules, io::Result::Ok(ruleset))?),
            Err((index, error)) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                return Err(StepError { step: Step::LandlockRules, index, errno });
            }
        },
        None => None,
    };

    // 12. What can never be gained again, by either process. Then the program's: it
    //    still has what it takes to become another user.
    let kept = blueprint.keep_capabilities;
    let limited = identity::limit_capabilities(blueprint.last_capability, kept);
    context.at(Step::Capabilities, limited)?;
    let begun = context.at(Step::Fork, family::begin(context, landlock, host_proc.as_fd()))?;

    // 13. Init's own descent. Dumpable last: every change of credentials sets
    //     it anew, and a dumpable init could be opened through /proc/1/mem.
    let (uid, gid) = blueprint.init_id;
    if kept != 0 {
        let limited = identity::limit_capabilities(blueprint.last_capability, 0);
        context.at(Step::Capabilities, limited)?;
    }
    context.at(Step::Identity, identity::become_user(uid, gid, blueprint.clear_groups))?;
    context.at(Step::Capabilities, identity::drop_capabilities(blueprint.last_capability, 0))?;
    context.at(Step::Attributes, rustix::thread::set_no_new_privs(true))?;
    context.at(
        Step::Attributes,
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable),
    )?;
    // Credential changes clear it, so it comes after them; the launcher's end
    // of file on the control socket says the same once more.
    context.at(
        Step::Attributes,
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)),
    )?;
    Ok(begun)
}

/// Enters a namespace of the launcher's choice. The descriptor goes at once: nothing
/// that comes of us shall have a way back into it.
fn enter(namespace: RawFd, kind: LinkNameSpaceType) -> io::Result<()> {
    // SAFETY: it is one of `keep`; nothing else here has or closes this number.
    let namespace = unsafe { OwnedFd::from_raw_fd(namespace) };
    Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind))?)
}

fn name_and_connect(context: Context<'_>) -> Result<(), StepError> {
    if let Some(name) = &context.blueprint.host_name {
        context.at(Step::Network, rustix::system::sethostname(name.as_bytes()))?;
    }
    if context.blueprint.loopback {
        context.at(Step::Network, namespaces::bring_up_loopback())?;
    }
    Ok(())
}

fn ask_for_maps(context: Context<'_>) -> Result<(), StepError> {
    context.at(Step::Handshake, context.report(Report::NeedsMaps))?;
    expect(context, word::MAPPED)
}

/// Waits for one word of the launcher's; its end of file means the run is over.
fn expect(context: Context<'_>, expected: u8) -> Result<(), StepError> {
    let mut byte = [0];
    let read = loop {
        match rustix::io::read(context.control, &mut byte) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result,
        }
    };
    let read = context.at(Step::Handshake, read)?;
    if read == 1 && byte[0] == expected {
        Ok(())
    } else {
        Err(StepError { step: Step::Handshake, index: 0, errno: libc::EPIPE })
    }
}

fn open_host_proc() -> io::Result<OwnedFd> {
    use rustix::fs::{CWD, Mode, OFlags};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, c"/proc", flags, Mode::empty())?)
}

/// Reaps until the program ends, says how it ended, and exits: the kernel then
/// kills what is left in the pid namespace, pid_namespaces(7). Where nothing is left
/// it waits until it is dismissed.
fn supervise(context: Context<'_>, begun: Begun) -> ! {
    let Begun { program, score } = begun;
    let kept = context.at(Step::CloseFds, keep_only_control(context, score));
    let (mut score, signals) = match kept {
        Ok(kept) => kept,
        Err(error) => context.fail(error),
    };
    // SAFETY: keep_only_control put it there.
    let context = Context { control: unsafe { BorrowedFd::borrow_raw(CONTROL) }, ..context };
    let mut watch_for_kills = kills_unnamed(context.blueprint);
    let (mut running, mut paused) = (true, false);
    loop {
        let (ended, alone) = reap(context, program, &mut watch_for_kills);
        if let Some(ended) = ended {
            running = false;
            // Nothing is left that the kernel should rather take.
            score = None;
            let report = match ended {
                sys::Ended::Exited(code) => Report::Exited { code, alone },
                sys::Ended::Signalled(signal) => Report::Signalled { signal, alone },
            };
            tell(context, report);
            if !alone {
                sys::exit_now(0);
            }
            // Nobody waits for our end, which is work for the kernel: the launcher
            // says when, by closing the socket.
        }
        if let Some(score) = score.take_if(|_| running && paused)
            && let Err(error) = context.at(Step::Attributes, score.restore())
        {
            context.fail(error);
        }
        paused = score.as_ref().is_some_and(Score::is_apart);
        wait_for_news(context, &signals, &mut score);
    }
}

/// Reaps who has ended: how the program did, if it was among them, and whether nobody
/// is left.
fn reap(
    context: Context<'_>,
    program: i32,
    watch_for_kills: &mut bool,
) -> (Option<sys::Ended>, bool) {
    let mut program_ended = None;
    let mut left_behind = 0;
    loop {
        match sys::wait_any() {
            Waited::Child(pid, ended) => {
                if *watch_for_kills && ended == sys::Ended::Signalled(libc::SIGSYS) {
                    *watch_for_kills = false;
                    tell(context, Report::Denied);
                }
                // What the program left dead and unreaped became ours with its end.
                if pid == program {
                    program_ended = Some(ended);
                } else if program_ended.is_some() {
                    left_behind += 1;
                }
                if left_behind == LEFT_BEHIND_MAX {
                    return (program_ended, false);
                }
            }
            Waited::Nobody => return (program_ended, false),
            // All of the pid namespace descends from us: nobody is left in it.
            Waited::Childless => return (program_ended, true),
        }
    }
}

/// Waits for ended children, for the program's exec, and for the launcher's end, which
/// is ours; after exec no longer than a pause.
fn wait_for_news(context: Context<'_>, signals: &OwnedFd, score: &mut Option<Score>) {
    let exec = score.as_ref().and_then(Score::exec);
    let mut fds = [
        PollFd::from_borrowed_fd(context.control, PollFlags::empty()),
        PollFd::new(signals, PollFlags::IN),
        // The first one once more, where there is no exec to hear of.
        PollFd::from_borrowed_fd(exec.unwrap_or(context.control), PollFlags::empty()),
    ];
    let pause = score.as_ref().and_then(Score::pause);
    match rustix::event::poll(&mut fds, pause.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(_) => sys::exit_now(1),
    }
    // The launcher closed or died: so must everything here.
    if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
        sys::exit_now(1);
    }
    if fds[2].revents().contains(PollFlags::HUP) {
        *score = score.take().map(Score::apart);
    }
    sys::drain_signal_fd(signals.as_fd());
}

/// What init needs from here on: the control socket, the bell, its score and news of its
/// children.
fn keep_only_control(
    context: Context<'_>,
    score: Option<Score>,
) -> io::Result<(Option<Score>, OwnedFd)> {
    use std::os::fd::AsRawFd as _;
    let bell = context.blueprint.bell;
    let score = score.map(Score::moved_away).transpose()?;
    // It may have the number that the socket is to have; never the other way round.
    if bell != BELL {
        sys::dup_to(bell, BELL)?;
    }
    if context.control.as_raw_fd() != CONTROL {
        sys::dup_to(context.control.as_raw_fd(), CONTROL)?;
    }
    let score = score.map(|score| score.moved_to(BELL + 1)).transpose()?;
    let kept = if score.is_some() { Score::DESCRIPTORS } else { 0 };
    sys::close_range(BELL as u32 + 1 + kept, u32::MAX)?;
    Ok((score, sys::child_signal_fd()?))
}

/// Reports, and rings: the launcher doesn't listen to the socket of a program that
/// was just started.
fn tell(context: Context<'_>, report: Report) {
    // If they can't be delivered the launcher is gone.
    drop(context.report(report));
    // SAFETY: keep_only_control put it there.
    let bell = unsafe { BorrowedFd::borrow_raw(BELL) };
    rustix::io::write(bell, &context.blueprint.serial.to_ne_bytes()).ok();
}

/// Whether the filter kills on the spot, so that a death by SIGSYS is all there is
/// to see of a deadly call.
fn kills_unnamed(blueprint: &Blueprint) -> bool {
    blueprint.filter.as_ref().is_some_and(|filter| !filter.notify)
}

/// Sets one resource limit, soft and hard.
pub(super) fn limit(resource: Resource, value: u64) -> rustix::io::Result<()> {
    rustix::process::setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })
}

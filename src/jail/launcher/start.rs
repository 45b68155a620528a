//! Starting a run: everything that is refused is refused before anything is made.
//!
//! A call gets a jail that was built ahead (`ahead`), where there is one that
//! will do, and else one that is built for it, the same way.

use std::{
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::Instant,
};

use super::{Launcher, build::BuiltFor};
use crate::jail::{
    cgroup::{Cgroup, CgroupError, CgroupLimits, Hierarchy, Lack},
    check::{self, Checked},
    decide::Script,
    message::{FromLauncher, Launch, LaunchFds, Refusal, StopCause},
    plan::{Control, Mode, Template},
    run::{self, Call, Change, Run},
    step::{Step, StepError},
};

/// Why a jail didn't take a call.
enum Unassigned {
    /// The call can't be had here.
    Refused(Refusal),
    /// The jail died while it waited. The call is as it was.
    Gone(Box<(Call, LaunchFds)>),
}

impl Launcher {
    /// Starts a run. What can be refused is refused before anything is made.
    pub(super) fn launch(&mut self, launch: Launch, fds: Vec<OwnedFd>) -> Result<(), Refusal> {
        let received = Instant::now();
        if self.ending.is_some() {
            return Err(Refusal::Ending);
        }
        let invalid = |what: &str| Refusal::Invalid { what: what.into() };
        if self.serials.contains_key(&launch.run) {
            return Err(invalid("the run id is in use"));
        }
        let set = self
            .sets
            .iter()
            .find(|set| set.digest == launch.policy_set)
            .ok_or(Refusal::StalePolicy)?;
        let prepared = Rc::clone(
            set.templates.get(&launch.template).ok_or_else(|| invalid("no such template"))?,
        );
        let mut fds =
            LaunchFds::of(fds).ok_or_else(|| invalid("a launch takes five descriptors"))?;
        let checked = check::check(&launch, &fds, &prepared.template, &[Mode::Direct, Mode::Jail])
            .map_err(|what| Refusal::Invalid { what })?;
        let cores = cores(&checked, self.facts.processors);
        let mut call = Call { launch, call_len: checked.call_len, cores, received };

        while let Some(serial) = self.take_ahead(&prepared, &call.launch) {
            match self.assign(serial, call, fds, &checked) {
                Ok(()) => return Ok(()),
                Err(Unassigned::Refused(refusal)) => return Err(refusal),
                Err(Unassigned::Gone(back)) => (call, fds) = *back,
            }
        }
        let script = script(&call.launch, &fds);
        let serial = self.build(&prepared, call.launch.mode, BuiltFor::Call(script))?;
        match self.assign(serial, call, fds, &checked) {
            Ok(()) => Ok(()),
            Err(Unassigned::Refused(refusal)) => Err(refusal),
            Err(Unassigned::Gone(_)) => {
                let errno = libc::ECHILD;
                Err(run::refusal(StepError { step: Step::Start, index: 0, errno }))
            }
        }
    }

    /// Gives a jail its call, with the limits that hold for it.
    fn assign(
        &mut self,
        serial: u64,
        call: Call,
        fds: LaunchFds,
        checked: &Checked,
    ) -> Result<(), Unassigned> {
        let id = call.launch.run;
        let Some(run) = self.runs.get_mut(&serial) else {
            return Err(Unassigned::Gone(Box::new((call, fds))));
        };
        let result = match tighten(run, &self.hierarchy, &call, checked) {
            Ok(controls) => {
                run.assign(call, fds, &controls, Instant::now()).map_err(Unassigned::Gone)
            }
            Err(refusal) => Err(Unassigned::Refused(refusal)),
        };
        match result {
            Ok(change) => {
                self.serials.insert(id, serial);
                if let Some(launch) = run.launch() {
                    self.ahead.count_running(run, launch, true);
                }
                self.on_change(serial, change);
                Ok(())
            }
            Err(why) => {
                run.stop(StopCause::Cancelled, Instant::now());
                self.reschedule(serial);
                Err(why)
            }
        }
    }

    /// The program was started, or its listener came.
    pub(super) fn on_change(&mut self, serial: u64, change: Change) {
        match change {
            Change::None => {}
            Change::Started { setup } => {
                self.heed(serial, self.runs.get(&serial).is_some_and(Run::has_wanted));
                let at = std::time::SystemTime::now();
                if let Some(run) = self.runs.get(&serial).and_then(Run::id) {
                    self.tell_soon(&FromLauncher::Started { run, at, setup });
                }
            }
            Change::Listener => self.watch_listener(serial),
        }
        self.reschedule(serial);
    }
}

/// Sets what the call wants less of than its template gives. The cgroup's and the
/// clocks' share of the controls, or the refusal for one that is demanded and not there.
fn tighten(
    run: &mut Run,
    hierarchy: &Hierarchy,
    call: &Call,
    checked: &Checked,
) -> Result<Vec<Control>, Refusal> {
    let prepared = Rc::clone(run.prepared());
    let template = &prepared.template;
    let Some(cgroup) = &mut run.cgroup else { return Ok(Vec::new()) };
    let tighter = call.launch.memory.is_some() || call.launch.cpus.is_some();
    if tighter || !cgroup.holds() {
        hierarchy
            .limit(cgroup, &limits(template, Some(checked)), &template.best_effort)
            .map_err(cgroup_refusal)?;
    }
    let mut controls =
        cgroup_controls(cgroup, template).map_err(|control| lacking(hierarchy, control))?;
    controls.extend(checked.timeout.map(|_| Control::Timeout));
    Ok(controls)
}

/// The template's limits, or those that hold for a call.
pub(super) fn limits(template: &Template, checked: Option<&Checked>) -> CgroupLimits {
    let limits = &template.limits;
    CgroupLimits {
        memory: checked.map_or(limits.memory, |checked| checked.memory),
        swap: limits.swap,
        cpus: checked.map_or(limits.cpus, |checked| checked.cpus),
        pids: limits.pids,
    }
}

/// How many processors' worth of time a run can use per second.
fn cores(checked: &Checked, processors: u32) -> f64 {
    let processors = f64::from(processors);
    checked.cpus.finite().map_or(processors, |cpus| cpus.as_f64().min(processors))
}

fn script<'a>(launch: &'a Launch, fds: &'a LaunchFds) -> Option<Script<'a>> {
    launch.interpreter.as_deref().map(|interpreter| Script {
        interpreter,
        executable: fds.executable.as_fd(),
        size: launch.executable_size,
    })
}

/// The refusal for a control that this host's cgroups can't give.
pub(super) fn lacking(hierarchy: &Hierarchy, control: Control) -> Refusal {
    match hierarchy.available().lacking(control) {
        Some(lack) => Refusal::lacking(lack),
        None => {
            let why = "the run's cgroup doesn't have it".to_owned();
            Refusal::ControlUnavailable { control, why }
        }
    }
}

/// What of the limits the cgroup holds or counts, or the first control that is
/// demanded and not there.
pub(super) fn cgroup_controls(
    cgroup: &Cgroup,
    template: &Template,
) -> Result<Vec<Control>, Control> {
    let timed = run::cpu_limit(template).is_some();
    for (control, wanted) in [(Control::CgroupKill, true), (Control::CpuTime, timed)] {
        let there = cgroup.enforced().contains(&control);
        if wanted && !there && !template.best_effort.contains(&control) {
            return Err(control);
        }
    }
    let mut controls = cgroup.enforced().to_vec();
    controls.retain(|control| *control != Control::CpuTime || timed);
    Ok(controls)
}

pub(super) fn cgroup_refusal(error: CgroupError) -> Refusal {
    match error {
        CgroupError::Lacking { control, why, mend } => {
            Refusal::lacking(&Lack { control, why, mend })
        }
        CgroupError::Io { what, path, source } => Refusal::Step {
            step: format!("{} ({what} {})", Step::Cgroup, path.display()),
            index: 0,
            errno: source.raw_os_error().unwrap_or(libc::EIO),
        },
        other => Refusal::Invalid { what: other.to_string() },
    }
}

//! Starting a run: everything that is refused is refused before anything is made.
//!
//! A call gets a jail that was built ahead (`ahead`), where there is one that
//! will do, and else one that is built for it, the same way.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    rc::Rc,
    time::Instant,
};

use super::{LEFTOVER_DESCRIPTORS, Launcher, OWN_DESCRIPTORS, log};
use crate::{
    jail::{
        cgroup::{Cgroup, CgroupError, CgroupLimits, Hierarchy, Lack},
        check::{self, Checked},
        decide::{Decided, Lent, Prepared, Purpose, Script},
        identity::HostIds,
        init,
        message::{Exhausted, FromLauncher, Launch, LaunchFds, Refusal, StopCause},
        namespaces::{self, Cloned},
        network::EmptyNetwork,
        plan::{Control, Mode, Template},
        run::{self, Call, Change, Parts, Run},
        step::{Step, StepError},
    },
    names::RunId,
    sys,
};

/// `run-` and eight digits: the jail's host name, which isn't the host's.
const HOST_NAME_LEN: usize = 12;

/// A cloned init.
struct Init {
    pid: i32,
    pidfd: OwnedFd,
    /// Our end of its socket.
    control: OwnedFd,
}

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
        let mut fds = launch_fds(fds).ok_or_else(|| invalid("a launch takes five descriptors"))?;
        let checked = check::check(&launch, &fds, &prepared.template)
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
        let serial = self.build(&prepared, call.launch.mode, script)?;
        match self.assign(serial, call, fds, &checked) {
            Ok(()) => Ok(()),
            Err(Unassigned::Refused(refusal)) => Err(refusal),
            Err(Unassigned::Gone(_)) => {
                let errno = libc::ECHILD;
                Err(run::refusal(StepError { step: Step::Start, index: 0, errno }))
            }
        }
    }

    /// Begins to build a jail, with the template's own limits.
    pub(super) fn build(
        &mut self,
        prepared: &Rc<Prepared>,
        mode: Mode,
        script: Option<Script<'_>>,
    ) -> Result<u64, Refusal> {
        while !self.has_descriptors_for(&prepared.template) && self.let_one_go() {}
        if !self.has_descriptors_for(&prepared.template) {
            return Err(Refusal::Exhausted(Exhausted::Descriptors));
        }
        let ids = match self.facts.root {
            true => Some(self.ids.take().ok_or(Refusal::Exhausted(Exhausted::HostIds))?),
            false => None,
        };
        let made = self
            .take_network(prepared, mode)
            .and_then(|network| self.make(prepared, mode, script, ids, network));
        match made {
            Ok(run) => Ok(self.register(run)),
            Err(refusal) => {
                if let Some(ids) = ids {
                    self.ids.give_back(ids, None);
                }
                Err(refusal)
            }
        }
    }

    /// Whether a run more leaves the launcher the descriptors that it needs:
    /// without one it could neither hear of a run's end nor start another.
    pub(super) fn has_descriptors_for(&self, template: &Template) -> bool {
        let runs: usize = self.runs.values().map(Run::descriptors).sum();
        let leftovers = LEFTOVER_DESCRIPTORS * self.leftovers.len();
        let kept = EmptyNetwork::DESCRIPTORS * self.networks.kept() + self.ids.kept();
        let held = OWN_DESCRIPTORS + kept + runs + leftovers;
        u64::try_from(held + Run::descriptors_needed(template))
            .is_ok_and(|all| all <= self.facts.open_files)
    }

    fn take_network(
        &mut self,
        prepared: &Prepared,
        mode: Mode,
    ) -> Result<Option<EmptyNetwork>, Refusal> {
        if !prepared.takes_empty_network(mode, &self.facts) {
            return Ok(None);
        }
        self.inject(Step::NetworkNamespace)?;
        self.networks
            .take()
            .map(Some)
            .map_err(|error| run::refusal(step_error(Step::NetworkNamespace)(error)))
    }

    fn make(
        &mut self,
        prepared: &Rc<Prepared>,
        mode: Mode,
        script: Option<Script<'_>>,
        ids: Option<HostIds>,
        network: Option<EmptyNetwork>,
    ) -> Result<Run, Refusal> {
        let template = &prepared.template;
        // Not the call's id, which its jail may be older than; the same for nobody.
        let id = RunId::random().map_err(|error| run::refusal(step_error(Step::Clone)(error)))?;
        let name = format!("run-{id}");
        let serial = self.next_serial;
        let purpose = Purpose { mode, name: &name[..HOST_NAME_LEN], serial, script };
        self.inject(Step::Idmap)?;
        self.inject(Step::Cgroup)?;
        let cgroup = self
            .hierarchy
            .create(&name, &limits(template, None), &template.best_effort)
            .map_err(cgroup_refusal)?;
        if let Err(control) = cgroup_controls(&cgroup, template) {
            self.discard(cgroup);
            return Err(lacking(&self.hierarchy, control));
        }
        let cloned = self.clone_jail(prepared, &purpose, ids, network.as_ref(), &cgroup);
        let (decided, Init { pid, pidfd, control }, user_namespace) = match cloned {
            Ok(cloned) => cloned,
            Err(refusal) => {
                self.discard(cgroup);
                return Err(refusal);
            }
        };
        let parts = Parts {
            name,
            ids,
            cgroup,
            network,
            user_namespace,
            pid,
            pidfd,
            control,
            prepared: Rc::clone(prepared),
            namespaces: decided.namespaces,
            map: decided.map,
            enforced: decided.enforced,
        };
        Ok(Run::new(parts, Instant::now()))
    }

    /// Decides a jail and clones its init; also gives the user namespace that it was lent.
    fn clone_jail(
        &mut self,
        prepared: &Prepared,
        purpose: &Purpose<'_>,
        ids: Option<HostIds>,
        network: Option<&EmptyNetwork>,
        cgroup: &Cgroup,
    ) -> Result<(Decided, Init, Option<OwnedFd>), Refusal> {
        let ids_to_map = ids.filter(|_| prepared.takes_user_namespace(purpose.mode, &self.facts));
        let user_namespace = ids_to_map
            .map(|ids| self.ids.namespace(ids))
            .transpose()
            .map_err(|error| run::refusal(step_error(Step::Maps)(error)))?;
        let cgroups = match cgroup.others() {
            Ok(others) => others,
            Err(error) => return Err(run::refusal(step_error(Step::Cgroup)(error))),
        };
        let lent = Lent {
            network: network.map(AsFd::as_fd),
            user_namespace: user_namespace.as_ref().map(AsFd::as_fd),
            cgroups: cgroups.iter().map(AsFd::as_fd).collect(),
            bell: self.bell.1.as_fd(),
        };
        let decided = prepared.decide(purpose, ids, &lent, &self.facts, self.fault)?;
        let init = self.clone_init(&decided, cgroup).map_err(run::refusal)?;
        Ok((decided, init, user_namespace))
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
                self.heed(serial, false);
                let at = std::time::SystemTime::now();
                if let Some(run) = self.runs.get(&serial).and_then(Run::id) {
                    self.tell_soon(&FromLauncher::Started { run, at, setup });
                }
            }
            Change::Listener => self.watch_listener(serial),
        }
        self.reschedule(serial);
    }

    pub(super) fn inject(&self, step: Step) -> Result<(), Refusal> {
        if self.fault.hits(step) {
            return Err(run::refusal(StepError { step, index: 0, errno: libc::EIO }));
        }
        Ok(())
    }

    fn clone_init(&self, decided: &Decided, cgroup: &Cgroup) -> Result<Init, StepError> {
        if self.fault.hits(Step::Clone) {
            return Err(StepError { step: Step::Clone, index: 0, errno: libc::EIO });
        }
        let (ours, theirs) = sys::seqpacket_pair().map_err(step_error(Step::Clone))?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(|e| step_error(Step::Clone)(e.into()))?;
        let mut keep = decided.keep.clone();
        keep.push(theirs.as_raw_fd());
        keep.sort_unstable();
        let namespaces = decided.blueprint.outer_namespaces;
        // SAFETY: this process has one thread; init makes only system calls.
        let cloned = unsafe { namespaces::clone(namespaces, cgroup.v2_dir_fd()) };
        match cloned.map_err(step_error(Step::Clone))? {
            Cloned::Child => init::main(&decided.blueprint, theirs.as_raw_fd(), &keep),
            Cloned::Parent(pid, pidfd) => Ok(Init { pid, pidfd, control: ours }),
        }
    }

    fn discard(&self, cgroup: Cgroup) {
        if cgroup.remove().is_err() {
            log("a cgroup that never held a run can't be removed");
        }
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
fn limits(template: &Template, checked: Option<&Checked>) -> CgroupLimits {
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
fn lacking(hierarchy: &Hierarchy, control: Control) -> Refusal {
    match hierarchy.available().lacking(control) {
        Some(lack) => Refusal::lacking(lack),
        None => {
            let why = "the run's cgroup doesn't have it".to_owned();
            Refusal::ControlUnavailable { control, why }
        }
    }
}

fn step_error(step: Step) -> impl Fn(io::Error) -> StepError {
    move |error| StepError { step, index: 0, errno: error.raw_os_error().unwrap_or(libc::EIO) }
}

/// What of the limits the cgroup holds or counts, or the first control that is
/// demanded and not there.
fn cgroup_controls(cgroup: &Cgroup, template: &Template) -> Result<Vec<Control>, Control> {
    let timed = template.limits.cpu_time.finite().is_some();
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

fn cgroup_refusal(error: CgroupError) -> Refusal {
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

fn launch_fds(fds: Vec<OwnedFd>) -> Option<LaunchFds> {
    let [executable, stdin, stdout, stderr, call]: [OwnedFd; 5] = fds.try_into().ok()?;
    Some(LaunchFds { executable, stdin, stdout, stderr, call })
}

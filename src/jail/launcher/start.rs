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

use super::{Launcher, OWN_DESCRIPTORS, log};
use crate::{
    jail::{
        cgroup::{Cgroup, CgroupError, CgroupLimits, Hierarchy, Lack},
        check::{self, Checked},
        decide::{Decided, Lent, Prepared, Purpose, Script},
        empty_root::{self, EmptyRoot},
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

/// What a jail is built for.
pub(super) enum BuiltFor<'a> {
    /// A call that waits for it; its `#!` executable is part of the root.
    Call(Option<Script<'a>>),
    /// Whichever call comes.
    Later,
}

/// What a jail has for its time, and is given back of it.
struct Loan {
    ids: Option<HostIds>,
    network: Option<EmptyNetwork>,
    root: Option<EmptyRoot>,
}

/// A jail of which all is there but its init.
struct Ready {
    serial: u64,
    name: String,
    prepared: Rc<Prepared>,
    loan: Loan,
    cgroup: Cgroup,
    decided: Decided,
    open: OpenForInit,
}

/// What is open for init until it has been cloned.
struct OpenForInit {
    /// This one stays, for the next run of the same ids.
    user_namespace: Option<OwnedFd>,
    _cgroups: Vec<OwnedFd>,
    control: ControlSocket,
}

/// Both ends of the socket between launcher and init.
struct ControlSocket {
    ours: OwnedFd,
    theirs: OwnedFd,
}

impl Ready {
    fn into_run(self, pid: i32, pidfd: OwnedFd) -> Run {
        let Loan { ids, network, root } = self.loan;
        let parts = Parts {
            serial: self.serial,
            name: self.name,
            ids,
            cgroup: self.cgroup,
            network,
            root,
            user_namespace: self.open.user_namespace,
            pid,
            pidfd,
            control: self.open.control.ours,
            prepared: self.prepared,
            namespaces: self.decided.namespaces,
            map: self.decided.map,
            enforced: self.decided.enforced,
        };
        Run::new(parts, Instant::now())
    }
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

    /// Begins to build a jail, with the template's own limits.
    fn build(
        &mut self,
        prepared: &Rc<Prepared>,
        mode: Mode,
        built_for: BuiltFor<'_>,
    ) -> Result<u64, Refusal> {
        let ready = self.prepare(prepared, mode, built_for, 0)?;
        let cloned = self.clone_init(&ready);
        self.enter(ready, cloned)
    }

    /// Begins to build `count` jails for whichever call comes.
    ///
    /// After a clone each page that we write to is copied first, as long as the child has it
    /// too. So nothing is written between the clones: it is the same few pages for all.
    pub(super) fn build_for_later(
        &mut self,
        prepared: &Rc<Prepared>,
        mode: Mode,
        count: usize,
    ) -> Vec<Result<u64, Refusal>> {
        let mut built = Vec::with_capacity(count);
        let mut ready = Vec::with_capacity(count);
        let mut refused = None;
        while ready.len() < count && refused.is_none() {
            match self.prepare(prepared, mode, BuiltFor::Later, ready.len()) {
                Ok(one) => ready.push(one),
                Err(refusal) => refused = Some(Err(refusal)),
            }
        }
        let mut cloned = Vec::with_capacity(ready.len());
        cloned.extend(ready.iter().map(|one| self.clone_init(one)));
        for (one, cloned) in ready.into_iter().zip(cloned) {
            built.push(self.enter(one, cloned));
        }
        // Last: what goes wrong is what comes of it.
        built.extend(refused);
        built
    }

    /// Makes and takes all that a jail needs, but its init; `others` of the same template
    /// are prepared already.
    fn prepare(
        &mut self,
        prepared: &Rc<Prepared>,
        mode: Mode,
        built_for: BuiltFor<'_>,
        others: usize,
    ) -> Result<Ready, Refusal> {
        let has_descriptors =
            |launcher: &Self| launcher.has_descriptors_for(&prepared.template, others + 1);
        while !has_descriptors(self) && self.let_one_go() {}
        if !has_descriptors(self) {
            return Err(Refusal::Exhausted(Exhausted::Descriptors));
        }
        let ids = match self.facts.root {
            true => Some(self.ids.take().ok_or(Refusal::Exhausted(Exhausted::HostIds))?),
            false => None,
        };
        let ready = self.take_network(prepared, mode).and_then(|network| {
            let root = self.take_root(prepared, mode, &built_for)?;
            let script = match built_for {
                BuiltFor::Call(script) => script,
                BuiltFor::Later => None,
            };
            self.make(prepared, mode, script, Loan { ids, network, root })
        });
        if let (Err(_), Some(ids)) = (&ready, ids) {
            self.ids.give_back(ids, None);
        }
        ready
    }

    /// A prepared jail becomes a run, once its init was cloned.
    fn enter(&mut self, ready: Ready, cloned: Result<Cloned, StepError>) -> Result<u64, Refusal> {
        match cloned {
            Ok(Cloned::Child) => unreachable!("init never comes here"),
            Ok(Cloned::Parent(pid, pidfd)) => Ok(self.register(ready.into_run(pid, pidfd))),
            Err(error) => {
                self.discard(ready.cgroup);
                if let Some(ids) = ready.loan.ids {
                    self.ids.give_back(ids, None);
                }
                Err(run::refusal(error))
            }
        }
    }

    /// Whether so many runs more leave the launcher the descriptors that it needs:
    /// without one it could neither hear of a run's end nor start another.
    fn has_descriptors_for(&self, template: &Template, more: usize) -> bool {
        let runs: usize = self.runs.values().map(Run::descriptors).sum();
        let kept = EmptyNetwork::DESCRIPTORS * self.networks.kept()
            + EmptyRoot::DESCRIPTORS * self.roots.kept()
            + self.ids.kept()
            + Cgroup::DESCRIPTORS * (self.cgroups.kept() + self.leftovers.len());
        let gone = Run::DESCRIPTORS_WAITING * self.gone.len();
        let held = OWN_DESCRIPTORS + kept + runs + gone;
        u64::try_from(held + more * Run::descriptors_needed(template))
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

    /// An empty root for a jail that can have one. One is made only for later: a call that
    /// waits has its root made by init at once.
    fn take_root(
        &mut self,
        prepared: &Prepared,
        mode: Mode,
        built_for: &BuiltFor<'_>,
    ) -> Result<Option<EmptyRoot>, Refusal> {
        let Some(with_tmp) = prepared.takes_empty_root(mode, &self.facts) else { return Ok(None) };
        match built_for {
            BuiltFor::Call(Some(_)) => Ok(None),
            BuiltFor::Call(None) => Ok(self.roots.take(with_tmp)),
            BuiltFor::Later => match self.roots.take(with_tmp) {
                None => empty_root::make(with_tmp, self.fault).map(Some).map_err(run::refusal),
                kept => Ok(kept),
            },
        }
    }

    fn make(
        &mut self,
        prepared: &Rc<Prepared>,
        mode: Mode,
        script: Option<Script<'_>>,
        loan: Loan,
    ) -> Result<Ready, Refusal> {
        let template = &prepared.template;
        // Not the call's id, which its jail may be older than; the same for nobody.
        let id = RunId::random().map_err(|error| run::refusal(step_error(Step::Clone)(error)))?;
        let name = format!("run-{id}");
        let serial = self.next_serial();
        let purpose = Purpose { mode, name: &name[..HOST_NAME_LEN], serial, script };
        self.inject(Step::Idmap)?;
        self.inject(Step::Cgroup)?;
        let cgroup = self.take_cgroup(&name, template)?;
        if let Err(control) = cgroup_controls(&cgroup, template) {
            self.discard(cgroup);
            return Err(lacking(&self.hierarchy, control));
        }
        match self.decide(prepared, &purpose, &loan, &cgroup) {
            Ok((decided, open)) => Ok(Ready {
                serial,
                name,
                prepared: Rc::clone(prepared),
                loan,
                cgroup,
                decided,
                open,
            }),
            Err(refusal) => {
                self.discard(cgroup);
                Err(refusal)
            }
        }
    }

    fn next_serial(&mut self) -> u64 {
        let serial = self.next_serial;
        self.next_serial += 1;
        serial
    }

    fn take_cgroup(&mut self, name: &str, template: &Template) -> Result<Cgroup, Refusal> {
        let limits = limits(template, None);
        match self.cgroups.take(&limits) {
            Some(cgroup) => Ok(cgroup),
            None => {
                self.hierarchy.create(name, &limits, &template.best_effort).map_err(cgroup_refusal)
            }
        }
    }

    /// Decides a jail, and opens what its init needs.
    fn decide(
        &mut self,
        prepared: &Prepared,
        purpose: &Purpose<'_>,
        loan: &Loan,
        cgroup: &Cgroup,
    ) -> Result<(Decided, OpenForInit), Refusal> {
        let failed = |step| move |error| run::refusal(step_error(step)(error));
        let ids_to_map =
            loan.ids.filter(|_| prepared.takes_user_namespace(purpose.mode, &self.facts));
        let user_namespace = ids_to_map
            .map(|ids| self.ids.namespace(ids))
            .transpose()
            .map_err(failed(Step::Maps))?;
        let cgroups = cgroup.others().map_err(failed(Step::Cgroup))?;
        let lent = Lent {
            network: loan.network.as_ref().map(AsFd::as_fd),
            root: loan.root.as_ref().map(AsFd::as_fd),
            user_namespace: user_namespace.as_ref().map(AsFd::as_fd),
            cgroups: cgroups.iter().map(AsFd::as_fd).collect(),
            bell: self.bell.1.as_fd(),
        };
        let mut decided = prepared.decide(purpose, loan.ids, &lent, &self.facts, self.fault)?;
        let (ours, theirs) = sys::seqpacket_pair().map_err(failed(Step::Clone))?;
        rustix::io::ioctl_fionbio(&ours, true)
            .map_err(|error| failed(Step::Clone)(error.into()))?;
        decided.keep.push(theirs.as_raw_fd());
        decided.keep.sort_unstable();
        let control = ControlSocket { ours, theirs };
        Ok((decided, OpenForInit { user_namespace, _cgroups: cgroups, control }))
    }

    /// Clones a jail's init. Writes to no memory but its own stack: see
    /// [`Launcher::build_for_later`].
    fn clone_init(&self, ready: &Ready) -> Result<Cloned, StepError> {
        if self.fault.hits(Step::Clone) {
            return Err(StepError { step: Step::Clone, index: 0, errno: libc::EIO });
        }
        let Decided { blueprint, keep, .. } = &ready.decided;
        let namespaces = blueprint.outer_namespaces;
        // SAFETY: this process has one thread; init makes only system calls.
        let cloned = unsafe { namespaces::clone(namespaces, ready.cgroup.v2_dir_fd()) };
        match cloned.map_err(step_error(Step::Clone))? {
            Cloned::Child => init::main(blueprint, ready.open.control.theirs.as_raw_fd(), keep),
            parent @ Cloned::Parent(..) => Ok(parent),
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

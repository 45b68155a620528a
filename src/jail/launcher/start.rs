//! Starting a run: everything that is refused is refused before anything is made.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    rc::Rc,
    time::Instant,
};

use super::{LEFTOVER_DESCRIPTORS, Launcher, OWN_DESCRIPTORS, log, reap};
use crate::{
    jail::{
        cgroup::{Cgroup, CgroupError, CgroupLimits, Lack},
        check,
        decide::{Decided, Prepared},
        identity::HostIds,
        init,
        message::{Exhausted, Launch, LaunchFds, Refusal},
        namespaces::{self, Cloned},
        plan::{Control, Template},
        run::{self, Parts, Run},
        step::{Step, StepError},
    },
    sys,
};

impl Launcher {
    /// Starts building a run. What can be refused is refused before anything is made.
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
        let fds = launch_fds(fds).ok_or_else(|| invalid("a launch takes five descriptors"))?;
        let checked = check::check(&launch, &fds, &prepared.template)
            .map_err(|what| Refusal::Invalid { what })?;
        if !self.has_descriptors_for(&prepared.template) {
            return Err(Refusal::Exhausted(Exhausted::Descriptors));
        }
        let ids = match self.facts.root {
            true => Some(self.ids.take().ok_or(Refusal::Exhausted(Exhausted::HostIds))?),
            false => None,
        };
        let made = self.make(received, launch, fds, &prepared, &checked, ids);
        match made {
            Ok(run) => {
                self.register(run);
                Ok(())
            }
            Err(refusal) => {
                if let Some(ids) = ids {
                    self.ids.give_back(ids);
                }
                Err(refusal)
            }
        }
    }

    /// Whether a run more leaves the launcher the descriptors that it needs:
    /// without one it could neither hear of a run's end nor start another.
    fn has_descriptors_for(&self, template: &Template) -> bool {
        let runs: usize = self.runs.values().map(Run::descriptors).sum();
        let leftovers = LEFTOVER_DESCRIPTORS * self.leftovers.len();
        let all = OWN_DESCRIPTORS + runs + leftovers + Run::descriptors_needed(template);
        u64::try_from(all).is_ok_and(|all| all <= self.facts.open_files)
    }

    pub(super) fn make(
        &self,
        received: Instant,
        launch: Launch,
        fds: LaunchFds,
        prepared: &Rc<Prepared>,
        checked: &check::Checked,
        ids: Option<HostIds>,
    ) -> Result<Run, Refusal> {
        let template = &prepared.template;
        let limits = CgroupLimits {
            memory: checked.memory,
            swap: template.limits.swap,
            cpus: checked.cpus,
            pids: template.limits.pids,
        };
        self.inject(Step::Idmap)?;
        let decided = prepared.decide(&launch, &fds, ids, &self.facts, self.fault)?;
        self.inject(Step::Cgroup)?;
        let cgroup = self
            .hierarchy
            .create(&format!("run-{}", launch.run), &limits, &template.best_effort)
            .map_err(cgroup_refusal)?;
        let mut cgroup_controls = match cgroup_controls(&cgroup, template, checked) {
            Ok(controls) => controls,
            Err(control) => {
                self.discard(cgroup);
                return Err(self.lacking(control));
            }
        };
        let cloned = self.clone_init(&decided, &cgroup);
        let (pid, pidfd, control) = match cloned {
            Ok(parts) => parts,
            Err(error) => {
                self.discard(cgroup);
                return Err(run::refusal(error));
            }
        };
        let mut enforced = decided.enforced;
        enforced.append(&mut cgroup_controls);
        let cores = checked
            .cpus
            .finite()
            .map_or(f64::from(self.facts.processors), |cpus| cpus.as_f64())
            .min(f64::from(self.facts.processors));
        Ok(Run::new(Parts {
            ids,
            cgroup,
            pid,
            pidfd,
            control,
            prepared: Rc::clone(prepared),
            call_len: checked.call_len,
            cpu_limit: template.limits.cpu_time.finite(),
            launch,
            fds,
            namespaces: decided.namespaces,
            map: decided.map,
            enforced,
            cores,
            received,
        }))
    }

    /// The refusal for a control that this host's cgroups can't give.
    fn lacking(&self, control: Control) -> Refusal {
        match self.hierarchy.available().lacking(control) {
            Some(lack) => Refusal::lacking(lack),
            None => {
                let why = "the run's cgroup doesn't have it".to_owned();
                Refusal::ControlUnavailable { control, why }
            }
        }
    }

    pub(super) fn inject(&self, step: Step) -> Result<(), Refusal> {
        if self.fault.hits(step) {
            return Err(run::refusal(StepError { step, index: 0, errno: libc::EIO }));
        }
        Ok(())
    }

    pub(super) fn clone_init(
        &self,
        decided: &Decided,
        cgroup: &Cgroup,
    ) -> Result<(i32, OwnedFd, OwnedFd), StepError> {
        let failed = |step: Step| {
            move |error: io::Error| StepError {
                step,
                index: 0,
                errno: error.raw_os_error().unwrap_or(libc::EIO),
            }
        };
        if self.fault.hits(Step::Clone) {
            return Err(StepError { step: Step::Clone, index: 0, errno: libc::EIO });
        }
        let (ours, theirs) = sys::seqpacket_pair().map_err(failed(Step::Clone))?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(|e| failed(Step::Clone)(e.into()))?;
        let mut keep = decided.keep.clone();
        keep.push(theirs.as_raw_fd());
        keep.sort_unstable();
        let namespaces = decided.blueprint.outer_namespaces;
        // SAFETY: this process has one thread; init makes only system calls.
        let cloned = unsafe { namespaces::clone(namespaces, cgroup.v2_dir_fd()) };
        match cloned.map_err(failed(Step::Clone))? {
            Cloned::Child => init::main(&decided.blueprint, theirs.as_raw_fd(), &keep),
            Cloned::Parent(pid, pidfd) => {
                let attached = if self.fault.hits(Step::Attach) {
                    Err(io::Error::from_raw_os_error(libc::EIO))
                } else {
                    attach(cgroup, pid)
                };
                if let Err(error) = attached {
                    kill_and_reap(&pidfd);
                    return Err(failed(Step::Attach)(error));
                }
                Ok((pid, pidfd, ours))
            }
        }
    }

    pub(super) fn discard(&self, cgroup: Cgroup) {
        if cgroup.remove().is_err() {
            log("a cgroup that never held a run can't be removed");
        }
    }
}

/// What of the limits the cgroup holds and the launcher's clocks watch, or the
/// first control that is demanded and not there.
fn cgroup_controls(
    cgroup: &Cgroup,
    template: &Template,
    checked: &check::Checked,
) -> Result<Vec<Control>, Control> {
    let timed = template.limits.cpu_time.finite().is_some();
    for (control, wanted) in [(Control::CgroupKill, true), (Control::CpuTime, timed)] {
        let there = cgroup.enforced().contains(&control);
        if wanted && !there && !template.best_effort.contains(&control) {
            return Err(control);
        }
    }
    let mut controls = cgroup.enforced().to_vec();
    controls.retain(|control| *control != Control::CpuTime || timed);
    if checked.timeout.is_some() {
        controls.push(Control::Timeout);
    }
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

/// Into the hierarchies that clone3 could not put it into.
fn attach(cgroup: &Cgroup, pid: i32) -> io::Result<()> {
    let Some(pid) = rustix::process::Pid::from_raw(pid) else {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    };
    let attached = match cgroup.v2_dir_fd() {
        Some(_) => cgroup.attach_rest(pid),
        None => cgroup.attach(pid),
    };
    attached.map_err(|error| match error {
        CgroupError::Attach { source, .. } => source,
        other => io::Error::other(other.to_string()),
    })
}

fn launch_fds(fds: Vec<OwnedFd>) -> Option<LaunchFds> {
    let [executable, stdin, stdout, stderr, call]: [OwnedFd; 5] = fds.try_into().ok()?;
    Some(LaunchFds { executable, stdin, stdout, stderr, call })
}

fn kill_and_reap(pidfd: &OwnedFd) {
    // ESRCH: dead already.
    rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL).ok();
    reap(pidfd);
}

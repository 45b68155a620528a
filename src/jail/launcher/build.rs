//! Building a jail: all of it but what only its call brings.
//!
//! What it needs is made or taken (`prepare`), its init is cloned (`clone_init`), and
//! from then on it is a run (`enter`), which builds the rest by itself.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    rc::Rc,
    time::Instant,
};

use super::{
    Launcher, OWN_DESCRIPTORS, log,
    start::{cgroup_controls, cgroup_refusal, lacking, limits},
};
use crate::{
    jail::{
        cgroup::Cgroup,
        decide::{Decided, Lent, Prepared, Purpose, Script},
        empty_root::{self, EmptyRoot},
        identity::HostIds,
        init,
        message::{Exhausted, Refusal},
        namespaces::{self, Cloned},
        network::EmptyNetwork,
        plan::{Mode, Template},
        run::{self, Parts, Run},
        service::Service,
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

/// A cloned init: its pid and pidfd.
type Init = (i32, OwnedFd);

/// A jail of which all is there but its init.
struct Ready {
    serial: u64,
    name: String,
    prepared: Rc<Prepared>,
    loan: Loan,
    cgroup: Cgroup,
    decided: Decided,
    open: OpenForInit,
    service: Option<Service>,
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
            service: self.service,
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

impl Launcher {
    /// Begins to build a jail, with the template's own limits.
    pub(super) fn build(
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
            true => Some(
                self.ids
                    .take(prepared.is_alone(mode))
                    .ok_or(Refusal::Exhausted(Exhausted::HostIds))?,
            ),
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
    fn enter(&mut self, ready: Ready, cloned: Result<Init, StepError>) -> Result<u64, Refusal> {
        match cloned {
            Ok((pid, pidfd)) => Ok(self.register(ready.into_run(pid, pidfd))),
            Err(error) => {
                self.discard(ready.cgroup);
                self.discard_place(ready.service);
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
        let held = OWN_DESCRIPTORS + kept + runs + gone + self.connected;
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
        let service = self.make_service(prepared, mode, loan.ids)?;
        self.inject(Step::Idmap)?;
        self.inject(Step::Cgroup)?;
        let cgroup = match self.take_cgroup(&name, template) {
            Ok(cgroup) => cgroup,
            Err(refusal) => {
                self.discard_place(service);
                return Err(refusal);
            }
        };
        if let Err(control) = cgroup_controls(&cgroup, template) {
            self.discard(cgroup);
            self.discard_place(service);
            return Err(lacking(&self.hierarchy, control));
        }
        let place = service.as_ref().and_then(|service| service.place.as_ref());
        let socket = place.map(|place| place.socket.as_c_str());
        let purpose = Purpose { mode, name: &name[..HOST_NAME_LEN], serial, script, socket };
        match self.decide(prepared, &purpose, &loan, &cgroup) {
            Ok((decided, open)) => Ok(Ready {
                serial,
                name,
                prepared: Rc::clone(prepared),
                loan,
                cgroup,
                decided,
                open,
                service,
            }),
            Err(refusal) => {
                self.discard(cgroup);
                self.discard_place(service);
                Err(refusal)
            }
        }
    }

    /// What the launcher holds of a run that listens; in direct mode with its directory.
    fn make_service(
        &mut self,
        prepared: &Prepared,
        mode: Mode,
        ids: Option<HostIds>,
    ) -> Result<Option<Service>, Refusal> {
        if !prepared.template.listens {
            return Ok(None);
        }
        self.inject(Step::ServiceSocket)?;
        let user = prepared.host_user(mode, ids, &self.facts)?;
        let place = match mode {
            Mode::Direct => Some(self.place(user)?),
            Mode::Jail | Mode::Container => None,
        };
        Ok(Some(Service::new(user.0, place, prepared.has_own_network(mode))))
    }

    fn discard_place(&mut self, service: Option<Service>) {
        if let Some(place) = service.and_then(|service| service.place) {
            self.give_back_place(place);
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
    fn clone_init(&self, ready: &Ready) -> Result<Init, StepError> {
        if self.fault.hits(Step::Clone) {
            return Err(StepError { step: Step::Clone, index: 0, errno: libc::EIO });
        }
        let Decided { blueprint, keep, .. } = &ready.decided;
        let namespaces = blueprint.outer_namespaces;
        // SAFETY: this process has one thread; init makes only system calls.
        let cloned = unsafe { namespaces::clone(namespaces, ready.cgroup.v2_dir_fd()) };
        match cloned.map_err(step_error(Step::Clone))? {
            Cloned::Child => init::main(blueprint, ready.open.control.theirs.as_raw_fd(), keep),
            Cloned::Parent(pid, pidfd) => Ok((pid, pidfd)),
        }
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

fn step_error(step: Step) -> impl Fn(io::Error) -> StepError {
    move |error| StepError { step, index: 0, errno: error.raw_os_error().unwrap_or(libc::EIO) }
}

//! From a checked launch to a [`Blueprint`]: everything decided, nothing done.

use std::{
    ffi::CString,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    rc::Rc,
};

use super::{
    blueprint::{Blueprint, Exec, Filter, INSIDE_ID, INSIDE_INIT_ID},
    facts::Facts,
    identity::{self, HostIds, IdMap},
    landlock, limits,
    message::{Launch, LaunchFds, Refusal},
    namespaces,
    plan::{Control, Mode, Network, Template},
    root::{self, Ownership, Script},
    seccomp::filter::{self, FilterError, FilterOptions, sock_filter},
    step::Fault,
};

/// A template made ready for this host: its filter compiled, its lacks known.
#[derive(Debug)]
pub struct Prepared {
    /// As the monitor sent it.
    pub template: Template,
    open_files: Result<u64, u64>,
    filter: Rc<[sock_filter]>,
    filter_options: FilterOptions,
}

/// A decided run.
#[derive(Debug)]
pub struct Decided {
    /// For init.
    pub blueprint: Blueprint,
    /// Open until init has built the root.
    pub namespaces: Vec<OwnedFd>,
    /// Descriptors that init needs, besides its control socket.
    pub keep: Vec<RawFd>,
    /// How its ids map, where it has a user namespace.
    pub map: IdMap,
    /// What will be in force when the program starts, but for the cgroup's share.
    pub enforced: Vec<Control>,
}

impl Prepared {
    /// Compiles what doesn't depend on the call.
    ///
    /// # Errors
    /// Those of the filter's compiler; [`check_filter`] found them when the
    /// policies were compiled.
    pub fn new(template: Template, facts: &Facts) -> Result<Self, FilterError> {
        let open_files = limits::open_files(&template.limits, facts.open_files);
        let exec_fd = limits::parking_place(open_files.unwrap_or_else(|most| most));
        let by_sysctl = facts.memfd_noexec.is_some();
        let filter_options = filter_options(&template, exec_fd, by_sysctl, facts.notify);
        let filter = filter::compile(&template.syscalls, &filter_options)?;
        Ok(Self { template, open_files, filter: filter.into(), filter_options })
    }

    /// What the filter was compiled with; notifications are decided by the same.
    #[must_use]
    pub fn filter_options(&self) -> &FilterOptions {
        &self.filter_options
    }

    /// Decides one run.
    ///
    /// # Errors
    /// [`Refusal::ControlUnavailable`] for what this host can't give.
    pub fn decide(
        &self,
        launch: &Launch,
        fds: &LaunchFds,
        ids: Option<HostIds>,
        facts: &Facts,
        fault: Fault,
    ) -> Result<Decided, Refusal> {
        let template = &self.template;
        let jail = launch.mode == Mode::Jail;
        let lacks = |control: Control, why: String| Refusal::ControlUnavailable { control, why };

        if !facts.stuck_groups.is_empty() && !self.is_best_effort(Control::Groups) {
            return Err(lacks(
                Control::Groups,
                format!(
                    "the dispatcher's user is in supplementary groups {:?}, which it can't give up without root; run it as a user in none, or add \"groups\" to best_effort",
                    facts.stuck_groups
                ),
            ));
        }
        if jail && facts.landlock_abi == 0 && !self.is_best_effort(Control::Landlock(0)) {
            return Err(lacks(
                Control::Landlock(0),
                "the kernel has no Landlock; boot with lsm=landlock,…, or add \"landlock\" to best_effort".into(),
            ));
        }
        let open_files = self.open_files.map_err(|most| {
            lacks(
                Control::Rlimits,
                format!("open_files is over {most}, the most that the dispatcher's own limit leaves; raise LimitNOFILE="),
            )
        })?;
        let network = if jail { template.network } else { Network::Host };
        let keep = capability_bits(&template.keep_capabilities);
        let namespaces = namespaces::decide(launch.mode, network, facts.root, keep != 0);
        let mut enforced = namespaces.controls.clone();
        enforced.extend([Control::NoNewPrivs, Control::Rlimits]);
        if keep == 0 || !jail {
            enforced.push(Control::CapsNone);
        }

        let (map, program_id, init_id) = self.identities(launch.mode, ids, facts)?;
        let mut kept_namespaces = Vec::new();
        let mut root = None;
        if jail {
            let ownership = match ids {
                Some(ids) => Ownership::Idmap { program: ids.program },
                None => Ownership::Plain { uid: facts.own_ids.0 },
            };
            let script = launch
                .interpreter
                .as_ref()
                .map(|_| Script { fd: fds.executable.as_raw_fd(), size: launch.executable_size });
            let decided = root::decide(&template.filesystem, script, ownership)
                .map_err(|error| lacks(Control::RootReadonly, error.to_string()))?;
            (root, kept_namespaces) = (Some(decided.plan), decided.namespaces);
            enforced.extend([Control::RootReadonly, Control::ProcRestricted, Control::Seccomp]);
            if ids.is_some() {
                enforced.push(Control::HostUid);
            }
        }
        let landlock = root
            .as_ref()
            .and_then(|root| landlock::Ruleset::decide(facts.landlock_abi, root, network));
        enforced.extend(landlock.as_ref().map(|rules| Control::Landlock(rules.abi)));
        // By the sysctl where it can be written, else by the filter: either way in force.
        if jail && !template.filesystem.tmp_exec {
            enforced.push(Control::MemfdNoexec);
        }
        let memfd_noexec = facts
            .memfd_noexec
            .as_ref()
            .filter(|_| jail && !template.filesystem.tmp_exec)
            .map(AsRawFd::as_raw_fd);

        let mut kept_fds: Vec<RawFd> = kept_namespaces.iter().map(AsRawFd::as_raw_fd).collect();
        kept_fds.extend(memfd_noexec);
        kept_fds.extend(launch.interpreter.as_ref().map(|_| fds.executable.as_raw_fd()));
        let blueprint = Blueprint {
            mode: launch.mode,
            outer_namespaces: namespaces.outer,
            inner_namespaces: namespaces.inner,
            maps_first: !facts.root,
            clear_groups: facts.root,
            program_id,
            init_id,
            root,
            host_name: jail.then(|| host_name(launch)),
            loopback: jail && network == Network::Loopback,
            memfd_noexec,
            landlock,
            rlimits: limits::resource_limits(&template.limits, open_files),
            last_capability: facts.last_capability,
            keep_capabilities: if jail { keep } else { 0 },
            filter: jail
                .then(|| Filter { instructions: Rc::clone(&self.filter), notify: facts.notify }),
            exec_fd: self.filter_options.exec_fd,
            control_fd: self.filter_options.control_fd,
            exec: self.exec(launch),
            fault,
        };
        Ok(Decided { blueprint, namespaces: kept_namespaces, keep: kept_fds, map, enforced })
    }

    /// Whether the policy does without this control where it can't be had.
    fn is_best_effort(&self, control: Control) -> bool {
        self.template.best_effort.iter().any(|word| word.word() == control.word())
    }

    /// The id map, and the ids of program and init in the namespace they end in.
    #[allow(clippy::type_complexity)]
    fn identities(
        &self,
        mode: Mode,
        ids: Option<HostIds>,
        facts: &Facts,
    ) -> Result<(IdMap, (u32, u32), (u32, u32)), Refusal> {
        let jail = mode == Mode::Jail;
        match (ids, &self.template.user) {
            (Some(ids), _) if jail => {
                Ok((IdMap::Own(ids), (INSIDE_ID, INSIDE_ID), (INSIDE_INIT_ID, INSIDE_INIT_ID)))
            }
            // Direct mode has no user namespace of its own: host ids as they are.
            (Some(ids), Some(user)) if user.uid != 0 && user.gid != 0 => {
                Ok((IdMap::Own(ids), (user.uid, user.gid), (ids.init, ids.init)))
            }
            (Some(_), _) => {
                Err(Refusal::Invalid { what: "direct mode has no user to run as".into() })
            }
            (None, _) if jail => {
                let inside = (INSIDE_ID, INSIDE_ID);
                Ok((IdMap::Launcher { inside }, inside, inside))
            }
            (None, Some(user)) if user.uid != 0 && user.gid != 0 => {
                let own = facts.own_ids;
                match identity::lacking_user(user, facts.root, own.0) {
                    // Not as root, whatever the policy puts up with.
                    Some(lack) if own.0 == 0 || !self.is_best_effort(lack.control) => {
                        Err(Refusal::lacking(&lack))
                    }
                    _ => Ok((IdMap::Launcher { inside: own }, own, own)),
                }
            }
            (None, _) => Err(Refusal::Invalid { what: "direct mode has no user to run as".into() }),
        }
    }

    fn exec(&self, launch: &Launch) -> Exec {
        match (&launch.interpreter, launch.mode) {
            (Some(path), _) => Exec::Interpreter(CString::new(path.as_str()).unwrap_or_default()),
            // memfd-exec writes its copy after RLIMIT_FSIZE is set, in one write(2).
            (None, Mode::Direct)
                if self.template.limits.file_size.allows(launch.executable_size)
                    && launch.executable_size < 1 << 30 =>
            {
                Exec::Copy(launch.executable_size)
            }
            (None, _) => Exec::Memfd,
        }
    }
}

/// Whether the filter of a template can be made, on whichever host it will be.
///
/// # Errors
/// Those of [`filter::compile`].
pub fn check_filter(template: &Template) -> Result<(), FilterError> {
    // Which number it is makes no difference.
    let exec_fd = limits::parking_place(0);
    for (by_sysctl, notify) in [(false, false), (false, true), (true, false), (true, true)] {
        let options = filter_options(template, exec_fd, by_sysctl, notify);
        filter::compile(&template.syscalls, &options)?;
    }
    Ok(())
}

/// `by_sysctl`: whether the kernel itself can refuse executable memfds.
fn filter_options(
    template: &Template,
    exec_fd: i32,
    by_sysctl: bool,
    notify: bool,
) -> FilterOptions {
    FilterOptions {
        network: template.network,
        refuse_exec_memfd: !template.filesystem.tmp_exec && !by_sysctl,
        refuse_set_id: template.filesystem.binds.iter().any(|bind| !bind.read_only),
        exec_fd,
        control_fd: exec_fd + 1,
        notify,
    }
}

fn capability_bits(numbers: &[u8]) -> u64 {
    numbers.iter().filter(|number| **number < 64).fold(0, |bits, number| bits | 1 << number)
}

/// Not the host's, and the same for nobody: `run-` and the id's first digits.
fn host_name(launch: &Launch) -> CString {
    let id = launch.run.to_string();
    CString::new(format!("run-{}", &id[..8])).unwrap_or_default()
}

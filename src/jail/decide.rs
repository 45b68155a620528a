//! From a template to the [`Blueprint`] of one jail: everything decided, nothing done.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    rc::Rc,
};

use rustix::thread::UnshareFlags;

use super::{
    blueprint::{Blueprint, Exec, Filter, INSIDE_ID, INSIDE_INIT_ID, Service},
    facts::Facts,
    identity::{self, HostIds, IdMap},
    landlock, limits,
    message::{LISTEN_VARIABLES, Launch, Refusal, SERVICE_SOCKET},
    namespaces::{self, Namespaces},
    plan::{Control, Mode, Network, Template},
    root::{self, DecidedRoot, Ownership},
    seccomp::{
        docker,
        filter::{self, FilterError, FilterOptions, sock_filter},
    },
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

/// What a jail is built for, beyond its template.
#[derive(Debug)]
pub struct Purpose<'a> {
    /// Direct or jail.
    pub mode: Mode,
    /// Its name, which is its host's.
    pub name: &'a str,
    /// See [`Blueprint::serial`].
    pub serial: u64,
    /// The call's `#!` executable, which is part of the root.
    pub script: Option<Script<'a>>,
    /// Direct mode: where a service may bind a socket of its own.
    pub socket: Option<&'a CStr>,
}

/// A `#!` executable.
#[derive(Debug)]
pub struct Script<'a> {
    /// The interpreter's path inside.
    pub interpreter: &'a str,
    /// Its sealed memfd.
    pub executable: BorrowedFd<'a>,
    /// Its length in bytes.
    pub size: u64,
}

impl Script<'_> {
    fn exec(&self) -> Exec {
        Exec::Interpreter(CString::new(self.interpreter).unwrap_or_default())
    }
}

/// What init is lent of the launcher's, open until it has been cloned.
#[derive(Debug)]
pub struct Lent<'a> {
    /// An empty network namespace, where [`Prepared::takes_empty_network`].
    pub network: Option<BorrowedFd<'a>>,
    /// An empty root, where [`Prepared::takes_empty_root`].
    pub root: Option<BorrowedFd<'a>>,
    /// A user namespace for its ids, where [`Prepared::takes_user_namespace`].
    pub user_namespace: Option<BorrowedFd<'a>>,
    /// See [`Blueprint::cgroups`].
    pub cgroups: Vec<BorrowedFd<'a>>,
    /// See [`Blueprint::bell`].
    pub bell: BorrowedFd<'a>,
}

/// A decided jail.
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

    /// Whether its runs in this mode are in an empty network namespace that belongs
    /// to the launcher's user namespace, which can be any such ([`super::network`]).
    #[must_use]
    pub fn takes_empty_network(&self, mode: Mode, facts: &Facts) -> bool {
        let none = self.template.network == Network::None;
        none && self.takes_user_namespace(mode, facts)
    }

    /// Whether its runs in this mode enter a user namespace of the id pool's.
    #[must_use]
    pub fn takes_user_namespace(&self, mode: Mode, facts: &Facts) -> bool {
        self.is_alone(mode) && facts.root && self.template.keep_capabilities.is_empty()
    }

    /// Whether its runs in this mode have no way to hand a descriptor to another run, by
    /// a socket in a directory that both see or in the host's network. What is open
    /// elsewhere outlives a run: a view into its namespaces, or what is counted for its uids.
    /// A service is not alone: it can send descriptors to whom it talks with, the server.
    #[must_use]
    pub fn is_alone(&self, mode: Mode) -> bool {
        let talks = self.template.listens;
        self.has_own_network(mode) && !talks && !self.template.filesystem.shows_host()
    }

    /// Whether its runs in this mode have a network namespace of their own.
    #[must_use]
    pub fn has_own_network(&self, mode: Mode) -> bool {
        mode == Mode::Jail && self.template.network != Network::Host
    }

    /// Whether its runs in this mode are in an empty root, which can be any such
    /// ([`super::empty_root`]): if so, whether with a /tmp.
    #[must_use]
    pub fn takes_empty_root(&self, mode: Mode, facts: &Facts) -> Option<bool> {
        let takes = facts.enters_mounts && self.takes_user_namespace(mode, facts);
        takes.then_some(self.template.filesystem.tmp.is_some())
    }

    /// Decides one jail: what is lacking for it, what it is made of, which
    /// controls that comes to, and what init is told.
    ///
    /// # Errors
    /// [`Refusal::ControlUnavailable`] for what this host can't give.
    pub fn decide(
        &self,
        purpose: &Purpose<'_>,
        ids: Option<HostIds>,
        lent: &Lent<'_>,
        facts: &Facts,
        fault: Fault,
    ) -> Result<Decided, Refusal> {
        let open_files = self.check_host(purpose.mode, facts)?;
        let mut makings = self.makings(purpose, ids, facts)?;
        let mut keep = Vec::new();
        let mut lend = |fd: &BorrowedFd<'_>| {
            keep.push(fd.as_raw_fd());
            fd.as_raw_fd()
        };
        let network = lent.network.as_ref().map(&mut lend);
        if network.is_some() {
            makings.namespaces.outer &= !(libc::CLONE_NEWNET as u64);
        }
        let empty_root = lent.root.as_ref().map(&mut lend);
        if empty_root.is_some() {
            makings.namespaces.outer &= !(libc::CLONE_NEWNS as u64);
        }
        let user_namespace = lent.user_namespace.as_ref().map(&mut lend);
        if user_namespace.is_some() {
            makings.namespaces.inner = UnshareFlags::empty();
        }
        let cgroups = lent.cgroups.iter().map(&mut lend).collect();
        let bell = lend(&lent.bell);
        let enforced = makings.controls(ids);
        let Makings { jail, namespaces, identities, root, .. } = makings;
        let (root, bind_namespaces) = match root {
            Some(DecidedRoot { plan, namespaces }) => (Some(plan), namespaces),
            None => (None, Vec::new()),
        };
        keep.extend(bind_namespaces.iter().map(AsRawFd::as_raw_fd));
        let memfd_noexec = facts.memfd_noexec.as_ref().filter(|_| makings.memfd_noexec);
        let memfd_noexec = memfd_noexec.map(AsRawFd::as_raw_fd);
        keep.extend(memfd_noexec);
        keep.extend(purpose.script.as_ref().map(|script| script.executable.as_raw_fd()));
        let filter = Filter { instructions: Rc::clone(&self.filter), notify: facts.notify };
        let blueprint = Blueprint {
            mode: purpose.mode,
            network,
            outer_namespaces: namespaces.outer,
            inner_namespaces: namespaces.inner,
            user_namespace,
            cgroups,
            bell,
            serial: purpose.serial,
            maps_first: !facts.root,
            clear_groups: facts.root,
            program_id: identities.program,
            init_id: identities.init,
            root,
            empty_root,
            host_name: jail.then(|| CString::new(purpose.name).unwrap_or_default()),
            loopback: jail && makings.network == Network::Loopback,
            memfd_noexec,
            landlock: makings.landlock,
            rlimits: limits::resource_limits(&self.template.limits, open_files),
            last_capability: facts.last_capability,
            keep_capabilities: makings.keep_capabilities,
            filter: jail.then_some(filter),
            exec_fd: self.filter_options.exec_fd,
            control_fd: self.filter_options.control_fd,
            exec: purpose.script.as_ref().map_or(Exec::Memfd, Script::exec),
            service: self.template.listens.then(|| Service {
                own_network: self.has_own_network(purpose.mode),
                ..service(purpose.socket)
            }),
            fault,
        };
        Ok(Decided { blueprint, namespaces: bind_namespaces, keep, map: identities.map, enforced })
    }

    /// What this host lacks for any run of this mode, whatever the call. The open
    /// files that the program may have, where nothing is lacking.
    fn check_host(&self, mode: Mode, facts: &Facts) -> Result<u64, Refusal> {
        if !facts.stuck_groups.is_empty() && !self.is_best_effort(Control::Groups) {
            let why = format!(
                "the dispatcher's user is in supplementary groups {:?}, which it can't give up without root; run it as a user in none, or add \"groups\" to best_effort",
                facts.stuck_groups
            );
            return Err(lacks(Control::Groups, why));
        }
        let landlock = Control::Landlock(0);
        if mode == Mode::Jail && facts.landlock_abi == 0 && !self.is_best_effort(landlock) {
            let why = "the kernel has no Landlock; boot with lsm=landlock,…, or add \"landlock\" to best_effort";
            return Err(lacks(landlock, why.to_owned()));
        }
        self.open_files.map_err(|most| {
            let why = format!(
                "open_files is over {most}, the most that the dispatcher's own limit leaves; raise LimitNOFILE="
            );
            lacks(Control::Rlimits, why)
        })
    }

    /// Whether the policy does without this control where it can't be had.
    fn is_best_effort(&self, control: Control) -> bool {
        self.template.best_effort.iter().any(|word| word.word() == control.word())
    }

    fn makings(
        &self,
        purpose: &Purpose<'_>,
        ids: Option<HostIds>,
        facts: &Facts,
    ) -> Result<Makings, Refusal> {
        let template = &self.template;
        let jail = purpose.mode == Mode::Jail;
        let network = if jail { template.network } else { Network::Host };
        let keep_capabilities = if jail { capability_bits(&template.keep_capabilities) } else { 0 };
        let keeps = keep_capabilities != 0;
        let namespaces = namespaces::decide(purpose.mode, network, facts.root, keeps);
        let identities = self.identities(purpose.mode, ids, facts)?;
        let root = match jail {
            true => Some(self.root(purpose.script.as_ref(), ids, facts)?),
            false => None,
        };
        let landlock = root
            .as_ref()
            .and_then(|root| landlock::Ruleset::decide(facts.landlock_abi, &root.plan, network));
        Ok(Makings {
            jail,
            network,
            keep_capabilities,
            namespaces,
            identities,
            root,
            landlock,
            memfd_noexec: jail && !template.filesystem.tmp_exec,
        })
    }

    fn root(
        &self,
        script: Option<&Script<'_>>,
        ids: Option<HostIds>,
        facts: &Facts,
    ) -> Result<DecidedRoot, Refusal> {
        let ownership = match ids {
            Some(ids) => Ownership::Idmap { program: ids.program },
            None => Ownership::Plain { uid: facts.own_ids.0 },
        };
        let script = script
            .map(|script| root::Script { fd: script.executable.as_raw_fd(), size: script.size });
        root::decide(&self.template.filesystem, script, ownership, self.template.listens)
            .map_err(|error| lacks(Control::RootReadonly, error.to_string()))
    }

    fn identities(
        &self,
        mode: Mode,
        ids: Option<HostIds>,
        facts: &Facts,
    ) -> Result<Identities, Refusal> {
        let inside = (INSIDE_ID, INSIDE_ID);
        if mode == Mode::Jail {
            return Ok(match ids {
                Some(ids) => Identities {
                    map: IdMap::Own(ids),
                    program: inside,
                    init: (INSIDE_INIT_ID, INSIDE_INIT_ID),
                },
                None => {
                    Identities { map: IdMap::Launcher { inside }, program: inside, init: inside }
                }
            });
        }
        let user = self.template.user.as_ref().filter(|user| user.uid != 0 && user.gid != 0);
        let Some(user) = user else {
            return Err(Refusal::Invalid { what: "direct mode has no user to run as".into() });
        };
        let own = facts.own_ids;
        match ids {
            // As root there is no user namespace: host ids as they are.
            Some(ids) => Ok(Identities {
                map: IdMap::Own(ids),
                program: (user.uid, user.gid),
                init: (ids.init, ids.init),
            }),
            None => match identity::lacking_user(user, facts.root, own.0) {
                // Not as root, whatever the policy puts up with.
                Some(lack) if own.0 == 0 || !self.is_best_effort(lack.control) => {
                    Err(Refusal::lacking(&lack))
                }
                _ => {
                    Ok(Identities { map: IdMap::Launcher { inside: own }, program: own, init: own })
                }
            },
        }
    }

    /// The user and group that the program is on the host.
    ///
    /// # Errors
    /// As of [`Prepared::decide`].
    pub fn host_user(
        &self,
        mode: Mode,
        ids: Option<HostIds>,
        facts: &Facts,
    ) -> Result<(u32, u32), Refusal> {
        match (mode, ids) {
            (Mode::Direct, Some(_)) => Ok(self.identities(mode, ids, facts)?.program),
            (_, Some(ids)) => Ok((ids.program, ids.program)),
            (_, None) => Ok(facts.own_ids),
        }
    }

    /// How many bytes of the executable memfd-exec copies; 0: it is executed as it is.
    #[must_use]
    pub fn copy_len(&self, launch: &Launch) -> u32 {
        // memfd-exec writes its copy after RLIMIT_FSIZE is set, in one write(2).
        let copies = launch.mode == Mode::Direct
            && self.template.limits.file_size.allows(launch.executable_size)
            && launch.executable_size < 1 << 30;
        if copies { launch.executable_size as u32 } else { 0 }
    }
}

/// What a service is told: [`LISTEN_VARIABLES`], its pid by itself.
fn service(socket: Option<&CStr>) -> Service {
    let [count, names, _pid, own] = LISTEN_VARIABLES;
    let path = socket.map_or(SERVICE_SOCKET.as_bytes(), CStr::to_bytes);
    let entry = |name: &str, value: &[u8]| {
        // No NUL in what came from a C string, nor in ours.
        CString::new([name.as_bytes(), b"=", value].concat()).unwrap_or_default()
    };
    let directory = root::service_directory().as_os_str().as_encoded_bytes();
    Service {
        environment: vec![entry(count, b"1"), entry(names, b"grpc"), entry(own, path)],
        directory: socket.is_none().then(|| CString::new(directory).unwrap_or_default()),
        own_network: false,
    }
}

/// What a run is made of.
struct Makings {
    jail: bool,
    network: Network,
    keep_capabilities: u64,
    namespaces: Namespaces,
    identities: Identities,
    root: Option<DecidedRoot>,
    landlock: Option<landlock::Ruleset>,
    /// Memory files can't be executed: by the sysctl where it can be written,
    /// else by the filter.
    memfd_noexec: bool,
}

/// The id map, and the ids of program and init in the namespace they end in.
struct Identities {
    map: IdMap,
    program: (u32, u32),
    init: (u32, u32),
}

impl Makings {
    /// The controls that these are.
    fn controls(&self, ids: Option<HostIds>) -> Vec<Control> {
        let mut controls = self.namespaces.controls.clone();
        controls.extend([Control::NoNewPrivs, Control::Rlimits]);
        if self.keep_capabilities == 0 {
            controls.push(Control::CapsNone);
        }
        if self.jail {
            controls.extend([Control::RootReadonly, Control::ProcRestricted, Control::Seccomp]);
        }
        if self.jail && ids.is_some() {
            controls.push(Control::HostUid);
        }
        controls.extend(self.landlock.as_ref().map(|rules| Control::Landlock(rules.abi)));
        if self.memfd_noexec {
            controls.push(Control::MemfdNoexec);
        }
        controls
    }
}

fn lacks(control: Control, why: String) -> Refusal {
    Refusal::ControlUnavailable { control, why }
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
    if template.modes.contains(&Mode::Container) {
        docker::profile(&template.syscalls, &container_filter_options(template))?;
    }
    Ok(())
}

/// What a container's filter is made with: nobody is asked, and no sysctl helps.
#[must_use]
pub fn container_filter_options(template: &Template) -> FilterOptions {
    let options = filter_options(template, 0, false, false);
    FilterOptions { spare_init: true, exec_fd: -1, control_fd: -1, ..options }
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
        spare_init: false,
        exec_fd,
        control_fd: exec_fd + 1,
        notify,
    }
}

fn capability_bits(numbers: &[u8]) -> u64 {
    numbers.iter().filter(|number| **number < 64).fold(0, |bits, number| bits | 1 << number)
}

#[cfg(test)]
mod tests;

//! Each thing tried once, with the launcher's own functions.

use std::{ffi::CString, io, os::fd::AsRawFd as _};

use rustix::{
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags},
    process::{Rlimit, setrlimit},
    thread::set_no_new_privs,
};

use super::{
    Feature, Finding, Settings, Subject, Trouble,
    child::{Failed, at, in_child},
    mend, program,
};
use crate::{
    jail::{
        blueprint::{INSIDE_ID, RootPlan},
        facts::Facts,
        identity::{self, IdMap, IdPool},
        landlock, limits, mounts, namespaces,
        plan::{Allowed, Control, Filesystem, Limits, Network, Root, SyscallPolicy},
        root::{self, Ownership},
        seccomp::{self, filter::FilterOptions},
        step::{Fault, Step},
    },
    sys,
    units::Limit,
};

const USER: u64 = libc::CLONE_NEWUSER as u64;

/// Tries everything but cgroups.
pub(super) fn all(facts: &Facts, settings: &Settings) -> Vec<Finding> {
    let probe = Probe { facts, settings };
    let mut findings = probe.namespaces();
    findings.push(probe.host_uid());
    findings.extend(probe.root(&findings));
    findings.push(probe.capabilities());
    findings.push(Finding::new(
        Control::NoNewPrivs,
        plain(Step::Attributes, || Ok(set_no_new_privs(true)?)),
    ));
    findings.push(probe.seccomp(false));
    findings.push(probe.landlock());
    findings.push(probe.memfd_noexec());
    findings.push(probe.rlimits());
    findings.push(probe.groups());
    findings.push(probe.memfd_exec());
    findings.push(Finding::of(
        Subject::Feature(Feature::Pidfd),
        plain(Step::Attributes, || {
            let own = rustix::process::getpid();
            Ok(rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).map(drop)?)
        }),
    ));
    findings.push(probe.mount_api());
    findings.push(probe.idmapped_mounts());
    findings.push(probe.seccomp(true));
    findings
}

struct Probe<'a> {
    facts: &'a Facts,
    settings: &'a Settings,
}

impl Probe<'_> {
    /// `CLONE_NEWUSER` where nothing else can be had without it, and the map it needs.
    fn base(&self) -> (u64, Option<IdMap>) {
        let map = IdMap::Launcher { inside: (INSIDE_ID, INSIDE_ID) };
        if self.facts.root { (0, None) } else { (USER, Some(map)) }
    }

    fn own_map(&self) -> Option<IdMap> {
        match self.facts.root {
            true => IdPool::new(self.settings.uid_range).take(true).map(IdMap::Own),
            false => self.base().1,
        }
    }

    fn namespaces(&self) -> Vec<Finding> {
        let uts = libc::CLONE_NEWUTS as u64;
        // That it has capabilities inside must show: AppArmor may take them away.
        let user = in_child(USER | uts, self.own_map(), || {
            at(Step::UserNamespace, rustix::system::sethostname(b"probe"))
        });
        let without = user.is_err() && !self.facts.root;
        let told = |control, result: Result<(), Failed>| {
            let trouble = |failed| mend::namespace(control, &failed, self.facts.root);
            Finding::new(control, result.map(|()| "").map_err(trouble))
        };
        let mut findings = vec![told(Control::NsUser, user)];
        let (base, map) = self.base();
        for (control, flag) in [
            (Control::NsMount, libc::CLONE_NEWNS),
            (Control::NsPid, libc::CLONE_NEWPID),
            (Control::NsIpc, libc::CLONE_NEWIPC),
            (Control::NsUts, libc::CLONE_NEWUTS),
            (Control::NsNet, libc::CLONE_NEWNET),
            (Control::NsCgroup, libc::CLONE_NEWCGROUP),
        ] {
            if without {
                findings.push(Finding::new(control, Err(needs(Control::NsUser))));
                continue;
            }
            let body = || match control {
                Control::NsNet => at(Step::Network, namespaces::bring_up_loopback()),
                _ => Ok(()),
            };
            findings.push(told(control, in_child(base | flag as u64, map, body)));
        }
        findings
    }

    fn host_uid(&self) -> Finding {
        let (first, last) = self.settings.uid_range;
        let result = if !self.facts.root {
            Err(Trouble::new(
                "an ordinary user can't give runs uids of their own: they have its own uid",
                "run it as root",
            ))
        } else {
            match IdPool::new(self.settings.uid_range).take(true) {
                None => Err(Trouble::new(
                    format!("uid_range {first}-{last} has no room for a run"),
                    "set [server] uid_range in the server's own file",
                )),
                Some(ids) => match in_child(USER, Some(IdMap::Own(ids)), || Ok(())) {
                    Ok(()) => Ok(""),
                    Err(Failed::Maps(error)) => Err(Trouble::new(
                        format!("{first} can't be mapped: {error}"),
                        "run it as root with CAP_SETUID and CAP_SETGID, and set [server] uid_range to uids that it has",
                    )),
                    Err(_) => Err(needs(Control::NsUser)),
                },
            }
        };
        Finding::new(Control::HostUid, result)
    }

    /// A whole root, as for `root = "empty"`, entered.
    fn root(&self, namespaces: &[Finding]) -> Vec<Finding> {
        let filesystem = Filesystem {
            root: Root::Empty,
            tmp: Some(Limit::At(1 << 20)),
            tmp_exec: false,
            binds: Vec::new(),
        };
        let (base, map) = self.base();
        let flags = base | (libc::CLONE_NEWNS | libc::CLONE_NEWPID) as u64;
        let decided = root::decide(&filesystem, None, self.ownership(), false);
        let result = match &decided {
            Ok(decided) => {
                in_child(flags, map, || mounts::enter_new_root(&decided.plan, Fault::NONE)).map_err(
                    |failed| match lacking_namespace(namespaces) {
                        Some(namespace) => (Control::RootReadonly, needs(namespace)),
                        None => mend::root(&failed, self.facts.root),
                    },
                )
            }
            Err(error) => Err((Control::RootReadonly, Trouble::new(error.to_string(), ""))),
        };
        match result {
            Ok(()) => vec![
                Finding::new(Control::RootReadonly, Ok("")),
                Finding::new(Control::ProcRestricted, Ok("")),
            ],
            Err((Control::ProcRestricted, trouble)) => vec![
                Finding::new(Control::RootReadonly, Err(needs(Control::ProcRestricted))),
                Finding::new(Control::ProcRestricted, Err(trouble)),
            ],
            Err((_, trouble)) => vec![
                Finding::new(Control::RootReadonly, Err(trouble)),
                Finding::new(Control::ProcRestricted, Err(needs(Control::RootReadonly))),
            ],
        }
    }

    fn ownership(&self) -> Ownership {
        match IdPool::new(self.settings.uid_range).take(true) {
            Some(ids) if self.facts.root => Ownership::Idmap { program: ids.program },
            _ => Ownership::Plain { uid: self.facts.own_ids.0 },
        }
    }

    /// As root without a user namespace, as in direct mode: what works there
    /// works inside of one too.
    fn capabilities(&self) -> Finding {
        let last = self.facts.last_capability;
        let (base, map) = self.base();
        let root = self.facts.root;
        let id = if root { self.settings.uid_range.0 } else { INSIDE_ID };
        let result = in_child(base, map, || {
            at(Step::Capabilities, identity::limit_capabilities(last, 0))?;
            at(Step::Identity, identity::become_user(id, id, root))?;
            at(Step::Capabilities, identity::drop_capabilities(last, 0))
        });
        let result = result.map(|()| "").map_err(|failed| match failed {
            Failed::Step(_) if root => Trouble::new(
                failed.to_string(),
                "run it as root with CAP_SETPCAP, CAP_SETUID and CAP_SETGID",
            ),
            _ => needs(Control::NsUser),
        });
        Finding::new(Control::CapsNone, result)
    }

    fn seccomp(&self, notify: bool) -> Finding {
        let subject = match notify {
            true => Subject::Feature(Feature::SeccompNotify),
            false => Subject::Control(Control::Seccomp),
        };
        let options = FilterOptions {
            network: Network::None,
            refuse_exec_memfd: false,
            refuse_set_id: false,
            spare_init: false,
            exec_fd: -1,
            control_fd: -1,
            notify,
        };
        // Only what the child needs to say how it went.
        let calls = [libc::SYS_exit_group, libc::SYS_sendmsg];
        let allowed = calls.map(|call| (call as u32, Allowed::Always)).into();
        let policy = SyscallPolicy { allowed, ..SyscallPolicy::default() };
        let result = match seccomp::filter::compile(&policy, &options) {
            Ok(filter) => plain(Step::Seccomp, || {
                set_no_new_privs(true)?;
                seccomp::notify::install(&filter, notify).map(drop)
            }),
            Err(error) => Err(Trouble::new(error.to_string(), "")),
        };
        let result = result.map_err(|trouble| match notify {
            true => Trouble::new(
                format!("{}: denied calls end the run, but can't be named", trouble.why),
                "run it outside of a container runtime that listens to system calls itself",
            ),
            false => Trouble::new(trouble.why, "use a kernel with CONFIG_SECCOMP_FILTER"),
        });
        Finding::of(subject, result)
    }

    fn landlock(&self) -> Finding {
        // The host's own root serves for trying as well as a jail's.
        let root = RootPlan {
            size: CString::default(),
            make_devices: false,
            tmp: None,
            service: None,
            pieces: Vec::new(),
        };
        let ruleset = landlock::Ruleset::decide(self.facts.landlock_abi, &root, Network::None);
        let Some(ruleset) = ruleset else {
            let trouble = Trouble::new(
                "the kernel has no Landlock, or it is switched off",
                "boot with lsm=landlock,… before the others of /sys/kernel/security/lsm, or add \"landlock\" to best_effort",
            );
            return Finding::new(Control::Landlock(0), Err(trouble));
        };
        let result = plain(Step::Landlock, || {
            set_no_new_privs(true)?;
            let fd = ruleset.create().map_err(|(_, error)| error)?;
            landlock::restrict_self(fd)
        });
        Finding::new(Control::Landlock(ruleset.abi), result)
    }

    fn memfd_noexec(&self) -> Finding {
        let Some(sysctl) = &self.facts.memfd_noexec else {
            return Finding::new(Control::MemfdNoexec, Ok("by the system call filter"));
        };
        let (base, map) = self.base();
        let result = in_child(base | libc::CLONE_NEWPID as u64, map, || {
            at(Step::MemfdNoexec, rustix::io::write(sysctl, b"2").map(drop))
        });
        let trouble = |failed| match failed {
            Failed::Clone(_) | Failed::Maps(_) => needs(Control::NsPid),
            _ => Trouble::new(failed.to_string(), "use Linux 6.3 or later"),
        };
        Finding::new(
            Control::MemfdNoexec,
            result.map(|()| "by the sysctl vm.memfd_noexec").map_err(trouble),
        )
    }

    fn rlimits(&self) -> Finding {
        let wanted = Limits::default();
        let result = match limits::open_files(&wanted, self.facts.open_files) {
            Err(most) => Err(Trouble::new(
                format!("no more than {most} open files can be given to a run"),
                "ulimit -Hn 65536, or LimitNOFILE=65536 in the service's unit",
            )),
            Ok(open_files) => {
                let list = limits::resource_limits(&wanted, open_files);
                plain(Step::Rlimits, || {
                    for (resource, value) in &list {
                        let both = Rlimit { current: Some(*value), maximum: Some(*value) };
                        setrlimit(*resource, both)?;
                    }
                    Ok(())
                })
            }
        };
        Finding::new(Control::Rlimits, result)
    }

    fn groups(&self) -> Finding {
        let groups = &self.facts.stuck_groups;
        let result = match groups.is_empty() {
            true => Ok(""),
            false => Err(Trouble::new(
                format!(
                    "runs would keep the supplementary groups {groups:?}, which only root can give up"
                ),
                "run it as root or as a user in no other group, or add \"groups\" to best_effort",
            )),
        };
        Finding::new(Control::Groups, result)
    }

    fn memfd_exec(&self) -> Finding {
        let result = sys::sealed_memfd(c"probe", &[&program::EXITS_WITH_0], true)
            .map_err(|error| mend::memfd_exec(error.to_string()))
            .and_then(|program| {
                let nothing = [std::ptr::null()];
                in_child(0, None, || {
                    // SAFETY: empty vectors, each with its terminating null.
                    let error = unsafe {
                        sys::execveat(program.as_raw_fd(), nothing.as_ptr(), nothing.as_ptr())
                    };
                    at(Step::Exec, Err::<(), _>(error))
                })
                .map_err(|failed| mend::memfd_exec(failed.to_string()))
            });
        Finding::of(Subject::Feature(Feature::MemfdExec), result.map(|()| ""))
    }

    fn mount_api(&self) -> Finding {
        let (base, map) = self.base();
        let result = in_child(base | libc::CLONE_NEWNS as u64, map, || {
            at(Step::Root, make_tmpfs().map(drop))
        });
        let trouble = |failed| match failed {
            Failed::Clone(_) | Failed::Maps(_) => needs(Control::NsMount),
            _ => mend::root(&failed, self.facts.root).1,
        };
        let result = result.map(|()| "").map_err(trouble);
        Finding::of(Subject::Feature(Feature::MountApi), result)
    }

    fn idmapped_mounts(&self) -> Finding {
        let subject = Subject::Feature(Feature::IdmappedMounts);
        let Ownership::Idmap { program } = self.ownership() else {
            let trouble = Trouble::new("only root can make idmapped mounts", "run it as root");
            return Finding::of(subject, Err(trouble));
        };
        let result = identity::idmap_namespace((0, 0), program).map_err(Failed::Clone).and_then(
            |namespace| {
                in_child(libc::CLONE_NEWNS as u64, None, || {
                    at(Step::Idmap, idmap_root(namespace.as_raw_fd()))
                })
            },
        );
        let trouble = |failed| match failed {
            Failed::Clone(_) | Failed::Maps(_) => needs(Control::NsUser),
            _ => Trouble::new(
                format!("the file system of / can't be idmapped: {failed}"),
                "keep the sources of binds on ext4, xfs, btrfs or tmpfs (Linux 6.3)",
            ),
        };
        let how = "on the file system of /; others may differ";
        Finding::of(subject, result.map(|()| how).map_err(trouble))
    }
}

/// The first namespace that a root needs and that was told to be lacking.
fn lacking_namespace(findings: &[Finding]) -> Option<Control> {
    [Control::NsUser, Control::NsMount, Control::NsPid].into_iter().find(|control| {
        let lacking =
            |finding: &Finding| finding.subject == Subject::Control(*control) && !finding.ok;
        findings.iter().any(lacking)
    })
}

/// Tries `body` in a child without namespaces.
fn plain(step: Step, body: impl FnOnce() -> io::Result<()>) -> Result<&'static str, Trouble> {
    in_child(0, None, || at(step, body()))
        .map(|()| "")
        .map_err(|failed| Trouble::new(failed.to_string(), "see the message of the kernel (dmesg)"))
}

/// What rests on something that was told to be lacking.
fn needs(other: Control) -> Trouble {
    Trouble::new(format!("it needs {other}"), format!("mend {other} (see there)"))
}

/// A tmpfs that is mounted nowhere, its attributes then changed.
fn make_tmpfs() -> io::Result<()> {
    let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID;
    let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
    mounts::set_attributes(std::os::fd::AsFd::as_fd(&mount), c"", libc::MOUNT_ATTR_RDONLY, None)
}

fn idmap_root(namespace: i32) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(rustix::fs::CWD, c"/", flags)?;
    mounts::set_attributes(std::os::fd::AsFd::as_fd(&tree), c"", 0, Some(namespace))
}

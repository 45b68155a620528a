//! What the launcher knows of its host and of itself; found out once, at start.

use std::{fs, io, os::fd::OwnedFd};

use super::{
    identity, landlock,
    seccomp::{self, filter::FilterOptions},
};
use crate::{
    jail::plan::{Network, SyscallPolicy},
    sys,
};

/// Facts that every launch decision rests on.
#[derive(Debug)]
pub struct Facts {
    /// Whether the launcher is root and may use a range of host uids.
    pub root: bool,
    /// Its own ids.
    pub own_ids: (u32, u32),
    /// Supplementary groups that a run would inherit (only without root).
    pub stuck_groups: Vec<u32>,
    /// The kernel's highest capability.
    pub last_capability: u8,
    /// The Landlock ABI; 0 for none.
    pub landlock_abi: u8,
    /// The open sysctl, where it may be written.
    pub memfd_noexec: Option<OwnedFd>,
    /// Hard RLIMIT_NOFILE.
    pub open_files: u64,
    /// Whether it may enter another mount namespace, which takes CAP_SYS_CHROOT as well.
    pub enters_mounts: bool,
    /// Whether a seccomp listener can be had (no outer tracer holds one).
    pub notify: bool,
    /// Processors online.
    pub processors: u32,
}

impl Facts {
    /// Asks the kernel, by trying where that is the only way.
    ///
    /// # Errors
    /// Where /proc can't be read or a child can't be made.
    pub fn find_out() -> io::Result<Self> {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        let root = uid == 0 && may_map_ids()?;
        let groups = rustix::process::getgroups()?;
        let stuck_groups = if root {
            Vec::new()
        } else {
            groups.iter().map(|group| group.as_raw()).filter(|group| *group != gid).collect()
        };
        Ok(Self {
            root,
            own_ids: (uid, gid),
            stuck_groups,
            last_capability: identity::last_capability()?,
            landlock_abi: landlock::abi_version(),
            memfd_noexec: open_memfd_noexec(),
            open_files: raise_open_files()?,
            enters_mounts: rustix::thread::capabilities(None)?
                .effective
                .contains(rustix::thread::CapabilitySet::SYS_CHROOT),
            notify: listener_available()?,
            processors: std::thread::available_parallelism()
                .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
        })
    }
}

/// Root of a user namespace may map only the ids that it has itself.
fn may_map_ids() -> io::Result<bool> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    Ok(map.lines().any(|line| {
        let mut numbers = line.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
        let (_inside, _outside, count) = (numbers.next(), numbers.next(), numbers.next());
        count.is_some_and(|count| count > 65_536)
    }))
}

/// Tries it: only one listener can watch a process, and the host's container
/// runtime may hold it already, seccomp_unotify(2).
fn listener_available() -> io::Result<bool> {
    let options = FilterOptions {
        network: Network::None,
        refuse_exec_memfd: false,
        refuse_set_id: false,
        spare_init: false,
        exec_fd: -1,
        control_fd: -1,
        notify: true,
    };
    // Everything but the deadly calls is refused; exit_group stays possible
    // because it is the one call that the child still makes.
    let policy = SyscallPolicy {
        allowed: [(libc::SYS_exit_group as u32, crate::jail::plan::Allowed::Always)].into(),
        ..SyscallPolicy::default()
    };
    let filter = seccomp::filter::compile(&policy, &options)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let pid = sys::fork()?;
    if pid == 0 {
        let installed = rustix::thread::set_no_new_privs(true)
            .map_err(io::Error::from)
            .and_then(|()| seccomp::notify::install(&filter, true));
        sys::exit_now(i32::from(installed.is_err()));
    }
    let pid = rustix::process::Pid::from_raw(pid);
    let status = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty())?;
    Ok(status.is_some_and(|(_, status)| status.exit_status() == Some(0)))
}

/// Opened for writing once: what counts is the pid namespace of who writes.
fn open_memfd_noexec() -> Option<OwnedFd> {
    fs::OpenOptions::new().write(true).open("/proc/sys/vm/memfd_noexec").ok().map(Into::into)
}

fn raise_open_files() -> io::Result<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let hard = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard })?;
    Ok(hard.unwrap_or(u64::MAX))
}

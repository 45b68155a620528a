//! What the launcher knows of its host and of itself; found out once, at start.

use std::{fs, io, os::fd::OwnedFd};

use super::{identity, landlock, seccomp};

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
            notify: seccomp::notify::listener_available()?,
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

//! Who a run is: host uids of its own, id maps, capabilities.

use std::{collections::HashMap, fs, io, os::fd::OwnedFd};

use rustix::{
    fs::{Gid, Uid},
    thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets},
};

use super::{
    blueprint::{INSIDE_ID, INSIDE_INIT_ID},
    cgroup::Lack,
    namespaces,
    plan::{Control, HostUser},
    step::{Step, StepError},
};
use crate::sys::{self, raw};

/// The two host uids (and equal gids) of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostIds {
    /// The program's.
    pub program: u32,
    /// Init's: another, so that the program can do nothing to it.
    pub init: u32,
    slot: u32,
    alone: bool,
}

/// Hands out host uids; no two runs have one in common at the same time.
///
/// A pair goes back only when its run's cgroup was seen empty: a survivor
/// would otherwise share the next run's uid. One of a run that could hand descriptors
/// to others goes to such runs only: with a descriptor somebody may still hold what is
/// counted for its uid, such as inotify's instances.
/// With a pair may come a user namespace that maps it, from the last run that had it:
/// there is nothing in one that a run could change.
#[derive(Debug)]
pub struct IdPool {
    first: u32,
    size: usize,
    free: Vec<u32>,
    /// Those that were used by runs that aren't alone.
    among_others: Vec<u32>,
    /// By slot; of free ones only.
    namespaces: HashMap<u32, OwnedFd>,
}

/// Most user namespaces that are kept.
const NAMESPACES_MAX: usize = 64;

impl IdPool {
    /// Over `range`, both ends included. Its last uid is the server's own.
    #[must_use]
    pub fn new((first, last): (u32, u32)) -> Self {
        let slots = last.saturating_sub(first) / 2;
        // Popped from the end: the lowest first.
        let free = (0..slots).rev().collect();
        Self {
            first,
            size: slots as usize,
            free,
            among_others: Vec::new(),
            namespaces: HashMap::new(),
        }
    }

    /// How many pairs there are, in use or not.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// A pair, or `None` when all are in use; `alone`: for a run that can hand nothing to
    /// others.
    pub fn take(&mut self, alone: bool) -> Option<HostIds> {
        let used = if alone { None } else { self.among_others.pop() };
        let slot = used.or_else(|| self.free.pop())?;
        let program = self.first + 2 * slot;
        Some(HostIds { program, init: program + 1, slot, alone })
    }

    /// The user namespace of a pair that was drawn, with the maps of [`IdMap::Own`].
    ///
    /// # Errors
    /// Those of clone(2) and of writing the maps.
    pub fn namespace(&mut self, ids: HostIds) -> io::Result<OwnedFd> {
        match self.namespaces.remove(&ids.slot) {
            Some(namespace) => Ok(namespace),
            None => make_namespace(ids.program, |pid| write_maps(pid, IdMap::Own(ids))),
        }
    }

    /// How many namespaces are kept.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.namespaces.len()
    }

    /// Keeps one less.
    pub fn let_one_go(&mut self) {
        if let Some(slot) = self.namespaces.keys().next().copied() {
            self.namespaces.remove(&slot);
        }
    }

    /// Gives a pair back, with its namespace if that may be used again.
    pub fn give_back(&mut self, ids: HostIds, namespace: Option<OwnedFd>) {
        if let Some(namespace) = namespace
            && self.namespaces.len() < NAMESPACES_MAX
        {
            self.namespaces.insert(ids.slot, namespace);
        }
        let back = if ids.alone { &mut self.free } else { &mut self.among_others };
        debug_assert!(!back.contains(&ids.slot), "given back twice");
        back.push(ids.slot);
    }
}

/// How the ids inside a run's user namespace map to the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdMap {
    /// By a privileged launcher: program and init to two ids of the run's own.
    Own(HostIds),
    /// By an unprivileged one: `inside` is its own uid and gid, user_namespaces(7).
    Launcher {
        /// The id inside.
        inside: (u32, u32),
    },
}

/// What keeps direct mode from running a program as `user`: a launcher without
/// root can become nobody but itself, setuid(2), and a program that ran as its
/// user after all could do what the operator can.
#[must_use]
pub fn lacking_user(user: &HostUser, root: bool, own_uid: u32) -> Option<Lack> {
    (!root && user.uid != own_uid).then(|| Lack {
        control: Control::HostUid,
        why: format!(
            "direct mode would run the program as {:?} (uid {}), and without root the dispatcher can't become another user",
            user.name, user.uid
        ),
        mend: format!(
            "run it as root, or name its own user (uid {own_uid}) as [identity] user in the policy"
        ),
    })
}

/// Writes uid_map and gid_map of a process that waits in a new user namespace.
///
/// # Errors
/// Those of writing the files: EPERM where the launcher may not map these ids.
pub fn write_maps(pid: i32, map: IdMap) -> io::Result<()> {
    let (uids, gids) = match map {
        IdMap::Own(ids) => {
            let lines = format!("{INSIDE_ID} {} 1\n{INSIDE_INIT_ID} {} 1\n", ids.program, ids.init);
            (lines.clone(), lines)
        }
        IdMap::Launcher { inside: (uid, gid) } => {
            // An unprivileged gid map is only taken where setgroups is off for good.
            fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
            let own_uid = rustix::process::geteuid().as_raw();
            let own_gid = rustix::process::getegid().as_raw();
            (format!("{uid} {own_uid} 1\n"), format!("{gid} {own_gid} 1\n"))
        }
    };
    fs::write(format!("/proc/{pid}/uid_map"), uids)?;
    fs::write(format!("/proc/{pid}/gid_map"), gids)
}

/// A user namespace that maps the on-disk ids `owner` to the run's program:
/// what an idmapped mount is made with, mount_setattr(2).
///
/// # Errors
/// Those of clone(2) and of writing the maps.
pub fn idmap_namespace((uid, gid): (u32, u32), program: u32) -> io::Result<OwnedFd> {
    make_namespace(program, |pid| {
        fs::write(format!("/proc/{pid}/uid_map"), format!("{uid} {program} 1\n"))?;
        fs::write(format!("/proc/{pid}/gid_map"), format!("{gid} {program} 1\n"))
    })
}

/// A user namespace, by way of a child that is in it until `map` has mapped it.
///
/// Its owner is `owner`, a host uid that nobody has outside of it. What is counted for
/// each user in it, such as inotify's instances, is counted for its owner as well
/// (`inc_ucount`, kernel/ucount.c): were that root, one run could use up root's share.
fn make_namespace(owner: u32, map: impl FnOnce(i32) -> io::Result<()>) -> io::Result<OwnedFd> {
    let enter = || {
        enter_namespace_of(owner).map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            StepError { step: Step::UserNamespace, index: 0, errno }
        })
    };
    let hold = |pid| {
        map(pid)?;
        Ok(fs::File::open(format!("/proc/{pid}/ns/user"))?.into())
    };
    namespaces::make(0, enter, hold).map_err(|error| io::Error::from_raw_os_error(error.errno))
}

/// Only system calls.
fn enter_namespace_of(owner: u32) -> io::Result<()> {
    // Capabilities stay: where unprivileged users may make none, this isn't one of them.
    rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    let same = usize::MAX;
    raw::numbers(libc::SYS_setresuid, &[same, owner as usize, same])?;
    sys::unshare(rustix::thread::UnshareFlags::NEWUSER)
}

/// Changes all user and group ids and clears the supplementary groups. Only
/// system calls.
///
/// # Errors
/// Those of setgroups(2), setresgid(2), setresuid(2).
pub fn become_user(uid: u32, gid: u32, clear_groups: bool) -> io::Result<()> {
    if clear_groups {
        rustix::thread::set_thread_groups(&[])?;
    }
    // The group first: afterwards we may not any more.
    let gid = Gid::from_raw(gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    let uid = Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// Before [`become_user`]: nothing but `keep` can ever be gained again, by
/// exec or by changes of uid, capabilities(7). Only system calls.
///
/// # Errors
/// Those of prctl(2): it takes CAP_SETPCAP.
pub fn limit_capabilities(last: u8, keep: u64) -> io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    for number in 0..=last {
        if keep & (1 << number) == 0 {
            drop_from_bounding_set(number)?;
        }
    }
    // Without the fix-up, leaving uid 0 takes no capability away: what is left
    // is decided by `drop_capabilities` alone, whichever uid we come from.
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED,
    )?;
    Ok(())
}

/// After [`become_user`]: takes every capability but `keep` out of every set.
/// Only system calls.
///
/// # Errors
/// Those of capset(2) and prctl(2).
pub fn drop_capabilities(last: u8, keep: u64) -> io::Result<()> {
    let kept = CapabilitySet::from_bits_retain(keep);
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: kept },
    )?;
    for number in (0..=last).filter(|number| keep & (1 << number) != 0) {
        raise_ambient(number)?;
    }
    Ok(())
}

fn drop_from_bounding_set(number: u8) -> io::Result<()> {
    let arguments = [libc::PR_CAPBSET_DROP as usize, usize::from(number), 0, 0, 0];
    raw::numbers(libc::SYS_prctl, &arguments).map(drop)
}

fn raise_ambient(number: u8) -> io::Result<()> {
    let raise = libc::PR_CAP_AMBIENT_RAISE as usize;
    let arguments = [libc::PR_CAP_AMBIENT as usize, raise, usize::from(number), 0, 0];
    raw::numbers(libc::SYS_prctl, &arguments).map(drop)
}

/// The highest capability number that this kernel knows.
///
/// # Errors
/// Those of reading `/proc/sys/kernel/cap_last_cap`.
pub fn last_capability() -> io::Result<u8> {
    let text = fs::read_to_string("/proc/sys/kernel/cap_last_cap")?;
    text.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_root_a_program_runs_as_the_launchers_user_or_not_at_all() {
        let user = |uid| HostUser { name: "somebody".into(), uid, gid: uid };
        assert_eq!(lacking_user(&user(65534), true, 0), None);
        assert_eq!(lacking_user(&user(1000), false, 1000), None);
        let lack = lacking_user(&user(65534), false, 1000).unwrap();
        assert_eq!(lack.control, Control::HostUid);
        assert!(lack.why.contains("\"somebody\" (uid 65534)"), "{}", lack.why);
        assert!(lack.mend.contains("uid 1000"), "{}", lack.mend);
        // Root of a user namespace that maps too little to become anybody else.
        assert!(lacking_user(&user(65534), false, 0).is_some());
    }

    #[test]
    fn no_two_runs_share_an_id_and_the_last_is_kept_for_the_server() {
        let mut pool = IdPool::new((1000, 1006));
        let taken: Vec<_> = std::iter::from_fn(|| pool.take(true)).collect();
        let mut ids: Vec<_> = taken.iter().flat_map(|ids| [ids.program, ids.init]).collect();
        ids.sort_unstable();
        assert_eq!(ids, [1000, 1001, 1002, 1003, 1004, 1005]);
        pool.give_back(taken[1], None);
        assert_eq!(pool.take(true), Some(taken[1]));
        assert_eq!(pool.take(true), None);
    }

    #[test]
    fn what_others_may_hold_something_of_is_not_for_a_run_that_is_alone() {
        let mut pool = IdPool::new((1000, 1004));
        let shared = pool.take(false).unwrap();
        pool.give_back(shared, None);
        let alone = pool.take(true).unwrap();
        assert_ne!(alone.program, shared.program);
        assert_eq!(pool.take(true), None);
        assert_eq!(pool.take(false), Some(shared));
        pool.give_back(alone, None);
        assert_eq!(pool.take(false).map(|ids| ids.program), Some(alone.program));
    }
}

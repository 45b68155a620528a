//! Empty roots, used again.
//!
//! A jail of `root = "empty"` shows a program nothing but /proc, /dev and /tmp. The root
//! itself and /dev are two file systems of ours that no program can change: they are
//! mounted read-only, in a mount namespace of the launcher's user namespace, in which no
//! program has a capability. So the launcher makes them once, in a mount namespace of
//! their own that nobody stays in, and each serves one jail at a time: init works in a
//! copy of that namespace, to which it adds the run's own /proc and /tmp. What two jails
//! that shared one could do to each other is lock its inodes, such as /dev/null. (They
//! could also see that it is the same one, by its device number.)
//!
//! What a run could leave behind is therefore a lock. Of its processes nobody holds one,
//! once it is gone; but a descriptor may have been on its way in a socket that was in its
//! own queue, unix(7), and the kernel closes such ones when it finds them, some time after
//! the sockets. So each lock is tried before a root is used again: whoever is gone can't
//! take another.

use std::{
    collections::VecDeque,
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::fs::{FlockOperation, Mode, OFlags};

use super::{
    mounts, namespaces,
    step::{Fault, StepError},
};
use crate::sys;

/// Most that are kept for later.
const KEPT_MAX: usize = 64;
/// Bytes that its file system may hold: it has directories only.
const SIZE: &CStr = c"64k";

/// A mount namespace with nothing in it but an empty root and its /dev.
#[derive(Debug)]
pub struct EmptyRoot {
    namespace: OwnedFd,
    /// Its directories that a program can open: / and /dev.
    directories: [OwnedFd; 2],
    with_tmp: bool,
}

impl EmptyRoot {
    /// How many descriptors one has open.
    pub const DESCRIPTORS: usize = 3;

    /// Whether nobody holds a lock on anything in it; not, where that can't be tried.
    fn is_unlocked(&self) -> bool {
        let [_, dev] = &self.directories;
        let open = |name| {
            // To be locked it need not be written to; /dev/full and others don't mind.
            rustix::fs::openat(dev, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        };
        self.directories.iter().all(|directory| unlocked(directory.as_fd()))
            && mounts::DEVICES
                .iter()
                .all(|(name, ..)| open(*name).is_ok_and(|node| unlocked(node.as_fd())))
    }
}

/// Both kinds that a descriptor can hold, flock(2) and F_OFD_SETLK of fcntl(2): the
/// third belongs to a process and goes with it. Leases are for the owner, which is root.
/// So are the hints of F_SET_RW_HINT; kernels of before the end of 2024 take them from
/// anybody.
fn unlocked(file: BorrowedFd<'_>) -> bool {
    let taken = rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive);
    let released = taken.and_then(|()| rustix::fs::flock(file, FlockOperation::Unlock));
    released.is_ok()
        && sys::open_file_lock(file).is_ok_and(|lock| !lock)
        && sys::write_hint(file).is_ok_and(|hint| hint == 0)
}

impl AsFd for EmptyRoot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

/// Those that wait for their next run.
#[derive(Debug, Default)]
pub struct EmptyRoots {
    /// The longest kept first.
    kept: VecDeque<EmptyRoot>,
}

impl EmptyRoots {
    /// How many are kept.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Keeps one less.
    pub fn let_one_go(&mut self) {
        self.kept.pop_front();
    }

    /// One that nobody is in, and in which nothing is locked; `with_tmp`: with a place for
    /// /tmp. One that is locked is none of use.
    pub fn take(&mut self, with_tmp: bool) -> Option<EmptyRoot> {
        let index = self.kept.iter().position(|root| root.with_tmp == with_tmp)?;
        self.kept.remove(index).filter(EmptyRoot::is_unlocked)
    }

    /// Takes one back whose run is gone.
    pub fn give_back(&mut self, root: EmptyRoot) {
        if self.kept.len() < KEPT_MAX {
            self.kept.push_back(root);
        }
    }
}

/// Makes one.
///
/// # Errors
/// The step that failed: those of [`mounts::enter_empty_root`], or of the clone.
pub fn make(with_tmp: bool, fault: Fault) -> Result<EmptyRoot, StepError> {
    let enter = || mounts::enter_empty_root(SIZE, with_tmp, fault);
    namespaces::make(libc::CLONE_NEWNS as u64, enter, |pid| hold(pid, with_tmp))
}

/// Holds the root that the child is in.
fn hold(pid: i32, with_tmp: bool) -> io::Result<EmptyRoot> {
    let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?.into();
    let root = File::open(format!("/proc/{pid}/root"))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dev = rustix::fs::openat(&root, c"dev", flags, Mode::empty())?;
    Ok(EmptyRoot { namespace, directories: [root.into(), dev], with_tmp })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

    use super::*;

    /// In a thread of its own, which stays in the root.
    fn inside(root: EmptyRoot, act: impl FnOnce() + Send + 'static) {
        let enter = move || {
            // SAFETY: only this thread's working directory and root are its own from here on.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.unwrap();
            move_into_link_name_space(root.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
            act();
        };
        std::thread::spawn(enter).join().unwrap();
    }

    fn names(directory: &str) -> BTreeSet<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn there_is_nothing_in_it_and_nothing_can_be_put_there() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not here: mounts take root");
            return;
        }
        for (with_tmp, expected) in [(true, "dev proc tmp"), (false, "dev proc")] {
            let root = make(with_tmp, Fault::NONE).unwrap();
            inside(root, move || {
                let expected: BTreeSet<_> = expected.split(' ').map(str::to_owned).collect();
                assert_eq!(names("/"), expected);
                let devices: BTreeSet<_> = mounts::DEVICES
                    .iter()
                    .map(|(name, ..)| name.to_str().unwrap().to_owned())
                    .collect();
                assert_eq!(names("/dev"), devices);
                assert!(names("/proc").is_empty());
                std::fs::write("/dev/null", "x").unwrap();
                for file in ["/x", "/dev/x", "/proc/x", "/tmp/x"] {
                    assert!(std::fs::write(file, "x").is_err(), "{file}");
                }
                let mounts = rustix::fs::statvfs("/").unwrap().f_flag;
                assert!(mounts.contains(rustix::fs::StatVfsMountFlags::RDONLY));
            });
        }
    }

    #[test]
    fn one_in_which_something_is_locked_is_of_no_use() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not here: mounts take root");
            return;
        }
        let mut roots = EmptyRoots::default();
        roots.give_back(make(false, Fault::NONE).unwrap());
        assert!(roots.take(true).is_none(), "it has no place for /tmp");
        let root = roots.take(false).unwrap();
        assert_eq!(roots.kept(), 0);
        for name in [".", "dev", "dev/null", "dev/urandom"] {
            for whole in [true, false] {
                let root = make(false, Fault::NONE).unwrap();
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&root.directories[0], name, flags, Mode::empty());
                let file = file.unwrap();
                if whole {
                    rustix::fs::flock(&file, FlockOperation::LockShared).unwrap();
                } else {
                    sys::lock_open_file(file.as_fd()).unwrap();
                }
                assert!(!root.is_unlocked(), "{name} {whole}");
                roots.give_back(root);
                assert!(roots.take(false).is_none(), "{name} {whole}");
                assert_eq!(roots.kept(), 0);
            }
        }
        assert!(root.is_unlocked());
    }
}

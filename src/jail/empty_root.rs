//! Empty roots, used again.
//!
//! A jail of `root = "empty"` shows a program nothing but /proc, /dev and /tmp. The root
//! itself and /dev are two file systems of ours that no program can change: they are
//! mounted read-only, in a mount namespace of the launcher's user namespace, in which no
//! program has a capability. So the launcher makes them once, in a mount namespace of
//! their own that nobody stays in, and each serves one jail at a time: init works in a
//! copy of that namespace, to which it adds the run's own /proc and /tmp. What two jails
//! that shared one could see of each other is locks on its inodes, such as /dev/null.
//!
//! What a run could leave behind is therefore a lock that somebody still holds: of its
//! processes nobody, once it is gone, but a descriptor may be on its way in a socket that
//! is in its own queue, unix(7). A root is used again only where the network namespace
//! of its run was seen without sockets, as [`super::network`] does.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{
    mounts,
    namespaces::{self, Cloned},
    step::{Fault, REPORT_LEN, Report, Step, StepError},
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
    with_tmp: bool,
}

impl EmptyRoot {
    /// How many descriptors one has open.
    pub const DESCRIPTORS: usize = 1;
}

impl AsFd for EmptyRoot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

/// Those that wait for their next run.
#[derive(Debug, Default)]
pub struct EmptyRoots {
    kept: Vec<EmptyRoot>,
}

impl EmptyRoots {
    /// How many are kept.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Keeps one less.
    pub fn let_one_go(&mut self) {
        self.kept.pop();
    }

    /// One that nobody is in; `with_tmp`: with a place for /tmp.
    pub fn take(&mut self, with_tmp: bool) -> Option<EmptyRoot> {
        let index = self.kept.iter().rposition(|root| root.with_tmp == with_tmp)?;
        Some(self.kept.swap_remove(index))
    }

    /// Takes one back whose run is gone, and of whose locks nobody holds any.
    pub fn give_back(&mut self, root: EmptyRoot) {
        if self.kept.len() < KEPT_MAX {
            self.kept.push(root);
        }
    }
}

/// Makes one, by way of a child that is in it until it can be held.
///
/// # Errors
/// The step that failed: those of [`mounts::enter_empty_root`], or of the clone.
pub fn make(with_tmp: bool, fault: Fault) -> Result<EmptyRoot, StepError> {
    let failed = |error: io::Error| {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        StepError { step: Step::Clone, index: 2, errno }
    };
    let (ours, theirs) = sys::seqpacket_pair().map_err(failed)?;
    // SAFETY: the launcher has one thread, and the child makes only system calls.
    let cloned = unsafe { namespaces::clone(libc::CLONE_NEWNS as u64, None) };
    let (pid, pidfd) = match cloned.map_err(failed)? {
        Cloned::Child => {
            // Our copy of the parent's end must go, or we would never see it close.
            drop(ours);
            build(with_tmp, fault, &theirs)
        }
        Cloned::Parent(pid, pidfd) => (pid, pidfd),
    };
    drop(theirs);
    let made = hear(&ours).and_then(|()| {
        let namespace = File::open(format!("/proc/{pid}/ns/mnt")).map_err(failed)?;
        Ok(EmptyRoot { namespace: namespace.into(), with_tmp })
    });
    drop(ours); // the child exits
    let reaped = rustix::process::waitid(
        rustix::process::WaitId::PidFd(pidfd.as_fd()),
        rustix::process::WaitIdOptions::EXITED,
    );
    reaped.map_err(|error| failed(error.into()))?;
    made
}

/// The child's part: builds, tells, and stays until the parent has closed.
fn build(with_tmp: bool, fault: Fault, control: &OwnedFd) -> ! {
    let report = match mounts::enter_empty_root(SIZE, with_tmp, fault) {
        Ok(()) => Report::Ready,
        Err(error) => Report::Failed(error),
    };
    // Where it can't be told, the parent sees the end.
    sys::send_packet(control, &report.encode(), &[]).ok();
    rustix::io::read(control, &mut [0]).ok();
    sys::exit_now(0)
}

fn hear(control: &OwnedFd) -> Result<(), StepError> {
    let mut bytes = [0; REPORT_LEN];
    let length = rustix::io::read(control, &mut bytes).unwrap_or(0);
    match Report::decode(&bytes[..length]) {
        Some(Report::Ready) => Ok(()),
        Some(Report::Failed(error)) => Err(error),
        _ => Err(StepError { step: Step::Clone, index: 2, errno: libc::EPROTO }),
    }
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
    fn one_without_a_place_for_tmp_is_not_taken_for_one_with() {
        let namespace = || File::open("/proc/self/ns/mnt").unwrap().into();
        let mut roots = EmptyRoots::default();
        roots.give_back(EmptyRoot { namespace: namespace(), with_tmp: false });
        assert!(roots.take(true).is_none());
        assert!(roots.take(false).is_some());
        assert_eq!(roots.kept(), 0);
    }
}

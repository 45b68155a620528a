//! Namespaces: clone3(2) of init, and the loopback interface.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, FromRawFd, OwnedFd},
};

use rustix::{
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
    thread::UnshareFlags,
};

use super::{
    plan::{Control, Mode, Network},
    step::{REPORT_LEN, Report, Step, StepError},
};
use crate::sys;

/// The namespaces a run gets, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespaces {
    /// `CLONE_NEW*` for clone3.
    pub outer: u64,
    /// Entered once the root stands.
    pub inner: UnshareFlags,
    /// The controls that they are.
    pub controls: Vec<Control>,
}

/// Decides which namespaces are made at the clone and which after.
///
/// As root, the user namespace comes last: the mount, pid, ipc, uts and net
/// namespaces then belong to the launcher's user namespace, where the program
/// has no capability even if it were to gain all in its own. Capabilities that
/// a policy keeps would mean nothing there, so with `keeps_capabilities` the
/// ipc, uts and net namespaces are made inside. Without root it comes first:
/// nothing else can be made without it.
#[must_use]
pub fn decide(mode: Mode, network: Network, root: bool, keeps_capabilities: bool) -> Namespaces {
    const USER: u64 = libc::CLONE_NEWUSER as u64;
    if mode != Mode::Jail {
        let outer = libc::CLONE_NEWPID as u64 | if root { 0 } else { USER };
        let mut controls = vec![Control::NsPid];
        if !root {
            controls.push(Control::NsUser);
        }
        return Namespaces { outer, inner: UnshareFlags::empty(), controls };
    }
    let mut private = (libc::CLONE_NEWIPC | libc::CLONE_NEWUTS) as u64;
    let mut controls = vec![
        Control::NsUser,
        Control::NsMount,
        Control::NsPid,
        Control::NsIpc,
        Control::NsUts,
        Control::NsCgroup,
    ];
    if network != Network::Host {
        private |= libc::CLONE_NEWNET as u64;
        controls.push(Control::NsNet);
    }
    let always = (libc::CLONE_NEWNS | libc::CLONE_NEWPID) as u64;
    let (outer, inner) = match (root, keeps_capabilities) {
        (false, _) => (USER | always | private, 0),
        (true, false) => (always | private, USER),
        (true, true) => (always, USER | private),
    };
    Namespaces { outer, inner: UnshareFlags::from_bits_retain(inner as u32), controls }
}

/// What clone3 made.
#[derive(Debug)]
pub enum Cloned {
    /// We are the child.
    Child,
    /// We are the launcher: the child's pid and pidfd.
    Parent(i32, OwnedFd),
}

/// fork with namespaces, a pidfd, and (cgroup v2) straight into a cgroup.
///
/// # Safety
/// The calling process must have one thread: the child gets a copy of its
/// memory as it stands, locks included. The child may only make system calls
/// until it execs or exits.
///
/// # Errors
/// Those of clone3(2): EPERM without the privilege, ENOSPC over a namespace
/// limit, EAGAIN over a task limit, EBUSY or EOPNOTSUPP for the cgroup.
pub unsafe fn clone(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: i32 = -1;
    let mut args = CloneArgs {
        flags: namespaces | libc::CLONE_PIDFD as u64,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = std::os::fd::AsRawFd::as_raw_fd(&cgroup) as u64;
    }
    // SAFETY: args and the pidfd it points to outlive the call; without
    // CLONE_VM and a stack it behaves as fork, which the caller allows.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match pid {
        0 => Ok(Cloned::Child),
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel just made this descriptor for us.
        pid => Ok(Cloned::Parent(pid as i32, unsafe { OwnedFd::from_raw_fd(pidfd) })),
    }
}

/// Makes namespaces for later by way of a child: it has those of `flags` from its clone,
/// enters more by `enter`, and is there until `hold`, given its pid, has a hold on them.
///
/// `enter` may only make system calls; see [`clone`].
///
/// # Errors
/// What `enter` said, or [`Step::Clone`] with the errno of anything else.
pub fn make<T>(
    flags: u64,
    enter: impl FnOnce() -> Result<(), StepError>,
    hold: impl FnOnce(i32) -> io::Result<T>,
) -> Result<T, StepError> {
    let failed = |error: io::Error| {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        StepError { step: Step::Clone, index: 2, errno }
    };
    let (ours, theirs) = sys::seqpacket_pair().map_err(failed)?;
    // SAFETY: the launcher has one thread, and the child makes only system calls.
    let (pid, pidfd) = match unsafe { clone(flags, None) }.map_err(failed)? {
        Cloned::Child => {
            // Our copy of the parent's end must go, or we would never see it close.
            drop(ours);
            enter_and_stay(enter, &theirs)
        }
        Cloned::Parent(pid, pidfd) => (pid, pidfd),
    };
    drop(theirs);
    let made = hear_entered(&ours).and_then(|()| hold(pid).map_err(failed));
    // Not by closing our end: where others fork too, they have copies of it.
    pidfd_send_signal(&pidfd, Signal::KILL).map_err(|error| failed(error.into()))?;
    waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)
        .map_err(|error| failed(error.into()))?;
    made
}

/// The child's part. It ends at the latest when the launcher does.
fn enter_and_stay(enter: impl FnOnce() -> Result<(), StepError>, control: &OwnedFd) -> ! {
    let report = enter().map_or_else(Report::Failed, |()| Report::Ready);
    // Where it can't be told, the launcher sees the end.
    sys::send_packet(control, &report.encode(), &[]).ok();
    rustix::io::read(control, &mut [0]).ok();
    sys::exit_now(0)
}

fn hear_entered(control: &OwnedFd) -> Result<(), StepError> {
    let mut bytes = [0; REPORT_LEN];
    let length = rustix::io::read(control, &mut bytes).unwrap_or(0);
    match Report::decode(&bytes[..length]) {
        Some(Report::Ready) => Ok(()),
        Some(Report::Failed(error)) => Err(error),
        _ => Err(StepError { step: Step::Clone, index: 2, errno: libc::EPROTO }),
    }
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args`, clone(2).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Brings up lo in the current network namespace, netdevice(7). Only system calls.
///
/// # Errors
/// Those of socket(2) and ioctl(2).
pub fn bring_up_loopback() -> io::Result<()> {
    use std::os::fd::AsRawFd as _;

    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is an initialised ifreq and outlives the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jail_has_every_namespace_whoever_makes_it() {
        for root in [true, false] {
            for keeps in [true, false] {
                let made = decide(Mode::Jail, Network::None, root, keeps);
                let all = made.outer | u64::from(made.inner.bits());
                for flag in [
                    libc::CLONE_NEWUSER,
                    libc::CLONE_NEWNS,
                    libc::CLONE_NEWPID,
                    libc::CLONE_NEWIPC,
                    libc::CLONE_NEWUTS,
                    libc::CLONE_NEWNET,
                ] {
                    assert_ne!(all & flag as u64, 0, "{flag:#x} root={root} keeps={keeps}");
                }
                assert_eq!(made.outer & u64::from(made.inner.bits()), 0);
            }
        }
    }

    #[test]
    fn the_hosts_network_is_not_reported_as_a_namespace() {
        let made = decide(Mode::Jail, Network::Host, true, false);
        assert_eq!(made.outer & libc::CLONE_NEWNET as u64, 0);
        assert!(!made.controls.contains(&Control::NsNet));
    }

    #[test]
    fn direct_mode_has_a_pid_namespace_only() {
        let made = decide(Mode::Direct, Network::Host, true, false);
        assert_eq!(made.outer, libc::CLONE_NEWPID as u64);
        assert_eq!(made.controls, [Control::NsPid]);
    }
}

//! Starting the dispatcher's other processes.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use crate::{jail::identity, sys};

/// Where a child finds its socket to us.
const SOCKET_FD: i32 = 3;

/// A running child, its pidfd, and our end of the socket to it.
#[derive(Debug)]
pub struct Child {
    /// Its name, as `ps` shows it.
    pub name: &'static str,
    /// Its process id.
    pub pid: Pid,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// Our end of the socketpair.
    pub socket: OwnedFd,
    /// When it was started.
    pub started: Instant,
}

/// Whom a child runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// As we do.
    Keep,
    /// As this uid and gid, with no group and no capability.
    Drop(u32),
}

/// This program's file, held open: a new version put in its place on disk is
/// started only by a new monitor, so that all processes speak the same protocol.
#[derive(Debug)]
pub struct Executable(OwnedFd);

impl Executable {
    /// Opens the running program.
    ///
    /// # Errors
    /// Those of open(2) and fcntl(2).
    pub fn own() -> io::Result<Self> {
        use rustix::fs::{CWD, Mode, OFlags};
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, c"/proc/self/exe", flags, Mode::empty())?;
        // Out of the way of the numbers that a child's own descriptors get.
        Ok(Self(rustix::io::fcntl_dupfd_cloexec(&fd, 100)?))
    }

    /// Starts it under another name, with a socket to us at descriptor 3.
    ///
    /// # Errors
    /// Those of socketpair(2), fork(2), exec(2) and of giving up privilege.
    pub fn start(
        &self,
        name: &'static str,
        arguments: &[&std::ffi::OsStr],
        privilege: Privilege,
    ) -> io::Result<Child> {
        let (ours, theirs) = sys::seqpacket_pair()?;
        let mut command = Command::new(format!("/proc/self/fd/{}", self.0.as_raw_fd()));
        command.arg0(name).args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        let monitor = std::process::id();
        let socket = theirs.as_raw_fd();
        // SAFETY: we have one thread, so the forked child may do what it likes;
        // it makes only system calls all the same.
        unsafe {
            command.pre_exec(move || prepare(socket, privilege, monitor));
        }
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Child { name, pid, pidfd, socket: ours, started: Instant::now() })
    }
}

fn prepare(socket: i32, privilege: Privilege, monitor: u32) -> io::Result<()> {
    // A session of its own: a terminal's Ctrl-C is for the monitor alone.
    rustix::process::setsid()?;
    sys::default_signals()?;
    sys::dup_to_inherited(socket, SOCKET_FD)?;
    if let Privilege::Drop(id) = privilege {
        let last = identity::last_capability()?;
        identity::limit_capabilities(last, 0)?;
        identity::become_user(id, id, true)?;
        identity::drop_capabilities(last, 0)?;
        rustix::thread::set_no_new_privs(true)?;
    }
    // Last, because a change of credentials clears it. If the monitor died
    // before this line nobody would tell us: so look.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get() as u32) != Some(monitor) {
        return Err(io::Error::from(io::ErrorKind::BrokenPipe));
    }
    Ok(())
}

impl Child {
    /// Kills it at once.
    pub fn kill(&self) {
        // ESRCH: it is dead already.
        rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL).ok();
    }

    /// How it ended, if it has: "exited with 1", "was killed by signal 9".
    pub fn ended(&self) -> Option<String> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options).ok()??;
        Some(match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("exited with {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended".into(),
        })
    }

    /// Waits for its end at most this long; `None` when it is still there.
    pub fn wait(&self, at_most: Duration) -> Option<String> {
        if !readable(self.pidfd.as_fd(), at_most) {
            return None;
        }
        self.ended()
    }

    /// Sends it one message.
    ///
    /// # Errors
    /// Those of encoding and of sendmsg(2): it is gone.
    pub fn send(
        &self,
        message: &impl serde::Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let bytes = postcard::to_stdvec(message)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        sys::send_packet(&self.socket, &bytes, descriptors)
    }
}

/// Waits until a descriptor is readable, at most this long.
pub fn readable(fd: BorrowedFd<'_>, at_most: Duration) -> bool {
    let deadline = Instant::now() + at_most;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

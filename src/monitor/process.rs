//! Our own executable started again under another name, with little in its hands.

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::{Errno, fcntl_dupfd_cloexec},
    process::{
        Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, pidfd_send_signal,
        set_parent_process_death_signal, setsid,
    },
};

use super::privilege;
use crate::sys;

/// Where a child finds the first descriptor that it is given.
pub const FIRST_FD: RawFd = 3;

/// Descriptors that a child gets are held at or above this number meanwhile, so
/// that putting one into its place can't destroy another.
const HELD_ABOVE: RawFd = 64;

/// Variables that are the monitor's own affair, systemd's `sd_notify(3)` and `sd_listen_fds(3)`.
const PRIVATE_VARIABLES: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
];

/// This program's own file. Held open from the start: what is started later is
/// the same program, also after the file was replaced by a newer one.
#[derive(Debug)]
pub struct Executable(OwnedFd);

impl Executable {
    /// Opens it.
    ///
    /// # Errors
    /// Those of open(2); /proc has to be mounted.
    pub fn own() -> io::Result<Self> {
        let file = std::fs::File::open("/proc/self/exe")?;
        Ok(Self(fcntl_dupfd_cloexec(&file, HELD_ABOVE)?))
    }
}

/// A process to be started.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// argv[0], by which it knows what it is to do.
    pub name: &'static str,
    /// What follows argv[0].
    pub arguments: &'a [&'a OsStr],
    /// Its descriptors from [`FIRST_FD`] on.
    pub descriptors: &'a [BorrowedFd<'a>],
    /// What it may do.
    pub privilege: Privilege,
}

/// What a child may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// All that its parent may.
    Kept,
    /// All that its parent may, but no more by any exec.
    Bounded,
    /// Nothing, [`privilege::give_up`]; as this user, if there is one.
    None {
        /// User and group id.
        id: Option<u32>,
    },
}

/// A running child. Dropping it does not end it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
}

impl Process {
    /// Starts a process in a session of its own (a terminal's signals are for
    /// the monitor alone), which dies when the calling *thread* does.
    ///
    /// # Errors
    /// Those of fork(2), of each step in the child, and of exec(2).
    pub fn start(executable: &Executable, spawn: &Spawn<'_>) -> io::Result<Self> {
        let held = spawn
            .descriptors
            .iter()
            .map(|fd| fcntl_dupfd_cloexec(fd, HELD_ABOVE))
            .collect::<Result<Vec<_>, _>>()?;
        let program = format!("/proc/self/fd/{}", executable.0.as_raw_fd());
        let mut command = Command::new(program);
        command.arg0(spawn.name).args(spawn.arguments).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        for variable in PRIVATE_VARIABLES {
            command.env_remove(variable);
        }
        let sources: Vec<RawFd> = held.iter().map(AsRawFd::as_raw_fd).collect();
        let (privilege, parent) = (spawn.privilege, getpid());
        // `Command` hears of errors by a pipe of its own, which must not lie
        // where a descriptor is put.
        let reserved = occupy(held.len())?;
        let prepare = move || prepare(&sources, privilege, parent);
        let mut child = sys::spawn_prepared(&mut command, prepare)?;
        drop(reserved);
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { child, pidfd }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error.into())
            }
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGKILL. One that has ended already is no error.
    ///
    /// # Errors
    /// Those of pidfd_send_signal(2) but ESRCH.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// Those of waitpid(2).
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits for its end, `limit` long at most.
    ///
    /// # Errors
    /// Those of poll(2) and waitpid(2).
    pub fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = left.try_into().map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&left)) {
                Ok(_) => return self.ended(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Readable once the process has ended.
impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// How a process ended, for people: `was killed by signal 9`.
#[must_use]
pub fn told(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => format!("ended: {status}"),
    }
}

/// Holds the numbers from [`FIRST_FD`] on, `count` of them, so that nothing new
/// is opened there. Those that are in use already are held by that.
fn occupy(count: usize) -> io::Result<Vec<OwnedFd>> {
    let null = std::fs::File::open("/dev/null")?;
    (0..count).map(|_| Ok(fcntl_dupfd_cloexec(&null, FIRST_FD)?)).collect()
}

/// In the child, between fork and exec: only system calls.
fn prepare(sources: &[RawFd], privilege: Privilege, parent: Pid) -> io::Result<()> {
    setsid()?;
    let mut next = FIRST_FD;
    for source in sources {
        sys::dup_to_inherited(*source, next)?;
        next += 1;
    }
    // Whatever this process inherited without the flag ends here. It closes at
    // exec only: until then the executable and the pipe for errors are needed.
    sys::close_on_exec_from(next.unsigned_abs())?;
    match privilege {
        Privilege::Kept => {}
        Privilege::Bounded => rustix::thread::set_no_new_privs(true)?,
        Privilege::None { id } => privilege::give_up(id)?,
    }
    // After the last change of credentials, which clears it.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Our parent may have died before that.
    if getppid() != Some(parent) {
        return Err(Errno::SRCH.into());
    }
    Ok(())
}

//! What the server and the monitor say to the launcher, and what it answers.
//!
//! One postcard-encoded message per SOCK_SEQPACKET packet, file descriptors as
//! SCM_RIGHTS. The launcher trusts none of it: every [`Launch`] is checked
//! against the templates that it got from the monitor.

use std::{
    os::fd::OwnedFd,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{
    cgroup::Lack,
    plan::{Control, Mode, TemplateId},
};
use crate::{
    names::{Digest, RunId},
    units::MilliCpus,
};

/// Longest encoded message in bytes. Large things (argv, environment,
/// executable, input) travel as memfds.
pub const MESSAGE_MAX: usize = 16 << 10;

/// Most bytes of argv and environment together, as execve(2) counts their text.
pub const CALL_BLOB_MAX: usize = 1 << 20;

/// Monitor → launcher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromMonitor {
    /// First message, once. No descriptors.
    Configure(LauncherConfig),
    /// One descriptor: a sealed memfd holding a postcard `TemplateSet`.
    Policies,
    /// One descriptor: the launcher's end of a fresh socketpair with the server.
    /// Replaces the earlier one; what ran for that one is killed.
    Server,
}

/// The launcher's share of the server's own file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LauncherConfig {
    /// Tells this dispatcher's cgroups from others': `dispatcher.<instance>`.
    pub instance: String,
    /// `[server] cgroup_parent`; empty: the delegated or own one.
    pub cgroup_parent: String,
    /// `[server] uid_range`: first and last host uid for jails.
    pub uid_range: (u32, u32),
}

/// Server → launcher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromServer {
    /// Start a run. Descriptors, in this order: see [`LaunchFds`].
    Launch(Launch),
    /// End a run; answered by its `Ended`. Unknown ids are ignored: it ended meanwhile.
    Stop {
        /// Which.
        run: RunId,
        /// Why; becomes the verdict if nothing stopped it earlier.
        cause: StopCause,
    },
    /// Connect to the service that a run is; answered by [`FromLauncher::Connected`], for one
    /// run in the order of the questions. The launcher answers as soon as the program is about
    /// to be exec'd, or the run ends. Only for a run whose template
    /// [listens](super::plan::Template::listens).
    Connect {
        /// Which.
        run: RunId,
        /// To which of its sockets.
        to: ServiceSocket,
    },
    /// Look at a running run; answered by [`FromLauncher::Seen`].
    Look {
        /// Which.
        run: RunId,
    },
    /// Stop a run from using any processor time, or let it go on. Not answered; nothing
    /// where the run's cgroup can't (it takes one of v2), or its program isn't running.
    Freeze {
        /// Which.
        run: RunId,
        /// Stop, or go on.
        frozen: bool,
    },
}

/// Where a service listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ServiceSocket {
    /// At the socket that it inherited as descriptor 3.
    Inherited,
    /// At the path that it was told in [`SOCKET_VARIABLE`], which it bound by itself.
    Own,
}

/// The environment variable that names the path at which a service may listen.
pub const SOCKET_VARIABLE: &str = "GRPC_UNIX_SOCKET";

/// That path in a jail or container: in a directory of the run's own, where nobody but
/// its program can make anything. Direct mode has one on the host.
pub const SERVICE_SOCKET: &str = "/run/grpc/service.sock";

/// What a run whose template listens finds in its environment besides what the call
/// memfd has, put there by who starts it: `LISTEN_FDS=1`, `LISTEN_FDNAMES=grpc`,
/// `LISTEN_PID` with the program's own pid, sd_listen_fds(3), and [`SOCKET_VARIABLE`].
pub const LISTEN_VARIABLES: [&str; 4] =
    ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", SOCKET_VARIABLE];

/// The descriptors of [`FromServer::Launch`], in order.
#[derive(Debug)]
pub struct LaunchFds {
    /// Sealed memfd (`F_SEAL_WRITE|SHRINK|GROW|SEAL`) holding the executable, opened read-only.
    pub executable: OwnedFd,
    /// Becomes descriptor 0: a sealed memfd holding the input.
    pub stdin: OwnedFd,
    /// Becomes descriptor 1: the write end of a pipe.
    pub stdout: OwnedFd,
    /// Becomes descriptor 2: the write end of a pipe.
    pub stderr: OwnedFd,
    /// Sealed memfd: argv then environment, each string followed by a NUL
    /// ([`Launch::argc`] and [`Launch::envc`] strings).
    pub call: OwnedFd,
}

impl LaunchFds {
    /// Those that came with a launch; `None` where it is another number of them.
    #[must_use]
    pub fn of(fds: Vec<OwnedFd>) -> Option<Self> {
        let [executable, stdin, stdout, stderr, call] = fds.try_into().ok()?;
        Some(Self { executable, stdin, stdout, stderr, call })
    }
}

/// One run to start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// The run's id.
    pub run: RunId,
    /// The set of policies the server decided by. The launcher keeps a few
    /// superseded sets; otherwise [`Refusal::StalePolicy`].
    pub policy_set: Digest,
    /// Which template of it.
    pub template: TemplateId,
    /// Direct or jail for the launcher, container for `dispatch-docker`.
    pub mode: Mode,
    /// Whose call it is: for the labels of containers, decides nothing.
    pub namespace: String,
    /// Wall clock left for the run; `None` only where the template is unlimited, or
    /// [listens](super::plan::Template::listens).
    pub timeout: Option<Duration>,
    /// Tighter than the template's, or `None` for the template's.
    pub memory: Option<u64>,
    /// Tighter than the template's, or `None` for the template's.
    pub cpus: Option<MilliCpus>,
    /// The size of the executable in bytes.
    pub executable_size: u64,
    /// For a `#!` executable: the interpreter, one of the template's. The
    /// executable is then shown at [`SCRIPT_PATH`] and argv already begins
    /// with the interpreter and that path.
    pub interpreter: Option<String>,
    /// Strings of argv in the call memfd.
    pub argc: u32,
    /// Strings of environment in the call memfd, after those of argv.
    pub envc: u32,
}

/// Where a `#!` executable is shown inside the jail.
pub const SCRIPT_PATH: &str = "/run/dispatcher/service";

/// Why a run was ended by the dispatcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopCause {
    /// Its wall clock ran out (the launcher's own timer, or the server's for the RPC's deadline).
    Timeout,
    /// Its CPU time ran out.
    CpuTime,
    /// Stdout went over its limit.
    Output,
    /// The caller went away, or the service is stopping.
    Cancelled,
    /// It made a deadly system call.
    Syscall,
}

/// Launcher → server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromLauncher {
    /// First message on a new connection, and again after each reload.
    Ready {
        /// The newest policy set it holds.
        policy_set: Digest,
    },
    /// The run never started; its id is free.
    Refused {
        /// Which.
        run: RunId,
        /// Why.
        refusal: Refusal,
    },
    /// The program was told to start.
    Started {
        /// Which.
        run: RunId,
        /// When, by the host's clock.
        at: SystemTime,
        /// From receiving [`Launch`] to here.
        setup: Duration,
    },
    /// The run is over; nothing of it is left (unless [`End::quarantined`]).
    Ended {
        /// Which.
        run: RunId,
        /// How.
        end: Box<End>,
    },
    /// An answer to [`FromServer::Connect`]. With one descriptor where it went well: a
    /// connected stream socket that nobody else has.
    Connected {
        /// Which.
        run: RunId,
        /// To which of its sockets.
        to: ServiceSocket,
        /// errno(3): ENOENT for no such socket yet, or, of `dispatch-docker`, for a program
        /// that isn't there yet; ECONNREFUSED for a socket that nobody listens at; EAGAIN for one with
        /// a full queue, or for more answers than are waited for at once; EPERM for one that
        /// is not the run's, or what is no socket; ESRCH for no such run, or one that ends;
        /// EINVAL for one that doesn't listen. Others, such as EMFILE, are the launcher's own.
        result: Result<(), i32>,
    },
    /// An answer to [`FromServer::Look`].
    Seen {
        /// Which.
        run: RunId,
        /// What was seen; `None` for no such run, or one whose program wasn't started.
        sight: Option<Box<Sight>>,
    },
    /// What was left of a quarantined run is gone; it no longer counts.
    Released {
        /// Which.
        run: RunId,
    },
}

/// Why the launcher did not start a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The policy set named is no longer held: decide again by the current one.
    StalePolicy,
    /// The request goes beyond its template, or is malformed: a bug or a captured server.
    Invalid {
        /// What was wrong.
        what: String,
    },
    /// This host cannot give a control that the policy demands.
    ControlUnavailable {
        /// Which.
        control: Control,
        /// Why, and what would mend it.
        why: String,
    },
    /// execve failed: ENOENT for a missing loader, ENOEXEC for no executable, E2BIG, EACCES.
    Exec {
        /// errno(3).
        errno: i32,
    },
    /// Something that every run takes is all in use; it comes back with their ends.
    Exhausted(Exhausted),
    /// The launcher ends, and starts nothing any more.
    Ending,
    /// Docker can't be reached, or failed in a way that has nothing to do with this run.
    DockerUnavailable {
        /// What happened, and what to do.
        why: String,
    },
    /// Docker refused what it was asked for.
    Docker {
        /// In its words.
        why: String,
    },
    /// The policy's image isn't there, or can't be used.
    Image {
        /// Which, and what is wrong with it.
        why: String,
    },
    /// A launch step failed otherwise.
    Step {
        /// The step's name, as in `jail::step`.
        step: String,
        /// Which item of the step (a mount's number, for one).
        index: u32,
        /// errno(3).
        errno: i32,
    },
}

/// What there is only so much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exhausted {
    /// Host uids of `[server] uid_range`.
    HostIds,
    /// Descriptors that the launcher may have open, RLIMIT_NOFILE.
    Descriptors,
}

impl Refusal {
    /// For a control that can't be had here.
    #[must_use]
    pub fn lacking(lack: &Lack) -> Self {
        let Lack { control, why, mend } = lack;
        Self::ControlUnavailable { control: *control, why: format!("{why}; {mend}") }
    }
}

/// How the first process ended, as waitid(2) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitStatus {
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
    /// Never seen: init was killed before it could tell.
    Unknown,
}

/// Out of memory, and by whose limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Oom {
    /// None of its processes was killed for memory.
    None,
    /// By the run's own limit.
    Own,
    /// By the host's, or by a cgroup above.
    Host,
}

/// What there is to see of a run that runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sight {
    /// Controls that are in force.
    pub enforced: Vec<Control>,
    /// Container mode: the OCI runtime that the policy names.
    pub runtime: Option<String>,
    /// CPU time of the whole tree so far.
    pub user: Duration,
    /// CPU time of the whole tree so far.
    pub system: Duration,
    /// Peak memory of the whole tree so far, in bytes.
    pub memory_peak: u64,
    /// Peak tasks so far, init excluded.
    pub pids_peak: u32,
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// The first process's wait status.
    pub status: WaitStatus,
    /// The cause of the dispatcher's first kill, if it killed.
    pub stopped: Option<StopCause>,
    /// Memory kills in the run's cgroup.
    pub oom: Oom,
    /// The deadly call that was made: `unshare`, `i386:getpid`, `x32:getpid`, `#999`.
    /// `Some("")` where it could not be named.
    pub denied_syscall: Option<String>,
    /// Distinct calls that were answered with an error, at most 16.
    pub refused_syscalls: Vec<String>,
    /// Controls that were in force.
    pub enforced: Vec<Control>,
    /// Container mode: the OCI runtime that the policy names.
    pub runtime: Option<String>,
    /// Container mode: Docker was lost under the run, or somebody else ended it; in words.
    pub lost: Option<String>,
    /// From receiving the launch to telling the program to start.
    pub setup: Duration,
    /// From then to its end.
    pub wall: Duration,
    /// CPU time of the whole tree.
    pub user: Duration,
    /// CPU time of the whole tree.
    pub system: Duration,
    /// Peak memory of the whole tree in bytes.
    pub memory_peak: u64,
    /// Peak tasks of the run, init excluded.
    pub pids_peak: u32,
    /// Teardown hung (a task in D): its uid and cgroup are kept aside, and it
    /// counts until [`FromLauncher::Released`].
    pub quarantined: bool,
}

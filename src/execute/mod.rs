//! Executing one admitted call: the invocation in, the outcome out.

mod capture;
#[cfg(test)]
pub(crate) mod fake;
pub mod launcher;
mod outcome;
mod run;
pub mod service;
pub mod stop;
#[cfg(test)]
mod tests;

use std::{
    os::fd::OwnedFd,
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use self::launcher::Launcher;

use crate::{
    jail::{
        message::{Refusal, StopCause},
        plan::{Control, Mode, TemplateId},
    },
    names::{Digest, RunId},
    units::{Limit, MilliCpus},
};

/// Everything an executor needs; decided, nothing left to look up.
#[derive(Debug)]
pub struct Invocation {
    /// The run's id.
    pub run: RunId,
    /// The set and template of the policy in force.
    pub policy_set: Digest,
    /// Which template of it.
    pub template: TemplateId,
    /// How it is run.
    pub mode: Mode,
    /// Whose call it is.
    pub namespace: String,
    /// The sealed executable; shared by all runs of the same artifact.
    pub executable: std::sync::Arc<OwnedFd>,
    /// Its size in bytes.
    pub executable_size: u64,
    /// For `#!` programs: the interpreter.
    pub interpreter: Option<String>,
    /// argv, complete.
    pub argv: Vec<String>,
    /// Environment, complete.
    pub environment: Vec<(String, String)>,
    /// Standard input.
    pub input: Bytes,
    /// Wall clock of the run.
    pub timeout: Limit<Duration>,
    /// When the run must be over whatever its timeout: the RPC's own deadline,
    /// less what it takes to report.
    pub deadline: Option<tokio::time::Instant>,
    /// Tighter than the policy's memory limit, if asked for.
    pub memory: Option<u64>,
    /// Tighter than the policy's cpus limit, if asked for.
    pub cpus: Option<MilliCpus>,
    /// Bytes of stdout; more ends the run.
    pub output_limit: Limit<u64>,
    /// Bytes of the stderr tail that are kept.
    pub stderr_limit: Limit<u64>,
}

/// What happened, in the contract's words and order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // CONTRACT: Verdict
pub enum Verdict {
    Exited,
    Signalled,
    TimedOut,
    CpuTimeExceeded,
    OutOfMemory,
    OutputExceeded,
    SyscallDenied,
    Cancelled,
    Refused,
    Failed,
    Completed,
}

/// A run that was started, and how it went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// By the kernel's word.
    pub verdict: Verdict,
    /// Of the first process; 0 where it did not exit.
    pub exit_code: i32,
    /// That ended the first process; 0 for none.
    pub signal: i32,
    /// Captured stdout, up to the limit.
    pub stdout: Bytes,
    /// There was more stdout than that.
    pub stdout_truncated: bool,
    /// The tail of stderr.
    pub stderr: Bytes,
    /// There was more stderr than that.
    pub stderr_truncated: bool,
    /// When the program was told to start.
    pub started: SystemTime,
    /// Launch to start.
    pub setup: Duration,
    /// Start to end.
    pub wall: Duration,
    /// CPU of the whole tree.
    pub user: Duration,
    /// CPU of the whole tree.
    pub system: Duration,
    /// Peak memory of the whole tree.
    pub memory_peak: u64,
    /// Peak tasks.
    pub pids_peak: u32,
    /// Controls really in force.
    pub enforced: Vec<Control>,
    /// Container mode: the OCI runtime that the policy names.
    pub runtime: Option<String>,
    /// The deadly call.
    pub denied_syscall: String,
    /// Calls answered with an error.
    pub refused_syscalls: Vec<String>,
    /// For `Failed`: `host_memory`, `launcher_lost`, `docker_unavailable` or `internal`,
    /// and a sentence.
    pub failure: Option<(&'static str, String)>,
    /// Something of it is left, which the launcher could not remove: what it
    /// was granted must stay counted.
    pub quarantined: bool,
}

impl Outcome {
    /// One of which only the verdict and the start are known.
    #[must_use]
    pub fn unknown(verdict: Verdict, started: SystemTime) -> Self {
        Self {
            verdict,
            exit_code: 0,
            signal: 0,
            stdout: Bytes::new(),
            stdout_truncated: false,
            stderr: Bytes::new(),
            stderr_truncated: false,
            started,
            setup: Duration::ZERO,
            wall: Duration::ZERO,
            user: Duration::ZERO,
            system: Duration::ZERO,
            memory_peak: 0,
            pids_peak: 0,
            enforced: Vec::new(),
            runtime: None,
            denied_syscall: String::new(),
            refused_syscalls: Vec::new(),
            failure: None,
            quarantined: false,
        }
    }
}

/// A piece of a running program's output, as it comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Written to descriptor 1; nothing past the limit.
    Stdout(Bytes),
    /// Written to descriptor 2; all of it.
    Stderr(Bytes),
}

/// Where output goes while the program runs, besides into the [`Outcome`]. A
/// full channel holds the program up, as a full pipe does; a closed one doesn't.
pub type OutputSink = tokio::sync::mpsc::Sender<Chunk>;

/// Who runs calls. Each knows its own modes, and speaks the same protocol.
#[derive(Clone, Debug, Default)]
pub struct Executors {
    /// `dispatch-launch`, for jail and direct mode.
    pub launcher: Launcher,
    /// `dispatch-docker`, for container mode; without it nobody is there to connect.
    pub containers: Launcher,
    renewed: std::sync::Arc<tokio::sync::Notify>,
}

impl Executors {
    /// Who runs calls in `mode`.
    #[must_use]
    pub fn of(&self, mode: Mode) -> &Launcher {
        match mode {
            Mode::Direct | Mode::Jail => &self.launcher,
            Mode::Container => &self.containers,
        }
    }

    /// How many ended runs can't be removed yet.
    #[must_use]
    pub fn quarantined(&self) -> usize {
        self.launcher.quarantined() + self.containers.quarantined()
    }

    /// Has those who wait for policies look again: the server took up others.
    pub fn policies_changed(&self) {
        self.launcher.policies_changed();
        self.containers.policies_changed();
        self.renewed.notify_one();
    }

    /// Returns when the server has taken up other policies. For one listener.
    pub fn renewed(&self) -> impl Future<Output = ()> + '_ {
        self.renewed.notified()
    }
}

impl From<Launcher> for Executors {
    fn from(launcher: Launcher) -> Self {
        Self { launcher, ..Self::default() }
    }
}

/// Why there is no [`Outcome`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExecuteError {
    /// The launcher did not start it.
    #[error("not started: {0:?}")]
    Refused(Refusal),
    /// The launcher isn't there, or died before it told of a start.
    #[error("the launcher was lost")]
    LauncherLost,
    /// The launcher does not answer; the run may still exist.
    #[error("the launcher did not {0} in time")]
    Stuck(&'static str),
    /// There was cause to end it before it had started.
    #[error("stopped before the start: {0:?}")]
    Stopped(StopCause),
    /// Something in this process failed.
    #[error("{what}: {error}")]
    Internal {
        /// What was being done.
        what: &'static str,
        /// The error's text.
        error: String,
    },
}

impl ExecuteError {
    /// Whether it is to be had as soon as some other run ends.
    #[must_use]
    pub fn is_for_want_of_room(&self) -> bool {
        matches!(self, Self::Refused(Refusal::Exhausted(_)))
    }
}

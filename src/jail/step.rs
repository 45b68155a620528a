//! The steps of a launch by name, and how a failing one is told.
//!
//! The same list serves error reports (`Refusal::Step`), the fault injection
//! of debug builds, and the reader: it is the table of contents of `init`.

use std::fmt;

macro_rules! steps {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// One step of a launch. Grouped by who does it, and in each group in
        /// the order in which a jail made by root comes to them first.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Step {
            $($(#[$doc])* $variant,)*
        }

        impl Step {
            /// Every step.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name in errors and in `DISPATCHER_FAULT`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

steps! {
    // In the launcher.
    /// Make user namespaces for idmapped binds.
    Idmap = "idmap",
    /// Make an empty network namespace, or take one whose last run is gone.
    NetworkNamespace = "network_namespace",
    /// Make the socket that a service inherits, and in direct mode the directory for one of
    /// its own.
    ServiceSocket = "service_socket",
    /// Make the run's cgroups and write their limits.
    Cgroup = "cgroup",
    /// clone3(2) of init with its namespaces.
    Clone = "clone",
    /// Write uid_map and gid_map.
    Maps = "maps",
    /// Hand the program its descriptors.
    Start = "start",
    // In init, PID 1 of the run.
    /// Close what the launcher had open.
    CloseFds = "close_fds",
    /// Name and signal mask, no_new_privs, dumpable, parent death signal.
    Attributes = "attributes",
    /// Wait for the launcher's word.
    Handshake = "handshake",
    /// Into the cgroups that clone3 could not put it into.
    Attach = "attach",
    /// Enter the network namespace that the launcher chose.
    EnterNetwork = "enter_network",
    /// A cgroup namespace rooted at the run's cgroup.
    CgroupNamespace = "cgroup_namespace",
    /// Forbid executable memfds in this pid namespace.
    MemfdNoexec = "memfd_noexec",
    /// Take the mounts out of the host's propagation.
    Private = "private",
    /// Clone the host paths that the root shows.
    Sources = "sources",
    /// Make /proc.
    Proc = "proc",
    /// Make /dev.
    Dev = "dev",
    /// Make /tmp.
    Tmp = "tmp",
    /// Make the directory for a service's own socket, and open it for the launcher.
    ServiceDirectory = "service_directory",
    /// Enter a copy of an empty root that the launcher made.
    EnterRoot = "enter_root",
    /// Make the root.
    Root = "root",
    /// Switch to it and leave the host's behind.
    Pivot = "pivot",
    /// Fill it.
    Populate = "populate",
    /// Make it read-only.
    Readonly = "readonly",
    /// Host name and loopback interface.
    Network = "network",
    /// The user namespace.
    UserNamespace = "user_namespace",
    /// Build the Landlock ruleset.
    LandlockRules = "landlock_rules",
    /// Fork the process that becomes the program.
    Fork = "fork",
    /// Give up capabilities.
    Capabilities = "capabilities",
    /// User and group ids.
    Identity = "identity",
    // In the process that becomes the program.
    /// Session and signals.
    Session = "session",
    /// Open the network namespace for the launcher, which makes a service's sockets in it.
    ServiceNetwork = "service_network",
    /// Map argv and environment.
    Arguments = "arguments",
    /// Receive and place the program's descriptors.
    Descriptors = "descriptors",
    /// Resource limits.
    Rlimits = "rlimits",
    /// Enter the Landlock domain.
    Landlock = "landlock",
    /// Install the system call filter.
    Seccomp = "seccomp",
    /// Send its listener to the launcher.
    Listener = "listener",
    /// execve(2).
    Exec = "exec",
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A step that failed: which, at which of its items, with which errno(3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepError {
    /// Which step.
    pub step: Step,
    /// Which item of it, such as the number of a bind.
    pub index: u16,
    /// errno(3).
    pub errno: i32,
}

/// A fault to inject, for tests: only debug builds ever make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault(Option<Step>);

impl Fault {
    /// No fault.
    pub const NONE: Self = Self(None);

    /// The step named by `DISPATCHER_FAULT`, in debug builds only.
    #[must_use]
    pub fn from_environment() -> Self {
        if !cfg!(debug_assertions) {
            return Self::NONE;
        }
        let name = std::env::var("DISPATCHER_FAULT").unwrap_or_default();
        Self(Step::ALL.iter().copied().find(|step| step.name() == name))
    }

    /// Whether this step must fail.
    #[must_use]
    pub fn hits(self, step: Step) -> bool {
        cfg!(debug_assertions) && self.0 == Some(step)
    }
}

/// What init and the program tell the launcher over the run's control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Init is in a new user namespace and waits for its maps.
    NeedsMaps,
    /// Everything is built; the program waits for its descriptors. Where it is a service in a
    /// jail with one descriptor or two: the directory for a socket of its own, and its network
    /// namespace, where that is its own.
    Ready,
    /// The system call filter is on. With one descriptor: its listener, where it has one.
    Filtered,
    /// The program ended: waitid(2)'s `si_code` was CLD_EXITED, and the code.
    Exited {
        /// The exit code.
        code: i32,
        /// Nobody else is left in the pid namespace, not even a zombie.
        alone: bool,
    },
    /// The program ended by this signal.
    Signalled {
        /// Which.
        signal: i32,
        /// As above.
        alone: bool,
    },
    /// A step failed; the process that sends this exits.
    Failed(StepError),
    /// Where no listener names deadly calls: a process of the run was killed as
    /// the filter kills, by SIGSYS.
    Denied,
}

/// A report's encoded length in bytes.
pub const REPORT_LEN: usize = 8;

impl Report {
    /// kind, step or flag, index, value: fixed layout, no allocation.
    #[must_use]
    pub fn encode(self) -> [u8; REPORT_LEN] {
        let (kind, step, index, value) = match self {
            Self::NeedsMaps => (1, 0, 0, 0),
            Self::Ready => (2, 0, 0, 0),
            Self::Filtered => (3, 0, 0, 0),
            Self::Exited { code, alone } => (4, u8::from(alone), 0, code),
            Self::Signalled { signal, alone } => (5, u8::from(alone), 0, signal),
            Self::Failed(error) => (6, error.step as u8, error.index, error.errno),
            Self::Denied => (7, 0, 0, 0),
        };
        let mut bytes = [0; REPORT_LEN];
        bytes[0] = kind;
        bytes[1] = step;
        bytes[2..4].copy_from_slice(&index.to_ne_bytes());
        bytes[4..8].copy_from_slice(&value.to_ne_bytes());
        bytes
    }

    /// The reverse; `None` for anything else.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let &[kind, step, i0, i1, v0, v1, v2, v3] = bytes else { return None };
        let value = i32::from_ne_bytes([v0, v1, v2, v3]);
        Some(match kind {
            1 => Self::NeedsMaps,
            2 => Self::Ready,
            3 => Self::Filtered,
            4 => Self::Exited { code: value, alone: step == 1 },
            5 => Self::Signalled { signal: value, alone: step == 1 },
            6 => Self::Failed(StepError {
                step: *Step::ALL.get(usize::from(step))?,
                index: u16::from_ne_bytes([i0, i1]),
                errno: value,
            }),
            7 => Self::Denied,
            _ => return None,
        })
    }
}

/// The launcher's words to init on the control socket: one byte each.
pub mod word {
    /// The maps are written: go on.
    pub const MAPPED: u8 = b'M';
}

/// The message that starts the program; it carries the five descriptors of `LaunchFds`,
/// and where it is a service the socket that it listens at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Strings of argv.
    pub argc: u32,
    /// Strings of environment.
    pub envc: u32,
    /// Bytes of the call memfd.
    pub call_len: u32,
    /// Direct mode: bytes of the executable, which memfd-exec copies; 0 where the
    /// sealed memfd itself is executed.
    pub copy_len: u32,
}

/// A [`Start`]'s encoded length in bytes.
pub const START_LEN: usize = 16;

impl Start {
    /// Fixed layout, no allocation.
    #[must_use]
    pub fn encode(self) -> [u8; START_LEN] {
        let mut bytes = [0; START_LEN];
        bytes[0..4].copy_from_slice(&self.argc.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.envc.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.call_len.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.copy_len.to_ne_bytes());
        bytes
    }

    /// The reverse; `None` for any other length.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        (bytes.len() == START_LEN).then_some(())?;
        Some(Self { argc: word(0)?, envc: word(4)?, call_len: word(8)?, copy_len: word(12)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_round_trip() {
        let mut reports = vec![
            Report::NeedsMaps,
            Report::Ready,
            Report::Filtered,
            Report::Exited { code: 255, alone: true },
            Report::Exited { code: 0, alone: false },
            Report::Signalled { signal: 9, alone: true },
            Report::Denied,
        ];
        for &step in Step::ALL {
            reports.push(Report::Failed(StepError { step, index: 300, errno: libc::EPERM }));
        }
        for report in reports {
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
        assert_eq!(Report::decode(&[0; REPORT_LEN]), None);
        assert_eq!(Report::decode(&[6, 255, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(Report::decode(&[]), None);
    }

    #[test]
    fn starts_round_trip() {
        let start = Start { argc: 4, envc: 7, call_len: 100, copy_len: 1 << 30 };
        assert_eq!(Start::decode(&start.encode()), Some(start));
        assert_eq!(Start::decode(&[0; START_LEN - 1]), None);
    }
}

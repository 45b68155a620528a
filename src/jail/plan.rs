//! What the launcher is told about a policy: everything decided, nothing to parse.
//!
//! `policy` compiles each policy (and each of its `[service."…"]` overrides)
//! into one [`Template`]; the launcher receives the whole [`TemplateSet`] in a
//! sealed memfd that the server never touches.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Read as _, Seek as _},
    os::fd::OwnedFd,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    names::Digest,
    units::{Limit, MilliCpus},
};

/// Bytes of memory in container mode; Docker takes no lower limit (`linuxMinMemory` of
/// its daemon).
pub const CONTAINER_MEMORY_MIN: u64 = 6 << 20;
/// Processors in container mode: of the period that Docker takes for granted the kernel
/// gives no smaller part, and with less a container's own start would take minutes.
pub const CONTAINER_CPUS_MIN: MilliCpus = MilliCpus(10);
/// Whom the program is in container mode, inside and (but for Docker's userns-remap) outside.
pub const CONTAINER_USER: u32 = 65_534;

/// Sets of policies that are kept where they are enforced: the current one, and superseded
/// ones that a call may have been decided by a moment ago.
pub const SETS_KEPT: usize = 4;
/// Encoded size of a set that is still believed.
const SET_MAX: u64 = 256 << 20;

/// All templates of one load of the policy directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TemplateSet {
    /// Digest of the whole set; `policy_set_digest` in reports.
    pub digest: Digest,
    /// Whether any may run in containers.
    pub containers: bool,
    /// Every policy and variant.
    pub templates: Vec<Template>,
}

impl TemplateSet {
    /// Reads what the monitor sent: postcard in a sealed memfd.
    ///
    /// # Errors
    /// Those of read(2), and what can't be a set.
    pub fn read(memory: OwnedFd) -> io::Result<Self> {
        let mut file = File::from(memory);
        let size = file.metadata()?.len();
        if size > SET_MAX {
            let why = format!("policies of {size} bytes; at most {SET_MAX} are possible");
            return Err(io::Error::other(why));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        file.rewind()?;
        file.take(SET_MAX).read_to_end(&mut bytes)?;
        postcard::from_bytes(&bytes).map_err(io::Error::other)
    }
}

/// Names a template within its set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TemplateId {
    /// The policy's name: its file name without `.toml`.
    pub policy: String,
    /// 0 is the policy itself, N its Nth `[service."…"]` override in the file's order.
    pub variant: u32,
}

/// One policy as the launcher enforces it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Template {
    /// Which one this is.
    pub id: TemplateId,
    /// The modes a call may be launched in.
    pub modes: Vec<Mode>,
    /// Controls whose absence on this host does not refuse the call.
    pub best_effort: Vec<Control>,
    /// Ceilings; a call may only tighten them.
    pub limits: Limits,
    /// What the program sees as its root.
    pub filesystem: Filesystem,
    /// What the program can talk to.
    pub network: Network,
    /// Which system calls it may make.
    pub syscalls: SyscallPolicy,
    /// Capability numbers (capabilities(7)) that are kept, within the run's own user namespace.
    pub keep_capabilities: Vec<u8>,
    /// Direct mode's host user, looked up when the policies were compiled.
    pub user: Option<HostUser>,
    /// The policy's `[environment] set`.
    pub environment: BTreeMap<String, String>,
    /// Names that a call may set besides the fixed `DISPATCHER_*` and `GRPC_INPUT_DATA`.
    pub environment_allow: Vec<String>,
    /// Absolute paths of interpreters for `#!` programs.
    pub interpreters: Vec<String>,
    /// What container mode runs in.
    pub container: Container,
    /// Whether its runs are gRPC services, that take calls for as long as they live: they
    /// have a listening socket as descriptor 3 and a directory to bind one of their own in.
    /// `timeout` and `cpu_time` are then not of the run: the first is of each call.
    pub listens: bool,
}

/// The policy's `[container]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Container {
    /// Image name; empty: one that the dispatcher makes.
    pub image: String,
    /// Whether an image that Docker doesn't hold is pulled.
    pub pull: bool,
    /// Containers of each namespace that wait for its next calls.
    pub ahead: u32,
    /// OCI runtime; empty: Docker's default.
    pub runtime: String,
}

/// How a call is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// From memory, for trusted programs.
    Direct,
    /// Docker.
    Container,
    /// Our own sandbox.
    Jail,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Container => "container",
            Self::Jail => "jail",
        })
    }
}

impl FromStr for Mode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Direct, Self::Container, Self::Jail]
            .into_iter()
            .find(|mode| mode.to_string() == text)
            .ok_or(())
    }
}

/// A host account, by number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostUser {
    /// As the policy names it.
    pub name: String,
    /// Its user id; never 0.
    pub uid: u32,
    /// Its primary group id; never 0.
    pub gid: u32,
}

/// The policy's `[limits]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Wall clock of one call, queue excluded.
    pub timeout: Limit<Duration>,
    /// User and system time of the whole tree.
    pub cpu_time: Limit<Duration>,
    /// Share of processor time.
    pub cpus: Limit<MilliCpus>,
    /// Bytes of memory of the whole tree.
    pub memory: Limit<u64>,
    /// Bytes of swap on top of `memory`.
    pub swap: Limit<u64>,
    /// Tasks (processes and threads) at once.
    pub pids: Limit<u64>,
    /// RLIMIT_NOFILE, soft and hard.
    pub open_files: Limit<u64>,
    /// RLIMIT_FSIZE in bytes.
    pub file_size: Limit<u64>,
    /// Bytes of standard output; more ends the run.
    pub output: Limit<u64>,
    /// Bytes of standard error that are kept: its tail.
    pub stderr: Limit<u64>,
    /// Bytes of the executable.
    pub artifact_size: Limit<u64>,
    /// Bytes of standard input.
    pub input: Limit<u64>,
}

impl Default for Limits {
    /// The built-in limits of the contract's policy section.
    fn default() -> Self {
        Self {
            timeout: Limit::At(Duration::from_secs(30)),
            cpu_time: Limit::At(Duration::from_secs(30)),
            cpus: Limit::At(MilliCpus(1000)),
            memory: Limit::At(512 << 20),
            swap: Limit::At(0),
            pids: Limit::At(256),
            open_files: Limit::At(256),
            file_size: Limit::At(64 << 20),
            output: Limit::At(3 << 20),
            stderr: Limit::At(64 << 10),
            artifact_size: Limit::At(128 << 20),
            input: Limit::At(32 << 20),
        }
    }
}

/// The policy's `[filesystem]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// What the root is made of.
    pub root: Root,
    /// Size of the private /tmp in bytes; `None` for no /tmp.
    pub tmp: Option<Limit<u64>>,
    /// Whether /tmp may hold executables (and memfds be executed).
    pub tmp_exec: bool,
    /// Host directories or files shown in the root.
    pub binds: Vec<Bind>,
}

impl Filesystem {
    /// Whether a root has anything of the host's in it.
    #[must_use]
    pub fn shows_host(&self) -> bool {
        self.root != Root::Empty || !self.binds.is_empty()
    }
}

/// What a jail's root is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// Nothing but /dev, /proc, /tmp: for static executables.
    Empty,
    /// The host's /usr and friends, read-only, and a minimal /etc.
    Host,
    /// A directory of the host's, read-only.
    Directory(PathBuf),
}

/// One host path shown in the root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Absolute path inside; not /, /proc, /dev, /run/dispatcher or below them, and where
    /// it listens not /run/grpc.
    pub target: PathBuf,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// The policy's `[network] mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// An empty network namespace; even lo is down.
    None,
    /// A network namespace with nothing but a lo that is up.
    Loopback,
    /// The host's own network.
    Host,
}

/// Which system calls a run may make, apart from the deadly ones, which lie
/// over every profile (`jail::seccomp`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyscallPolicy {
    /// The allowlist: number → argument conditions.
    pub allowed: BTreeMap<u32, Allowed>,
    /// What calls that are not allowed answer, where the profile says it:
    /// number → errno(3). Others answer EPERM, or ENOSYS where programs expect that.
    pub errnos: BTreeMap<u32, u16>,
}

/// When an allowlisted system call is allowed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Allowed {
    /// With any arguments.
    Always,
    /// Where at least one of these groups has all of its conditions met.
    AnyOf(Vec<Vec<ArgumentCondition>>),
}

/// A test of one system call argument. Arguments are compared as the kernel
/// sees them: 64 bits, or the low 32 where `wide` is false.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArgumentCondition {
    /// Argument number, 0 to 5.
    pub index: u8,
    /// Whether all 64 bits take part.
    pub wide: bool,
    /// How it is compared.
    pub comparison: Comparison,
    /// With what.
    pub value: u64,
}

/// Unsigned comparisons of an argument with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Comparison {
    /// Equal.
    Equal,
    /// Not equal.
    NotEqual,
    /// Less.
    Less,
    /// Less or equal.
    LessOrEqual,
    /// Greater.
    Greater,
    /// Greater or equal.
    GreaterOrEqual,
    /// `argument & mask == value`.
    MaskedEqual {
        /// The mask.
        mask: u64,
    },
}

/// A control that can be in force in a run; the words of `enforced` and `best_effort`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // the words themselves say it; CONTRACT: `enforced`
pub enum Control {
    NsUser,
    NsMount,
    NsPid,
    NsIpc,
    NsUts,
    NsNet,
    NsCgroup,
    HostUid,
    RootReadonly,
    ProcRestricted,
    CapsNone,
    NoNewPrivs,
    Seccomp,
    /// With the ABI version in force; any version when it stands in `best_effort`.
    Landlock(u8),
    MemfdNoexec,
    Rlimits,
    CgroupMemory,
    CgroupSwap,
    CgroupPids,
    CgroupCpu,
    CgroupKill,
    CpuTime,
    Timeout,
    Output,
    /// No supplementary groups (rootless: they may not be droppable).
    Groups,
}

impl Control {
    /// Every control, `Landlock` with version 0.
    pub const ALL: [Self; 25] = [
        Self::NsUser,
        Self::NsMount,
        Self::NsPid,
        Self::NsIpc,
        Self::NsUts,
        Self::NsNet,
        Self::NsCgroup,
        Self::HostUid,
        Self::RootReadonly,
        Self::ProcRestricted,
        Self::CapsNone,
        Self::NoNewPrivs,
        Self::Seccomp,
        Self::Landlock(0),
        Self::MemfdNoexec,
        Self::Rlimits,
        Self::CgroupMemory,
        Self::CgroupSwap,
        Self::CgroupPids,
        Self::CgroupCpu,
        Self::CgroupKill,
        Self::CpuTime,
        Self::Timeout,
        Self::Output,
        Self::Groups,
    ];

    /// The word without any version: `landlock`, `ns.user`.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::NsUser => "ns.user",
            Self::NsMount => "ns.mount",
            Self::NsPid => "ns.pid",
            Self::NsIpc => "ns.ipc",
            Self::NsUts => "ns.uts",
            Self::NsNet => "ns.net",
            Self::NsCgroup => "ns.cgroup",
            Self::HostUid => "host_uid",
            Self::RootReadonly => "root.readonly",
            Self::ProcRestricted => "proc.restricted",
            Self::CapsNone => "caps.none",
            Self::NoNewPrivs => "no_new_privs",
            Self::Seccomp => "seccomp",
            Self::Landlock(_) => "landlock",
            Self::MemfdNoexec => "memfd_noexec",
            Self::Rlimits => "rlimits",
            Self::CgroupMemory => "cgroup.memory",
            Self::CgroupSwap => "cgroup.swap",
            Self::CgroupPids => "cgroup.pids",
            Self::CgroupCpu => "cgroup.cpu",
            Self::CgroupKill => "cgroup.kill",
            Self::CpuTime => "cpu_time",
            Self::Timeout => "timeout",
            Self::Output => "output",
            Self::Groups => "groups",
        }
    }
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Landlock(version) if *version > 0 => write!(f, "landlock.v{version}"),
            other => f.write_str(other.word()),
        }
    }
}

impl FromStr for Control {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|control| control.word() == text).ok_or(())
    }
}

//! One jail, decided: everything init needs, made before the clone.
//!
//! A [`Blueprint`] is what `plan::Template` comes to on this host. `decide` makes it; `init` only carries it out, so nothing here
//! may need allocation, lookup or judgement later.

use std::ffi::CString;

use rustix::{process::Resource, thread::UnshareFlags};

use super::{plan::Mode, seccomp::filter::sock_filter, step::Fault};

/// The uid and gid of the program inside its user namespace.
pub const INSIDE_ID: u32 = 65534;

/// The uid and gid of init inside it, where the launcher is root.
pub const INSIDE_INIT_ID: u32 = 65533;

/// Most pieces a root may be made of.
pub const PIECES_MAX: usize = 256;

/// Everything init needs.
#[derive(Debug)]
pub struct Blueprint {
    /// Direct or jail.
    pub mode: Mode,
    /// Namespaces made by clone3; in a jail made by root, all but the user namespace.
    pub outer_namespaces: u64,
    /// An empty network namespace to enter, where it isn't one of these.
    pub network: Option<i32>,
    /// Namespaces entered after the root is built, while it still takes privilege.
    pub inner_namespaces: UnshareFlags,
    /// A mapped user namespace to enter then, where it isn't one of these.
    pub user_namespace: Option<i32>,
    /// The `tasks` of those cgroups that clone3 didn't put init into.
    pub cgroups: Vec<i32>,
    /// Whether init asks for its maps right after the clone (an unprivileged
    /// launcher: the user namespace comes first) instead of after `inner_namespaces`.
    pub maps_first: bool,
    /// Whether setgroups(2) may and must be called.
    pub clear_groups: bool,
    /// Where init rings when it has reported: a pipe that takes `serial`.
    pub bell: i32,
    /// Which run it is, to the launcher.
    pub serial: u64,
    /// What the program becomes, as numbered in the namespace that is then current.
    pub program_id: (u32, u32),
    /// What init becomes, likewise.
    pub init_id: (u32, u32),
    /// The jail's file system; `None` in direct mode.
    pub root: Option<RootPlan>,
    /// A mount namespace with an empty root to start from, where the plan has no pieces.
    pub empty_root: Option<i32>,
    /// The host name shown; `None` without a uts namespace.
    pub host_name: Option<CString>,
    /// Bring up lo.
    pub loopback: bool,
    /// An open `/proc/sys/vm/memfd_noexec` to write to; `None`: not used.
    pub memfd_noexec: Option<i32>,
    /// The Landlock ruleset to build; `None` where the kernel has no Landlock.
    pub landlock: Option<super::landlock::Ruleset>,
    /// Resource limits, soft and hard alike.
    pub rlimits: Vec<(Resource, u64)>,
    /// The highest capability number this kernel knows.
    pub last_capability: u8,
    /// Capabilities that the program keeps, as a bit set.
    pub keep_capabilities: u64,
    /// The system call filter; `None` in direct mode.
    pub filter: Option<Filter>,
    /// Where the executable goes: at or above the hard RLIMIT_NOFILE.
    pub exec_fd: i32,
    /// Where the program's copy of the control socket goes: `exec_fd + 1`.
    pub control_fd: i32,
    /// How the executable is started.
    pub exec: Exec,
    /// Where it is a service: what it is told and given besides.
    pub service: Option<Service>,
    /// A step that fails on purpose.
    pub fault: Fault,
}

/// A compiled filter and whether its denials go to the launcher.
#[derive(Debug)]
pub struct Filter {
    /// The program.
    pub instructions: std::rc::Rc<[sock_filter]>,
    /// Ask for a listener. Off where another tracer holds it: then deadly calls
    /// kill, unnamed. Init tells of every process that it reaps and that died so;
    /// of one that its own parent reaps, nobody hears. And nothing tells such a
    /// death from that of a program which sends itself SIGSYS.
    pub notify: bool,
}

/// How the executable is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exec {
    /// The sealed memfd itself: by execveat(2), or where `Start` says so by
    /// memfd-exec, which makes a memfd of its own.
    Memfd,
    /// The interpreter at this path, inside the root; argv names the script.
    Interpreter(CString),
}

/// What a program that listens is told and given besides what its call brings.
#[derive(Debug)]
pub struct Service {
    /// Entries of its environment, but for the one with its pid.
    pub environment: Vec<CString>,
    /// The directory for a socket of its own, inside the root; `None` in direct mode, where
    /// the launcher has made it.
    pub directory: Option<CString>,
    /// Whether it has a network namespace of its own: then its sockets are made in that.
    pub own_network: bool,
}

/// A jail's root, piece by piece.
#[derive(Debug)]
pub struct RootPlan {
    /// Bytes the root's own tmpfs may hold.
    pub size: CString,
    /// Whether device nodes can be made (root) or must be borrowed from the host.
    pub make_devices: bool,
    /// What /tmp is mounted with; `None` for no /tmp.
    pub tmp: Option<TmpPlan>,
    /// Where the program listens: the directory for a socket of its own.
    pub service: Option<ServicePlan>,
    /// In the order they are put in place.
    pub pieces: Vec<Piece>,
}

/// A private /tmp.
#[derive(Debug)]
pub struct TmpPlan {
    /// `size=` in bytes.
    pub size: CString,
    /// `nr_inodes=`.
    pub inodes: CString,
    /// Whether its files can be executed.
    pub exec: bool,
}

/// A directory that only the program can use, and nobody's but the run's.
#[derive(Debug)]
pub struct ServicePlan {
    /// Where it is mounted, relative to the root; one of the pieces makes that.
    pub target: CString,
    /// `uid=` and `gid=` of the program, as numbered where the root is built.
    pub owner: CString,
}

/// Something put into the root. Paths are relative to it, without `..`.
#[derive(Debug)]
pub enum Piece {
    /// A directory; there already is fine.
    Directory(CString),
    /// A symbolic link.
    Symlink {
        /// Its content.
        content: CString,
        /// Where.
        path: CString,
    },
    /// A small read-only file with this content.
    File {
        /// Where.
        path: CString,
        /// Its content.
        content: Vec<u8>,
    },
    /// The `#!` executable, copied from this descriptor.
    Script {
        /// Where.
        path: CString,
        /// The sealed memfd.
        source: i32,
        /// Its length in bytes.
        size: u64,
    },
    /// A host path.
    Bind(BindPiece),
}

/// A host path shown in the root.
#[derive(Debug)]
pub struct BindPiece {
    /// On the host, absolute.
    pub source: CString,
    /// In the root.
    pub target: CString,
    /// Whether it is a directory; otherwise a file is made to mount on.
    pub directory: bool,
    /// Mount attributes, mount_setattr(2). Landlock says the same over again:
    /// executable where not NOEXEC, writable where not RDONLY.
    pub attributes: u64,
    /// A user namespace for an idmapped mount.
    pub idmap: Option<i32>,
    /// A missing source, or one that vanished, is no error.
    pub optional: bool,
}

//! The one source of the rules: what happens to a call, as data that
//! `tree` compiles and [`Rule::verdict`] evaluates.

use crate::jail::plan::{Allowed, ArgumentCondition, Comparison, Network, SyscallPolicy};

use super::{
    deadly::{self, CLONE_NAMESPACES},
    filter::FilterOptions,
    syscalls,
};

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The kernel makes it.
    Allow,
    /// It ends the run.
    Deadly,
    /// It answers an errno.
    Refuse {
        /// errno(3).
        errno: u16,
        /// Whether the launcher is to hear of it.
        recorded: bool,
    },
}

/// What happens to one call: stages in order, the first that settles it counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule<V> {
    pub(super) stages: Vec<Stage<V>>,
    /// For what passed all stages.
    pub(super) last: V,
}

/// One test of the arguments; `None` passes the call on to the next stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stage<V> {
    /// The test is met where one group has all its conditions met.
    pub(super) groups: Vec<Vec<ArgumentCondition>>,
    pub(super) met: Option<V>,
    pub(super) unmet: Option<V>,
}

/// The rule for a number of the 64-bit entry. Every other entry is deadly.
pub(super) fn rule(number: u32, policy: &SyscallPolicy, options: &FilterOptions) -> Rule<Verdict> {
    if syscalls::is_x32(number) || deadly::is_deadly(number) {
        return Rule::always(Verdict::Deadly);
    }
    // clone3's flags lie in memory, where a filter cannot see them, and libcs
    // fall back to clone: it does not exist here.
    if syscalls::name(number).is_none() || number == CLONE3 {
        return Rule::always(Verdict::Refuse { errno: ENOSYS, recorded: false });
    }
    let mut stages = Vec::new();
    if let Some(condition) = launch_tail(number, options) {
        let groups = vec![vec![condition]];
        stages.push(Stage { groups, met: Some(Verdict::Allow), unmet: None });
    }
    if let Some((groups, otherwise)) = guard(number, options) {
        stages.push(Stage { groups, met: None, unmet: Some(otherwise) });
    }
    let refuse = Verdict::Refuse {
        errno: policy.errnos.get(&number).copied().unwrap_or_else(|| usual_errno(number)),
        recorded: number != IO_URING_ENTER && number != IO_URING_REGISTER,
    };
    let last = match policy.allowed.get(&number) {
        None => refuse,
        Some(Allowed::Always) => Verdict::Allow,
        Some(Allowed::AnyOf(groups)) => {
            let groups = groups.clone();
            stages.push(Stage { groups, met: Some(Verdict::Allow), unmet: None });
            refuse
        }
    };
    Rule { stages, last }
}

impl<V: Copy> Rule<V> {
    /// The same for all arguments.
    pub(super) const fn always(verdict: V) -> Self {
        Self { stages: Vec::new(), last: verdict }
    }

    /// What happens to a call with these arguments.
    pub(super) fn verdict(&self, args: &[u64; 6]) -> V {
        let met = |group: &Vec<_>| group.iter().all(|condition| is_met(condition, args));
        self.stages
            .iter()
            .find_map(|stage| if stage.groups.iter().any(met) { stage.met } else { stage.unmet })
            .unwrap_or(self.last)
    }

    /// The same rule with other words for its verdicts.
    pub(super) fn map<W>(self, word: impl Fn(V) -> W) -> Rule<W> {
        let stage = |stage: Stage<V>| Stage {
            groups: stage.groups,
            met: stage.met.map(&word),
            unmet: stage.unmet.map(&word),
        };
        Rule { stages: self.stages.into_iter().map(stage).collect(), last: word(self.last) }
    }
}

/// Whether `args` meet a condition.
fn is_met(condition: &ArgumentCondition, args: &[u64; 6]) -> bool {
    let Some(&argument) = args.get(usize::from(condition.index)) else { return false };
    let argument = if condition.wide { argument } else { argument & u64::from(u32::MAX) };
    match condition.comparison {
        Comparison::Equal => argument == condition.value,
        Comparison::NotEqual => argument != condition.value,
        Comparison::Less => argument < condition.value,
        Comparison::LessOrEqual => argument <= condition.value,
        Comparison::Greater => argument > condition.value,
        Comparison::GreaterOrEqual => argument >= condition.value,
        Comparison::MaskedEqual { mask } => argument & mask == condition.value,
    }
}

/// A condition on the low 32 bits of an argument: what the kernel looks at
/// where the parameter is an `int` or `unsigned int`. The upper half is the
/// program's to fill as it likes.
pub(super) const fn low(index: u8, comparison: Comparison, value: u32) -> ArgumentCondition {
    ArgumentCondition { index, wide: false, comparison, value: value as u64 }
}

/// [`Comparison::MaskedEqual`] on the low 32 bits.
pub(super) const fn low_masked(index: u8, mask: u32, value: u32) -> ArgumentCondition {
    low(index, Comparison::MaskedEqual { mask: mask as u64 }, value)
}

const CLONE: u32 = libc::SYS_clone as u32;
const CLONE3: u32 = libc::SYS_clone3 as u32;
const EXECVEAT: u32 = libc::SYS_execveat as u32;
const IOCTL: u32 = libc::SYS_ioctl as u32;
const IO_URING_SETUP: u32 = libc::SYS_io_uring_setup as u32;
const IO_URING_ENTER: u32 = libc::SYS_io_uring_enter as u32;
const IO_URING_REGISTER: u32 = libc::SYS_io_uring_register as u32;
const MEMFD_CREATE: u32 = libc::SYS_memfd_create as u32;
const PRLIMIT64: u32 = libc::SYS_prlimit64 as u32;
const SENDMSG: u32 = libc::SYS_sendmsg as u32;
const SETRLIMIT: u32 = libc::SYS_setrlimit as u32;
const SOCKET: u32 = libc::SYS_socket as u32;
const SOCKETPAIR: u32 = libc::SYS_socketpair as u32;

const EPERM: u16 = libc::EPERM as u16;
const ENOSYS: u16 = libc::ENOSYS as u16;
const EACCES: u16 = libc::EACCES as u16;
const EAFNOSUPPORT: u16 = libc::EAFNOSUPPORT as u16;

/// What our own launch does after the filter is in place. The descriptors have
/// numbers that the program can never own.
fn launch_tail(number: u32, options: &FilterOptions) -> Option<ArgumentCondition> {
    let descriptor = match number {
        EXECVEAT => options.exec_fd,
        SENDMSG => options.control_fd,
        _ => return None,
    };
    // Negative: none. Never AT_FDCWD, which is negative too.
    let descriptor = u32::try_from(descriptor).ok()?;
    Some(low(0, Comparison::Equal, descriptor))
}

/// A condition that every profile's calls must meet, and what happens otherwise.
fn guard(number: u32, options: &FilterOptions) -> Option<(Vec<Vec<ArgumentCondition>>, Verdict)> {
    use Comparison::{Equal, NotEqual};
    let refuse = |errno| Verdict::Refuse { errno, recorded: true };
    let core = libc::RLIMIT_CORE;
    Some(match number {
        CLONE => (vec![vec![low_masked(0, CLONE_NAMESPACES, 0)]], Verdict::Deadly),
        SOCKET | SOCKETPAIR => {
            let families = families(options.network);
            let groups = families.iter().map(|&family| vec![low(0, Equal, family)]).collect();
            (groups, refuse(EAFNOSUPPORT))
        }
        // RLIMIT_CORE must stay 1: lowered to 0 it arms the host's core handler again.
        SETRLIMIT => (vec![vec![low(0, NotEqual, core)]], refuse(EPERM)),
        PRLIMIT64 => {
            let reads = ArgumentCondition { index: 2, wide: true, comparison: Equal, value: 0 };
            let own = low(0, Equal, 0);
            (vec![vec![reads], vec![own, low(1, NotEqual, core)]], refuse(EPERM))
        }
        // Both type into a terminal as if its user had.
        IOCTL => {
            let types = [libc::TIOCSTI as u32, libc::TIOCLINUX as u32];
            (vec![types.map(|request| low(1, NotEqual, request)).to_vec()], refuse(EPERM))
        }
        MEMFD_CREATE if options.refuse_exec_memfd => {
            let sealed = libc::MFD_NOEXEC_SEAL;
            (vec![vec![low_masked(1, sealed, sealed)]], refuse(EACCES))
        }
        _ => {
            let spare = options.spare_init.then(|| init_guard(number)).flatten();
            return spare.or_else(|| options.refuse_set_id.then(|| set_id_guard(number)).flatten());
        }
    })
}

/// Nobody decides when init may run.
fn init_guard(number: u32) -> Option<(Vec<Vec<ArgumentCondition>>, Verdict)> {
    use Comparison::{Equal, NotEqual};
    const INIT: u32 = 1;
    let groups = match i64::from(number) {
        libc::SYS_sched_setaffinity
        | libc::SYS_sched_setscheduler
        | libc::SYS_sched_setparam
        | libc::SYS_sched_setattr => vec![vec![low(0, NotEqual, INIT)]],
        // By process group or user, init may be among them. (One's own alone, not all but
        // init's: a container's filter would take hundreds of patterns for that.)
        libc::SYS_setpriority => {
            vec![vec![low(0, Equal, libc::PRIO_PROCESS), low(1, Equal, 0)]]
        }
        _ => return None,
    };
    Some((groups, Verdict::Refuse { errno: EPERM, recorded: true }))
}

/// No file gets a set-user-id or set-group-id bit, by whichever call.
fn set_id_guard(number: u32) -> Option<(Vec<Vec<ArgumentCondition>>, Verdict)> {
    const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;
    // A mode is looked at only where a file is made: other callers leave
    // whatever they like in its place. (Of O_TMPFILE's two bits, one is O_DIRECTORY's.)
    const MAKES: u32 = (libc::O_CREAT | (libc::O_TMPFILE & !libc::O_DIRECTORY)) as u32;
    let clear = |index| vec![low_masked(index, SET_ID, 0)];
    let groups = match i64::from(number) {
        libc::SYS_chmod | libc::SYS_fchmod | libc::SYS_creat | libc::SYS_mknod => vec![clear(1)],
        libc::SYS_fchmodat | libc::SYS_fchmodat2 | libc::SYS_mknodat => vec![clear(2)],
        libc::SYS_open => vec![vec![low_masked(1, MAKES, 0)], clear(2)],
        libc::SYS_openat => vec![vec![low_masked(2, MAKES, 0)], clear(3)],
        // Its mode lies in memory, where no filter can look; programs fall back.
        libc::SYS_openat2 => {
            return Some((Vec::new(), Verdict::Refuse { errno: ENOSYS, recorded: true }));
        }
        _ => return None,
    };
    Some((groups, Verdict::Refuse { errno: EPERM, recorded: true }))
}

/// The socket families that a network mode gives. AF_NETLINK is in none: it is
/// the way to the kernel's packet filters and routing.
const fn families(network: Network) -> &'static [u32] {
    match network {
        Network::None => &[libc::AF_UNIX as u32],
        Network::Loopback | Network::Host => {
            &[libc::AF_UNIX as u32, libc::AF_INET as u32, libc::AF_INET6 as u32]
        }
    }
}

/// What a refused call answers where the profile does not say. With ENOSYS
/// programs take it for an old kernel and do the same by older calls.
const fn usual_errno(number: u32) -> u16 {
    match number {
        EXECVEAT | IO_URING_SETUP | IO_URING_ENTER | IO_URING_REGISTER => ENOSYS,
        _ => EPERM,
    }
}

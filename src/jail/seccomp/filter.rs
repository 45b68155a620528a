//! From a policy to the BPF program that enforces it, and the launcher's answer
//! where that program asks.

use std::collections::BTreeMap;

pub use seccompiler::sock_filter;

use crate::jail::plan::{Allowed, ArgumentCondition, Comparison, Network, SyscallPolicy};

use super::{
    deadly,
    rules::{self, Verdict},
    syscalls::{self, ARCH_X86_64, X32_BIT},
    tree::{self, Range},
};

/// Most instructions that the kernel takes (BPF_MAXINSNS).
pub const PROGRAM_MAX: usize = 4096;

/// What besides the policy decides about calls: the same for [`compile`] and [`decide`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterOptions {
    /// Which socket families there are.
    pub network: Network,
    /// Refuse (EACCES) memfds that could be executed. For hosts where the
    /// `vm.memfd_noexec` sysctl cannot do it; programs that pass no
    /// MFD_NOEXEC_SEAL get no memfd at all then.
    pub refuse_exec_memfd: bool,
    /// Refuse (EPERM) set-user-id and set-group-id bits on files. For runs that
    /// write into host directories: what they leave there belongs to the
    /// directory's owner, and must not run as him.
    pub refuse_set_id: bool,
    /// Refuse (EPERM) to change how PID 1 is scheduled. For runs whose init has the
    /// program's uid: starved, it could neither end the run nor tell of it.
    pub spare_init: bool,
    /// `execveat` on this descriptor is allowed under every profile: the
    /// launch's own. It must be a number that the program can never own, at or
    /// above its hard RLIMIT_NOFILE. Negative: none.
    pub exec_fd: i32,
    /// The same for `sendmsg`: how a launch tells that it failed.
    pub control_fd: i32,
    /// Ask the launcher about calls to refuse and deadly ones, rather than
    /// answering errnos and killing on the spot, unnamed.
    pub notify: bool,
}

/// What the launcher is to do about a call that a filter told it of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// End the run; the name is `denied_syscall`.
    Deadly(String),
    /// Answer this errno; the name is for `refused_syscalls`.
    Refuse(i32, String),
    /// The filter allows this call, and so never tells of it. A notification
    /// that meets this is not from a filter compiled with the same policy and
    /// options: answer EPERM.
    Continue,
}

/// Why a policy cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// There are arguments 0 to 5.
    #[error("{syscall}: there is no argument {index}; a system call has arguments 0 to 5")]
    NoSuchArgument {
        /// The call.
        syscall: String,
        /// The argument's number.
        index: u8,
    },
    /// A 32-bit comparison with a larger number.
    #[error("{syscall}: {value:#x} does not fit the 32 bits that are compared")]
    TooWide {
        /// The call.
        syscall: String,
        /// The number.
        value: u64,
    },
    /// A rule without effect: a mistake.
    #[error("{syscall}: this rule can never matter: {why}")]
    NeverMatters {
        /// The call.
        syscall: String,
        /// Why not.
        why: &'static str,
    },
    /// errnos are 1 to 4095.
    #[error("{syscall}: {errno} is no errno; they are 1 to 4095")]
    NoSuchErrno {
        /// The call.
        syscall: String,
        /// The number.
        errno: u16,
    },
    /// The kernel would not take it.
    #[error("too many conditions: {0} BPF instructions, and the kernel takes {PROGRAM_MAX}")]
    TooLong(usize),
    /// Conditions that multiply; only [`docker::profile`](super::docker::profile) says it.
    #[error("{syscall}: conditions on several arguments are too many patterns for a container")]
    TooScattered {
        /// The call.
        syscall: String,
    },
}

/// The BPF program for a policy: a binary search over ranges of call numbers.
///
/// # Errors
/// [`FilterError`], for a policy that is malformed or has a rule that can never
/// matter, such as one that allows a deadly call.
pub fn compile(
    policy: &SyscallPolicy,
    options: &FilterOptions,
) -> Result<Vec<sock_filter>, FilterError> {
    check(policy)?;
    let action = |verdict| action(verdict, options.notify);
    // Above the table: no calls, then x32's, then none again.
    let numbers = (0..=syscalls::last() + 1).chain([X32_BIT, X32_BIT << 1]);
    let mut ranges: Vec<Range> = numbers
        .map(|first| Range { first, rule: rules::rule(first, policy, options).map(action) })
        .collect();
    ranges.dedup_by(|next, before| next.rule == before.rule);
    let program = tree::program(&ranges, action(Verdict::Deadly));
    if program.len() > PROGRAM_MAX {
        return Err(FilterError::TooLong(program.len()));
    }
    Ok(program)
}

/// What to do about a call that the filter of [`compile`] told of, by the same
/// policy and options. `nr`, `arch` and `args` are those of `seccomp_data`: a
/// copy of the caller's registers, which it cannot change any more.
#[must_use]
pub fn decide(
    nr: i32,
    arch: u32,
    args: &[u64; 6],
    policy: &SyscallPolicy,
    options: &FilterOptions,
) -> Decision {
    let verdict = if arch == ARCH_X86_64 {
        rules::rule(nr.cast_unsigned(), policy, options).verdict(args)
    } else {
        Verdict::Deadly
    };
    match verdict {
        Verdict::Allow => Decision::Continue,
        Verdict::Deadly => Decision::Deadly(syscalls::describe(arch, nr)),
        Verdict::Refuse { errno, .. } => {
            Decision::Refuse(i32::from(errno), syscalls::describe(arch, nr))
        }
    }
}

/// The SECCOMP_RET_ value for a verdict.
fn action(verdict: Verdict, notify: bool) -> u32 {
    match verdict {
        Verdict::Allow => libc::SECCOMP_RET_ALLOW,
        Verdict::Deadly if notify => libc::SECCOMP_RET_USER_NOTIF,
        Verdict::Deadly => libc::SECCOMP_RET_KILL_PROCESS,
        Verdict::Refuse { recorded: true, .. } if notify => libc::SECCOMP_RET_USER_NOTIF,
        Verdict::Refuse { errno, .. } => libc::SECCOMP_RET_ERRNO | u32::from(errno),
    }
}

/// Refuses what is malformed or without effect.
pub(super) fn check(policy: &SyscallPolicy) -> Result<(), FilterError> {
    for (&number, allowed) in &policy.allowed {
        let syscall = || syscalls::describe(ARCH_X86_64, number.cast_signed());
        let never = |why| Err(FilterError::NeverMatters { syscall: syscall(), why });
        if syscalls::name(number).is_none() {
            return never("there is no such system call");
        }
        if deadly::is_deadly(number) {
            return never("it is deadly under every profile");
        }
        if number == libc::SYS_clone3 as u32 {
            return never(
                "its flags cannot be seen, so that it answers ENOSYS under every profile",
            );
        }
        let Allowed::AnyOf(groups) = allowed else { continue };
        if groups.is_empty() {
            return never("it is allowed under none of no conditions");
        }
        for condition in groups.iter().flatten() {
            check_condition(condition, &syscall)?;
        }
    }
    check_errnos(&policy.errnos)
}

fn check_condition(
    condition: &ArgumentCondition,
    syscall: &impl Fn() -> String,
) -> Result<(), FilterError> {
    let ArgumentCondition { index, wide, comparison, value } = *condition;
    if index > 5 {
        return Err(FilterError::NoSuchArgument { syscall: syscall(), index });
    }
    let mask = if let Comparison::MaskedEqual { mask } = comparison { mask } else { 0 };
    let highest = if wide { u64::MAX } else { u64::from(u32::MAX) };
    if let Some(value) = [value, mask].into_iter().find(|&number| number > highest) {
        return Err(FilterError::TooWide { syscall: syscall(), value });
    }
    let why = match comparison {
        Comparison::Less if value == 0 => "nothing is less than 0",
        Comparison::Greater if value == highest => "nothing is greater than the highest number",
        Comparison::MaskedEqual { mask } if value & !mask != 0 => {
            "the value has bits that the mask takes away"
        }
        _ => return Ok(()),
    };
    Err(FilterError::NeverMatters { syscall: syscall(), why })
}

fn check_errnos(errnos: &BTreeMap<u32, u16>) -> Result<(), FilterError> {
    match errnos.iter().find(|(_, errno)| !(1..=4095).contains(*errno)) {
        None => Ok(()),
        Some((&number, &errno)) => Err(FilterError::NoSuchErrno {
            syscall: syscalls::describe(ARCH_X86_64, number.cast_signed()),
            errno,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::profile::default_profile, *};

    const OPTIONS: FilterOptions = FilterOptions {
        network: Network::None,
        refuse_exec_memfd: false,
        refuse_set_id: false,
        spare_init: false,
        exec_fd: 256,
        control_fd: 257,
        notify: true,
    };

    fn with(name: &str, allowed: Allowed) -> SyscallPolicy {
        let mut policy = default_profile();
        policy.allowed.insert(syscalls::number(name).unwrap(), allowed);
        policy
    }

    fn never_matters(policy: &SyscallPolicy) -> bool {
        matches!(compile(policy, &OPTIONS), Err(FilterError::NeverMatters { .. }))
    }

    #[test]
    fn a_rule_that_can_never_matter_is_an_error() {
        for name in deadly::names().iter().chain(&["clone3"]) {
            assert!(never_matters(&with(name, Allowed::Always)), "{name}");
        }
        let mut unknown = default_profile();
        unknown.allowed.insert(400, Allowed::Always);
        assert!(never_matters(&unknown));

        let impossible = [
            rules::low(0, Comparison::Less, 0),
            rules::low(0, Comparison::Greater, u32::MAX),
            rules::low_masked(0, 0xf0, 0x10f),
        ];
        for condition in impossible {
            assert!(never_matters(&with("getpid", Allowed::AnyOf(vec![vec![condition]]))));
        }
        assert!(never_matters(&with("getpid", Allowed::AnyOf(Vec::new()))));
        assert!(compile(&with("personality", Allowed::Always), &OPTIONS).is_ok());
    }

    #[test]
    fn malformed_conditions_are_errors() {
        let with = |condition| with("getpid", Allowed::AnyOf(vec![vec![condition]]));
        let sixth = with(rules::low(6, Comparison::Equal, 0));
        assert!(matches!(compile(&sixth, &OPTIONS), Err(FilterError::NoSuchArgument { .. })));
        let (comparison, value) = (Comparison::Equal, 1 << 32);
        let wide = with(ArgumentCondition { index: 0, wide: false, comparison, value });
        assert!(matches!(compile(&wide, &OPTIONS), Err(FilterError::TooWide { .. })));
        let mut errno = default_profile();
        errno.errnos.insert(0, 0);
        assert!(matches!(compile(&errno, &OPTIONS), Err(FilterError::NoSuchErrno { .. })));
    }

    #[test]
    fn more_than_the_kernel_takes_is_an_error() {
        let group = |value| vec![rules::low(0, Comparison::Equal, value)];
        let policy = with("getpid", Allowed::AnyOf((0..5000).map(group).collect()));
        assert!(matches!(compile(&policy, &OPTIONS), Err(FilterError::TooLong(_))));
    }

    #[test]
    fn the_default_profile_makes_a_short_program() {
        for network in [Network::None, Network::Loopback, Network::Host] {
            for notify in [false, true] {
                let options = FilterOptions { network, notify, refuse_exec_memfd: true, ..OPTIONS };
                let program = compile(&default_profile(), &options).unwrap();
                assert!(program.len() < 400, "{} instructions", program.len());
            }
        }
    }
}

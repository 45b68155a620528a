//! The rules of `rules` in the form in which Docker and other OCI runtimes take
//! a filter: for runs whose jail is a container that a daemon makes.
//!
//! A profile is an allowlist over EPERM. It is enforced by libseccomp, which
//! compares 64 bits, where the kernel looks at 32 of an `int`: "is not TIOCSTI"
//! said to it is met by TIOCSTI with a bit more in the upper half. And runc
//! joins comparisons of one argument by "or". So nothing is compared but bits
//! under a mask, once for each argument of an entry, and what an entry cannot
//! say alone is said by several (`patterns`).
//!
//! What differs from [`filter::compile`], never to allow more:
//!
//! - Nobody is asked: the report names no call, neither refused nor deadly.
//! - No descriptor is the launch's own: `exec_fd`, `control_fd` and `notify` are
//!   taken for none. What the runtime does between filter and program, execve
//!   for one, goes by the same rules.
//! - Calls by another entry (i386, x32) kill the thread, not the process.
//! - A call whose name the host's libseccomp does not know, allowed or deadly,
//!   and a number without a name answer EPERM; above the highest call that the
//!   profile names and libseccomp knows, everything answers ENOSYS (runc's doing).
//! - Another errno than EPERM is EPERM where the calls that answer it are too
//!   many patterns ([`REFUSALS_MAX`]): where conditions combine, as on several
//!   arguments. And everywhere, where a daemon knows no `errnoRet`.
//!
//! `defaultErrnoRet` says EPERM to those who read it. Docker 20.10 doesn't, and
//! means EPERM.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use crate::jail::plan::SyscallPolicy;

use super::{
    filter::{self, FilterError, FilterOptions, PROGRAM_MAX},
    patterns::{self, Pattern},
    rules::{self, Rule, Verdict},
    syscalls,
};

/// Most patterns for one call's errno; with more, it answers EPERM.
pub const REFUSALS_MAX: usize = 128;

/// The profile for a policy: JSON for `docker run --security-opt seccomp=FILE`,
/// or, after `seccomp=`, for `HostConfig.SecurityOpt`.
///
/// # Errors
/// [`FilterError`], as of [`compile`](filter::compile); and where the profile
/// would be longer than the kernel takes, which conditions on several arguments
/// at once soon are.
///
/// # Panics
/// Never: what is written has a form in JSON.
pub fn profile(policy: &SyscallPolicy, options: &FilterOptions) -> Result<String, FilterError> {
    filter::check(policy)?;
    let options = FilterOptions { exec_fd: -1, control_fd: -1, notify: false, ..*options };
    let mut entries = Entries::new();
    for (number, name) in syscalls::names() {
        let parts = parts(rules::rule(number, policy, &options))
            .ok_or_else(|| FilterError::TooScattered { syscall: name.to_owned() })?;
        for (action, pattern) in parts {
            entries.entry((action, arguments(&pattern))).or_default().push(name);
        }
    }
    let length = length(&entries);
    if length > PROGRAM_MAX {
        return Err(FilterError::TooLong(length));
    }
    let profile = Profile {
        default_action: Action::Errno(EPERM),
        default_errno_ret: EPERM,
        architectures: ["SCMP_ARCH_X86_64"],
        syscalls: entries.into_iter().map(entry).collect(),
    };
    Ok(serde_json::to_string(&profile).expect("numbers and strings"))
}

const EPERM: u16 = libc::EPERM as u16;

/// What happens to a call, in this order in the profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Allow,
    Kill,
    Errno(u16),
}

impl From<Verdict> for Action {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Allow => Self::Allow,
            Verdict::Deadly => Self::Kill,
            Verdict::Refuse { errno, .. } => Self::Errno(errno),
        }
    }
}

/// A call's patterns by what happens to them; those not listed answer EPERM.
/// `None`: there are too many to list.
fn parts(rule: Rule<Verdict>) -> Option<Vec<(Action, Pattern)>> {
    let rule = rule.map(Action::from);
    let mut parts = Vec::new();
    // What no stage before has settled; `None`: too many patterns.
    let mut left = Some(vec![patterns::ANY]);
    for stage in &rule.stages {
        let divided = left.map(|left| {
            (patterns::met(&left, &stage.groups), patterns::unmet(&left, &stage.groups))
        });
        let (met, unmet) = divided.unwrap_or_default();
        left = match (stage.met, stage.unmet) {
            (None, None) => met.zip(unmet).map(|(met, unmet)| [met, unmet].concat()),
            (Some(action), None) => {
                settle(&mut parts, action, met)?;
                unmet
            }
            (None, Some(action)) => {
                settle(&mut parts, action, unmet)?;
                met
            }
            (Some(if_met), Some(if_unmet)) => {
                settle(&mut parts, if_met, met)?;
                settle(&mut parts, if_unmet, unmet)?;
                Some(Vec::new())
            }
        };
    }
    settle(&mut parts, rule.last, left)?;
    Some(parts)
}

/// Adds patterns to what happens to a call. Refusals may be too many: what is
/// not listed is refused. `None` for others.
fn settle(
    parts: &mut Vec<(Action, Pattern)>,
    action: Action,
    patterns: Option<Vec<Pattern>>,
) -> Option<()> {
    match (action, patterns) {
        (Action::Errno(EPERM), _) | (Action::Errno(_), None) => {}
        (Action::Errno(_), Some(patterns)) if patterns.len() > REFUSALS_MAX => {}
        (_, patterns) => parts.extend(patterns?.into_iter().map(|pattern| (action, pattern))),
    }
    Some(())
}

/// Calls with the same action and arguments share an entry.
type Entries = BTreeMap<(Action, Vec<Argument>), Vec<&'static str>>;

/// About how many BPF instructions libseccomp makes of it, rather more than less:
/// each half of an argument is loaded, masked and compared.
fn length(entries: &Entries) -> usize {
    let halves = |argument: &Argument| {
        usize::from(argument.value >> 32 != 0) + usize::from(argument.value as u32 != 0)
    };
    entries
        .iter()
        .map(|((_, args), names)| names.len() * (1 + 3 * args.iter().map(halves).sum::<usize>()))
        .sum()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    default_action: Action,
    default_errno_ret: u16,
    architectures: [&'static str; 1],
    syscalls: Vec<Entry>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    names: Vec<&'static str>,
    action: Action,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno_ret: Option<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    args: Vec<Argument>,
}

/// A comparison under a mask, which is `value`; what to find there is `valueTwo`.
#[derive(Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "camelCase")]
struct Argument {
    index: usize,
    value: u64,
    value_two: u64,
    op: &'static str,
}

impl Serialize for Action {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::Allow => "SCMP_ACT_ALLOW",
            Self::Kill => "SCMP_ACT_KILL_PROCESS",
            Self::Errno(_) => "SCMP_ACT_ERRNO",
        })
    }
}

fn entry(((action, args), names): ((Action, Vec<Argument>), Vec<&'static str>)) -> Entry {
    let errno_ret = if let Action::Errno(errno) = action { Some(errno) } else { None };
    Entry { names, action, errno_ret, args }
}

fn arguments(pattern: &Pattern) -> Vec<Argument> {
    let op = "SCMP_CMP_MASKED_EQ";
    let compared = pattern.iter().enumerate().filter(|(_, bits)| bits.mask != 0);
    compared
        .map(|(index, bits)| Argument { index, value: bits.mask, value_two: bits.value, op })
        .collect()
}

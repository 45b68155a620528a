//! A container's profile says what the rules say, for every call.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*};
use serde_json::Value;

use super::{
    deadly,
    docker::profile,
    equivalence_test::{EDGES, condition, value},
    filter::{FilterError, FilterOptions},
    profile::default_profile,
    rules::{self, Verdict},
    syscalls,
};
use crate::jail::plan::{Allowed, ArgumentCondition, Comparison, Network, SyscallPolicy};

const NETWORKS: [Network; 3] = [Network::None, Network::Loopback, Network::Host];

const fn options(network: Network, refuse: bool) -> FilterOptions {
    FilterOptions {
        network,
        refuse_exec_memfd: refuse,
        refuse_set_id: refuse,
        spare_init: refuse,
        exec_fd: -1,
        control_fd: -1,
        notify: false,
    }
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Answer {
    Allow,
    Kill,
    Errno(u64),
}

/// A profile as runc and libseccomp read it: by call, entries that each compare
/// an argument at most once.
struct Profile {
    default: Answer,
    entries: BTreeMap<String, Vec<Entry>>,
}

struct Entry {
    answer: Answer,
    /// Index, mask, what to find under it.
    args: Vec<(usize, u64, u64)>,
}

impl Profile {
    fn parse(json: &str) -> Self {
        let json: Value = serde_json::from_str(json).unwrap();
        assert_eq!(json["architectures"], serde_json::json!(["SCMP_ARCH_X86_64"]));
        let default = answer(&json["defaultAction"], &json["defaultErrnoRet"]);
        let mut entries = BTreeMap::<_, Vec<_>>::new();
        for rule in json["syscalls"].as_array().unwrap() {
            for name in rule["names"].as_array().unwrap() {
                let answer = answer(&rule["action"], &rule["errnoRet"]);
                let args: Vec<_> =
                    rule["args"].as_array().into_iter().flatten().map(argument).collect();
                let indices: BTreeSet<_> = args.iter().map(|(index, ..)| index).collect();
                assert_eq!(indices.len(), args.len(), "{name}: runc would join these by or");
                let name = name.as_str().unwrap().to_owned();
                entries.entry(name).or_default().push(Entry { answer, args });
            }
        }
        Self { default, entries }
    }

    fn answer(&self, name: &str, args: &[u64; 6]) -> Answer {
        let entries = self.entries.get(name).into_iter().flatten();
        let mut answers = entries
            .filter(|entry| entry.args.iter().all(|&(index, mask, is)| args[index] & mask == is))
            .map(|entry| entry.answer);
        let Some(answer) = answers.next() else { return self.default };
        assert!(answers.all(|other| other == answer), "{name}{args:x?}: it depends on the order");
        answer
    }
}

fn answer(action: &Value, errno: &Value) -> Answer {
    match action.as_str().unwrap() {
        "SCMP_ACT_ALLOW" => Answer::Allow,
        "SCMP_ACT_KILL_PROCESS" => Answer::Kill,
        "SCMP_ACT_ERRNO" => Answer::Errno(errno.as_u64().unwrap()),
        other => panic!("{other}"),
    }
}

fn argument(argument: &Value) -> (usize, u64, u64) {
    assert_eq!(argument["op"], "SCMP_CMP_MASKED_EQ");
    let number = |key: &str| argument[key].as_u64().unwrap();
    (number("index") as usize, number("value"), number("valueTwo"))
}

fn expected(
    number: u32,
    args: &[u64; 6],
    policy: &SyscallPolicy,
    options: &FilterOptions,
) -> Answer {
    match rules::rule(number, policy, options).verdict(args) {
        Verdict::Allow => Answer::Allow,
        Verdict::Deadly => Answer::Kill,
        Verdict::Refuse { errno, .. } => Answer::Errno(errno.into()),
    }
}

const EPERM: Answer = Answer::Errno(libc::EPERM as u64);

#[test]
fn default_profile_for_every_call_and_edge_value() {
    let policy = default_profile();
    let both = [false, true];
    for (network, refuse) in NETWORKS.into_iter().flat_map(|n| both.map(|refuse| (n, refuse))) {
        let options = options(network, refuse);
        let profile = Profile::parse(&profile(&policy, &options).unwrap());
        for (number, name) in syscalls::names() {
            for (index, low) in (0..6).flat_map(|index| EDGES.map(|low| (index, low))) {
                for high in [0, 1 << 32, u64::MAX << 32] {
                    let mut args = [0; 6];
                    args[index] = low | high;
                    let expected = expected(number, &args, &policy, &options);
                    assert_eq!(profile.answer(name, &args), expected, "{name}{args:x?}");
                }
            }
        }
    }
}

#[test]
fn guards_hold_whatever_is_in_the_upper_half() {
    let profiles = NETWORKS.map(|network| {
        Profile::parse(&profile(&default_profile(), &options(network, true)).unwrap())
    });
    let answers = |network, name: &str, args: &[u64]| {
        let index = NETWORKS.iter().position(|one| *one == network).unwrap();
        let profile = &profiles[index];
        let answer = |high: u64| {
            let mut all = [high; 6];
            all.iter_mut().zip(args).for_each(|(all, low)| *all |= low);
            profile.answer(name, &all)
        };
        let first = answer(0);
        let same = [1 << 32, 1 << 63, u64::MAX << 32].into_iter().all(|high| answer(high) == first);
        (first, same)
    };
    let none = |name, args: &[u64]| answers(Network::None, name, args);
    let errno = |errno: i32| (Answer::Errno(errno as u64), true);
    let (allowed, eperm) = ((Answer::Allow, true), errno(libc::EPERM));

    assert_eq!(none("ioctl", &[0, libc::TIOCSTI]), eperm);
    assert_eq!(none("ioctl", &[0, libc::TIOCLINUX]), eperm);
    assert_eq!(none("ioctl", &[0, libc::TIOCGWINSZ]), allowed);
    assert_eq!(none("setrlimit", &[libc::RLIMIT_CORE.into()]), eperm);
    assert_eq!(none("setrlimit", &[libc::RLIMIT_NOFILE.into()]), allowed);
    for flag in (0..32).map(|shift| 1 << shift) {
        let deadly = flag & u64::from(deadly::CLONE_NAMESPACES) != 0;
        let expected = if deadly { Answer::Kill } else { Answer::Allow };
        assert_eq!(none("clone", &[flag | 17]), (expected, true), "{flag:#x}");
    }
    assert_eq!(none("clone", &[deadly::CLONE_NAMESPACES.into()]), (Answer::Kill, true));
    assert_eq!(none("clone3", &[]), errno(libc::ENOSYS));
    assert_eq!(none("openat2", &[]), errno(libc::ENOSYS));
    assert_eq!(none("memfd_create", &[0, 0]), errno(libc::EACCES));
    assert_eq!(none("memfd_create", &[0, libc::MFD_NOEXEC_SEAL.into()]), allowed);
    assert_eq!(none("unshare", &[]), (Answer::Kill, true));
    // Nobody schedules init.
    for name in ["sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"] {
        assert_eq!(none(name, &[1]), eperm, "{name}");
        assert_eq!((none(name, &[0]), none(name, &[7])), (allowed, allowed), "{name}");
    }
    assert_eq!(none("setpriority", &[0, 0, 5]), allowed);
    for others in [[0, 1, 5], [1, 1, 5], [2, 0, 5]] {
        assert_eq!(none("setpriority", &others), eperm, "{others:?}");
    }
    for family in 0..50 {
        for (network, inet) in [(Network::None, false), (Network::Host, true)] {
            let given = family == 1 || (inet && (family == 2 || family == 10));
            let expected = if given { allowed } else { errno(libc::EAFNOSUPPORT) };
            assert_eq!(answers(network, "socket", &[family]), expected, "{family}");
            assert_eq!(answers(network, "socketpair", &[family]), expected, "{family}");
        }
    }
    assert_eq!(none("kexec_load", &[]), (Answer::Kill, true));
    assert_eq!(none("syslog", &[]), eperm);
}

#[test]
fn limits_are_read_of_others_and_set_of_oneself_but_for_core() {
    let profile = profile(&default_profile(), &options(Network::None, false)).unwrap();
    let profile = Profile::parse(&profile);
    let prlimit = |pid, resource, new| profile.answer("prlimit64", &[pid, resource, new, 0, 0, 0]);
    let core = u64::from(libc::RLIMIT_CORE);
    for high in [0, 1 << 32, u64::MAX << 32] {
        assert_eq!(prlimit(high | 5, high | core, 0), Answer::Allow);
        assert_eq!(prlimit(high, high | 7, 1), Answer::Allow);
        assert_eq!(prlimit(high, high | core, 1), EPERM);
        // A pointer is a pointer by its upper half too.
        assert_eq!(prlimit(high, high | core, 1 << 40), EPERM);
        assert_eq!(prlimit(high | 5, high | 7, 1), EPERM);
    }
}

#[test]
fn default_profile_is_short_and_names_no_call_twice_without_conditions() {
    for network in NETWORKS {
        let json = profile(&default_profile(), &options(network, true)).unwrap();
        println!("{network:?}: {} bytes", json.len());
        assert!(json.len() < 64 << 10, "{} bytes", json.len());
        for (name, entries) in Profile::parse(&json).entries {
            let always = entries.iter().any(|entry| entry.args.is_empty());
            assert!(entries.len() == 1 || !always, "{name}");
            assert!(entries.iter().all(|entry| entry.answer != EPERM), "{name}: it is the default");
        }
    }
}

#[test]
fn no_descriptor_is_the_launchs_own() {
    let with = |descriptor| FilterOptions {
        exec_fd: descriptor,
        control_fd: descriptor,
        notify: true,
        ..options(Network::None, false)
    };
    let json = profile(&default_profile(), &with(256)).unwrap();
    assert_eq!(json, profile(&default_profile(), &with(-1)).unwrap());
    let args = [256, 0, 0, 0, libc::AT_EMPTY_PATH as u64, 0];
    let refused = Answer::Errno(libc::ENOSYS as u64);
    assert_eq!(Profile::parse(&json).answer("execveat", &args), refused);
}

#[test]
fn what_is_too_much_is_an_error_and_never_left_out() {
    let options = options(Network::None, false);
    let with = |groups| {
        let allowed = [(libc::SYS_getpid as u32, Allowed::AnyOf(groups))].into();
        profile(&SyscallPolicy { allowed, errnos: BTreeMap::new() }, &options)
    };
    let differs = |index| rules::low(index, Comparison::NotEqual, 1);
    let three = vec![(0..3).map(differs).collect()];
    assert!(matches!(with(three), Err(FilterError::TooScattered { .. })));
    let two = vec![(0..2).map(differs).collect()];
    assert!(matches!(with(two), Err(FilterError::TooLong(_))));
    let (comparison, value) = (Comparison::Equal, 1 << 32);
    let wide = vec![vec![ArgumentCondition { index: 0, wide: false, comparison, value }]];
    assert!(matches!(with(wide), Err(FilterError::TooWide { .. })));
}

/// Few calls with few conditions: more of them make no profile.
fn policy() -> impl Strategy<Value = SyscallPolicy> {
    let usable: Vec<u32> = syscalls::names()
        .filter(|(_, name)| !deadly::is_deadly_name(name) && *name != "clone3")
        .map(|(number, _)| number)
        .collect();
    // The guards' calls more often than others.
    let guarded = ["clone", "socket", "ioctl", "setrlimit", "prlimit64", "memfd_create", "openat"];
    let guarded = guarded.map(|name| syscalls::number(name).unwrap()).to_vec();
    let call = || {
        prop_oneof![
            proptest::sample::select(usable.clone()),
            proptest::sample::select(guarded.clone())
        ]
    };
    let allowed = prop_oneof![
        1 => Just(Allowed::Always),
        4 => vec(vec(condition(), 0..3), 1..4).prop_map(Allowed::AnyOf),
    ];
    (
        proptest::collection::btree_map(call(), allowed, 1..4),
        proptest::collection::btree_map(call(), 1..4096_u16, 0..4),
    )
        .prop_map(|(allowed, errnos)| SyscallPolicy { allowed, errnos })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_policy(policy in policy(), which in 0..6_usize, args in vec(value(), 6)) {
        let options = options(NETWORKS[which / 2], which % 2 == 0);
        let json = match profile(&policy, &options) {
            Ok(json) => json,
            Err(FilterError::TooLong(_) | FilterError::TooScattered { .. }) => {
                return Err(TestCaseError::reject("too many patterns"));
            }
            Err(error) => panic!("{error}"),
        };
        let profile = Profile::parse(&json);
        let check = |number, name: &str, args: &[u64; 6]| {
            let (answer, expected) = (profile.answer(name, args), expected(number, args, &policy, &options));
            // Another errno may be too many patterns to be said.
            let other = matches!(expected, Answer::Errno(_)) && answer == EPERM;
            assert!(answer == expected || other, "{name}{args:x?}: {answer:?}, not {expected:?}");
        };
        let args: [u64; 6] = args.try_into().unwrap();
        for (number, name) in syscalls::names() {
            check(number, name, &args);
            let Some(Allowed::AnyOf(groups)) = policy.allowed.get(&number) else { continue };
            for group in groups {
                // All of a group's conditions nearly met, and then one after the other not.
                let mut met = args;
                for condition in group {
                    met[usize::from(condition.index)] = condition.value;
                }
                check(number, name, &met);
                for condition in group {
                    let value = condition.value;
                    for near in [value.wrapping_add(1), value.wrapping_sub(1), value ^ 1 << 32] {
                        let mut args = met;
                        args[usize::from(condition.index)] = near;
                        check(number, name, &args);
                    }
                }
            }
        }
    }
}

//! The compiled filter does what `decide` says, for every call.

use std::collections::BTreeMap;

use proptest::{collection::vec, prelude::*};

use super::{
    filter::{Decision, FilterOptions, compile, decide, sock_filter},
    interpreter::{Call, run},
    profile::default_profile,
    syscalls::{self, ARCH_I386, ARCH_X86_64, X32_BIT},
};
use crate::jail::plan::{Allowed, ArgumentCondition, Comparison, Network, SyscallPolicy};

const ALLOW: u32 = 0x7fff_0000;
const NOTIFY: u32 = 0x7fc0_0000;
const KILL: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;

/// The numbers where something may change, and some beyond.
fn numbers() -> impl Iterator<Item = u32> {
    (0..600)
        .chain([1023, 4096, X32_BIT - 1, u32::MAX, X32_BIT << 1, X32_BIT << 1 | X32_BIT])
        .chain((0..600).map(|number| number | X32_BIT))
}

/// What a filter must give for a call, said without looking at its instructions.
fn expected(call: &Call, policy: &SyscallPolicy, options: &FilterOptions) -> u32 {
    let nr = call.nr.cast_signed();
    let name = syscalls::describe(call.arch, nr);
    match decide(nr, call.arch, &call.args, policy, options) {
        Decision::Continue => ALLOW,
        Decision::Deadly(named) => {
            assert_eq!(named, name);
            if options.notify { NOTIFY } else { KILL }
        }
        Decision::Refuse(errno, named) => {
            assert_eq!(named, name);
            // Too frequent to be told, or meaningless: answered on the spot.
            let quiet = ["clone3", "io_uring_enter", "io_uring_register"].contains(&&*name)
                || name.starts_with('#');
            if options.notify && !quiet { NOTIFY } else { ERRNO | errno.cast_unsigned() }
        }
    }
}

fn agree(program: &[sock_filter], call: &Call, policy: &SyscallPolicy, options: &FilterOptions) {
    assert_eq!(run(program, call), expected(call, policy, options), "{call:x?} {options:?}");
}

fn all_options() -> Vec<FilterOptions> {
    let mut all = Vec::new();
    for network in [Network::None, Network::Loopback, Network::Host] {
        for (refuse_exec_memfd, notify) in
            [(false, false), (false, true), (true, false), (true, true)]
        {
            let (exec_fd, control_fd) = if notify { (256, 257) } else { (-1, -100) };
            all.push(FilterOptions {
                network,
                refuse_exec_memfd,
                refuse_set_id: notify,
                spare_init: notify,
                exec_fd,
                control_fd,
                notify,
            });
        }
    }
    all
}

/// Argument values at which the built-in rules change their mind.
pub(super) const EDGES: [u64; 24] = [
    0,
    1,
    2,
    3,
    4,
    5,
    8,
    10,
    16,
    0x80,
    0x100,
    256,
    257,
    0x1000,
    0x2000,
    0x5412,
    0x541c,
    0x0002_0000,
    0x1000_0000,
    0x7e02_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0xffff_ff9c,
];

#[test]
fn default_profile_for_every_number_and_edge_value() {
    let policy = default_profile();
    for options in all_options() {
        let program = compile(&policy, &options).unwrap();
        for nr in 0..600 {
            for (index, low) in (0..6).flat_map(|index| EDGES.map(|low| (index, low))) {
                for high in [0, 1 << 32, 0xffff_ffff << 32] {
                    let mut args = [0; 6];
                    args[index] = low | high;
                    agree(&program, &Call { nr, arch: ARCH_X86_64, args }, &policy, &options);
                }
            }
        }
        for nr in numbers() {
            agree(&program, &Call { nr, arch: ARCH_X86_64, args: [0; 6] }, &policy, &options);
        }
        for arch in [ARCH_I386, 0xc000_00b7, 0] {
            for nr in numbers() {
                let call = Call { nr, arch, args: [0; 6] };
                let deadly = if options.notify { NOTIFY } else { KILL };
                assert_eq!(run(&program, &call), deadly, "{call:x?}");
                agree(&program, &call, &policy, &options);
            }
        }
    }
}

#[test]
fn empty_policy_allows_only_the_launch_tail() {
    let policy = SyscallPolicy::default();
    for options in all_options() {
        let program = compile(&policy, &options).unwrap();
        for nr in numbers() {
            for first in [0, 255, 256, 257, 256 | 1 << 32, u64::MAX, 0xffff_ff9c] {
                let call = Call { nr, arch: ARCH_X86_64, args: [first, 0, 0, 0, 0, 0] };
                agree(&program, &call, &policy, &options);
                let tail = match syscalls::name(nr) {
                    Some("execveat") => options.exec_fd,
                    Some("sendmsg") => options.control_fd,
                    _ => -1,
                };
                let allowed = tail >= 0 && first as u32 == tail.cast_unsigned();
                assert_eq!(run(&program, &call) == ALLOW, allowed, "{call:x?}");
            }
        }
    }
}

#[test]
fn far_targets_are_reached() {
    // Every other call allowed, each with conditions of its own: nothing merges.
    let condition = |value| ArgumentCondition {
        index: (value % 6) as u8,
        wide: value % 4 == 0,
        comparison: Comparison::GreaterOrEqual,
        value,
    };
    let allowed = syscalls::names()
        .filter(|(number, name)| {
            number % 2 == 0 && !super::deadly::is_deadly_name(name) && *name != "clone3"
        })
        .map(|(number, _)| {
            let value = u64::from(number) + 1;
            (number, Allowed::AnyOf(vec![vec![condition(value), condition(value + 1)]]))
        })
        .collect();
    let policy = SyscallPolicy { allowed, errnos: BTreeMap::from([(1, 38), (3, 13)]) };
    for options in all_options() {
        let program = compile(&policy, &options).unwrap();
        assert!(program.len() > 1000, "{}", program.len());
        for nr in numbers() {
            for value in [0, 1, u64::from(nr), u64::from(nr) + 1, u64::from(nr) + 2, 1 << 40] {
                let call = Call { nr, arch: ARCH_X86_64, args: [value; 6] };
                agree(&program, &call, &policy, &options);
            }
        }
    }
}

pub(super) fn value() -> impl Strategy<Value = u64> {
    prop_oneof![0..4_u64, Just(u64::MAX), Just(1 << 32), Just(u64::from(u32::MAX)), any::<u64>()]
}

pub(super) fn condition() -> impl Strategy<Value = ArgumentCondition> {
    let comparison = prop_oneof![
        Just(Comparison::Equal),
        Just(Comparison::NotEqual),
        Just(Comparison::Less),
        Just(Comparison::LessOrEqual),
        Just(Comparison::Greater),
        Just(Comparison::GreaterOrEqual),
        value().prop_map(|mask| Comparison::MaskedEqual { mask }),
    ];
    (0..6_u8, any::<bool>(), comparison, value()).prop_map(|(index, wide, comparison, value)| {
        // Bring what `compile` refuses into form: too wide, or never met.
        let highest = if wide { u64::MAX } else { u64::from(u32::MAX) };
        let (comparison, value) = match comparison {
            Comparison::MaskedEqual { mask } => {
                let mask = mask & highest;
                (Comparison::MaskedEqual { mask }, value & mask)
            }
            Comparison::Less => (comparison, (value & highest).max(1)),
            Comparison::Greater => (comparison, (value & highest).min(highest - 1)),
            _ => (comparison, value & highest),
        };
        ArgumentCondition { index, wide, comparison, value }
    })
}

fn policy() -> impl Strategy<Value = SyscallPolicy> {
    let usable: Vec<u32> = syscalls::names()
        .filter(|(_, name)| !super::deadly::is_deadly_name(name) && *name != "clone3")
        .map(|(number, _)| number)
        .collect();
    let allowed = prop_oneof![
        2 => Just(Allowed::Always),
        3 => vec(vec(condition(), 0..4), 1..4).prop_map(Allowed::AnyOf),
    ];
    let call = proptest::sample::select(usable.clone());
    let errno = (proptest::sample::select(usable), 1..4096_u16);
    (
        proptest::collection::btree_map(call, allowed, 0..120),
        vec(errno, 0..20).prop_map(|errnos| errnos.into_iter().collect()),
    )
        .prop_map(|(allowed, errnos)| SyscallPolicy { allowed, errnos })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_policy(policy in policy(), which in 0..12_usize, args in vec(value(), 6), near in any::<bool>()) {
        let options = all_options()[which];
        let program = compile(&policy, &options).unwrap();
        for nr in numbers() {
            let mut all: [u64; 6] = args.clone().try_into().unwrap();
            if near
                && let Some(Allowed::AnyOf(groups)) = policy.allowed.get(&nr)
            {
                for condition in groups.iter().flatten() {
                    let index = usize::from(condition.index);
                    for argument in [
                        condition.value,
                        condition.value.wrapping_add(1),
                        condition.value.wrapping_sub(1),
                        condition.value ^ 1 << 32,
                    ] {
                        all[index] = argument;
                        agree(&program, &Call { nr, arch: ARCH_X86_64, args: all }, &policy, &options);
                    }
                }
            }
            agree(&program, &Call { nr, arch: ARCH_X86_64, args: all }, &policy, &options);
        }
    }
}

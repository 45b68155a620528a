//! Sets of calls as lists of patterns of their arguments' bits, for filters that
//! know no other comparison than "these bits have these values" and join
//! comparisons of several arguments only ([`docker`](super::docker)).
//!
//! Every condition can be said so, exactly: a bound is a list of prefixes of the
//! numbers below it, "not equal" one of those that differ at one bit first, at
//! most as many as there are bits. A list may name a call twice.

use crate::jail::plan::{ArgumentCondition, Comparison};

/// Most patterns that a list may have: what several arguments' conditions
/// multiply to soon is more than a filter can hold.
pub(super) const PATTERNS_MAX: usize = 1024;

/// The numbers that have `value` in the bits of `mask`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Bits {
    pub(super) mask: u64,
    /// No bit outside of the mask.
    pub(super) value: u64,
}

/// The calls whose arguments all are so.
pub(super) type Pattern = [Bits; 6];

/// All calls.
pub(super) const ANY: Pattern = [Bits { mask: 0, value: 0 }; 6];

impl Bits {
    /// The numbers that are in both.
    fn and(self, other: Self) -> Option<Self> {
        let agree = (self.value ^ other.value) & self.mask & other.mask == 0;
        agree.then_some(Self { mask: self.mask | other.mask, value: self.value | other.value })
    }

    /// The numbers that are not in `other`, by the highest bit that tells.
    fn without(self, other: Self) -> Vec<Self> {
        if self.and(other).is_none() {
            return vec![self];
        }
        let (mut same, mut differing) = (self, Vec::new());
        let free = other.mask & !self.mask;
        for bit in (0..u64::BITS).rev().map(|shift| 1 << shift).filter(|bit| free & bit != 0) {
            let mask = same.mask | bit;
            differing.push(Self { mask, value: same.value | (!other.value & bit) });
            same = Self { mask, value: same.value | (other.value & bit) };
        }
        differing
    }

    fn contains(self, other: Self) -> bool {
        self.mask & !other.mask == 0 && (self.value ^ other.value) & self.mask == 0
    }
}

/// Those calls of `from` for which one group has all its conditions met;
/// `None`: too many patterns.
pub(super) fn met(from: &[Pattern], groups: &[Vec<ArgumentCondition>]) -> Option<Vec<Pattern>> {
    let mut met = Vec::new();
    for group in groups {
        let mut meeting = from.to_vec();
        for condition in group {
            meeting = select(&meeting, condition, true)?;
        }
        met.extend(meeting);
    }
    bounded(met)
}

/// The other calls of `from`: in each group a condition is not met.
pub(super) fn unmet(from: &[Pattern], groups: &[Vec<ArgumentCondition>]) -> Option<Vec<Pattern>> {
    let mut left = from.to_vec();
    for group in groups {
        let mut missing = Vec::new();
        for condition in group {
            missing.extend(select(&left, condition, false)?);
        }
        left = bounded(missing)?;
    }
    Some(left)
}

/// The calls of `from` that meet a condition, or that do not.
fn select(from: &[Pattern], condition: &ArgumentCondition, meet: bool) -> Option<Vec<Pattern>> {
    let index = usize::from(condition.index);
    let (values, within) = values(condition);
    let mut selected = Vec::new();
    for pattern in from {
        let before = pattern[index];
        let after: Vec<Bits> = if within == meet {
            values.iter().filter_map(|&bits| before.and(bits)).collect()
        } else {
            values.iter().fold(vec![before], |left, &bits| {
                left.into_iter().flat_map(|one| one.without(bits)).collect()
            })
        };
        selected.extend(after.into_iter().map(|bits| {
            let mut pattern = *pattern;
            pattern[index] = bits;
            pattern
        }));
    }
    bounded(selected)
}

/// Numbers, and whether a condition is met by these or by all others.
fn values(condition: &ArgumentCondition) -> (Vec<Bits>, bool) {
    let mask = if condition.wide { u64::MAX } else { u64::from(u32::MAX) };
    let value = condition.value;
    let equal = Bits { mask, value };
    match condition.comparison {
        Comparison::Equal => (vec![equal], true),
        Comparison::NotEqual => (vec![equal], false),
        Comparison::Less => (below(equal), true),
        Comparison::GreaterOrEqual => (below(equal), false),
        Comparison::LessOrEqual => (up_to(equal), true),
        Comparison::Greater => (up_to(equal), false),
        Comparison::MaskedEqual { mask } => (vec![Bits { mask, value }], true),
    }
}

/// The numbers below one of which `end` has all bits: for each of its ones,
/// those that have a zero there and are the same above.
fn below(end: Bits) -> Vec<Bits> {
    let ones = (0..u64::BITS).rev().map(|shift| 1 << shift).filter(|bit| end.value & bit != 0);
    ones.map(|bit: u64| {
        let above = end.mask & !(bit - 1);
        Bits { mask: above, value: end.value & above & !bit }
    })
    .collect()
}

fn up_to(end: Bits) -> Vec<Bits> {
    if end.value == end.mask {
        return vec![Bits::default()];
    }
    below(Bits { mask: end.mask, value: end.value + 1 })
}

/// Without patterns that others cover; `None` where too many are left.
fn bounded(mut patterns: Vec<Pattern>) -> Option<Vec<Pattern>> {
    patterns.sort_unstable();
    patterns.dedup();
    if patterns.len() > PATTERNS_MAX {
        return None;
    }
    let covers = |one: &Pattern, other: &Pattern| {
        one != other && one.iter().zip(other).all(|(one, other)| one.contains(*other))
    };
    let all = patterns.clone();
    patterns.retain(|pattern| !all.iter().any(|other| covers(other, pattern)));
    Some(patterns)
}

#[cfg(test)]
mod tests {
    use super::{
        super::rules::{self, Rule, Stage},
        *,
    };

    fn has(patterns: &[Pattern], argument: u64) -> bool {
        patterns.iter().any(|pattern| argument & pattern[0].mask == pattern[0].value)
    }

    #[test]
    fn a_condition_and_its_contrary_share_all_numbers_out() {
        use Comparison::*;
        let values = [0, 1, 2, 4, 5, 0x5412, 1 << 31, u64::from(u32::MAX) - 1, u32::MAX.into()];
        for (value, wide) in values.into_iter().flat_map(|value| [(value, false), (value, true)]) {
            let masked = MaskedEqual { mask: value | 0x0010_0010 };
            for comparison in [Equal, NotEqual, Less, LessOrEqual, Greater, GreaterOrEqual, masked]
            {
                let groups = vec![vec![ArgumentCondition { index: 0, wide, comparison, value }]];
                let (yes, no) = (met(&[ANY], &groups).unwrap(), unmet(&[ANY], &groups).unwrap());
                assert!(yes.len() <= 64 && no.len() <= 64, "{} {}", yes.len(), no.len());
                let stages = vec![Stage { groups, met: Some(true), unmet: None }];
                let rule = Rule { stages, last: false };
                let near = |value: u64| [value.wrapping_sub(1), value, value.wrapping_add(1)];
                for low in values.into_iter().flat_map(near) {
                    for argument in [low, low ^ (1 << 32), low ^ (u64::MAX << 32)] {
                        let expected = rule.verdict(&[argument, 0, 0, 0, 0, 0]);
                        assert_eq!(has(&yes, argument), expected, "{rule:?} {argument:#x}");
                        assert_eq!(has(&no, argument), !expected, "{rule:?} {argument:#x}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_covers_all_is_all_that_is_listed() {
        let one =
            ArgumentCondition { index: 3, wide: true, comparison: Comparison::Equal, value: 7 };
        let groups = [vec![one], vec![]];
        assert_eq!(met(&[ANY], &groups), Some(vec![ANY]));
        assert_eq!(unmet(&[ANY], &groups), Some(vec![]));
        assert_eq!(met(&[ANY], &[]), Some(vec![]));
        assert_eq!(unmet(&[ANY], &[]), Some(vec![ANY]));
    }

    #[test]
    fn more_than_a_filter_holds_is_none() {
        let group =
            (0..3).map(|index| rules::low(index, Comparison::NotEqual, 0)).collect::<Vec<_>>();
        assert_eq!(met(&[ANY], std::slice::from_ref(&group)), None);
        assert_eq!(met(&[ANY], &[group[..2].to_vec()]).unwrap().len(), 1024);
        assert_eq!(unmet(&[ANY], &[group]).unwrap().len(), 3);
    }
}

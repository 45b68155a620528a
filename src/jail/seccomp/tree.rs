//! Rules as BPF: a binary search over ranges of call numbers, arguments at its leaves.

use seccompiler::sock_filter;

use crate::jail::plan::{ArgumentCondition, Comparison};

use super::{
    assembler::{Assembler, Label, Test},
    rules::{Rule, Stage},
    syscalls::ARCH_X86_64,
};

/// A range of call numbers with one rule; it ends where the next begins.
#[derive(Clone, Debug)]
pub(super) struct Range {
    pub(super) first: u32,
    /// In terms of SECCOMP_RET_ values.
    pub(super) rule: Rule<u32>,
}

// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

/// The program for ranges that begin at number 0 and are in order; whatever
/// comes by another entry meets `other_entry`.
pub(super) fn program(ranges: &[Range], other_entry: u32) -> Vec<sock_filter> {
    let mut tree = Tree { asm: Assembler::default(), bodies: Vec::new() };
    let search = tree.search(ranges);
    let number = tree.asm.load(NUMBER, search);
    let other = tree.asm.ret(other_entry);
    let check = tree.asm.branch(Test::Equal, ARCH_X86_64, number, other);
    let start = tree.asm.load(ARCH, check);
    tree.asm.finish(start)
}

struct Tree<'a> {
    asm: Assembler,
    /// Rules in place: calls with the same rule share its code.
    bodies: Vec<(&'a Rule<u32>, Label)>,
}

impl<'a> Tree<'a> {
    /// Finds the range of the number in the accumulator.
    fn search(&mut self, ranges: &'a [Range]) -> Label {
        match ranges {
            [] => self.asm.ret(libc::SECCOMP_RET_KILL_PROCESS),
            [range] => self.body(&range.rule),
            _ => {
                let (low, high) = ranges.split_at(ranges.len() / 2);
                let above = self.search(high);
                let below = self.search(low);
                self.asm.branch(Test::GreaterOrEqual, high[0].first, above, below)
            }
        }
    }

    fn body(&mut self, rule: &'a Rule<u32>) -> Label {
        if let Some((_, label)) = self.bodies.iter().find(|(known, _)| *known == rule) {
            return *label;
        }
        let mut next = self.asm.ret(rule.last);
        for stage in rule.stages.iter().rev() {
            next = self.stage(stage, next);
        }
        if !rule.stages.is_empty() {
            self.bodies.push((rule, next));
        }
        next
    }

    fn stage(&mut self, stage: &Stage<u32>, next: Label) -> Label {
        let met = stage.met.map_or(next, |action| self.asm.ret(action));
        let mut unmet = stage.unmet.map_or(next, |action| self.asm.ret(action));
        for group in stage.groups.iter().rev() {
            let all = group.iter().rev();
            unmet = all.fold(met, |met, condition| self.condition(condition, met, unmet));
        }
        unmet
    }

    /// Compares an argument; 64 bits are two words, and the accumulator holds one.
    fn condition(&mut self, condition: &ArgumentCondition, yes: Label, no: Label) -> Label {
        let value = condition.value;
        match condition.comparison {
            Comparison::Equal => self.masked(condition, u64::MAX, value, yes, no),
            Comparison::NotEqual => self.masked(condition, u64::MAX, value, no, yes),
            Comparison::MaskedEqual { mask } => self.masked(condition, mask, value, yes, no),
            Comparison::Greater => self.ordered(condition, Test::Greater, yes, no),
            Comparison::LessOrEqual => self.ordered(condition, Test::Greater, no, yes),
            Comparison::GreaterOrEqual => self.ordered(condition, Test::GreaterOrEqual, yes, no),
            Comparison::Less => self.ordered(condition, Test::GreaterOrEqual, no, yes),
        }
    }

    fn masked(
        &mut self,
        condition: &ArgumentCondition,
        mask: u64,
        value: u64,
        yes: Label,
        no: Label,
    ) -> Label {
        let (low, high) = offsets(condition.index);
        let low_half = self.word(low, mask as u32, value as u32, yes, no);
        if !condition.wide {
            return low_half;
        }
        self.word(high, (mask >> 32) as u32, (value >> 32) as u32, low_half, no)
    }

    fn word(&mut self, offset: u32, mask: u32, value: u32, yes: Label, no: Label) -> Label {
        let test = self.asm.branch(Test::Equal, value, yes, no);
        let masked = if mask == u32::MAX { test } else { self.asm.and(mask, test) };
        self.asm.load(offset, masked)
    }

    fn ordered(
        &mut self,
        condition: &ArgumentCondition,
        test: Test,
        yes: Label,
        no: Label,
    ) -> Label {
        let (low, high) = offsets(condition.index);
        let compare = self.asm.branch(test, condition.value as u32, yes, no);
        let low_half = self.asm.load(low, compare);
        if !condition.wide {
            return low_half;
        }
        // The high halves decide unless they are equal.
        let value = (condition.value >> 32) as u32;
        let equal = self.asm.branch(Test::Equal, value, low_half, no);
        let greater = self.asm.branch(Test::Greater, value, yes, equal);
        self.asm.load(high, greater)
    }
}

/// Offsets of an argument's low and high word (x86_64 is little-endian).
const fn offsets(index: u8) -> (u32, u32) {
    let low = ARGUMENTS + 8 * index as u32;
    (low, low + 4)
}

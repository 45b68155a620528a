//! Classic BPF, written from its end.
//!
//! All its jumps go forward. Written from the last instruction to the first,
//! every target is already in place when a jump to it is made, and where it is
//! too far for a conditional jump (255 instructions) a long one goes between.

use seccompiler::sock_filter;

/// How conditional jumps compare the accumulator with a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Test {
    Equal,
    Greater,
    GreaterOrEqual,
}

/// An instruction that is in place; counts from the program's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label(usize);

/// A program under construction.
#[derive(Default)]
pub(super) struct Assembler {
    reversed: Vec<sock_filter>,
    returns: Vec<(u32, Label)>,
}

// Class, size or operation, and mode or source of each instruction used; linux/bpf_common.h.
const LOAD_WORD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// How far a conditional jump may go, less one for a long jump placed after it was measured.
const REACH: usize = 254;

impl Assembler {
    /// Ends the program with `action`.
    pub(super) fn ret(&mut self, action: u32) -> Label {
        let near = self.returns.iter().rev().find(|(of, _)| *of == action).map(|(_, label)| *label);
        if let Some(label) = near
            && self.distance(label) < REACH
        {
            return label;
        }
        let label = self.place(RETURN, 0, 0, action);
        self.returns.push((action, label));
        label
    }

    /// Loads the word at `offset` of `seccomp_data`, then goes on at `next`.
    pub(super) fn load(&mut self, offset: u32, next: Label) -> Label {
        self.fall_through_to(next);
        self.place(LOAD_WORD, 0, 0, offset)
    }

    /// Masks the accumulator, then goes on at `next`.
    pub(super) fn and(&mut self, mask: u32, next: Label) -> Label {
        self.fall_through_to(next);
        self.place(AND, 0, 0, mask)
    }

    /// Goes on at `yes` where the accumulator passes the test, else at `no`.
    pub(super) fn branch(&mut self, test: Test, value: u32, yes: Label, no: Label) -> Label {
        if yes == no {
            return yes;
        }
        let yes = self.within_reach(yes);
        let no = self.within_reach(no);
        let (jt, jf) = (self.distance(yes), self.distance(no));
        debug_assert!(jt <= 255 && jf <= 255);
        let code = match test {
            Test::Equal => JUMP_EQUAL,
            Test::Greater => JUMP_GREATER,
            Test::GreaterOrEqual => JUMP_GREATER_OR_EQUAL,
        };
        self.place(code, jt as u8, jf as u8, value)
    }

    /// The program that begins at `start`, in the kernel's order.
    pub(super) fn finish(mut self, start: Label) -> Vec<sock_filter> {
        self.reversed.truncate(start.0 + 1);
        self.reversed.reverse();
        self.reversed
    }

    fn place(&mut self, code: u16, jt: u8, jf: u8, k: u32) -> Label {
        self.reversed.push(sock_filter { code, jt, jf, k });
        Label(self.reversed.len() - 1)
    }

    /// Instructions that a jump placed now would skip to get to `target`.
    fn distance(&self, target: Label) -> usize {
        self.reversed.len() - 1 - target.0
    }

    fn within_reach(&mut self, target: Label) -> Label {
        if self.distance(target) <= REACH { target } else { self.long_jump(target) }
    }

    fn fall_through_to(&mut self, target: Label) {
        if self.distance(target) != 0 {
            self.long_jump(target);
        }
    }

    fn long_jump(&mut self, target: Label) -> Label {
        let distance = self.distance(target);
        self.place(JUMP, 0, 0, distance as u32)
    }
}

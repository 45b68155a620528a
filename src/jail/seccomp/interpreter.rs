//! A BPF interpreter for tests, as strict as the kernel's own checker.

use super::filter::sock_filter;

/// What a call's registers hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) nr: u32,
    pub(crate) arch: u32,
    pub(crate) args: [u64; 6],
}

/// The SECCOMP_RET_ value that `program` gives for a call.
///
/// # Panics
/// On what the kernel would refuse: unknown instructions, loads that are not
/// words of seccomp_data, jumps out of the program.
pub(crate) fn run(program: &[sock_filter], call: &Call) -> u32 {
    let mut data = [0; 64];
    data[0..4].copy_from_slice(&call.nr.to_ne_bytes());
    data[4..8].copy_from_slice(&call.arch.to_ne_bytes());
    data[8..16].copy_from_slice(&0x5555_5555_0000_1234_u64.to_ne_bytes());
    for (word, arg) in data[16..].chunks_exact_mut(8).zip(call.args) {
        word.copy_from_slice(&arg.to_ne_bytes());
    }
    let (mut at, mut accumulator) = (0, 0_u32);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let mut jump = |passes: bool| at += usize::from(if passes { jt } else { jf });
        match code {
            0x06 => return k,
            0x20 => {
                assert_eq!(k % 4, 0, "unaligned load");
                let word = &data[k as usize..k as usize + 4];
                accumulator = u32::from_ne_bytes(word.try_into().unwrap());
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => jump(accumulator == k),
            0x25 => jump(accumulator > k),
            0x35 => jump(accumulator >= k),
            _ => panic!("instruction {code:#x}"),
        }
    }
}

//! The smallest program there can be, for trying whether programs can be started.

/// An ELF executable that exits with 0: a header, one segment, three instructions.
pub const EXITS_WITH_0: [u8; CODE + 12] = assemble();

/// Where the code is: behind the two headers.
const CODE: usize = 64 + 56;

#[cfg(target_arch = "x86_64")]
const MACHINE: (u8, [u8; 12]) = (
    62,
    // xor edi, edi; mov eax, 60; syscall; nop; nop; nop
    [0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05, 0x90, 0x90, 0x90],
);
#[cfg(target_arch = "aarch64")]
const MACHINE: (u8, [u8; 12]) = (
    183,
    // mov x0, #0; mov x8, #93; svc #0
    [0x00, 0x00, 0x80, 0xd2, 0xa8, 0x0b, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4],
);

/// elf(5): the code follows the two headers and is where the entry point is.
const fn assemble() -> [u8; CODE + 12] {
    let mut elf = [0; CODE + 12];
    let fields: [(usize, &[u8]); 11] = [
        (0, b"\x7fELF\x02\x01\x01"),    // 64 bits, little-endian
        (16, &[2, 0, MACHINE.0, 0, 1]), // executable, machine, version
        (24, &[CODE as u8, 0, 0x40]),   // entry point, in the segment at 0x400000
        (32, &[64]),                    // program headers follow this header
        (52, &[64, 0, 56, 0, 1]),       // header sizes, one program header
        (64, &[1, 0, 0, 0, 5]),         // load, readable and executable
        (80, &[0, 0, 0x40]),            // where in memory
        (96, &[CODE as u8 + 12]),       // bytes in the file
        (104, &[CODE as u8 + 12]),      // bytes in memory
        (113, &[0x10]),                 // alignment
        (CODE, &MACHINE.1),
    ];
    let mut field = 0;
    while field < fields.len() {
        let (at, bytes) = fields[field];
        let mut byte = 0;
        while byte < bytes.len() {
            elf[at + byte] = bytes[byte];
            byte += 1;
        }
        field += 1;
    }
    elf
}

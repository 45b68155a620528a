//! System calls without the C library.
//!
//! The library puts an error's number into `errno`: memory that a process shares with a
//! child of the same memory, as init does with the process that becomes the program.
//! Here it comes in a register, as the kernel gives it, and nothing is written to.

use std::{arch::asm, io};

/// Makes a system call; syscall(2) has the registers.
///
/// # Errors
/// The kernel's, -1 to -4095.
///
/// # Safety
/// That of the call: pointers among its arguments must be good for what it does with them.
pub(crate) unsafe fn syscall(number: libc::c_long, arguments: [usize; 6]) -> io::Result<usize> {
    let [a, b, c, d, e, f] = arguments;
    let result: isize;
    // SAFETY: the caller vouches for the arguments; rcx and r11 are what the kernel
    // changes, and the memory that it changes is told by leaving `nomem` out.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if (-4095..0).contains(&result) {
        Err(io::Error::from_raw_os_error(-result as i32))
    } else {
        Ok(result as usize)
    }
}

/// The same for calls that take plain numbers only.
///
/// # Errors
/// As above.
pub(crate) fn numbers(number: libc::c_long, arguments: &[usize]) -> io::Result<usize> {
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    // SAFETY: callers name calls that take no address, and own the descriptors.
    unsafe { syscall(number, all) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_errors_are_the_kernels() {
        let pid = numbers(libc::SYS_getpid, &[]).unwrap();
        assert_eq!(pid, std::process::id() as usize);
        let error = numbers(libc::SYS_close, &[usize::MAX]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        let mut buffer = [0_u8; 64];
        // SAFETY: the buffer is as long as said.
        let length = unsafe {
            syscall(libc::SYS_getcwd, [buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0, 0])
        };
        assert!(length.is_ok_and(|length| length > 1) || buffer[0] == 0);
    }
}

//! A child that does one thing in our place.

use std::io;

use super::raw;

/// Runs `act(argument)` in a child that shares our memory and our table of descriptors, and
/// waits for its end, while this thread stands still: what it enters and becomes meanwhile
/// isn't what we are. It costs little, for nothing is copied, vfork(2).
///
/// # Errors
/// Those of clone(2) and wait4(2).
///
/// # Safety
/// `act` makes only system calls, by `raw` or rustix, and needs no more stack than `stack`
/// bytes; nobody else uses what `argument` points to.
pub unsafe fn run_aside(
    stack: usize,
    act: extern "C" fn(*mut libc::c_void) -> libc::c_int,
    argument: *mut libc::c_void,
) -> io::Result<()> {
    // Aligned as a stack must be.
    let mut stack = Vec::<u128>::with_capacity(stack / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    // No signal tells of its end, which is waited for here alone.
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
    // SAFETY: the stack is the child's alone until it has ended, which we wait for; the
    // caller vouches for the rest.
    let pid = unsafe { libc::clone(act, top.cast(), flags, argument) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    loop {
        let arguments = [pid as usize, 0, libc::__WALL as usize, 0];
        match raw::numbers(libc::SYS_wait4, &arguments) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(drop),
        }
    }
}

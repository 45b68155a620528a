//! The system calls of `dispatch-init`, and what a program without a C library needs.

use core::{
    arch::{asm, global_asm},
    ffi::CStr,
    mem, ptr, slice,
};

// The outermost frame, by the ABI; a call wants a stack aligned to 16.
global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {main}",
    "ud2",
    main = sym super::main,
);

/// The number of an error.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub u32);

impl Errno {
    pub const SEARCH: Self = Self(3);
    pub const INTERRUPTED: Self = Self(4);
    pub const CHILD: Self = Self(10);
    pub const AGAIN: Self = Self(11);
}

pub type Result<T> = core::result::Result<T, Errno>;

/// The number of a descriptor. Nothing here closes one by itself.
#[derive(Clone, Copy)]
pub struct Fd(i32);

impl Fd {
    pub const STDIN: Self = Self(0);
    pub const STDOUT: Self = Self(1);
    pub const STDERR: Self = Self(2);
    /// The first after these, which systemd's protocol begins at: sd_listen_fds(3).
    pub const LISTENER: Self = Self(3);
}

/// The number of a process.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pid(i32);

/// What poll(2) waits for, and says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ready(i16);

impl Ready {
    /// Asked for, it still brings hangups and errors.
    pub const NOTHING: Self = Self(0);
    pub const INPUT: Self = Self(1);
    pub const OUTPUT: Self = Self(4);
}

pub const SIGSYS: u32 = 31;
const SIGKILL: usize = 9;
const SIGCHLD: usize = 17;
/// A set of one signal has the bit below its number.
static SIGCHLD_SET: u64 = 1 << (SIGCHLD - 1);

const O_WRONLY: usize = 1;
const O_NONBLOCK: usize = 0o4000;
const O_CLOEXEC: usize = 0o2_000_000;
const AT_FDCWD: usize = -100_isize as usize;

/// Every call that is made.
mod number {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const CLOSE: usize = 3;
    pub const LSEEK: usize = 8;
    pub const MMAP: usize = 9;
    pub const MUNMAP: usize = 11;
    pub const RT_SIGACTION: usize = 13;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const GETPID: usize = 39;
    pub const SOCKET: usize = 41;
    pub const BIND: usize = 49;
    pub const LISTEN: usize = 50;
    pub const CLONE: usize = 56;
    pub const EXECVE: usize = 59;
    pub const WAIT4: usize = 61;
    pub const KILL: usize = 62;
    pub const SETSID: usize = 112;
    pub const PRCTL: usize = 157;
    pub const EXIT_GROUP: usize = 231;
    pub const OPENAT: usize = 257;
    pub const UNLINKAT: usize = 263;
    pub const PPOLL: usize = 271;
    pub const ACCEPT4: usize = 288;
    pub const SIGNALFD4: usize = 289;
    pub const DUP3: usize = 292;
    pub const PIPE2: usize = 293;
    pub const CLOSE_RANGE: usize = 436;
}

/// Makes a system call; syscall(2) has the registers.
///
/// # Safety
/// That of the call: pointers among its arguments must be good for what it does with them.
unsafe fn syscall(number: usize, arguments: [usize; 6]) -> Result<usize> {
    let [a, b, c, d, e, f] = arguments;
    let result: isize;
    // SAFETY: the caller vouches for the arguments; rcx and r11 are what the kernel
    // changes, and the memory that it changes is told by leaving `nomem` out.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
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
    if (-4095..0).contains(&result) { Err(Errno(-result as u32)) } else { Ok(result as usize) }
}

/// The same for calls that take plain numbers only.
fn numbers<const N: usize>(number: usize, arguments: [usize; N]) -> Result<usize> {
    let mut all = [0; 6];
    for (to, from) in all.iter_mut().zip(arguments) {
        *to = from;
    }
    // SAFETY: callers name calls that take no address.
    unsafe { syscall(number, all) }
}

pub fn exit(code: i32) -> ! {
    loop {
        numbers(number::EXIT_GROUP, [code as usize]).ok();
    }
}

pub fn getpid() -> i32 {
    numbers(number::GETPID, []).map_or(0, |pid| pid as i32)
}

pub fn set_name(name: &CStr) -> Result<()> {
    const PR_SET_NAME: usize = 15;
    // SAFETY: a string with its NUL, of which at most 16 bytes are read.
    unsafe { syscall(number::PRCTL, [PR_SET_NAME, name.as_ptr() as usize, 0, 0, 0, 0]) }.map(drop)
}

pub fn set_dumpable(dumpable: bool) -> Result<()> {
    const PR_SET_DUMPABLE: usize = 4;
    numbers(number::PRCTL, [PR_SET_DUMPABLE, usize::from(dumpable), 0, 0, 0]).map(drop)
}

pub fn block_all_signals() -> Result<()> {
    mask(u64::MAX)
}

pub fn unblock_all_signals() -> Result<()> {
    mask(0)
}

fn mask(blocked: u64) -> Result<()> {
    const SIG_SETMASK: usize = 2;
    let set = &raw const blocked as usize;
    let size = mem::size_of_val(&blocked);
    // SAFETY: the set is as long as said.
    unsafe { syscall(number::RT_SIGPROCMASK, [SIG_SETMASK, set, 0, size, 0, 0]) }.map(drop)
}

/// Makes ended children wait for wait4: ignored, they would be gone at once.
pub fn notice_children() -> Result<()> {
    // The kernel's `struct sigaction`: SIG_DFL, no flags, no restorer, no mask.
    let default = [0_u64; 4];
    let action = &raw const default as usize;
    let size = mem::size_of::<u64>();
    // SAFETY: the structure is the kernel's; no handler is set.
    unsafe { syscall(number::RT_SIGACTION, [SIGCHLD, action, 0, size, 0, 0]) }.map(drop)
}

/// A descriptor that is ready when a child has ended. SIGCHLD must be blocked.
pub fn child_signals() -> Result<Fd> {
    let set = &raw const SIGCHLD_SET as usize;
    let size = mem::size_of_val(&SIGCHLD_SET);
    let flags = O_CLOEXEC | O_NONBLOCK;
    // SAFETY: the set is as long as said; -1 makes a new descriptor.
    unsafe { syscall(number::SIGNALFD4, [usize::MAX, set, size, flags, 0, 0]) }
        .map(|fd| Fd(fd as i32))
}

/// Takes the news: whoever has ended is asked after next.
pub fn drain(signals: Fd) {
    /// Of `struct signalfd_siginfo`.
    const SIZE: usize = 128;
    let mut news = mem::MaybeUninit::<[u8; 2 * SIZE]>::uninit();
    let arguments = [signals.0 as usize, news.as_mut_ptr() as usize, 2 * SIZE, 0, 0, 0];
    // SAFETY: the buffer is as long as said; what comes into it is not looked at.
    unsafe { syscall(number::READ, arguments) }.ok();
}

/// Opens a file; a FIFO without waiting for a writer.
pub fn open_to_read(path: &CStr) -> Result<Fd> {
    open(path, O_NONBLOCK)
}

pub fn open_to_write(path: &CStr) -> Result<Fd> {
    open(path, O_WRONLY)
}

fn open(path: &CStr, flags: usize) -> Result<Fd> {
    let arguments = [AT_FDCWD, path.as_ptr() as usize, flags | O_CLOEXEC, 0, 0, 0];
    // SAFETY: a string with its NUL.
    unsafe { syscall(number::OPENAT, arguments) }.map(|fd| Fd(fd as i32))
}

pub fn close(fd: Fd) {
    numbers(number::CLOSE, [fd.0 as usize]).ok();
}

/// Closes this number and all above it.
pub fn close_from(first: u32) -> Result<()> {
    numbers(number::CLOSE_RANGE, [first as usize, u32::MAX as usize, 0]).map(drop)
}

pub fn read(from: Fd, buffer: &mut [u8]) -> Result<usize> {
    let arguments = [from.0 as usize, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0];
    // SAFETY: the buffer is as long as said.
    unsafe { syscall(number::READ, arguments) }
}

pub fn write(to: Fd, bytes: &[u8]) -> Result<usize> {
    let arguments = [to.0 as usize, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0];
    // SAFETY: the bytes are as many as said.
    unsafe { syscall(number::WRITE, arguments) }
}

/// Whether it is a file with a position, not a pipe, FIFO or socket.
pub fn can_seek(fd: Fd) -> bool {
    const SEEK_CUR: usize = 1;
    numbers(number::LSEEK, [fd.0 as usize, 0, SEEK_CUR]).is_ok()
}

/// A pipe: the end to read from, the end to write to.
pub fn pipe() -> Result<(Fd, Fd)> {
    let mut ends = [0_i32; 2];
    let arguments = [ends.as_mut_ptr() as usize, O_CLOEXEC, 0, 0, 0, 0];
    // SAFETY: there is room for two numbers.
    unsafe { syscall(number::PIPE2, arguments) }?;
    let [read, write] = ends;
    Ok((Fd(read), Fd(write)))
}

/// A stream socket of the Unix family that listens at a path, unix(7). It stays open over
/// exec: whoever forks decides who has it.
pub fn listen(path: &CStr, backlog: u32) -> Result<Fd> {
    const AF_UNIX: u16 = 1;
    const SOCK_STREAM: usize = 1;
    /// The kernel's `struct sockaddr_un`.
    #[repr(C)]
    struct Address {
        family: u16,
        path: [u8; 108],
    }
    let mut address = Address { family: AF_UNIX, path: [0; 108] };
    for (to, from) in address.path.iter_mut().zip(path.to_bytes()) {
        *to = *from;
    }
    let socket = numbers(number::SOCKET, [AF_UNIX as usize, SOCK_STREAM, 0])?;
    let size = mem::size_of::<Address>();
    // SAFETY: the structure is the kernel's, and as long as said.
    unsafe { syscall(number::BIND, [socket, &raw const address as usize, size, 0, 0, 0]) }?;
    numbers(number::LISTEN, [socket, backlog as usize])?;
    Ok(Fd(socket as i32))
}

/// The next connection to a socket that listens.
pub fn accept(listener: Fd) -> Result<Fd> {
    // SOCK_CLOEXEC is O_CLOEXEC. Nobody asks for the peer's address.
    numbers(number::ACCEPT4, [listener.0 as usize, 0, 0, O_CLOEXEC]).map(|fd| Fd(fd as i32))
}

pub fn unlink(path: &CStr) -> Result<()> {
    // SAFETY: a string with its NUL.
    unsafe { syscall(number::UNLINKAT, [AT_FDCWD, path.as_ptr() as usize, 0, 0, 0, 0]) }.map(drop)
}

/// Gives a descriptor another number, whatever had that, to be kept over exec.
pub fn renumber(from: Fd, to: Fd) -> Result<()> {
    if from.0 != to.0 {
        numbers(number::DUP3, [from.0 as usize, to.0 as usize, 0])?;
        close(from);
    }
    Ok(())
}

/// Waits for what either is to be ready for, or only looks: what they are ready for.
pub fn poll(wanted: [(Option<Fd>, Ready); 2], glance: bool) -> Result<[Ready; 2]> {
    #[repr(C)]
    struct PollFd {
        fd: i32,
        events: i16,
        revents: i16,
    }
    // A negative number is passed over.
    let mut fds = wanted.map(|(fd, Ready(events))| PollFd {
        fd: fd.map_or(-1, |fd| fd.0),
        events,
        revents: 0,
    });
    let no_time = [0_u64; 2];
    let timeout = if glance { &raw const no_time as usize } else { 0 };
    let arguments = [fds.as_mut_ptr() as usize, fds.len(), timeout, 0, 0, 0];
    // SAFETY: the structures are the kernel's, and as many as said; the timeout is a
    // timespec of zeros, which the kernel may write to: nothing else is in that place.
    unsafe { syscall(number::PPOLL, arguments) }?;
    Ok(fds.map(|fd| Ready(fd.revents)))
}

/// Zeroed memory for bytes.
pub fn map_bytes(count: usize) -> Result<&'static mut [u8]> {
    let start = map(count)?;
    // SAFETY: fresh, ours alone, zeroed, and as long.
    Ok(unsafe { slice::from_raw_parts_mut(start, count) })
}

/// Zeroed memory for pointers, all null.
pub fn map_pointers(count: usize) -> Result<&'static mut [*const u8]> {
    let start = map(count * mem::size_of::<*const u8>())?;
    // SAFETY: fresh, ours alone, zeroed, as long, and aligned to a page.
    Ok(unsafe { slice::from_raw_parts_mut(start.cast(), count) })
}

fn map(size: usize) -> Result<*mut u8> {
    const READ_WRITE: usize = 3;
    const PRIVATE_ANONYMOUS: usize = 0x22;
    let arguments = [0, size, READ_WRITE, PRIVATE_ANONYMOUS, usize::MAX, 0];
    // SAFETY: it takes the place of no other mapping.
    let start = unsafe { syscall(number::MMAP, arguments) }?;
    Ok(ptr::with_exposed_provenance_mut(start))
}

/// Gives a mapping back.
///
/// # Safety
/// It came from `map_bytes` or `map_pointers`, and nothing looks at it again.
pub unsafe fn unmap<T>(mapping: &'static [T]) {
    let arguments = [mapping.as_ptr() as usize, mem::size_of_val(mapping), 0, 0, 0, 0];
    // SAFETY: the caller's.
    unsafe { syscall(number::MUNMAP, arguments) }.ok();
}

/// Begins a child, which has a copy of everything; `None` in the child.
pub fn fork() -> Result<Option<Pid>> {
    // No memory is shared, so both go on with the stack they have.
    numbers(number::CLONE, [SIGCHLD, 0, 0, 0, 0]).map(|pid| (pid != 0).then_some(Pid(pid as i32)))
}

pub fn setsid() -> Result<()> {
    numbers(number::SETSID, []).map(drop)
}

/// Becomes another program.
///
/// # Safety
/// The path ends with a NUL, and so does each string of the two vectors; each of these
/// ends with a null.
pub unsafe fn execve(
    path: *const u8,
    argv: *const *const u8,
    envp: *const *const u8,
) -> Result<()> {
    let arguments = [path as usize, argv as usize, envp as usize, 0, 0, 0];
    // SAFETY: the caller's.
    unsafe { syscall(number::EXECVE, arguments) }.map(drop)
}

/// Reaps one ended process of any kind: which, and its wait status. `None` where all live.
pub fn wait_any() -> Result<Option<(Pid, u32)>> {
    const WNOHANG: usize = 1;
    const WALL: usize = 0x4000_0000;
    let mut status = 0_u32;
    let arguments = [usize::MAX, &raw mut status as usize, WNOHANG | WALL, 0, 0, 0];
    // SAFETY: there is room for the status; usage is not asked for.
    let pid = unsafe { syscall(number::WAIT4, arguments) }?;
    Ok((pid != 0).then_some((Pid(pid as i32), status)))
}

/// Kills every process of the pid namespace but its first, which the caller must be.
pub fn kill_all_others() -> Result<()> {
    numbers(number::KILL, [usize::MAX, SIGKILL]).map(drop)
}

/// Nothing here panics that is known of. Where it does, no record is written.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(super::protocol::exit::REFUSED)
}

// What the compiler may call for, by these names, and a C library would have.

/// # Safety
/// That of memcpy(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's. The direction flag is clear by the ABI.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") count => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// # Safety
/// That of memset(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: as above.
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") count => _,
            inout("rdi") to => _,
            in("al") byte as u8,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// # Safety
/// That of memcmp(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller's: both are as long. Volatile, so that the loop is not
        // taken for what this function is.
        let (a, b) = unsafe { (one.add(at).read_volatile(), other.add(at).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// # Safety
/// That of memcmp(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's.
    unsafe { memcmp(one, other, count) }
}

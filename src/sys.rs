//! The few raw system calls that no crate wraps as needed, and descriptor passing.
//!
//! Thin: errors are `io::Error` with the kernel's errno.

mod aside;
mod mapping;
mod memfd;
pub(crate) mod raw;
mod sockets;

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command},
    ptr,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

pub use aside::run_aside;
pub use mapping::Mapping;
pub use memfd::{SealedBytes, Unsealed, sealed_memfd};
pub use sockets::{connect_to_inode, open_socket, peer, stream_socket};

/// Most descriptors one packet can carry here.
pub const FDS_MAX: usize = 32;

/// A connected SOCK_SEQPACKET pair, close-on-exec, unix(7).
///
/// # Errors
/// Those of socketpair(2).
pub fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one packet with its descriptors; never SIGPIPE.
///
/// # Errors
/// Those of sendmsg(2): `WouldBlock` on a full non-blocking socket, `BrokenPipe`
/// when the peer is gone.
pub fn send_packet(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::from_raw_os_error(libc::ETOOMANYREFS));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// A packet as it came.
#[derive(Debug)]
pub struct Packet {
    /// How much of the buffer it fills.
    pub length: usize,
    /// Its descriptors, close-on-exec. `None` where some were lost: this
    /// process can have no more of them, cmsg(3). What did come is closed.
    pub descriptors: Option<Vec<OwnedFd>>,
}

/// Receives one packet into `buffer`, its descriptors close-on-exec.
/// `Ok(None)` is the end: the peer closed.
///
/// # Errors
/// Those of recvmsg(2); `EMSGSIZE` for a packet that did not fit, or whose
/// descriptors did not; they are closed.
pub fn receive_packet(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let Some(packet) = receive_bytes(socket, buffer)? else { return Ok(None) };
    let too_many = || io::Error::from_raw_os_error(libc::EMSGSIZE);
    Ok(Some((packet.length, packet.descriptors.ok_or_else(too_many)?)))
}

/// [`receive_packet`], but that lost descriptors don't lose the bytes.
///
/// # Errors
/// Those of recvmsg(2); `EMSGSIZE` for bytes that did not fit.
pub fn receive_bytes(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Option<Packet>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    if received.flags.contains(rustix::net::ReturnFlags::TRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let lost = received.flags.contains(rustix::net::ReturnFlags::CTRUNC);
    if received.bytes == 0 && descriptors.is_empty() && !lost {
        return Ok(None);
    }
    let descriptors = (!lost).then_some(descriptors);
    Ok(Some(Packet { length: received.bytes, descriptors }))
}

/// Whether another open file than this one has a lock of F_OFD_SETLK, or a process one of
/// F_SETLK, on any part of it; fcntl(2). Locks of flock(2) are others.
///
/// # Errors
/// Those of fcntl(2).
pub fn open_file_lock(file: BorrowedFd<'_>) -> io::Result<bool> {
    let mut lock = whole_file(libc::F_WRLCK);
    let command = libc::F_OFD_GETLK as usize;
    let arguments = [file.as_raw_fd() as usize, command, (&raw mut lock) as usize, 0, 0, 0];
    // SAFETY: the structure outlives the call.
    unsafe { raw::syscall(libc::SYS_fcntl, arguments) }?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// How long what is written to the file is said to live, F_GET_RW_HINT of fcntl(2); 0 for
/// what nobody said anything of.
///
/// # Errors
/// Those of fcntl(2).
pub fn write_hint(file: BorrowedFd<'_>) -> io::Result<u64> {
    // F_LINUX_SPECIFIC_BASE and 11, include/uapi/linux/fcntl.h.
    const F_GET_RW_HINT: usize = 1024 + 11;
    let mut hint = 0_u64;
    let arguments = [file.as_raw_fd() as usize, F_GET_RW_HINT, (&raw mut hint) as usize, 0, 0, 0];
    // SAFETY: the number outlives the call.
    unsafe { raw::syscall(libc::SYS_fcntl, arguments) }?;
    Ok(hint)
}

/// Takes such a lock, for reading.
///
/// # Errors
/// Those of fcntl(2).
#[cfg(test)]
pub(crate) fn lock_open_file(file: BorrowedFd<'_>) -> io::Result<()> {
    let lock = whole_file(libc::F_RDLCK);
    let command = libc::F_OFD_SETLK as usize;
    let arguments = [file.as_raw_fd() as usize, command, (&raw const lock) as usize, 0, 0, 0];
    // SAFETY: the structure outlives the call.
    unsafe { raw::syscall(libc::SYS_fcntl, arguments) }.map(drop)
}

fn whole_file(kind: i32) -> libc::flock {
    // SAFETY: all-zero is a valid flock: from the beginning, to the end, nobody's.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock
}

/// Opens a file for reading: no link is followed at the path's end, and a FIFO
/// doesn't block; close-on-exec.
///
/// # Errors
/// Those of open(2): `ELOOP` for a link.
pub fn open_no_follow(path: &std::path::Path) -> io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// The user and primary group id of a host account; `None` where there is none
/// of this name, or the account database can't be asked.
#[must_use]
pub fn account(name: &str) -> Option<(u32, u32)> {
    let user = nix::unistd::User::from_name(name).ok().flatten()?;
    Some((user.uid.as_raw(), user.gid.as_raw()))
}

/// Takes over a descriptor that a parent process passed on by number; once per
/// number. To be called before anything else could have opened it.
///
/// # Errors
/// EBADF where it isn't open, EBUSY where it was taken already.
pub fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    static TAKEN: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let bit = 1_u64.checked_shl(fd.cast_unsigned()).unwrap_or(0);
    if bit == 0 || TAKEN.fetch_or(bit, std::sync::atomic::Ordering::SeqCst) & bit != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    set_close_on_exec(fd, true)?;
    // SAFETY: it is open, and nobody in this process owned it before: it came
    // from our parent, and only the first caller gets here.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts a signal's disposition back to its default. One that is ignored, as a
/// shell ignores SIGINT for its background jobs, never reaches a signalfd.
///
/// # Errors
/// Those of sigaction(2).
pub fn default_signal(signal: nix::sys::signal::Signal) -> io::Result<()> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: installs no handler.
    unsafe { sigaction(signal, &default) }?;
    Ok(())
}

/// Starts a command; `prepare` runs in the child between fork and exec, and its
/// error is this function's.
///
/// # Errors
/// Those of fork(2) and exec(2), and where this process has a second thread: a
/// forked child may then find a lock taken for ever.
pub fn spawn_prepared(
    command: &mut Command,
    prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<Child> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("this process has more than one thread already"));
    }
    // SAFETY: with one thread, the child's copy of our memory is consistent.
    #[expect(clippy::disallowed_methods, reason = "the monitor has one thread and is small")]
    unsafe {
        command.pre_exec(prepare)
    };
    command.spawn()
}

// What follows runs in cloned children too: only system calls, no allocation.

/// Ends this process at once: no destructor, no exit handler.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) touches none of our memory.
    unsafe { libc::_exit(code) }
}

/// fork(2) without the C library's handlers: 0 in the child.
///
/// # Errors
/// Those of clone(2).
pub fn fork() -> io::Result<i32> {
    // SAFETY: without CLONE_VM the child has a copy of everything; callers are
    // single-threaded and the child makes only system calls.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::SIGCHLD,
            ptr::null::<u8>(),
            ptr::null::<u8>(),
            ptr::null::<u8>(),
            0,
        )
    };
    check(pid).map(|pid| pid as i32)
}

/// unshare(2) of a process with one thread.
///
/// # Errors
/// Those of unshare(2).
pub fn unshare(namespaces: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: the unsound case is unsharing the table of descriptors or the
    // file system attributes of a thread; namespaces are neither.
    Ok(unsafe { rustix::thread::unshare_unsafe(namespaces) }?)
}

/// A child that shares our memory until it execs or ends, clone(2): it need not be copied.
/// It begins with `begin(argument)` on the stack that ends at `stack_top`; in everything
/// but memory it is as one of [`fork`].
///
/// # Errors
/// Those of clone(2).
///
/// # Safety
/// `stack_top` must be the end of memory that serves as a stack and, like what `argument`
/// points to, stays untouched by others until the child has exec'd or ended. `begin` never
/// returns. Both processes make system calls by `raw` or rustix only, and write to no
/// memory that both use.
pub unsafe fn clone_sharing(
    stack_top: *mut u8,
    begin: extern "C" fn(*mut libc::c_void) -> libc::c_int,
    argument: *mut libc::c_void,
) -> io::Result<i32> {
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: the caller vouches for stack and argument. A failure leaves no child that
    // errno would be shared with.
    match unsafe { libc::clone(begin, stack_top.cast(), flags, argument) } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(pid),
    }
}

/// dup3(2) with close-on-exec; `from` may equal `to`, which then gets that flag.
///
/// # Errors
/// Those of dup(2).
pub fn dup_to(from: RawFd, to: RawFd) -> io::Result<()> {
    if from == to {
        return set_close_on_exec(from, true);
    }
    let arguments = [from as usize, to as usize, libc::O_CLOEXEC as usize];
    raw::numbers(libc::SYS_dup3, &arguments).map(drop)
}

/// dup2(2): the copy survives exec.
///
/// # Errors
/// Those of dup(2).
pub fn dup_to_inherited(from: RawFd, to: RawFd) -> io::Result<()> {
    if from == to {
        return set_close_on_exec(from, false);
    }
    raw::numbers(libc::SYS_dup2, &[from as usize, to as usize]).map(drop)
}

fn set_close_on_exec(fd: RawFd, on: bool) -> io::Result<()> {
    let flag = if on { libc::FD_CLOEXEC } else { 0 };
    let arguments = [fd as usize, libc::F_SETFD as usize, flag as usize];
    raw::numbers(libc::SYS_fcntl, &arguments).map(drop)
}

/// close(2) of a bare number.
///
/// # Errors
/// Those of close(2).
pub fn close(fd: RawFd) -> io::Result<()> {
    raw::numbers(libc::SYS_close, &[fd as usize]).map(drop)
}

/// close_range(2) of `first..=last`.
///
/// # Errors
/// Those of close_range(2).
pub fn close_range(first: u32, last: u32) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    raw::numbers(libc::SYS_close_range, &[first as usize, last as usize, 0]).map(drop)
}

/// Has every descriptor from `first` on closed by the next exec.
///
/// # Errors
/// Those of close_range(2): EINVAL before Linux 5.11.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    let flag = libc::CLOSE_RANGE_CLOEXEC as usize;
    let all = libc::c_uint::MAX as usize;
    raw::numbers(libc::SYS_close_range, &[first as usize, all, flag]).map(drop)
}

/// Blocks every signal, sigprocmask(2).
///
/// # Errors
/// Those of sigprocmask(2).
pub fn block_all_signals() -> io::Result<()> {
    set_signal_mask(true)
}

/// No signal is blocked any more.
///
/// # Errors
/// Those of sigprocmask(2).
pub fn unblock_signals() -> io::Result<()> {
    set_signal_mask(false)
}

/// Every signal back to its default: what exec should start from.
pub fn default_signals() {
    // The kernel's own `struct sigaction`: SIG_DFL, no flags, no mask. Not the
    // C library's call: that one hides the two signals it keeps for itself.
    let default = [0_u64; 4];
    for signal in 1..=64 {
        // SAFETY: the structure outlives the call; no handler is installed.
        // KILL and STOP answer EINVAL: they are always at their default.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null::<u8>(),
                8_usize,
            )
        };
    }
}

fn set_signal_mask(all: bool) -> io::Result<()> {
    // The kernel's own set: 64 bits.
    let mask: u64 = if all { u64::MAX } else { 0 };
    let arguments = [libc::SIG_SETMASK as usize, (&raw const mask) as usize, 0, 8, 0, 0];
    // SAFETY: the mask outlives the call and is as long as said.
    unsafe { raw::syscall(libc::SYS_rt_sigprocmask, arguments) }.map(drop)
}

/// A non-blocking signalfd(2) for SIGCHLD, which must be blocked.
///
/// # Errors
/// Those of signalfd(2).
pub fn child_signal_fd() -> io::Result<OwnedFd> {
    let mask: u64 = 1 << (libc::SIGCHLD - 1);
    let flags = (libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) as usize;
    let arguments = [usize::MAX, (&raw const mask) as usize, 8, flags, 0, 0];
    // SAFETY: the mask outlives the call and is as long as said.
    let fd = unsafe { raw::syscall(libc::SYS_signalfd4, arguments) }? as RawFd;
    // SAFETY: the kernel just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Empties a signalfd.
pub fn drain_signal_fd(fd: BorrowedFd<'_>) {
    let mut info = [0; 128];
    while rustix::io::read(fd, &mut info).is_ok_and(|read| read > 0) {}
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
}

/// What waitid(2) says of our children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// This one ended, and was reaped.
    Child(i32, Ended),
    /// None that has ended.
    Nobody,
    /// There are none at all, alive or dead.
    Childless,
}

/// waitid(2) for any child that has ended; doesn't block.
#[must_use]
pub fn wait_any() -> Waited {
    // SAFETY: all-zero is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = (libc::WEXITED | libc::WNOHANG) as usize;
    let arguments = [libc::P_ALL as usize, 0, (&raw mut info) as usize, options, 0, 0];
    // SAFETY: info outlives the call.
    let result = unsafe { raw::syscall(libc::SYS_waitid, arguments) };
    // With WNOHANG it can fail in no other way than ECHILD.
    if result.is_err() {
        return Waited::Childless;
    }
    // SAFETY: waitid filled in the fields of a child's end, or left them zero.
    let pid = unsafe { info.si_pid() };
    if pid == 0 {
        return Waited::Nobody;
    }
    // SAFETY: as above.
    let status = unsafe { info.si_status() };
    let ended = if info.si_code == libc::CLD_EXITED {
        Ended::Exited(status)
    } else {
        Ended::Signalled(status)
    };
    Waited::Child(pid, ended)
}

/// Receives one packet and at most `fds.len()` descriptors (close-on-exec),
/// without allocating: the packet's length and the number of descriptors.
///
/// # Errors
/// Those of recvmsg(2); EMSGSIZE for a packet or descriptors that did not fit,
/// which are closed.
pub fn receive_raw(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    fds: &mut [RawFd],
) -> io::Result<(usize, usize)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(bytes)];
        match recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut count = 0;
    let mut fits = !received
        .flags
        .intersects(rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC);
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            for fd in rights {
                match fds.get_mut(count) {
                    Some(slot) => {
                        *slot = std::os::fd::IntoRawFd::into_raw_fd(fd);
                        count += 1;
                    }
                    None => fits = false, // and it is closed here
                }
            }
        }
    }
    if fits {
        return Ok((received.bytes, count));
    }
    for fd in &fds[..count] {
        close(*fd)?;
    }
    Err(io::Error::from_raw_os_error(libc::EMSGSIZE))
}

/// Sends one packet with at most one descriptor given by number.
///
/// # Errors
/// Those of sendmsg(2).
pub fn send_one_fd(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<RawFd>) -> io::Result<()> {
    match fd {
        Some(fd) => {
            // SAFETY: the caller holds it open over this call.
            let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
            send_packet(socket, bytes, &[borrowed])
        }
        None => send_packet(socket, bytes, &[]),
    }
}

/// execveat(2) of the file that `fd` itself is; returns only on failure.
///
/// # Safety
/// `argv` and `envp` must be null-terminated arrays of pointers to
/// NUL-terminated strings.
pub unsafe fn execveat(
    fd: RawFd,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
) -> io::Error {
    let path = c"".as_ptr() as usize;
    let flags = libc::AT_EMPTY_PATH as usize;
    let arguments = [fd as usize, path, argv as usize, envp as usize, flags, 0];
    // SAFETY: the caller vouches for the vectors; the empty path is a constant.
    match unsafe { raw::syscall(libc::SYS_execveat, arguments) } {
        Err(error) => error,
        Ok(_) => io::Error::from_raw_os_error(libc::EINVAL), // it never comes back well
    }
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::MetadataExt as _;

    /// How often this process has a file open, whatever other tests do meanwhile.
    fn copies(file: &OwnedFd) -> usize {
        let inode = |path: &std::path::Path| std::fs::metadata(path).map(|meta| meta.ino()).ok();
        let ours = inode(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref());
        let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        all.filter(|entry| inode(&entry.path()) == ours).count()
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_closed() {
        let (one, other) = seqpacket_pair().unwrap();
        let file = sealed_memfd(c"passed", &[], false).unwrap();
        let three = [file.as_fd(), file.as_fd(), file.as_fd()];
        for (bytes, descriptors) in [(4, 2), (5, 2), (4, 3)] {
            send_packet(&one, &[7; 8][..bytes], &three[..descriptors]).unwrap();
            let (mut buffer, mut fds) = ([0; 4], [-1; 2]);
            match receive_raw(other.as_fd(), &mut buffer, &mut fds) {
                Ok(received) => {
                    assert_eq!(received, (4, 2));
                    fds.iter().for_each(|fd| close(*fd).unwrap());
                }
                Err(error) => {
                    assert!(bytes > 4 || descriptors > 2);
                    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
                }
            }
            assert_eq!(copies(&file), 1, "{bytes} bytes, {descriptors} descriptors");
        }
    }
}

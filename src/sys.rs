//! The few raw system calls that no crate wraps as needed, and descriptor passing.
//!
//! Thin: errors are `io::Error` with the kernel's errno.

use std::{
    ffi::CStr,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

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

/// Receives one packet into `buffer`, its descriptors close-on-exec.
/// `Ok(None)` is the end: the peer closed.
///
/// # Errors
/// Those of recvmsg(2); `EMSGSIZE` for a packet that did not fit, whose
/// descriptors are closed.
pub fn receive_packet(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
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
    let flags = received.flags;
    if flags.intersects(rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    if received.bytes == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    Ok(Some((received.bytes, descriptors)))
}

/// A memfd holding `content`, sealed against every change, reopened read-only
/// with mode 0555 when `executable` and 0444 otherwise; close-on-exec.
///
/// No writable descriptor of it remains: execve(2) would answer ETXTBSY.
///
/// # Errors
/// Those of memfd_create(2), write(2), fcntl(2) and open(2).
pub fn sealed_memfd(name: &CStr, content: &[&[u8]], executable: bool) -> io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
    use std::io::Write as _;

    let kind = if executable { MemfdFlags::EXEC } else { MemfdFlags::NOEXEC_SEAL };
    let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 know neither flag.
    let fd = rustix::fs::memfd_create(name, base | kind).or_else(|error| {
        if error == rustix::io::Errno::INVAL {
            rustix::fs::memfd_create(name, base)
        } else {
            Err(error)
        }
    })?;
    let mut file = std::fs::File::from(fd);
    for part in content {
        file.write_all(part)?;
    }
    rustix::fs::fchmod(&file, Mode::from_raw_mode(if executable { 0o555 } else { 0o444 }))?;
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes an owned descriptor of a raw number that a parent process passed on.
///
/// # Safety
/// `fd` must be open and owned by nobody else in this process.
pub unsafe fn inherited_fd(fd: i32) -> OwnedFd {
    // SAFETY: the caller vouches for it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

//! Stream sockets of unix(7).

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

/// An AF_UNIX stream socket, close-on-exec.
///
/// # Errors
/// Those of socket(2).
pub fn stream_socket(nonblocking: bool) -> io::Result<OwnedFd> {
    use rustix::net::SocketFlags;
    let extra = if nonblocking { SocketFlags::NONBLOCK } else { SocketFlags::empty() };
    Ok(rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        SocketFlags::CLOEXEC | extra,
        None,
    )?)
}

/// Whose a connected AF_UNIX socket's other end is, SO_PEERCRED of unix(7): for one that
/// listened, pid and user id of who began to. The pid is 0 for one that isn't ours to see.
///
/// # Errors
/// Those of getsockopt(2).
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<(i32, u32)> {
    // Not by rustix: its pid can't be 0, which one of another pid namespace is.
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both outlive the call, and the length is that of the structure.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    if got == 0 { Ok((peer.pid, peer.uid)) } else { Err(io::Error::last_os_error()) }
}

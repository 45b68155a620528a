//! Stream sockets of unix(7).

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
    net::SocketAddrUnix,
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

/// The inode of a socket in a directory where somebody else can put what he likes.
///
/// # Errors
/// Those of openat2(2); EPERM for what is no socket, or leads elsewhere.
pub fn open_socket(directory: impl AsFd, name: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let here = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let inode = match rustix::fs::openat2(directory, name, flags, Mode::empty(), here) {
        Err(Errno::LOOP | Errno::XDEV | Errno::NOTDIR) => return Err(Errno::PERM),
        opened => opened?,
    };
    match FileType::from_raw_mode(rustix::fs::fstat(&inode)?.st_mode) {
        FileType::Socket => Ok(inode),
        _ => Err(Errno::PERM),
    }
}

/// Connects to the socket of an inode, whatever its names are by now: /proc/self/fd leads to
/// it like any other link (`unix_find_bsd`, net/unix/af_unix.c).
///
/// # Errors
/// Those of connect(2); EPERM for one of another kind.
pub fn connect_to_inode(socket: impl AsFd, inode: &OwnedFd) -> Result<(), Errno> {
    let path = SocketAddrUnix::new(format!("/proc/self/fd/{}", inode.as_raw_fd()))?;
    match rustix::net::connect(socket, &path) {
        Err(Errno::PROTOTYPE) => Err(Errno::PERM),
        connected => connected,
    }
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

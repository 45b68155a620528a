//! What the launcher holds of a run that listens, and how it connects to it.
//!
//! By no path: a socket is connected to by an open descriptor of its inode, which
//! /proc/self/fd leads to (`unix_find_bsd`, net/unix/af_unix.c, follows it like any other
//! link). So it makes no difference what a program does to names meanwhile.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{
    message::{SERVICE_SOCKET, ServiceSocket},
    places::{Place, is_socket},
};
use crate::sys;

/// The sockets of one run.
#[derive(Debug)]
pub struct Service {
    /// Direct mode: the directory that it has on the host.
    pub place: Option<Place>,
    /// A jail's, as it came from there.
    pub(super) directory: Option<OwnedFd>,
    /// The inode of the socket that the program inherited.
    pub(super) inherited: Option<OwnedFd>,
    /// The program's user id on the host.
    program: u32,
}

impl Service {
    /// Most descriptors that one has open: both of its sockets' ways, and until the program
    /// has it the listening socket itself.
    pub const DESCRIPTORS: usize = 3;

    /// Of a program of this host user's; with its directory, in direct mode.
    #[must_use]
    pub fn new(program: u32, place: Option<Place>) -> Self {
        Self { place, directory: None, inherited: None, program }
    }

    /// The directory that its own socket is to be in.
    pub(super) fn directory(&self) -> Option<BorrowedFd<'_>> {
        let place = self.place.as_ref().map(|place| place.directory.as_fd());
        place.or(self.directory.as_ref().map(|directory| directory.as_fd()))
    }

    /// A new connection. Never blocks.
    ///
    /// # Errors
    /// As of `FromLauncher::Connected`.
    pub fn connect(&self, to: ServiceSocket) -> Result<OwnedFd, Errno> {
        match to {
            ServiceSocket::Inherited => {
                connect(self.inherited.as_ref().ok_or(Errno::NOENT)?.as_fd())
            }
            ServiceSocket::Own => self.connect_own(),
        }
    }

    fn connect_own(&self) -> Result<OwnedFd, Errno> {
        let directory = self.directory().ok_or(Errno::NOENT)?;
        let name = Path::new(SERVICE_SOCKET).file_name().unwrap_or_default();
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let beneath = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let opened = rustix::fs::openat2(directory, name, flags, Mode::empty(), beneath);
        let inode = match opened {
            // What leads elsewhere is not the run's.
            Err(Errno::LOOP | Errno::XDEV | Errno::NOTDIR) => return Err(Errno::PERM),
            opened => opened?,
        };
        if !is_socket(&inode).map_err(errno)? {
            return Err(Errno::PERM);
        }
        let connection = connect(inode.as_fd())?;
        // Who listens there, not who owns the inode: a link could be to another's.
        if sys::peer_uid(connection.as_fd()).map_err(errno)? != self.program {
            return Err(Errno::PERM);
        }
        Ok(connection)
    }
}

fn connect(inode: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", inode.as_raw_fd());
    let socket = sys::stream_socket(true).map_err(errno)?;
    rustix::net::connect(&socket, &rustix::net::SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

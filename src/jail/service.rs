//! What the launcher holds of a run that listens, and how it connects to it.
//!
//! By no path: a socket is connected to by an open descriptor of its inode, which
//! /proc/self/fd leads to (`unix_find_bsd`, net/unix/af_unix.c, follows it like any other
//! link). So it makes no difference what a program does to names meanwhile.
//!
//! Its sockets are made when its jail is built, and one to connect by as well: most are
//! connected to once, and then neither is waited for.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::io::Errno;

use super::{
    message::{SERVICE_SOCKET, ServiceSocket},
    places::{Listening, Place},
    sockets::SocketMaker,
};
use crate::sys;

/// The sockets of one run.
#[derive(Debug)]
pub struct Service {
    /// Direct mode: the directory that it has on the host.
    pub place: Option<Place>,
    /// The socket that the program inherits, until it has it.
    pub listening: Option<Listening>,
    /// A jail's directory, as it came from there.
    directory: Option<OwnedFd>,
    /// The inode of the socket that the program inherited.
    inherited: Option<OwnedFd>,
    network: Network,
    /// To connect by, not connected yet.
    spare: Option<OwnedFd>,
    /// The program's user id on the host.
    program: u32,
}

/// Whose network namespace a run's sockets belong to.
#[derive(Debug)]
enum Network {
    /// The launcher's, where the run has no other.
    Launcher,
    /// The run's own; not known until that is built.
    Own(Option<SocketMaker>),
}

impl Service {
    /// Most descriptors that one has open: both of its sockets' ways, until the program has
    /// it the listening socket itself, one to connect by, and where they are made.
    pub const DESCRIPTORS: usize = 4 + SocketMaker::DESCRIPTORS;

    /// Of a program of this host user's; with its directory, in direct mode. `own_network`:
    /// in a network namespace of its own.
    #[must_use]
    pub fn new(program: u32, place: Option<Place>, own_network: bool) -> Self {
        Self {
            place,
            listening: None,
            directory: None,
            inherited: None,
            network: if own_network { Network::Own(None) } else { Network::Launcher },
            spare: None,
            program,
        }
    }

    /// Takes what came from a jail that is built: the directory, and its network namespace
    /// where it has its own. Nothing comes in direct mode.
    ///
    /// # Errors
    /// EBADF where something is missing; those of [`SocketMaker::new`].
    pub fn take(&mut self, came: Vec<OwnedFd>, root: bool) -> io::Result<()> {
        let mut came = came.into_iter();
        if self.place.is_none() {
            self.directory = Some(came.next().ok_or(Errno::BADF)?);
        }
        if let Network::Own(maker) = &mut self.network {
            let namespace = came.next().ok_or(Errno::BADF)?;
            *maker = Some(SocketMaker::new(namespace, root)?);
        }
        Ok(())
    }

    /// The socket that shall listen; and one to connect by, which stays here.
    ///
    /// # Errors
    /// Those of [`SocketMaker::stream_socket`]; EBADF before [`Service::take`].
    pub fn make_sockets(&mut self) -> io::Result<OwnedFd> {
        self.spare = Some(self.socket(true)?);
        self.socket(false)
    }

    /// Of the right network namespace, or none.
    fn socket(&self, nonblocking: bool) -> io::Result<OwnedFd> {
        match &self.network {
            Network::Launcher => sys::stream_socket(nonblocking),
            Network::Own(maker) => maker.as_ref().ok_or(Errno::BADF)?.stream_socket(nonblocking),
        }
    }

    /// The program has its listening socket, which nobody else may have: when it is gone,
    /// so is what could be connected to.
    pub fn hand_over(&mut self) {
        self.inherited = self.listening.take().map(|listening| listening.inode);
    }

    /// The directory that its own socket is to be in.
    fn directory(&self) -> Option<BorrowedFd<'_>> {
        let place = self.place.as_ref().map(|place| place.directory.as_fd());
        place.or(self.directory.as_ref().map(|directory| directory.as_fd()))
    }

    /// A new connection. Never blocks.
    ///
    /// # Errors
    /// As of `FromLauncher::Connected`.
    pub fn connect(&mut self, to: ServiceSocket) -> Result<OwnedFd, Errno> {
        match to {
            ServiceSocket::Inherited => {
                let inode = self.inherited.take().ok_or(Errno::NOENT)?;
                let connected = self.connect_to(&inode);
                self.inherited = Some(inode);
                connected
            }
            ServiceSocket::Own => self.connect_own(),
        }
    }

    fn connect_own(&mut self) -> Result<OwnedFd, Errno> {
        let directory = self.directory().ok_or(Errno::NOENT)?;
        let name = Path::new(SERVICE_SOCKET).file_name().unwrap_or_default();
        let inode = sys::open_socket(directory, name.as_ref())?;
        let connection = self.connect_to(&inode)?;
        // Who listens there, not who owns the inode: a link could be to another's.
        if sys::peer(connection.as_fd()).map_err(errno)?.1 != self.program {
            return Err(Errno::PERM);
        }
        Ok(connection)
    }

    fn connect_to(&mut self, inode: &OwnedFd) -> Result<OwnedFd, Errno> {
        let socket = match self.spare.take() {
            Some(socket) => socket,
            None => self.socket(true).map_err(errno)?,
        };
        match sys::connect_to_inode(&socket, inode) {
            Ok(()) => Ok(socket),
            Err(error) => {
                // It is as it was.
                self.spare = Some(socket);
                Err(error)
            }
        }
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

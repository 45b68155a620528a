//! A child that the monitor talks to.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::process::Process;
use crate::{jail::message::MESSAGE_MAX, sys};

/// How long a process that closed its socket may take to end by itself.
const HUNG_UP_MAX: Duration = Duration::from_secs(5);

/// A running server or launcher, and our end of its socket.
#[derive(Debug)]
pub struct Peer {
    /// The process.
    pub process: Process,
    socket: Option<OwnedFd>,
    /// When it is killed, having closed its end.
    overdue: Option<Instant>,
}

impl Peer {
    /// Takes over a process and a socket to it. A message that the process has
    /// no room for will be an error, not a wait.
    ///
    /// # Errors
    /// Those of ioctl(2).
    pub fn new((process, socket): (Process, OwnedFd)) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { process, socket: Some(socket), overdue: None })
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Those of sendmsg(2); `NotConnected` after [`Peer::close`].
    pub fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(self.socket.as_ref().ok_or(io::ErrorKind::NotConnected)?, message, descriptors)
    }

    /// The socket, until it is closed.
    #[must_use]
    pub fn socket(&self) -> Option<&OwnedFd> {
        self.socket.as_ref()
    }

    /// Closes the socket: the process is to end by itself.
    pub fn close(&mut self) {
        self.socket = None;
    }

    /// The process closed its end: as a rule because it is ending.
    pub fn hung_up(&mut self, now: Instant) {
        self.socket = None;
        self.overdue = Some(now + HUNG_UP_MAX);
    }

    /// When a process that hung up has taken too long to end.
    #[must_use]
    pub fn overdue(&self) -> Option<Instant> {
        self.overdue
    }
}

/// Sends one message as one packet.
///
/// # Errors
/// Those of sendmsg(2); EMSGSIZE for a message over the limit.
pub fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    if bytes.len() > MESSAGE_MAX {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    sys::send_packet(socket, &bytes, descriptors)
}

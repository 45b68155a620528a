//! An asynchronous SOCK_SEQPACKET socket that carries descriptors: how the
//! server speaks with the monitor and the launcher.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// One end of a pair made by [`sys::seqpacket_pair`].
#[derive(Debug)]
pub struct Packets(AsyncFd<OwnedFd>);

impl Packets {
    /// Takes a socket up into the current runtime.
    ///
    /// # Errors
    /// Those of ioctl(2) and of registering it.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self(register(socket, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// The next packet's length and descriptors; `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// Those of [`sys::receive_packet`].
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
        let read = |socket: &OwnedFd| sys::receive_packet(socket, buffer);
        self.0.async_io(Interest::READABLE, read).await
    }

    /// The next packet, also where some of its descriptors were lost. Cancel-safe.
    ///
    /// # Errors
    /// Those of [`sys::receive_bytes`].
    pub async fn receive_bytes(&self, buffer: &mut [u8]) -> io::Result<Option<sys::Packet>> {
        let read = |socket: &OwnedFd| sys::receive_bytes(socket, buffer);
        self.0.async_io(Interest::READABLE, read).await
    }

    /// Ends the conversation: both sides see its end.
    pub fn hang_up(&self) {
        // It may be at its end already.
        let _ = rustix::net::shutdown(self.0.get_ref(), rustix::net::Shutdown::Both);
    }

    /// Sends one packet. Cancel-safe.
    ///
    /// # Errors
    /// Those of [`sys::send_packet`].
    pub async fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let write = |socket: &OwnedFd| sys::send_packet(socket, bytes, descriptors);
        self.0.async_io(Interest::WRITABLE, write).await
    }

    /// Sends one packet if there is room for it now: for where nothing can wait.
    ///
    /// # Errors
    /// Those of [`sys::send_packet`]: `WouldBlock` where there is none.
    pub fn try_send(&self, bytes: &[u8]) -> io::Result<()> {
        sys::send_packet(self.0.get_ref(), bytes, &[])
    }
}

/// Takes a descriptor up into the current runtime, to wait until it is readable.
///
/// # Errors
/// Those of registering it.
pub fn until_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    register(fd, Interest::READABLE)
}

fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays open and the same until the AsyncFd drops it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest)? })
}

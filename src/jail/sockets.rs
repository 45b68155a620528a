//! Sockets of a run's own network namespace.
//!
//! A socket belongs to the network namespace that it was made in, also one of the Unix
//! family, and tells whoever has it of that one's interfaces (SIOCGIFCONF, netdevice(7)).
//! What accept gives belongs to that of who connected (`unix_stream_connect`,
//! net/unix/af_unix.c). So whatever a service has of us, and what connects to it, is made in
//! its own.
//!
//! The launcher stays where it is. A child of it goes there, makes the socket, and ends:
//! it has the launcher's table of descriptors, where the socket simply is, and its memory,
//! of which nothing need be copied; meanwhile the launcher stands still. So there is no way
//! back that could fail, and nothing that a run's processes have a part in, which may be
//! frozen. It is the same with root and without: there the child goes into the run's user
//! namespace first, whose owner is the launcher's user.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd, RawFd},
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    process::DumpableBehavior,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::sys::{self, raw};

/// The child's stack; a page or two of it are used.
const STACK: usize = 64 << 10;

/// A run's network namespace, to make sockets in.
#[derive(Debug)]
pub struct SocketMaker {
    network: OwnedFd,
    /// The one that it belongs to, where that must be entered first.
    user: Option<OwnedFd>,
}

impl SocketMaker {
    /// How many descriptors one has open.
    pub const DESCRIPTORS: usize = 2;

    /// In this namespace, by a launcher that is root or not.
    ///
    /// # Errors
    /// Those of `NS_GET_USERNS`, ioctl_nsfs(2).
    pub fn new(network: OwnedFd, root: bool) -> io::Result<Self> {
        let user = match root {
            // All are below its own, so that it has every capability there.
            true => None,
            false => Some(owner(network.as_fd())?),
        };
        Ok(Self { network, user })
    }

    /// An AF_UNIX stream socket, close-on-exec. The calling thread is its process's only one.
    ///
    /// # Errors
    /// Those of clone(2), setns(2) and socket(2).
    pub fn stream_socket(&self, nonblocking: bool) -> io::Result<OwnedFd> {
        let mut order = Order {
            network: self.network.as_raw_fd(),
            user: self.user.as_ref().map(AsRawFd::as_raw_fd),
            nonblocking,
            made: Err(libc::ECHILD),
        };
        // SAFETY: `order` outlives the child, which alone uses it meanwhile; `carry_out`
        // makes system calls and writes to it and its own stack.
        unsafe { sys::run_aside(STACK, carry_out, (&raw mut order).cast()) }?;
        // SAFETY: the child made it in our table, and it is nobody's yet.
        let made = order.made.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        made.map_err(io::Error::from_raw_os_error)
    }
}

/// What the child is to do, and where it leaves what came of it.
struct Order {
    network: RawFd,
    user: Option<RawFd>,
    nonblocking: bool,
    made: Result<RawFd, i32>,
}

/// The child, whose end is the return.
extern "C" fn carry_out(order: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `stream_socket` waits for our end, with this for us alone.
    let order = unsafe { &mut *order.cast::<Order>() };
    order.made = make(order).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
    0
}

/// Only system calls.
fn make(order: &Order) -> io::Result<RawFd> {
    // SAFETY: both are open in the launcher, who waits for us.
    let namespace = |fd: RawFd| unsafe { BorrowedFd::borrow_raw(fd) };
    if let Some(user) = order.user {
        move_into_link_name_space(namespace(user), Some(LinkNameSpaceType::User))?;
        // To gain capabilities there may have changed it (`commit_creds`, kernel/cred.c),
        // and it belongs to the memory, which is the launcher's.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    move_into_link_name_space(namespace(order.network), Some(LinkNameSpaceType::Network))?;
    let extra = if order.nonblocking { SocketFlags::NONBLOCK } else { SocketFlags::empty() };
    let flags = SocketFlags::CLOEXEC | extra;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    Ok(socket.into_raw_fd())
}

/// The user namespace that another namespace belongs to.
fn owner(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `_IO(0xb7, 0x1)`, linux/nsfs.h.
    const NS_GET_USERNS: usize = 0xb701;
    let arguments = [namespace.as_raw_fd() as usize, NS_GET_USERNS];
    let fd = raw::numbers(libc::SYS_ioctl, &arguments)?;
    // SAFETY: the kernel just made this descriptor for us, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

#[cfg(test)]
mod tests {
    use std::{ffi::CStr, fs::File};

    use super::*;
    use crate::jail::namespaces;

    /// A network namespace of the kind that a run has.
    fn network() -> OwnedFd {
        let root = rustix::process::geteuid().is_root();
        let user = if root { 0 } else { libc::CLONE_NEWUSER };
        let flags = (user | libc::CLONE_NEWNET) as u64;
        let hold = |pid| Ok(File::open(format!("/proc/{pid}/ns/net"))?.into());
        namespaces::make(flags, || Ok(()), hold).unwrap()
    }

    /// The name of an interface in the network namespace of a socket.
    fn interface(socket: &OwnedFd, index: i32) -> Option<String> {
        // SAFETY: all-zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_ifindex = index;
        let fd = socket.as_raw_fd();
        // SAFETY: an initialised ifreq that outlives the call, which fills it.
        let got = unsafe { libc::ioctl(fd, libc::SIOCGIFNAME, &raw mut request) };
        // SAFETY: the kernel ends it by a NUL.
        let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
        (got == 0).then(|| name.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_socket_is_made_elsewhere_and_we_stay_here() {
        let here = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let (before, user) = (here(), std::fs::read_link("/proc/thread-self/ns/user").unwrap());
        let root = rustix::process::geteuid().is_root();
        let maker = SocketMaker::new(network(), root).unwrap();
        for nonblocking in [true, false] {
            let socket = maker.stream_socket(nonblocking).unwrap();
            assert_eq!(interface(&socket, 1).as_deref(), Some("lo"));
            assert!((2..256).all(|index| interface(&socket, index).is_none()));
            let flags = rustix::fs::fcntl_getfl(&socket).unwrap();
            assert_eq!(flags.contains(rustix::fs::OFlags::NONBLOCK), nonblocking);
            let kept = rustix::io::fcntl_getfd(&socket).unwrap();
            assert!(kept.contains(rustix::io::FdFlags::CLOEXEC));
        }
        assert_eq!(before, here());
        assert_eq!(user, std::fs::read_link("/proc/thread-self/ns/user").unwrap());
    }

    #[test]
    fn what_is_no_network_namespace_is_an_error() {
        let other = File::open("/proc/self/ns/uts").unwrap();
        let maker = SocketMaker { network: other.into(), user: None };
        let error = maker.stream_socket(true).unwrap_err().raw_os_error();
        assert_eq!(error, Some(libc::EINVAL));
        let file = File::open("/dev/null").unwrap();
        let error = SocketMaker::new(file.into(), false).unwrap_err().raw_os_error();
        assert_eq!(error, Some(libc::ENOTTY));
    }
}

//! Empty network namespaces, used again.
//!
//! Making one and unmaking it is the dearest part of a jail, and one that nothing
//! ever ran in looks like any other. So the launcher makes them itself, in its own
//! user namespace, where no program has a capability over them, and each serves
//! one jail at a time: of two that shared one, each could reach the other's
//! abstract sockets.
//!
//! What a run could leave behind in its namespace is sockets, and in such a jail
//! AF_UNIX ones only: the filter refuses every other family, there is no
//! capability to configure anything, and lo is down. Sockets end with the
//! processes that hold them, but for those that are on their way in one another's
//! queues, unix(7): these stay until the kernel's own collection. A namespace is
//! used again only once its run is gone and its table of sockets is empty, and only
//! among runs that can hand each other nothing: a descriptor of /proc/self/net/unix
//! shows the table to whoever holds it.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::sys;

/// Most that are kept for later.
const KEPT_MAX: usize = 64;
/// What is read of a table of sockets: its heading is shorter.
const TABLE_READ: usize = 512;

/// A network namespace with nothing in it.
#[derive(Debug)]
pub struct EmptyNetwork {
    namespace: OwnedFd,
    /// Its /proc/net/unix.
    sockets: File,
}

impl EmptyNetwork {
    /// How many descriptors one has open.
    pub const DESCRIPTORS: usize = 2;

    /// Whether no socket is in it; not, where that can't be read.
    fn is_empty(&self) -> bool {
        let mut text = [0; TABLE_READ];
        match self.sockets.read_at(&mut text, 0) {
            Ok(length) => text[..length].iter().filter(|byte| **byte == b'\n').count() == 1,
            Err(_) => false,
        }
    }
}

impl AsFd for EmptyNetwork {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

/// Those that wait for their next run.
#[derive(Debug)]
pub struct EmptyNetworks {
    /// The launcher's own namespace, to come back to.
    own: OwnedFd,
    kept: Vec<EmptyNetwork>,
}

impl EmptyNetworks {
    /// None yet.
    ///
    /// # Errors
    /// Where /proc can't be read.
    pub fn new() -> io::Result<Self> {
        Ok(Self { own: File::open("/proc/thread-self/ns/net")?.into(), kept: Vec::new() })
    }

    /// How many are kept.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Keeps one less.
    pub fn let_one_go(&mut self) {
        self.kept.pop();
    }

    /// One that nobody is in.
    ///
    /// # Errors
    /// Those of unshare(2): EPERM without CAP_SYS_ADMIN, ENOSPC over a limit.
    pub fn take(&mut self) -> io::Result<EmptyNetwork> {
        match self.kept.pop() {
            Some(network) => Ok(network),
            None => self.make(),
        }
    }

    /// The calling thread is the process's only one, and it opens no socket
    /// while it is away.
    fn make(&self) -> io::Result<EmptyNetwork> {
        sys::unshare(UnshareFlags::NEWNET)?;
        let made = File::open("/proc/thread-self/ns/net").and_then(|namespace| {
            let sockets = File::open("/proc/thread-self/net/unix")?;
            Ok(EmptyNetwork { namespace: namespace.into(), sockets })
        });
        let back = move_into_link_name_space(self.own.as_fd(), Some(LinkNameSpaceType::Network));
        if let Err(error) = back {
            // Jails with the host's network would silently have none.
            eprintln!("dispatch-launch: can't come back to its own network: {error}");
            sys::exit_now(1);
        }
        made
    }

    /// Takes one back whose run is gone; keeps it if nothing is left in it, and says
    /// whether that is so.
    pub fn give_back(&mut self, network: EmptyNetwork) -> bool {
        let is_empty = network.is_empty();
        if is_empty && self.kept.len() < KEPT_MAX {
            self.kept.push(network);
        }
        is_empty
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{SocketAddr, UnixListener};

    use super::*;

    /// In a thread of its own: it changes namespaces.
    fn apart(test: impl FnOnce(EmptyNetworks) + Send + 'static) {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not here: namespaces take root");
            return;
        }
        std::thread::spawn(move || test(EmptyNetworks::new().unwrap())).join().unwrap();
    }

    fn inside<T>(networks: &EmptyNetworks, network: &EmptyNetwork, act: impl FnOnce() -> T) -> T {
        move_into_link_name_space(network.as_fd(), None).unwrap();
        let result = act();
        move_into_link_name_space(networks.own.as_fd(), None).unwrap();
        result
    }

    fn listen(name: &str) -> UnixListener {
        use std::os::linux::net::SocketAddrExt as _;
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap()
    }

    #[test]
    fn one_is_used_again_once_it_is_empty() {
        apart(|mut networks| {
            let network = networks.take().unwrap();
            assert!(network.is_empty());
            let before = std::fs::metadata("/proc/thread-self/ns/net").unwrap();
            networks.give_back(network);
            assert_eq!(networks.kept.len(), 1);
            networks.take().unwrap();
            assert_eq!(networks.kept.len(), 0);
            use std::os::unix::fs::MetadataExt as _;
            let after = std::fs::metadata("/proc/thread-self/ns/net").unwrap();
            assert_eq!(before.ino(), after.ino(), "it is back where it was");
        });
    }

    #[test]
    fn one_with_a_socket_left_in_it_is_not() {
        apart(|mut networks| {
            let network = networks.take().unwrap();
            let listener = inside(&networks, &network, || listen("left behind"));
            assert!(!network.is_empty());
            networks.give_back(network);
            assert_eq!(networks.kept.len(), 0);
            drop(listener);
        });
    }

    #[test]
    fn sockets_in_one_another_s_queues_are_seen() {
        apart(|mut networks| {
            let network = networks.take().unwrap();
            inside(&networks, &network, || {
                let (one, other) = sys::seqpacket_pair().unwrap();
                // Each is on its way through the other: nobody can close them.
                sys::send_packet(&one, b"x", &[one.as_fd()]).unwrap();
                sys::send_packet(&other, b"x", &[other.as_fd()]).unwrap();
            });
            let seen = !network.is_empty();
            // The kernel may have collected them by now, but never before its table shows it.
            networks.give_back(network);
            assert!(seen || networks.kept.len() == 1);
        });
    }
}

//! The listening sockets: bound once by the monitor, so that they outlive every
//! death of the server.

use std::{
    fs,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener, ToSocketAddrs as _},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    sys::stat::{Mode, umask},
    unistd::{FchownatFlags, Gid, Group},
};

use crate::config::{Config, ListenAddress};

/// Connections that may wait to be accepted; the kernel takes less where
/// `net.core.somaxconn` is less.
const BACKLOG: i32 = 1024;

/// Why an address can't be listened on. The text completes "ADDRESS: ...".
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Its host name has no address.
    #[error("the host has no address: {0}; write an address, such as 127.0.0.1")]
    Resolve(io::Error),
    /// It may only be used with `--insecure`.
    #[error(
        "it means {0}, which others can reach, without TLS; write 127.0.0.1, or start with --insecure"
    )]
    Exposed(SocketAddr),
    /// Somebody listens there already.
    #[error("somebody listens there already; stop them or listen elsewhere")]
    InUse,
    /// There is a file, and it is no socket.
    #[error("there is a file that is no socket; remove it or listen elsewhere")]
    NotASocket,
    /// `[server] socket_group` is unknown.
    #[error("this host has no group {0:?}; write one that it has in server.socket_group")]
    Group(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// How it failed.
        source: io::Error,
    },
}

impl ListenError {
    /// Whether it is for whoever wrote the configuration to mend.
    #[must_use]
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Resolve(_) | Self::Exposed(_) | Self::Group(_))
    }

    fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}

/// All listening sockets. Dropping it closes them and removes unix sockets' files.
#[derive(Debug)]
pub struct Listeners {
    calls: Vec<Listener>,
    health: Option<Listener>,
}

impl Listeners {
    /// Binds everything that the configuration names.
    ///
    /// # Errors
    /// The address and why; nothing is left bound.
    pub fn bind(config: &Config) -> Result<Self, (ListenAddress, ListenError)> {
        let bind = |address: &ListenAddress| {
            Listener::bind(address, config).map_err(|error| (address.clone(), error))
        };
        let calls = config.listen.iter().map(bind).collect::<Result<_, _>>()?;
        let health = config.health_listen.as_ref().map(bind).transpose()?;
        Ok(Self { calls, health })
    }

    /// Where calls come in, with real ports.
    #[must_use]
    pub fn addresses(&self) -> Vec<ListenAddress> {
        self.calls.iter().map(|listener| listener.address.clone()).collect()
    }

    /// Where health is asked for, with the real port.
    #[must_use]
    pub fn health_address(&self) -> Option<&ListenAddress> {
        self.health.as_ref().map(|listener| &listener.address)
    }

    /// Every socket: those of [`Listeners::addresses`] in their order, then that for health.
    #[must_use]
    pub fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        self.calls.iter().chain(&self.health).map(|listener| listener.socket.as_fd()).collect()
    }
}

#[derive(Debug)]
struct Listener {
    address: ListenAddress,
    socket: OwnedFd,
    /// The file of a unix socket, as device and inode.
    file: Option<(PathBuf, (u64, u64))>,
}

impl Listener {
    fn bind(address: &ListenAddress, config: &Config) -> Result<Self, ListenError> {
        match address {
            ListenAddress::Tcp { host, port } => bind_tcp(host, *port, config.insecure),
            ListenAddress::Unix(path) => bind_unix(path, config.socket_mode, &config.socket_group),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, made)) = &self.file else { return };
        // Somebody else may have put theirs there meanwhile.
        if identity(path).is_ok_and(|found| found == *made)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(%error, "{} can't be removed", path.display());
        }
    }
}

/// `exposed`: whether an address that others can reach is fine.
fn bind_tcp(host: &str, port: u16, exposed: bool) -> Result<Listener, ListenError> {
    let addresses: Vec<SocketAddr> =
        (host, port).to_socket_addrs().map_err(ListenError::Resolve)?.collect();
    // `localhost` is whatever the resolver says it is.
    if let Some(address) =
        addresses.iter().find(|address| !address.ip().to_canonical().is_loopback())
        && !exposed
    {
        return Err(ListenError::Exposed(*address));
    }
    let listener = TcpListener::bind(&addresses[..]).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => ListenError::InUse,
        _ => ListenError::System { what: "it can't be bound", source: error },
    })?;
    rustix::net::listen(&listener, BACKLOG)
        .map_err(|error| ListenError::system("listen")(error.into()))?;
    let bound = listener.local_addr().map_err(ListenError::system("getsockname"))?;
    let address = ListenAddress::Tcp { host: bound.ip().to_string(), port: bound.port() };
    Ok(Listener { address, socket: nonblocking(listener)?, file: None })
}

fn bind_unix(path: &Path, mode: u32, group: &str) -> Result<Listener, ListenError> {
    let group = find_group(group)?;
    remove_stale(path)?;
    // The file has its mode from the start, and nobody can connect to it before
    // it has its group: it listens last.
    let mask = Mode::from_bits_truncate(!mode & 0o777);
    let before = umask(mask);
    let bound = bind_unlistened(path);
    umask(before);
    let socket = bound.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => ListenError::InUse,
        _ => ListenError::System { what: "it can't be bound", source: error },
    })?;
    let made = identity(path).map_err(ListenError::system("stat"))?;
    let address = ListenAddress::Unix(path.to_owned());
    let listener = Listener { address, socket, file: Some((path.to_owned(), made)) };
    if let Some(group) = group {
        let here = nix::fcntl::AT_FDCWD;
        nix::unistd::fchownat(here, path, None, Some(group), FchownatFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|error| ListenError::system("its group can't be set")(error.into()))?;
    }
    rustix::net::listen(&listener.socket, BACKLOG)
        .map_err(|error| ListenError::system("listen")(error.into()))?;
    Ok(listener)
}

fn bind_unlistened(path: &Path) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn find_group(name: &str) -> Result<Option<Gid>, ListenError> {
    if name.is_empty() {
        return Ok(None);
    }
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(Some(group.gid)),
        Ok(None) => Err(ListenError::Group(name.to_owned())),
        Err(error) => Err(ListenError::system("groups can't be looked up")(error.into())),
    }
}

/// Removes a socket that nobody answers on any more; never anything else.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ListenError::system("stat")(error)),
    };
    if !found.file_type().is_socket() {
        return Err(ListenError::NotASocket);
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(ListenError::system("the stale socket there can't be removed")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        // A full backlog answers EAGAIN, a datagram socket EPROTOTYPE: alive.
        Ok(_) | Err(_) => Err(ListenError::InUse),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

fn nonblocking(listener: TcpListener) -> Result<OwnedFd, ListenError> {
    listener.set_nonblocking(true).map_err(ListenError::system("fcntl"))?;
    Ok(listener.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::PermissionsExt as _, net::UnixListener};

    use super::*;

    #[test]
    fn port_zero_becomes_a_real_one() {
        let listener = bind_tcp("127.0.0.1", 0, false).unwrap();
        let ListenAddress::Tcp { host, port } = &listener.address else { panic!() };
        assert_eq!(host, "127.0.0.1");
        assert_ne!(*port, 0);
        assert!(matches!(bind_tcp("127.0.0.1", *port, false), Err(ListenError::InUse)));
        assert!(std::net::TcpStream::connect(("127.0.0.1", *port)).is_ok());
    }

    #[test]
    fn a_name_may_not_lead_beyond_this_host() {
        assert!(matches!(bind_tcp("0.0.0.0", 0, false), Err(ListenError::Exposed(_))));
        assert!(bind_tcp("0.0.0.0", 0, true).is_ok());
    }

    #[test]
    fn unix_sockets_have_their_mode_and_go_with_the_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = bind_unix(&path, 0o620, "").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o620);
        assert!(UnixStream::connect(&path).is_ok());
        assert!(matches!(bind_unix(&path, 0o660, ""), Err(ListenError::InUse)));
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn only_a_stale_socket_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "nobody removed it");
        drop(bind_unix(&path, 0o660, "").unwrap());

        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind_unix(&path, 0o660, ""), Err(ListenError::NotASocket)));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_successors_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = bind_unix(&path, 0o660, "").unwrap();
        fs::remove_file(&path).unwrap();
        let successor = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
        drop(successor);
    }

    #[test]
    fn groups_must_exist() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let error = bind_unix(&path, 0o660, "no-such-group-here").unwrap_err();
        assert!(matches!(error, ListenError::Group(_)), "{error}");
        assert!(!path.exists());
    }
}

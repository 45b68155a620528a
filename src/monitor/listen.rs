//! The listening sockets: bound once, kept open over every restart.

use std::{
    io,
    net::{TcpListener, ToSocketAddrs},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use crate::config::ListenAddress;

/// One bound socket. A unix socket's file goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    /// With the port that it really has.
    pub address: ListenAddress,
    file: Option<PathBuf>,
}

/// Why an address can't be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A TCP address.
    #[error("cannot listen on {address}: {error}")]
    Tcp {
        /// As configured.
        address: String,
        /// The system's word.
        error: io::Error,
    },
    /// A unix socket.
    #[error("cannot listen on unix:{path}: {why}", path = path.display())]
    Unix {
        /// As configured.
        path: PathBuf,
        /// What is in the way and what to do.
        why: String,
    },
}

impl Listener {
    /// Binds and listens. `mode` and `group` are for unix sockets.
    ///
    /// # Errors
    /// [`ListenError`] names the address.
    pub fn bind(address: &ListenAddress, mode: u32, group: &str) -> Result<Self, ListenError> {
        match address {
            ListenAddress::Tcp { host, port } => bind_tcp(host, *port),
            ListenAddress::Unix(path) => bind_unix(path, mode, group)
                .map_err(|why| ListenError::Unix { path: path.clone(), why }),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            // Somebody may have removed it already; there is nothing else to do.
            std::fs::remove_file(file).ok();
        }
    }
}

fn bind_tcp(host: &str, port: u16) -> Result<Listener, ListenError> {
    let failed = |error| ListenError::Tcp { address: format!("{host}:{port}"), error };
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in (host, port).to_socket_addrs().map_err(failed)? {
        match TcpListener::bind(candidate) {
            Ok(listener) => {
                listener.set_nonblocking(true).map_err(failed)?;
                let real = listener.local_addr().map_err(failed)?;
                return Ok(Listener {
                    socket: listener.into(),
                    address: ListenAddress::Tcp { host: host.to_owned(), port: real.port() },
                    file: None,
                });
            }
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

fn bind_unix(path: &Path, mode: u32, group: &str) -> Result<Listener, String> {
    remove_stale(path)?;
    let text = |error: io::Error| error.to_string();
    // Nobody may connect before mode and group are right.
    let old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(old);
    let listener = bound.map_err(text)?;
    let bound = Listener {
        address: ListenAddress::Unix(path.to_owned()),
        file: Some(path.to_owned()),
        socket: {
            listener.set_nonblocking(true).map_err(text)?;
            listener.into()
        },
    };
    if !group.is_empty() {
        let gid = nix::unistd::Group::from_name(group)
            .map_err(|error| format!("group {group:?}: {error}"))?
            .ok_or_else(|| format!("there is no group {group:?}; create it, or set socket_group"))?
            .gid;
        std::os::unix::fs::chown(path, None, Some(gid.as_raw())).map_err(text)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(text)?;
    Ok(bound)
}

/// A socket file that nobody answers on was left by a killed dispatcher.
fn remove_stale(path: &Path) -> Result<(), String> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    if !metadata.file_type().is_socket() {
        return Err(
            "there is something else than a socket; remove it or choose another path".into()
        );
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("another process is listening there".into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| error.to_string())
        }
        Err(error) => Err(format!("the socket there can't be examined: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tcp_listener_knows_its_real_port() {
        let any = ListenAddress::Tcp { host: "127.0.0.1".into(), port: 0 };
        let listener = Listener::bind(&any, 0, "").unwrap();
        assert!(matches!(listener.address, ListenAddress::Tcp { port, .. } if port != 0));
    }

    #[test]
    fn a_stale_socket_is_replaced_a_living_one_and_a_file_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let address = ListenAddress::Unix(path.clone());
        let first = Listener::bind(&address, 0o600, "").unwrap();
        let error = Listener::bind(&address, 0o600, "").unwrap_err().to_string();
        assert!(error.contains("another process is listening"), "{error}");
        drop(first);
        assert!(!path.exists(), "its file goes with the listener");

        drop(UnixListener::bind(&path).unwrap()); // leaves its file behind
        let bound = Listener::bind(&address, 0o640, "").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        drop(bound);

        std::fs::write(&path, "precious").unwrap();
        assert!(Listener::bind(&address, 0o600, "").is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}

//! Telling systemd how things stand: the protocol of sd_notify(3), one datagram each.

use std::{
    env,
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};

/// Where to tell it; nowhere, if nobody asked.
#[derive(Debug, Default)]
pub struct Notifier(Option<(UnixDatagram, SocketAddr)>);

impl Notifier {
    /// As `$NOTIFY_SOCKET` asks.
    ///
    /// # Errors
    /// Those of socket(2), and `InvalidInput` for an address that is none.
    pub fn from_environment() -> io::Result<Self> {
        env::var_os("NOTIFY_SOCKET").map_or_else(|| Ok(Self::default()), |name| Self::to(&name))
    }

    /// To this socket: a path, or an abstract name after `@`.
    ///
    /// # Errors
    /// As [`Notifier::from_environment`].
    pub fn to(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
            _ => SocketAddr::from_pathname(name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self(Some((socket, address))))
    }

    /// The service is ready, for the first time or again after a reload.
    pub fn ready(&self) {
        self.send("READY=1\n");
    }

    /// Policies are being loaded again.
    pub fn reloading(&self) {
        // It can't fail: the clock exists on every Linux.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        let microseconds = now.as_micros();
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}\n"));
    }

    /// The end has begun.
    pub fn stopping(&self) {
        self.send("STOPPING=1\n");
    }

    fn send(&self, text: &str) {
        if let Some((socket, address)) = &self.0
            && let Err(error) = socket.send_to_addr(text.as_bytes(), address)
        {
            tracing::warn!(%error, "$NOTIFY_SOCKET can't be told {:?}", text.trim());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_datagram_each() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let receiver = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::to(path.as_os_str()).unwrap();
        notifier.ready();
        notifier.reloading();
        notifier.stopping();
        let mut buffer = [0; 128];
        let mut next = || {
            let length = receiver.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_eq!(next(), "READY=1\n");
        let reloading = next();
        let since = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(since.trim().parse::<u64>().unwrap() > 0);
        assert_eq!(next(), "STOPPING=1\n");
    }

    #[test]
    fn abstract_names_begin_with_an_at_sign() {
        let name = format!("dispatcher-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let receiver = UnixDatagram::bind_addr(&address).unwrap();
        Notifier::to(OsStr::new(&format!("@{name}"))).unwrap().ready();
        let mut buffer = [0; 16];
        assert_eq!(receiver.recv(&mut buffer).unwrap(), 8);
    }

    #[test]
    fn nobody_asked() {
        Notifier::default().ready();
    }
}

//! `HOST:PORT`, `[IPV6]:PORT` and `unix:PATH`.

use std::{fmt, net::IpAddr, path::PathBuf, str::FromStr};

use super::ListenAddress;

/// Longest path of a unix socket: `sun_path` less its final NUL.
const UNIX_PATH_MAX: usize = 107;

/// Why an address was not accepted. Its text completes "ADDRESS, ...".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// There is no colon.
    #[error("which has no port")]
    NoPort,
    /// What stands after the last colon is no port.
    #[error("whose port is not a number from 0 to 65535")]
    Port,
    /// The host is empty or has characters that no host has.
    #[error("whose host is neither a name nor an address")]
    Host,
    /// An IPv6 address without brackets.
    #[error("whose IPv6 address needs brackets")]
    Brackets,
    /// The path is empty, too long or has a NUL.
    #[error("whose path is empty or longer than 107 bytes")]
    Path,
}

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            let fits = !path.is_empty() && path.len() <= UNIX_PATH_MAX && !path.contains('\0');
            return fits.then(|| Self::Unix(PathBuf::from(path))).ok_or(AddressError::Path);
        }
        let (host, port) = text.rsplit_once(':').ok_or(AddressError::NoPort)?;
        let host = check_host(host)?;
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|_| digits).ok_or(AddressError::Port)?;
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

/// The host without brackets.
fn check_host(host: &str) -> Result<&str, AddressError> {
    if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        let address = inner.parse::<std::net::Ipv6Addr>();
        return address.map(|_| inner).map_err(|_| AddressError::Host);
    }
    if host.contains(':') {
        let bare = host.parse::<std::net::Ipv6Addr>().is_ok();
        return Err(if bare { AddressError::Brackets } else { AddressError::Host });
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let fits = !host.is_empty() && host.len() <= 253 && host.chars().all(plain);
    fits.then_some(host).ok_or(AddressError::Host)
}

/// As it would be written.
impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl ListenAddress {
    /// Whether only this host can reach it. A name other than `localhost` is
    /// not believed to be local, whatever it resolves to now.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => match host.parse::<IpAddr>() {
                Ok(address) => address.to_canonical().is_loopback(),
                Err(_) => host.eq_ignore_ascii_case("localhost"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_are_read_and_shown_the_same() {
        for good in
            ["127.0.0.1:50051", "localhost:0", "[::1]:50051", "0.0.0.0:1", "unix:/run/d.sock"]
        {
            assert_eq!(good.parse::<ListenAddress>().unwrap().to_string(), good);
        }
        for (bad, error) in [
            ("", AddressError::NoPort),
            ("localhost", AddressError::NoPort),
            ("localhost:", AddressError::Port),
            ("localhost:65536", AddressError::Port),
            ("localhost:+1", AddressError::Port),
            (":50051", AddressError::Host),
            ("a b:1", AddressError::Host),
            ("::1:50051", AddressError::Brackets),
            ("[::g]:1", AddressError::Host),
            ("a:b:1", AddressError::Host),
            ("unix:", AddressError::Path),
        ] {
            assert_eq!(bad.parse::<ListenAddress>(), Err(error), "{bad}");
        }
        assert!(format!("unix:/{}", "x".repeat(106)).parse::<ListenAddress>().is_ok());
        assert!(format!("unix:/{}", "x".repeat(107)).parse::<ListenAddress>().is_err());
    }

    #[test]
    fn only_loopback_and_unix_sockets_are_local() {
        for (text, local) in [
            ("127.0.0.1:1", true),
            ("127.9.9.9:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("LocalHost:1", true),
            ("unix:/x", true),
            ("0.0.0.0:1", false),
            ("[::]:1", false),
            ("192.168.0.1:1", false),
            ("localhost.example.com:1", false),
            ("[::ffff:10.0.0.1]:1", false),
        ] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().is_local(), local, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,40}|[0-9a-f:.\\[\\]]{0,20}") {
            if let Ok(address) = text.parse::<ListenAddress>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}

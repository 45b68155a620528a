//! Where the service is: what `--address` may say.

use std::net::SocketAddr;

use crate::config::ListenAddress;

/// Checks that this is `HOST:PORT` or `unix:PATH`, which is kept as it was written.
///
/// # Errors
/// What it is instead, and what to write.
pub(super) fn parse(text: &str) -> Result<String, String> {
    const HELP: &str = "write HOST:PORT, [IPV6]:PORT or unix:PATH";
    let address = match text.strip_prefix("unix:") {
        Some(path) => format!("unix:{}", socket_path(path)),
        None if text.contains("://") => return Err(format!("it is a URL; {HELP}")),
        None => text.to_owned(),
    };
    // An IPv6 address with a zone can't be listened at, but be reached.
    if address.parse::<SocketAddr>().is_ok() {
        return Ok(address);
    }
    match address.parse::<ListenAddress>() {
        Ok(_) => Ok(address),
        Err(error) => Err(format!("it is an address {error}; {HELP}")),
    }
}

/// The path of `unix:PATH`, which may also be written as a URL, `unix:///PATH`.
pub(super) fn socket_path(path: &str) -> &str {
    path.trim_start_matches("//")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_that_can_be_reached() {
        for good in [
            "127.0.0.1:50051",
            "localhost:1",
            "dispatcher.example.org:443",
            "[::1]:50051",
            "[fe80::1%2]:50051",
            "unix:/run/d.sock",
            "unix:d.sock",
        ] {
            assert_eq!(parse(good).as_deref(), Ok(good));
        }
        assert_eq!(parse("unix:///run/d.sock").as_deref(), Ok("unix:/run/d.sock"));
        for (bad, why) in [
            ("nonsense", "has no port"),
            ("", "has no port"),
            ("http://127.0.0.1:50951", "a URL"),
            ("unix:", "path is empty"),
            ("localhost:http", "port is not a number"),
            ("::1:50051", "brackets"),
        ] {
            let told = parse(bad).unwrap_err();
            assert!(told.contains(why) && told.contains("HOST:PORT"), "{bad}: {told}");
            assert!(told.contains("unix:PATH"), "{bad}: {told}");
        }
    }
}

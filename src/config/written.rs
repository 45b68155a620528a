//! The server's own file as it is written: every key, what it is for, its kind.

use std::sync::LazyLock;

use serde_json::{Value as Json, json};

use super::{ListenAddress, MemoryBudget, Reload, uids};
use crate::{
    policy::{
        fault::{Fault, quoted},
        kinds::{Kind, List, Shown, Text, Word, Words, Wrong, toml_string},
        quantities::{Bytes, Count, Time},
        read::{Item, Source},
        tables::tables,
        values::AbsolutePath,
    },
    units::Size,
};

/// The built-in settings, as a file.
pub const BUILT_IN: &str = include_str!("builtin.toml");

tables! {
    /// The service itself.
    server ["server"] {
        /// The name that replies carry as executor_id; empty for the host's name.
        id: ServerId,
        /// Where to listen: "HOST:PORT" or "unix:PATH".
        listen: List<Address, false>,
        /// One more address for health and metrics only, in plain text; empty for none.
        health_listen: AddressOrNone,
        /// Permission bits of unix sockets, in octal.
        socket_mode: SocketMode,
        /// Group of unix sockets; empty for the one they are created with.
        socket_group: GroupName,
        /// How long running calls may take to finish when the service stops.
        drain_timeout: Time<0>,
        /// Runs at once, all namespaces together; 0 for as many as memory allows.
        concurrency: Count<u32, 0, 1_000_000>,
        /// What the running calls' memory limits may add up to: a size, or a share of what this host has.
        memory: MemoryShare,
        /// Bytes of requests held at once, over all connections.
        inflight_bytes: Bytes<{ 1 << 20 }>,
        /// Connections at once.
        max_connections: Count<u32, 1, 1_000_000>,
        /// The cgroup in which those of runs are made; empty for the delegated or own one.
        cgroup_parent: CgroupPath,
        /// First and last host uid of jails, such as "2000000-2065535".
        uid_range: UidRange,
    }

    /// Where policies come from.
    policies ["policies"] {
        /// The directory of policy files.
        dir: AbsolutePath,
        /// When they are read again: on SIGHUP ("signal"), or also when the directory changes ("watch").
        reload: Word<Reload>,
    }

    /// What the server keeps.
    state ["state"] {
        /// The directory of what it keeps.
        dir: AbsolutePath,
    }

    /// Executables.
    artifacts ["artifacts"] {
        /// Bytes of executables kept for later calls.
        cache: Bytes<0>,
    }

    /// Container mode.
    docker ["docker"] {
        /// Docker's socket.
        socket: AbsolutePath,
        /// Where what containers are shown lies, such as their executables: ours alone, on a
        /// file system that allows execution, and seen by Docker under the same path.
        directory: AbsolutePath,
    }
}

/// Reads what a file says.
pub fn read(source: &Source, faults: &mut Vec<Fault>) -> Option<Tables> {
    source.read(faults, |table, faults| {
        table.keys_elsewhere(describe().into_iter().map(|key| (key.key, key.table)));
        Tables::read(table, faults)
    })
}

/// What holds where nobody says anything.
///
/// # Panics
/// Never: a test proves that `builtin.toml` is complete.
#[must_use]
pub fn built_in() -> Resolved {
    static RESOLVED: LazyLock<Resolved> = LazyLock::new(|| {
        let mut faults = Vec::new();
        let tables = read(&Source::built_in(BUILT_IN), &mut faults);
        tables
            .filter(|_| faults.is_empty())
            .and_then(Tables::complete)
            .expect("builtin.toml gives every key")
    });
    RESOLVED.clone()
}

impl Words for Reload {
    const WORDS: &'static [(&'static str, Self)] =
        &[("signal", Self::Signal), ("watch", Self::Watch)];
}

/// The server's name.
pub struct ServerId;

impl Text for ServerId {
    type Value = String;
    const WHAT: &'static str = "a name for this server";
    const HELP: &'static str = "write at most 253 letters, digits, dots, dashes, colons or _";

    fn parse(text: &str) -> Result<String, Wrong> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-:".contains(c);
        if text.len() > 253 || !text.chars().all(plain) {
            return Err(Wrong::is_not(text, Self::WHAT, Self::HELP));
        }
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// `HOST:PORT` or `unix:PATH`.
pub struct Address;

impl Text for Address {
    type Value = ListenAddress;
    const WHAT: &'static str = "an address";
    const HELP: &'static str = "write \"HOST:PORT\", \"[IPV6]:PORT\" or \"unix:PATH\"";

    fn parse(text: &str) -> Result<ListenAddress, Wrong> {
        text.parse()
            .map_err(|error| Wrong::new(format!("has {}, {error}", quoted(text)), Self::HELP))
    }

    fn show(value: &ListenAddress) -> String {
        value.to_string()
    }
}

/// An address, or nothing.
pub struct AddressOrNone;

impl Text for AddressOrNone {
    type Value = Option<ListenAddress>;
    const WHAT: &'static str = Address::WHAT;
    const HELP: &'static str = Address::HELP;

    fn parse(text: &str) -> Result<Self::Value, Wrong> {
        if text.is_empty() { Ok(None) } else { Address::parse(text).map(Some) }
    }

    fn show(value: &Self::Value) -> String {
        value.as_ref().map(ToString::to_string).unwrap_or_default()
    }
}

/// Permission bits in octal.
pub struct SocketMode;

impl Text for SocketMode {
    type Value = u32;
    const WHAT: &'static str = "the permission bits of a socket";
    const HELP: &'static str = "write three octal digits after a 0, such as \"0660\"";

    fn parse(text: &str) -> Result<u32, Wrong> {
        let octal = text.len() >= 3 && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        let bits = u32::from_str_radix(text, 8).ok().filter(|bits| octal && *bits <= 0o777);
        bits.ok_or_else(|| Wrong::is_not(text, Self::WHAT, Self::HELP))
    }

    fn show(value: &u32) -> String {
        format!("{value:04o}")
    }

    fn pattern() -> Option<&'static str> {
        Some("^0*[0-7]{3}$")
    }
}

/// A group of this host; empty for none in particular.
pub struct GroupName;

impl Text for GroupName {
    type Value = String;
    const WHAT: &'static str = "the name of a group";
    const HELP: &'static str = "write the name of a group of this host";

    fn parse(text: &str) -> Result<String, Wrong> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-$@".contains(c);
        if text.len() > 255 || text.starts_with('-') || !text.chars().all(plain) {
            return Err(Wrong::is_not(text, Self::WHAT, Self::HELP));
        }
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// A share of this host's memory, or a size.
pub struct MemoryShare;

// Less would not hold one run of the least possible memory.
type MemorySize = Bytes<{ 4 << 20 }>;

impl Kind for MemoryShare {
    type Value = MemoryBudget;

    fn read(item: &Item<'_>, faults: &mut Vec<Fault>) -> Option<MemoryBudget> {
        let Some(percent) = item.text().and_then(|text| text.strip_suffix('%')) else {
            return MemorySize::read(item, faults).map(MemoryBudget::Bytes);
        };
        let plain = percent.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let number = percent.parse::<f64>().ok().filter(|_| plain);
        let Some(number) = number.filter(|number| *number > 0.0 && *number <= 100.0) else {
            let what = "a share of the memory";
            faults.push(item.wrong(what, "write such as \"80%\", above 0 and at most 100"));
            return None;
        };
        Some(MemoryBudget::Percent(number))
    }

    fn show(value: &MemoryBudget) -> Shown {
        Shown::One(toml_string(&match value {
            MemoryBudget::Percent(number) => format!("{number}%"),
            MemoryBudget::Bytes(bytes) => Size(*bytes).to_string(),
        }))
    }

    fn schema() -> Json {
        let share = json!({ "type": "string", "pattern": r"^[0-9]*\.?[0-9]*%$" });
        json!({ "anyOf": [MemorySize::schema(), share] })
    }
}

/// A cgroup, as a path below the cgroup file system.
pub struct CgroupPath;

impl Text for CgroupPath {
    type Value = String;
    const WHAT: &'static str = "the path of a cgroup";
    const HELP: &'static str = "write it as in /proc/self/cgroup, such as \"/dispatcher.slice\"";

    fn parse(text: &str) -> Result<String, Wrong> {
        let path = text.strip_prefix('/').unwrap_or(text);
        let fine =
            |part: &str| !matches!(part, "" | "." | "..") && !part.contains(char::is_control);
        if !text.is_empty() && !path.split('/').all(fine) {
            return Err(Wrong::is_not(text, Self::WHAT, Self::HELP));
        }
        Ok(text.to_owned())
    }

    fn show(value: &String) -> String {
        value.clone()
    }
}

/// `FIRST-LAST`.
pub struct UidRange;

impl Text for UidRange {
    type Value = (u32, u32);
    const WHAT: &'static str = "a range of uids";
    const HELP: &'static str = "write FIRST-LAST, such as \"2000000-2065535\"";

    fn parse(text: &str) -> Result<(u32, u32), Wrong> {
        let range = uids::parse(text).ok_or_else(|| Wrong::is_not(text, Self::WHAT, Self::HELP))?;
        uids::check(range).map_err(|why| Wrong::new(format!("is {text:?}, {why}"), Self::HELP))?;
        Ok(range)
    }

    fn show(value: &(u32, u32)) -> String {
        format!("{}-{}", value.0, value.1)
    }

    fn pattern() -> Option<&'static str> {
        Some("^[0-9]+-[0-9]+$")
    }
}

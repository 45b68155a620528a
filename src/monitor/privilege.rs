//! What the server gives up between fork and exec.
//!
//! All that strangers send is parsed by the server, so it holds nothing that
//! would be worth taking: no capability in any set, no way to gain one by an
//! exec, no group, and, where the monitor is root, a user id of its own: the
//! last of `[server] uid_range`. Jails draw theirs from the rest of that range,
//! and the range belongs to nobody else, so that this id owns no file and may
//! signal no process but the server itself.

use std::{fs, io};

use rustix::{io::Errno, thread};

use crate::jail::identity;

/// The server's own user and group id (the same number): the last of `range`.
/// `None` where this process may not become it, because it isn't root, or is
/// root of a user namespace that lacks the id.
#[must_use]
pub fn server_id(range: (u32, u32)) -> Option<u32> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let maps = IdMaps {
        uid_map: &read("/proc/self/uid_map"),
        gid_map: &read("/proc/self/gid_map"),
        setgroups: &read("/proc/self/setgroups"),
    };
    (rustix::process::geteuid().is_root() && maps.has(range.1)).then_some(range.1)
}

/// Our user namespace, as /proc tells of it; user_namespaces(7).
struct IdMaps<'a> {
    uid_map: &'a str,
    gid_map: &'a str,
    setgroups: &'a str,
}

impl IdMaps<'_> {
    /// Whether a process in here may become user and group `id`, alone.
    fn has(&self, id: u32) -> bool {
        let maps = [self.uid_map, self.gid_map];
        self.setgroups.trim() != "deny"
            && maps.iter().all(|map| map.lines().any(|line| covers(line, id)))
    }
}

/// Whether a line `INSIDE OUTSIDE LENGTH` has the id inside.
fn covers(line: &str, id: u32) -> bool {
    let mut numbers = line.split_whitespace().map(str::parse::<u64>);
    let (Some(Ok(inside)), Some(Ok(_)), Some(Ok(length))) =
        (numbers.next(), numbers.next(), numbers.next())
    else {
        return false;
    };
    (inside..inside.saturating_add(length)).contains(&u64::from(id))
}

/// Gives everything up, and becomes user `id` if there is one to become.
///
/// Runs in a forked child: only system calls.
///
/// # Errors
/// Those of prctl(2), setgroups(2), setresuid(2) and capset(2): nothing that
/// was to be given up may stay.
pub fn give_up(id: Option<u32>) -> io::Result<()> {
    let held = thread::capabilities(None)?;
    // First, as it takes CAP_SETPCAP, which goes below.
    if held.effective.contains(thread::CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    if let Some(id) = id {
        identity::become_user(id, id, true)?;
    }
    // Leaving uid 0 empties most of them, but not where uid 0 is unmapped, and
    // not for an ordinary user with capabilities. This empties all; the ambient
    // set can't hold what the permitted one doesn't.
    identity::drop_capabilities(0, 0)?;
    thread::set_no_new_privs(true)?;
    Ok(())
}

fn empty_bounding_set() -> io::Result<()> {
    for number in 0..64 {
        let capability = thread::CapabilitySet::from_bits_retain(1 << number);
        match thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Beyond the kernel's last one.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "         0          0 4294967295\n";
    const ALONE: &str = "         0       1000          1\n";

    #[test]
    fn an_id_must_be_mapped_and_groups_droppable() {
        let has = |uid_map, gid_map, setgroups, id| IdMaps { uid_map, gid_map, setgroups }.has(id);
        assert!(has(WHOLE, WHOLE, "allow\n", 2_065_535));
        assert!(!has(ALONE, WHOLE, "allow\n", 2_065_535));
        assert!(!has(WHOLE, ALONE, "allow\n", 2_065_535));
        assert!(!has(WHOLE, WHOLE, "deny\n", 2_065_535));
        assert!(!has("", "", "", 1));
        let two = "0 1000 1\n1 100000 65536\n";
        assert!(has(two, two, "allow\n", 65_536));
        assert!(!has(two, two, "allow\n", 65_537));
    }
}

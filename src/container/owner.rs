//! Whose a container is: by labels, so that those of a dead dispatcher are found.

use std::{collections::HashMap, fs, io, os::unix::fs::MetadataExt as _};

use crate::{jail::message::Launch, names::RunId};

/// The process that made it and removes it.
pub const OWNER: &str = "dispatcher.owner";
/// Whose call it is for.
pub const NAMESPACE: &str = "dispatcher.namespace";
/// The run's id.
pub const RUN: &str = "dispatcher.run";
/// The policy's name.
pub const POLICY: &str = "dispatcher.policy";

/// A process of this boot, as nobody else ever was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    boot: String,
    /// The pid namespace in which `pid` is one.
    namespace: u64,
    pid: u32,
    /// In clock ticks after boot, proc_pid_stat(5).
    started: u64,
}

impl Owner {
    /// This process.
    ///
    /// # Errors
    /// Those of reading /proc.
    pub fn own() -> io::Result<Self> {
        let pid = std::process::id();
        Ok(Self {
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
            namespace: fs::metadata("/proc/self/ns/pid")?.ino(),
            pid,
            started: started(pid)?.ok_or(io::ErrorKind::InvalidData)?,
        })
    }

    /// As in the label.
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}/{}/{}/{}", self.boot, self.namespace, self.pid, self.started)
    }

    /// As the name of a file.
    #[must_use]
    pub fn file_name(&self) -> String {
        self.label().replace('/', ".")
    }

    /// Whether a file of that name is a dead owner's.
    #[must_use]
    pub fn sees_dead_by_name(&self, file_name: &str) -> bool {
        self.sees_dead(&file_name.replace('.', "/"))
    }

    fn parse(label: &str) -> Option<Self> {
        let mut parts = label.split('/');
        let owner = Self {
            boot: parts.next()?.to_owned(),
            namespace: parts.next()?.parse().ok()?,
            pid: parts.next()?.parse().ok()?,
            started: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(owner)
    }

    /// Whether the owner that a label names is dead, as far as we can see: of another pid
    /// namespace of this boot we see nothing, and leave what is theirs. So we do where we
    /// can't look: what is left too long is less than what the living lose.
    #[must_use]
    pub fn sees_dead(&self, label: &str) -> bool {
        let Some(other) = Self::parse(label) else { return false };
        if other.boot != self.boot {
            return true;
        }
        if other == *self || other.namespace != self.namespace {
            return false;
        }
        started(other.pid).is_ok_and(|started| started != Some(other.started))
    }

    /// The labels of a container for this launch; without a run, where that isn't known
    /// yet.
    #[must_use]
    pub fn labels(&self, launch: &Launch, run: Option<RunId>) -> HashMap<String, String> {
        let run = run.map(|run| (RUN, run.to_string()));
        let labels = [
            (OWNER, self.label()),
            (NAMESPACE, launch.namespace.clone()),
            (POLICY, launch.template.policy.clone()),
        ];
        labels.into_iter().chain(run).map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// When a process started; `None` where there is none.
///
/// # Errors
/// Where that can't be told.
fn started(pid: u32) -> io::Result<Option<u64>> {
    started_by(fs::read_to_string(format!("/proc/{pid}/stat")))
}

/// The same by what reading its /proc/PID/stat gave.
fn started_by(stat: io::Result<String>) -> io::Result<Option<u64>> {
    let stat = match stat {
        Ok(stat) => stat,
        // It went while it was read.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // The name before it may hold anything, parentheses included. It is field 22; the
    // first after the name is field 3.
    let mut fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    let odd = || io::Error::from(io::ErrorKind::InvalidData);
    // One that nobody reaps runs no more.
    if matches!(fields.next().ok_or_else(odd)?, "Z" | "X") {
        return Ok(None);
    }
    fields.nth(22 - 4).and_then(|field| field.parse().ok()).map(Some).ok_or_else(odd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_are_told_from_the_living_and_from_strangers() {
        let own = Owner::own().unwrap();
        assert_eq!(Owner::parse(&own.label()), Some(own.clone()));
        let dead = |change: fn(&mut Owner)| {
            let mut other = own.clone();
            change(&mut other);
            own.sees_dead(&other.label())
        };
        assert!(!dead(|_| {}), "we live");
        assert!(!own.sees_dead_by_name(&own.file_name()));
        let earlier = Owner { started: own.started + 1, ..own.clone() };
        assert!(own.sees_dead_by_name(&earlier.file_name()));
        assert!(dead(|other| other.started += 1), "its number was ours before");
        assert!(dead(|other| other.pid = u32::MAX));
        assert!(dead(|other| other.boot = "another".into()));
        assert!(!dead(|other| {
            other.namespace += 1;
            other.pid = u32::MAX;
        }));
        // What can't be looked at lives.
        for error in [libc::ENFILE, libc::EMFILE, libc::ENOMEM, libc::EACCES, libc::EIO] {
            assert!(started_by(Err(io::Error::from_raw_os_error(error))).is_err());
        }
        for odd in ["", "7 (a) S 1", "7 (a"] {
            assert!(started_by(Ok(odd.to_owned())).is_err(), "{odd}");
        }
        for error in [libc::ENOENT, libc::ESRCH] {
            assert_eq!(started_by(Err(io::Error::from_raw_os_error(error))).unwrap(), None);
        }
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        assert_eq!(started_by(Ok(stat.clone())).unwrap(), Some(own.started));
        let (name, fields) = stat.rsplit_once(") ").unwrap();
        assert_eq!(started_by(Ok(format!("{name}) Z{}", &fields[1..]))).unwrap(), None);
        for label in ["", "a/1/2", "a/1/2/3/4", "a/x/2/3"] {
            assert!(!own.sees_dead(label), "{label}: whatever that is, it isn't ours");
        }
    }
}

//! What a run's v2 cgroup tells, and cgroup2 mounts of our own.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::{
    files,
    usage::{CpuUsage, OomCounts},
};

/// CPU time so far. Every v2 cgroup has it, also without the cpu controller.
pub(super) fn cpu_usage(directory: &Path) -> io::Result<CpuUsage> {
    let text = files::read(directory, "cpu.stat")?;
    let microseconds = |key| {
        files::find_key(&text, key).map(Duration::from_micros).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("cpu.stat has no {key}"))
        })
    };
    Ok(CpuUsage { user: microseconds("user_usec")?, system: microseconds("system_usec")? })
}

/// A `memory.peak` that counts from the time it was opened: Linux 6.12 and later
/// reset it per descriptor. `None` on earlier ones.
pub(super) fn fresh_memory_peak(directory: &Path) -> Option<File> {
    let mut file =
        File::options().read(true).write(true).open(directory.join("memory.peak")).ok()?;
    file.write_all(b"reset").ok()?;
    Some(file)
}

/// The value of such a file.
pub(super) fn read_peak(mut file: &File) -> io::Result<u64> {
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    text.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// Memory kills, and whether its own limit was reached: the kernel counts `oom`
/// in the very cgroup whose limit it was, `oom_kill` in the victim's.
pub(super) fn oom(directory: &Path) -> io::Result<OomCounts> {
    let kills = files::keyed(directory, "memory.events", "oom_kill")?;
    // Linux 5.2 brought the local file; a run has no cgroups below its own, so that both agree.
    let own = files::keyed(directory, "memory.events.local", "oom")
        .or_else(|_| files::keyed(directory, "memory.events", "oom"))?;
    Ok(OomCounts { kills, own_limit: kills > 0 && own > 0 })
}

/// The top of the whole hierarchy, which alone may hold processes beside children.
pub(super) fn is_true_root(directory: &Path) -> bool {
    !directory.join("cgroup.type").exists()
}

/// Whether `file`, a list of words, has `word`.
pub(super) fn lists(directory: &Path, file: &str, word: &str) -> bool {
    files::read(directory, file).is_ok_and(|text| text.split_whitespace().any(|w| w == word))
}

/// Mounts the v2 hierarchy nowhere: it is reached through the descriptor alone,
/// so the host's mounts stay as they are, and it goes with the descriptor.
///
/// # Errors
/// Those of fsopen(2) and fsmount(2): EPERM without privilege.
pub(super) fn detached_mount() -> io::Result<(OwnedFd, PathBuf)> {
    let context = fsopen("cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    Ok((mount, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blame_is_by_the_local_event() {
        let directory = tempfile::tempdir().unwrap();
        let put =
            |file: &str, text: &str| std::fs::write(directory.path().join(file), text).unwrap();
        for (kills, local, own_limit) in [(1, 1, true), (1, 0, false), (0, 1, false)] {
            put("memory.events", &format!("low 0\nmax 9\noom 1\noom_kill {kills}\n"));
            put("memory.events.local", &format!("low 0\nmax 9\noom {local}\noom_kill {kills}\n"));
            assert_eq!(oom(directory.path()).unwrap(), OomCounts { kills, own_limit });
        }
    }

    #[test]
    fn cpu_stat_is_read_by_key() {
        let directory = tempfile::tempdir().unwrap();
        let text = "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 0\n";
        std::fs::write(directory.path().join("cpu.stat"), text).unwrap();
        let usage = cpu_usage(directory.path()).unwrap();
        assert_eq!(usage.user, Duration::from_micros(20));
        assert_eq!(usage.system, Duration::from_micros(10));
        std::fs::write(directory.path().join("cpu.stat"), "usage_usec 30\n").unwrap();
        assert!(cpu_usage(directory.path()).is_err());
    }
}

//! Reading, writing and removing what is in a cgroup directory.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Deepest nesting that is looked into. Runs make no cgroups of their own.
const DEPTH_MAX: usize = 8;

/// Permissions of our own directories.
pub(super) const MODE: u32 = 0o700;

/// Marks directories that a dispatcher made above its own, so that a later one
/// knows them after a crash. The second is for those without privilege.
const MARKS: [&str; 2] = ["trusted.dispatcher", "user.dispatcher"];

/// What is read at once: all of those files that are short, which all are that are
/// read for every run.
const READ: usize = 4096;

/// The text of `directory/file`.
pub(super) fn read(directory: &Path, file: &str) -> io::Result<String> {
    use io::Read as _;
    let mut open = fs::File::open(directory.join(file))?;
    let mut bytes = vec![0; READ];
    let length = open.read(&mut bytes)?;
    bytes.truncate(length);
    // Less than was asked for is the end of a cgroup's file, but of no empty one.
    if length == READ {
        open.read_to_end(&mut bytes)?;
    }
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Writes `directory/file`; never creates it.
pub(super) fn write(directory: &Path, file: &str, text: &str) -> io::Result<()> {
    use io::Write as _;
    fs::OpenOptions::new().write(true).open(directory.join(file))?.write_all(text.as_bytes())
}

/// The number that `directory/file` holds; `max` is `u64::MAX`.
pub(super) fn number(directory: &Path, file: &str) -> io::Result<u64> {
    let text = read(directory, file)?;
    parse_number(text.trim()).ok_or_else(|| unexpected(directory, file))
}

/// The number after `key` in a file of `key number` lines.
pub(super) fn keyed(directory: &Path, file: &str, key: &str) -> io::Result<u64> {
    find_key(&read(directory, file)?, key).ok_or_else(|| unexpected(directory, file))
}

/// The number after `key` in such a text.
pub(super) fn find_key(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.split_once(' ').filter(|(word, _)| *word == key))
        .and_then(|(_, value)| parse_number(value.trim()))
}

/// The processes directly in `directory`; 0 stands for one of an outer pid namespace.
pub(super) fn processes(directory: &Path) -> io::Result<Vec<i32>> {
    Ok(read(directory, "cgroup.procs")?.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Moves a whole process into `directory`.
pub(super) fn move_process(directory: &Path, pid: i32) -> io::Result<()> {
    write(directory, "cgroup.procs", &pid.to_string())
}

/// `directory/tasks` of a v1 hierarchy, to write to.
///
/// Moving a process by `cgroup.procs` keeps every fork, exec and exit of the host
/// waiting, for 10 ms and more where it is the first such move in a while. A thread
/// that moves itself needs nothing of the kind (`cgroup_procs_write_start`,
/// kernel/cgroup/cgroup.c, since Linux 5.5).
pub(super) fn open_tasks(directory: &Path) -> io::Result<OwnedFd> {
    Ok(fs::OpenOptions::new().write(true).open(directory.join("tasks"))?.into())
}

/// Makes `directory` for our eyes only: nobody else may lock it or look at who runs.
pub(super) fn make(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(MODE).create(directory)
}

/// Makes `directory` and what is missing above it, each marked as made by a dispatcher.
/// Those that bear the mark, from now or from earlier, are added to `made`, topmost first.
pub(super) fn make_path(top: &Path, directory: &Path, made: &mut Vec<PathBuf>) -> io::Result<()> {
    let below = directory.strip_prefix(top).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut path = top.to_owned();
    for part in below.components() {
        path.push(part);
        match fs::create_dir(&path) {
            Ok(()) => {
                // Without xattr support in the kernel the mark is lost in a crash, no more.
                MARKS.iter().any(|mark| {
                    let none = rustix::fs::XattrFlags::empty();
                    rustix::fs::setxattr(&path, *mark, b"1", none).is_ok()
                });
                made.push(path.clone());
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if MARKS.iter().any(|mark| has_xattr(&path, mark)) {
                    made.push(path.clone());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether `path` has the extended attribute `name` with the value 1.
pub(super) fn has_xattr(path: &Path, name: &str) -> bool {
    let mut value = [0_u8; 8];
    matches!(rustix::fs::getxattr(path, name, &mut value[..]), Ok(1) if value[0] == b'1')
}

/// Removes a cgroup; one that is gone already is fine.
pub(super) fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Kills every process in and below `directory`, then removes it, within `patience`.
///
/// # Errors
/// What stood in the way at the end: EBUSY for a process that would not die.
pub(super) fn destroy(directory: &Path, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    loop {
        kill_all(directory, 0);
        match remove_all(directory, 0) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(error);
                }
                // Nothing tells when a v1 cgroup empties: try again, less and less often.
                std::thread::sleep(pause.min(left));
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            result => return result,
        }
    }
}

/// Kills by `cgroup.kill`, which no fork escapes; else one by one, as often as the caller repeats it.
pub(super) fn kill_all(directory: &Path, depth: usize) {
    if write(directory, "cgroup.kill", "1").is_ok() {
        return;
    }
    // Where this is the pids hierarchy, nothing forks from here on.
    let _stops_forks_where_it_can = write(directory, "pids.max", "0");
    kill_each(directory);
    if depth < DEPTH_MAX {
        for child in children(directory) {
            kill_all(&child, depth + 1);
        }
    }
}

/// What cannot be killed shows itself when the directory cannot be removed.
fn kill_each(directory: &Path) {
    let own = rustix::process::getpid();
    let pids = processes(directory).unwrap_or_default();
    for pid in pids.into_iter().filter_map(Pid::from_raw).filter(|pid| *pid != own) {
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        // The number may have passed to a stranger between reading it and opening
        // it; what is in the cgroup now, while the pidfd is held, is the same process.
        let still = processes(directory).is_ok_and(|now| now.contains(&pid.as_raw_nonzero().get()));
        if still {
            let _dead_already_or_seen_by_removal = pidfd_send_signal(&pidfd, Signal::KILL);
        }
    }
}

fn remove_all(directory: &Path, depth: usize) -> io::Result<()> {
    if depth < DEPTH_MAX {
        for child in children(directory) {
            remove_all(&child, depth + 1)?;
        }
    }
    remove(directory)
}

/// The cgroups directly below `directory`.
pub(super) fn children(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn parse_number(text: &str) -> Option<u64> {
    if text == "max" { Some(u64::MAX) } else { text.parse().ok() }
}

fn unexpected(directory: &Path, file: &str) -> io::Error {
    let path = directory.join(file);
    io::Error::new(io::ErrorKind::InvalidData, format!("{} is not as expected", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_whole_words() {
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        assert_eq!(find_key(text, "oom_kill"), Some(3));
        assert_eq!(find_key(text, "oom"), None);
        assert_eq!(find_key("oom_kill x\n", "oom_kill"), None);
    }

    #[test]
    fn numbers_and_max() {
        let directory = tempfile::tempdir().unwrap();
        for (text, value) in [("17\n", Some(17)), ("max\n", Some(u64::MAX)), ("-1\n", None)] {
            fs::write(directory.path().join("file"), text).unwrap();
            assert_eq!(number(directory.path(), "file").ok(), value, "{text:?}");
        }
        assert!(write(directory.path(), "other", "1").is_err(), "must not create files");
    }
}

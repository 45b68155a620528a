//! Moving our own processes: a v2 cgroup whose children have controllers may
//! hold no processes itself, but for the very top.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::Pid;

use super::{files, place::Refused};

/// The leaf that our own processes move to. Its name tells it from one of systemd's.
pub(super) const LEAF: &str = "dispatcher-supervisor";

/// How long the moves may take, all attempts together.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(2);

/// Does `with_room`, having moved our own processes out of `directory` into the
/// leaf; never others'. Gives the leaf, where it took one.
///
/// It is tried more than once: we may fork meanwhile, and a process that is
/// ending can't be moved but goes by itself.
pub(super) fn make_room(
    directory: &Path,
    own_pids: &[Pid],
    mut with_room: impl FnMut() -> io::Result<()>,
) -> Result<Option<PathBuf>, Refused> {
    let denied = |error| Refused::Denied { directory: directory.to_owned(), error };
    let deadline = Instant::now() + PATIENCE;
    let mut leaf = None;
    loop {
        let present = files::processes(directory).map_err(denied)?;
        let of = |whose| {
            let same = move |pid: &i32| self::whose(*pid, own_pids) == whose;
            present.iter().copied().filter(same).collect::<Vec<_>>()
        };
        let strangers = of(Whose::Strangers);
        if !strangers.is_empty() {
            return Err(Refused::Occupied { directory: directory.to_owned(), strangers });
        }
        let ours = of(Whose::Ours);
        if !ours.is_empty() {
            let path = directory.join(LEAF);
            match files::make(&path) {
                // Left by a dispatcher that is dead, or made just now.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => result.map_err(denied)?,
            }
            move_all(&ours, &path).map_err(denied)?;
            leaf = Some(path);
        }
        match with_room() {
            Ok(()) => return Ok(leaf),
            Err(error) if is_busy(&error) && Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(denied(error)),
        }
    }
}

/// Moves everyone in the leaf back above it and removes it. It stays where
/// that can't be: another dispatcher came to live there.
pub(super) fn dissolve(leaf: &Path, above: &Path) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let present = files::processes(leaf).unwrap_or_default();
        if move_all(&present, above).is_err() {
            return;
        }
        match files::remove(leaf) {
            Err(error) if is_busy(&error) && Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            _ => return,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Ours,
    Strangers,
    /// It ended meanwhile, or hides from us: not to be moved in any case.
    Gone,
}

/// Ours are `own_pids` and their children: the monitor may start one at any time.
fn whose(pid: i32, own_pids: &[Pid]) -> Whose {
    let own = |pid: i32| own_pids.iter().any(|own| own.as_raw_nonzero().get() == pid);
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        _ if own(pid) => Whose::Ours,
        Ok(stat) if parent(&stat).is_some_and(own) => Whose::Ours,
        // 0 is a process of an outer pid namespace.
        Err(error) if pid != 0 && is_gone(&error) => Whose::Gone,
        _ => Whose::Strangers,
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The parent in a text of proc_pid_stat(5); the name before may hold anything.
fn parent(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// EOPNOTSUPP is what a threaded cgroup answers.
fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EOPNOTSUPP))
}

/// Processes that ended meanwhile are fine.
fn move_all(pids: &[i32], directory: &Path) -> io::Result<()> {
    for pid in pids {
        match files::move_process(directory, *pid) {
            Err(error) if is_gone(&error) => {}
            result => result?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_of_ours_are_ours_and_nobody_else_is() {
        assert_eq!(parent("7 (a b) c) S 42 7 7 0"), Some(42));
        assert_eq!(parent("7 (x"), None);
        let own = rustix::process::getpid();
        assert_eq!(whose(own.as_raw_nonzero().get(), &[own]), Whose::Ours);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!(whose(pid, &[own]), Whose::Ours);
        assert_eq!(whose(pid, &[Pid::INIT]), Whose::Strangers);
        assert_eq!(whose(0, &[own]), Whose::Strangers);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(whose(pid, &[own]), Whose::Gone);
    }
}

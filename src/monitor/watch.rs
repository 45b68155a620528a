//! `reload = "watch"`: the policy directory, and its `seccomp/`, by inotify(7).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

/// How long nothing may happen before a change is taken to be complete.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// How soon a directory that is gone is looked for again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Everything that changes what a directory says; not reading it.
const CHANGES: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF);

/// The watch, and when a change will have settled.
#[derive(Debug)]
pub struct Watch {
    inotify: Inotify,
    directory: PathBuf,
    settled_at: Option<Instant>,
}

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// Those of inotify_init(2) and inotify_add_watch(2).
    pub fn new(directory: &Path) -> io::Result<Self> {
        let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
        let watch = Self {
            inotify: Inotify::init(flags)?,
            directory: directory.to_owned(),
            settled_at: None,
        };
        watch.look()?;
        Ok(watch)
    }

    /// Takes note of what changed. Call it when the descriptor is readable.
    ///
    /// # Errors
    /// Those of read(2).
    pub fn note(&mut self, now: Instant) -> io::Result<()> {
        loop {
            match self.inotify.read_events() {
                Ok(events) if events.is_empty() => return Ok(()),
                Ok(_) => self.settled_at = Some(now + SETTLED_AFTER),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// When [`Watch::settled`] is to be asked.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.settled_at
    }

    /// Whether something changed and has been quiet since; says so once.
    pub fn settled(&mut self, now: Instant) -> bool {
        if self.settled_at.is_none_or(|at| now < at) {
            return false;
        }
        // It may be another directory by now; the watch is on what it was.
        match self.look() {
            Ok(()) => {
                self.settled_at = None;
                true
            }
            Err(error) => {
                let directory = self.directory.display();
                tracing::error!(%error, "{directory} can't be watched; the policies stay as they are");
                self.settled_at = Some(now + LOOK_AGAIN);
                false
            }
        }
    }

    /// Watches what is there now; what is watched already stays so.
    fn look(&self) -> io::Result<()> {
        self.inotify.add_watch(&self.directory, CHANGES | AddWatchFlags::IN_ONLYDIR)?;
        match self.inotify.add_watch(&self.directory.join("seccomp"), CHANGES) {
            Ok(_) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Changes are noted before the call that made them returns.
    fn after(watch: &mut Watch, change: impl FnOnce()) -> bool {
        change();
        let now = Instant::now();
        watch.note(now).unwrap();
        let noted = watch.deadline().is_some();
        assert!(!watch.settled(now), "not before a second of quiet");
        let settled = watch.settled(now + SETTLED_AFTER);
        assert_eq!(noted, settled);
        assert!(!watch.settled(now + 2 * SETTLED_AFTER), "once only");
        noted
    }

    #[test]
    fn changes_are_noted_and_reading_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut watch = Watch::new(directory.path()).unwrap();
        assert!(after(&mut watch, || fs::write(path("a.toml"), "x").unwrap()));
        assert!(!after(&mut watch, || drop(fs::read(path("a.toml")).unwrap())));
        assert!(after(&mut watch, || fs::rename(path("a.toml"), path("b.toml")).unwrap()));
        assert!(after(&mut watch, || fs::remove_file(path("b.toml")).unwrap()));
        assert!(after(&mut watch, || fs::create_dir(path("seccomp")).unwrap()));
        assert!(after(&mut watch, || fs::write(path("seccomp/p.json"), "{}").unwrap()));
    }

    #[test]
    fn each_change_begins_the_quiet_again() {
        let directory = tempfile::tempdir().unwrap();
        let mut watch = Watch::new(directory.path()).unwrap();
        let now = Instant::now();
        fs::write(directory.path().join("a"), "1").unwrap();
        watch.note(now).unwrap();
        let later = now + SETTLED_AFTER / 2;
        fs::write(directory.path().join("a"), "2").unwrap();
        watch.note(later).unwrap();
        assert!(!watch.settled(now + SETTLED_AFTER));
        assert!(watch.settled(later + SETTLED_AFTER));
    }

    #[test]
    fn a_directory_that_was_replaced_is_found_again() {
        let base = tempfile::tempdir().unwrap();
        let (policies, old) = (base.path().join("policies"), base.path().join("old"));
        fs::create_dir(&policies).unwrap();
        let mut watch = Watch::new(&policies).unwrap();
        let mut now = Instant::now();
        fs::rename(&policies, &old).unwrap();
        watch.note(now).unwrap();
        now += SETTLED_AFTER;
        assert!(!watch.settled(now), "there is none");
        fs::create_dir(&policies).unwrap();
        now += LOOK_AGAIN;
        assert!(watch.settled(now), "there is one again");
        fs::write(policies.join("a.toml"), "").unwrap();
        watch.note(now).unwrap();
        assert!(watch.settled(now + SETTLED_AFTER));
    }
}

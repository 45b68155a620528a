//! `reload = "watch"`: inotify(7) on the policy directory, settled for a second.

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// How long the directory must be quiet: an editor writes more than once.
const SETTLE: Duration = Duration::from_secs(1);

/// A watched policy directory.
pub(super) struct Watch {
    inotify: Inotify,
    settles_at: Option<Instant>,
}

impl Watch {
    /// Watches a directory, and its `seccomp` directory where there is one.
    pub(super) fn over(directory: &Path) -> nix::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let changes = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ATTRIB;
        inotify.add_watch(directory, changes)?;
        let profiles = directory.join("seccomp");
        if profiles.is_dir() {
            inotify.add_watch(&profiles, changes)?;
        }
        Ok(Self { inotify, settles_at: None })
    }

    /// Takes note of what changed. True when it has been quiet since long enough.
    pub(super) fn changed(&mut self) -> bool {
        let mut seen = false;
        while self.inotify.read_events().is_ok_and(|events| !events.is_empty()) {
            seen = true;
        }
        if seen {
            self.settles_at = Some(Instant::now() + SETTLE);
        }
        let settled = self.settled();
        if settled {
            self.settles_at = None;
        }
        settled
    }

    /// When to look again.
    pub(super) fn settles_at(&self) -> Option<Instant> {
        self.settles_at
    }

    /// Whether a change has settled.
    pub(super) fn settled(&self) -> bool {
        self.settles_at.is_some_and(|at| at <= Instant::now())
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

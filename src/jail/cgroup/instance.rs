//! The directory that one dispatcher holds in a hierarchy, and what dead ones left.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock},
    io::Errno,
};

use super::files;

/// How instance directories' names begin.
pub(super) const PREFIX: &str = "dispatcher.";

/// How long one directory of a dead instance may take to clear.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// How often, 10 ms apart, a lock is tried: a sweep by another may hold it, and
/// so may a process of a killed launcher of ours that is about to die.
const CLAIMS_MAX: u32 = 200;

/// How far a sweep looks. A host with more cgroups keeps what dead instances left
/// in the rest, all of it empty: their processes died with them.
const SWEEP_DEPTH_MAX: usize = 8;
const SWEEP_MAX: usize = 10_000;

/// A directory that is ours for as long as the lock on it is held.
///
/// The lock goes with the process however that ends, so that it tells the
/// living from the dead without any pid being compared.
#[derive(Debug)]
pub(super) struct Instance {
    pub(super) directory: PathBuf,
    _lock: OwnedFd,
}

impl Instance {
    /// Makes or takes over `parent/dispatcher.<name>`, empty and locked.
    ///
    /// # Errors
    /// `WouldBlock` when a living dispatcher holds it; `AlreadyExists` when what
    /// has that name is not a dispatcher's; `ResourceBusy` when a
    /// process of a dead one will not die; those of mkdir(2).
    pub(super) fn claim(parent: &Path, name: &str) -> io::Result<Self> {
        let directory = parent.join(format!("{PREFIX}{name}"));
        for _ in 0..CLAIMS_MAX {
            match files::make(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                // Gone meanwhile, or not ours at all.
                Err(error) if directory.exists() && !is_instance(&directory) => return Err(error),
                _ => {}
            }
            match lock(&directory) {
                Ok(held) if is_same(&held, &directory) => {
                    for left in files::children(&directory) {
                        files::destroy(&left, PATIENCE)?;
                    }
                    return Ok(Self { directory, _lock: held });
                }
                // A sweep removed it between our making and our locking it.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Kills what is left in it and removes it.
    ///
    /// # Errors
    /// EBUSY for a process that would not die; the directory then stays.
    pub(super) fn dissolve(&self) -> io::Result<()> {
        files::destroy(&self.directory, PATIENCE)
    }
}

/// Clears away what dead instances left anywhere in the hierarchy: they may
/// have had another parent. Living ones hold their lock, and what others made
/// under such a name is not touched. Gives what could not be cleared.
pub(super) fn sweep(top: &Path) -> Vec<(PathBuf, io::Error)> {
    let mut failed = Vec::new();
    let mut level = vec![top.to_owned()];
    let mut seen = 0;
    for _ in 0..SWEEP_DEPTH_MAX {
        let mut below = Vec::new();
        for directory in level.iter().flat_map(|directory| files::children(directory)) {
            seen += 1;
            if seen > SWEEP_MAX {
                return failed;
            }
            if !is_instance(&directory) {
                below.push(directory);
            } else if let Ok(_lock) = lock(&directory)
                && let Err(error) = files::destroy(&directory, PATIENCE)
            {
                failed.push((directory, error));
            }
        }
        level = below;
    }
    failed
}

/// Made by a dispatcher of our own user: by its name, and by its permissions,
/// since systemd may have a dispatcher.service or a dispatcher.slice. On no one
/// else's word do we kill.
fn is_instance(directory: &Path) -> bool {
    let name = directory.file_name().unwrap_or_default();
    name.as_bytes().starts_with(PREFIX.as_bytes())
        && fs::symlink_metadata(directory).is_ok_and(|found| {
            found.uid() == rustix::process::geteuid().as_raw()
                && found.mode() & 0o777 == files::MODE
        })
}

fn lock(directory: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::empty())?;
    flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
    Ok(fd)
}

fn is_same(held: impl AsFd, directory: &Path) -> bool {
    match (rustix::fs::fstat(held), rustix::fs::stat(directory)) {
        (Ok(held), Ok(named)) => (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino),
        _ => false,
    }
}

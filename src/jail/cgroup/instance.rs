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
    /// `WouldBlock` when a living dispatcher holds it; `ResourceBusy` when a
    /// process of a dead one will not die; those of mkdir(2).
    pub(super) fn claim(parent: &Path, name: &str) -> io::Result<Self> {
        let directory = parent.join(format!("{PREFIX}{name}"));
        for _ in 0..CLAIMS_MAX {
            match files::make(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
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

/// Clears away what dead instances left in `parent`; living ones hold their lock.
/// Gives what could not be cleared.
pub(super) fn sweep(parent: &Path) -> Vec<(PathBuf, io::Error)> {
    files::children(parent)
        .into_iter()
        .filter(|directory| is_instance(directory))
        .filter_map(|directory| {
            let _lock = lock(&directory).ok()?;
            files::destroy(&directory, PATIENCE).err().map(|error| (directory, error))
        })
        .collect()
}

/// Named as ours are, and made by our user: no one else's word makes us kill.
fn is_instance(directory: &Path) -> bool {
    directory.file_name().is_some_and(|name| name.as_bytes().starts_with(PREFIX.as_bytes()))
        && fs::metadata(directory).is_ok_and(|d| d.uid() == rustix::process::geteuid().as_raw())
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

//! What a container sees of ours: a directory, shown to it read-only at /run/dispatcher.
//!
//! It holds init, the FIFO by which init knows that we are there, files for its /etc, and,
//! once there is a call, the executable. Only we can write to it: it lies in a directory that nobody else
//! may enter on the host, and the container's mount of it is read-only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{
            DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
        },
    },
    path::{Path, PathBuf},
};

use super::{INIT, owner::Owner};
use crate::jail::root;

/// Names in it; `protocol` has init's and the FIFO's as paths of the container's.
const INIT_NAME: &str = "init";
const HOLD_NAME: &str = "hold";
/// How often what another removes at the same time is gone through: each time there is less.
const REMOVALS: u32 = 100;
/// As in `jail::message::SCRIPT_PATH`.
const SERVICE_NAME: &str = "service";
/// For /etc, by what they are called there: Docker would show copies of the host's. Each
/// container has its own, or one would see the locks that another takes on them.
pub const FOR_ETC: [(&str, &str); 2] =
    [("hosts", root::MADE_UP_HOSTS), ("resolv.conf", root::MADE_UP_RESOLV_CONF)];

/// One container's directory. Dropping it removes it, and lets the container's init go.
#[derive(Debug)]
pub struct Slot {
    path: PathBuf,
    _hold: OwnedFd,
}

impl Slot {
    /// Makes one in `parent`.
    ///
    /// # Errors
    /// Those of making directories and files. What was made is removed again.
    pub fn make(parent: &Path, name: &str) -> io::Result<Self> {
        let path = parent.join(name);
        // The program's user has to find its way in.
        fs::DirBuilder::new().mode(0o755).create(&path)?;
        let made = fill(&path);
        match made {
            Ok(hold) => Ok(Self { path, _hold: hold }),
            Err(error) => {
                fs::remove_dir_all(&path).ok();
                Err(error)
            }
        }
    }

    /// Its path, on the host.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Init's executable in it.
    #[must_use]
    pub fn init(&self) -> PathBuf {
        self.path.join(INIT_NAME)
    }

    /// Puts the executable there, of `size` bytes.
    ///
    /// # Errors
    /// Those of writing a file: ENOSPC on a full disk.
    pub fn place(&self, executable: impl AsFd, size: u64) -> io::Result<()> {
        let file = create(&self.path.join(SERVICE_NAME), 0o555)?;
        let mut offset = 0;
        while offset < size {
            let left = usize::try_from(size - offset).unwrap_or(usize::MAX);
            if rustix::fs::sendfile(&file, &executable, Some(&mut offset), left)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(%error, "{} can't be removed", self.path.display());
        }
    }
}

fn fill(path: &Path) -> io::Result<OwnedFd> {
    // Whatever our umask made of it.
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    create(&path.join(INIT_NAME), 0o555)?.write_all(INIT)?;
    for (name, content) in FOR_ETC {
        create(&path.join(name), 0o444)?.write_all(content.as_bytes())?;
    }
    let hold = path.join(HOLD_NAME);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &hold,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o444),
        0,
    )?;
    fs::set_permissions(&hold, fs::Permissions::from_mode(0o444))?;
    // For both, that opening it waits for nobody.
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let hold = OpenOptions::new().read(true).write(true).custom_flags(flags).open(hold)?;
    Ok(hold.into())
}

fn create(path: &Path, mode: u32) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(file)
}

/// Removes what a dead dispatcher left, which another one that starts may be removing too.
fn remove_left(path: &Path) -> io::Result<()> {
    for _ in 0..REMOVALS {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if !path.try_exists()? {
                    break;
                }
            }
            removed => return removed,
        }
    }
    Ok(())
}

/// Our directory for slots: below `base`, which is made where it isn't there. What dead
/// dispatchers left beside it is removed.
///
/// # Errors
/// Those of making it; `PermissionDenied` for a base in which others could put things.
pub fn prepare(base: &Path, owner: &Owner) -> io::Result<PathBuf> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(base)?;
    let found = fs::symlink_metadata(base)?;
    let ours = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw();
    if !ours || found.mode() & 0o022 != 0 {
        let why = format!(
            "{} must be a directory of our own that nobody else can write to; name another in \
             [docker] directory",
            base.display()
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    for entry in fs::read_dir(base)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| owner.sees_dead_by_name(name)) {
            remove_left(&entry.path())?;
        }
    }
    let own = base.join(owner.file_name());
    // On the host, for our eyes only.
    fs::DirBuilder::new().mode(0o700).create(&own)?;
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_a_container_needs_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let owner = Owner::own().unwrap();
        let base = directory.path().join("base");
        let parent = prepare(&base, &owner).unwrap();
        let slot = Slot::make(&parent, "one").unwrap();
        assert!(Slot::make(&parent, "one").is_err(), "the name is taken");
        assert_eq!(fs::read(slot.init()).unwrap(), INIT);
        let executable = crate::sys::sealed_memfd(c"test", &[b"#!/bin/sh\n"], false).unwrap();
        slot.place(&executable, 10).unwrap();
        let service = slot.path().join("service");
        assert_eq!(fs::read(&service).unwrap(), b"#!/bin/sh\n");
        for (file, mode) in [
            ("init", 0o555),
            ("hold", 0o444),
            ("service", 0o555),
            ("hosts", 0o444),
            ("resolv.conf", 0o444),
        ] {
            let found = fs::metadata(slot.path().join(file)).unwrap().permissions().mode();
            assert_eq!(found & 0o7777, mode, "{file}");
        }
        assert_eq!(fs::metadata(&parent).unwrap().permissions().mode() & 0o777, 0o700);
        let path = slot.path().to_owned();
        drop(slot);
        assert!(!path.exists());
        fs::remove_dir(&parent).unwrap();
        let left = base.join("another-boot.1.2.3");
        fs::create_dir_all(left.join("slot")).unwrap();
        fs::create_dir(base.join("whatever")).unwrap();
        prepare(&base, &owner).unwrap();
        assert!(!left.exists());
        assert!(base.join("whatever").exists());
        remove_left(&left).unwrap();
        fs::set_permissions(&base, fs::Permissions::from_mode(0o777)).unwrap();
        let refused = prepare(&base, &owner).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn what_a_dead_dispatcher_left_may_be_removed_by_two_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let left = directory.path().join("left");
        for number in 0..200 {
            fs::create_dir_all(left.join(number.to_string()).join("slot")).unwrap();
        }
        std::thread::scope(|scope| {
            let begun: Vec<_> = (0..4).map(|_| scope.spawn(|| remove_left(&left))).collect();
            begun.into_iter().for_each(|removing| removing.join().unwrap().unwrap());
        });
        assert!(!left.exists());
    }

    #[test]
    fn whoever_waits_at_the_fifo_learns_that_it_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let slot = Slot::make(directory.path(), "one").unwrap();
        let hold = slot.path().join("hold");
        let flags = libc::O_NONBLOCK;
        let reader = OpenOptions::new().read(true).custom_flags(flags).open(hold).unwrap();
        let hung_up = || {
            use rustix::event::{PollFd, PollFlags, Timespec, poll};
            let mut fds = [PollFd::new(&reader, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
            fds[0].revents().contains(PollFlags::HUP)
        };
        assert!(!hung_up());
        drop(slot);
        assert!(hung_up());
    }
}

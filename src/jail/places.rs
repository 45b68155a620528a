//! Where sockets of services are on the host: a directory of this launcher's own.
//!
//! ```text
//! /run/dispatch-launch.5f0c…/      0711, locked for as long as its launcher lives
//!     sockets/                     0700: inherited sockets are bound here, and unlinked at once
//!     9c41…/                       0700, the program's: direct mode, one for each run
//! ```
//!
//! It is made when the first service wants it, and goes with the launcher. What one that was
//! killed has left, the next one removes. Who the launcher is told apart by is the lock: that
//! goes with the process, however it ends.
//!
//! In direct mode a run's directory is its user's. So nothing in it is reached by a path:
//! only from one open directory to the next, following no link ([`Places::clear_away`]).

use std::{
    ffi::{CStr, CString, OsString},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags},
    io::Errno,
    process::{Gid, Uid},
};

use super::message::SERVICE_SOCKET;
use crate::names::RunId;

/// How our directories' names begin.
const PREFIX: &str = "dispatch-launch.";
/// Where inherited sockets are bound.
const SOCKETS: &CStr = c"sockets";
/// Connections that wait to be accepted: more than an instance has calls at once.
const BACKLOG: i32 = 128;
/// Longest path of a socket in bytes, its NUL not counted; unix(7).
const SOCKET_PATH_MAX: usize = 107;
/// How often a directory is made anew because a sweep took it before it was locked.
const CLAIMS_MAX: u32 = 16;
/// How many entries a sweep looks at.
const SWEEP_MAX: usize = 10_000;
/// Entries that are removed before something else has its turn.
const REMOVED_AT_ONCE: usize = 1024;
/// How often that is done for what a dead launcher left, and at our end.
const ROUNDS_MAX: usize = 64;
/// How deep directories are followed; what is deeper is moved up first.
const DEPTH_MAX: usize = 8;

/// A socket that a program will listen at, and the launcher's way to it.
#[derive(Debug)]
pub struct Listening {
    /// For the program alone: as long as a copy is open, connections can be made.
    pub socket: OwnedFd,
    /// Its inode, opened as a path. That has no name any more: only by this can it be
    /// connected to.
    pub inode: OwnedFd,
}

/// Direct mode: the directory in which a program may bind a socket of its own.
#[derive(Debug)]
pub struct Place {
    /// It, opened as a path.
    pub directory: OwnedFd,
    /// The socket's path.
    pub socket: CString,
    name: CString,
}

/// All of them.
#[derive(Debug)]
pub struct Places {
    parent: PathBuf,
    base: Option<Base>,
    /// Names of those whose run is gone, and that couldn't be removed yet.
    left: Vec<CString>,
}

#[derive(Debug)]
struct Base {
    path: PathBuf,
    /// It, locked.
    directory: OwnedFd,
    sockets: OwnedFd,
    /// The next name in it.
    next: u64,
}

impl Places {
    /// Descriptors that it has open.
    pub const DESCRIPTORS: usize = 2;

    /// For a launcher that is root, or not. Removes what dead ones left.
    #[must_use]
    pub fn new(root: bool) -> Self {
        let named = |variable| {
            let paths: OsString = std::env::var_os(variable)?;
            // systemd.exec(5): there may be several, with colons between.
            let first = paths.as_bytes().split(|byte| *byte == b':').next()?.to_vec();
            let path = PathBuf::from(OsString::from_vec(first));
            (path.is_absolute() && path.is_dir()).then_some(path)
        };
        let parent = match root {
            true => named("RUNTIME_DIRECTORY").unwrap_or_else(|| "/run".into()),
            false => named("XDG_RUNTIME_DIR").unwrap_or_else(std::env::temp_dir),
        };
        sweep(&parent);
        Self::below(parent)
    }

    fn below(parent: PathBuf) -> Self {
        Self { parent, base: None, left: Vec::new() }
    }

    /// Where it makes its directory, for the log.
    #[must_use]
    pub fn parent(&self) -> &Path {
        &self.parent
    }

    /// Has a new socket listen, connected to by nobody: it was in a directory that is ours
    /// alone, and its name was gone before it listened.
    ///
    /// # Errors
    /// Those of making the directory, of bind(2), open(2) and listen(2).
    pub fn listening(&mut self, socket: OwnedFd) -> io::Result<Listening> {
        let base = self.base()?;
        let name = base.next_name();
        // By the descriptor, so that no path is too long for it.
        let directory = base.sockets.as_raw_fd();
        let path = format!("/proc/self/fd/{directory}/{}", name.to_string_lossy());
        rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(path)?)?;
        let opened = open_path(base.sockets.as_fd(), &name);
        rustix::fs::unlinkat(&base.sockets, &name, AtFlags::empty())?;
        let inode = opened?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Listening { socket, inode })
    }

    /// A directory for one run in direct mode, which this user and group alone can use.
    ///
    /// # Errors
    /// Those of making it; `InvalidFilename` where the path is too long for a socket's.
    pub fn place(&mut self, owner: (u32, u32)) -> io::Result<Place> {
        // Which can't be guessed: in direct mode several namespaces may have one user.
        let name = CString::new(RunId::random()?.to_string())?;
        let base = self.base()?;
        let file = Path::new(SERVICE_SOCKET).file_name().unwrap_or_default();
        let path = base.path.join(std::ffi::OsStr::from_bytes(name.to_bytes())).join(file);
        let socket = CString::new(path.into_os_string().into_vec())?;
        if socket.as_bytes().len() > SOCKET_PATH_MAX {
            return Err(Errno::NAMETOOLONG.into());
        }
        rustix::fs::mkdirat(&base.directory, &name, Mode::RWXU)?;
        let made = base.give(&name, owner);
        match made {
            Ok(directory) => Ok(Place { directory, socket, name }),
            Err(error) => {
                rustix::fs::unlinkat(&base.directory, &name, AtFlags::REMOVEDIR).ok();
                Err(error)
            }
        }
    }

    /// Removes one whose run is gone, or as much of it as is removed at once.
    pub fn give_back(&mut self, place: Place) {
        self.left.push(place.name);
        self.clear_away();
    }

    /// Whether something is left of runs that are gone.
    #[must_use]
    pub fn has_left(&self) -> bool {
        !self.left.is_empty()
    }

    /// Removes more of what is left.
    pub fn clear_away(&mut self) {
        let Some(base) = &mut self.base else { return };
        let mut budget = REMOVED_AT_ONCE;
        for name in std::mem::take(&mut self.left) {
            let mut clearing = Clearing { budget, base, moved: Vec::new() };
            let removed = clearing.remove(None, &name, DEPTH_MAX);
            budget = clearing.budget;
            self.left.append(&mut clearing.moved);
            if removed.is_err() {
                self.left.push(name);
            }
        }
    }

    /// Removes all of it. Nothing of any run may be alive any more.
    ///
    /// # Errors
    /// What stood in the way.
    pub fn close(mut self) -> io::Result<()> {
        let closed = match self.base.take() {
            Some(mut base) => base.dissolve().map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", base.path.display()))
            }),
            None => Ok(()),
        };
        // One that died with us here, whose last process held its lock when we began.
        sweep(&self.parent);
        closed
    }

    fn base(&mut self) -> io::Result<&mut Base> {
        // Whoever tidies up in there may have taken it for forgotten.
        let there = |base: &Base| {
            rustix::fs::fstat(&base.directory).is_ok_and(|directory| directory.st_nlink > 0)
        };
        let base = match self.base.take().filter(there) {
            Some(base) => base,
            None => Base::make(&self.parent)?,
        };
        Ok(self.base.insert(base))
    }
}

impl Base {
    /// By a name that nobody can have taken before us.
    fn make(parent: &Path) -> io::Result<Self> {
        for _ in 0..CLAIMS_MAX {
            let id = RunId::random()?.to_string();
            let path = parent.join(format!("{PREFIX}{}", &id[..NAME_LEN.min(id.len())]));
            rustix::fs::mkdir(&path, Mode::RWXU)?;
            // A sweep may have been quicker.
            let Ok(directory) = lock(CWD, &path) else {
                rustix::fs::rmdir(&path).ok();
                continue;
            };
            let Ok(named) = rustix::fs::lstat(&path) else { continue };
            let held = rustix::fs::fstat(&directory)?;
            if (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino) {
                continue;
            }
            // Whatever the umask is. Others may pass through to what is theirs.
            rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o711))?;
            rustix::fs::mkdirat(&directory, SOCKETS, Mode::RWXU)?;
            let sockets = open_path(directory.as_fd(), SOCKETS)?;
            return Ok(Self { path, directory, sockets, next: 1 });
        }
        Err(Errno::AGAIN.into())
    }

    fn next_name(&mut self) -> CString {
        let name = format!("{:x}", self.next);
        self.next += 1;
        CString::new(name).unwrap_or_default()
    }

    /// Opens a directory that was just made, for its owner.
    fn give(&self, name: &CStr, (uid, gid): (u32, u32)) -> io::Result<OwnedFd> {
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        if (uid, gid) != own {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(&self.directory, name, Some(uid), Some(gid), flags)?;
        }
        Ok(open_path(self.directory.as_fd(), name)?)
    }

    fn dissolve(&mut self) -> io::Result<()> {
        for _ in 0..ROUNDS_MAX {
            let mut clearing = Clearing { budget: REMOVED_AT_ONCE, base: self, moved: Vec::new() };
            match clearing.empty(None, DEPTH_MAX) {
                Err(Errno::AGAIN) => {}
                other => {
                    other?;
                    if clearing.moved.is_empty() {
                        rustix::fs::rmdir(&self.path)?;
                        return Ok(());
                    }
                }
            }
        }
        Err(Errno::NOTEMPTY.into())
    }
}

/// Characters of a base's name behind [`PREFIX`].
const NAME_LEN: usize = 16;

/// Removing what tenants may have made.
struct Clearing<'a> {
    /// Entries that may still be removed.
    budget: usize,
    base: &'a mut Base,
    /// What lay too deep, and is in the base by these names now.
    moved: Vec<CString>,
}

impl Clearing<'_> {
    /// Removes `name` in `directory`, or in the base itself; with what is in it, where it is
    /// a directory. EAGAIN where more is left than may be removed at once.
    fn remove(
        &mut self,
        directory: Option<BorrowedFd<'_>>,
        name: &CStr,
        depth: usize,
    ) -> Result<(), Errno> {
        self.budget = self.budget.checked_sub(1).ok_or(Errno::AGAIN)?;
        let unlink = |clearing: &Self, flags| {
            let within = directory.unwrap_or(clearing.base.directory.as_fd());
            match rustix::fs::unlinkat(within, name, flags) {
                Err(Errno::NOENT) => Ok(()),
                result => result,
            }
        };
        match unlink(self, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => {}
            result => return result,
        }
        let within = directory.unwrap_or(self.base.directory.as_fd());
        if depth == 0 {
            let up = self.base.next;
            self.base.next += 1;
            let up = CString::new(format!("{up:x}")).unwrap_or_default();
            // Its parent is written into it.
            unlocked(within, name, || {
                rustix::fs::renameat(within, name, &self.base.directory, &up)
            })?;
            self.moved.push(up);
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let inner =
            unlocked(within, name, || rustix::fs::openat(within, name, flags, Mode::empty()))?;
        self.empty(Some(inner.as_fd()), depth - 1)?;
        unlink(self, AtFlags::REMOVEDIR)
    }

    /// Removes all that is in `directory`, or in the base itself.
    fn empty(&mut self, directory: Option<BorrowedFd<'_>>, depth: usize) -> Result<(), Errno> {
        let within = directory.unwrap_or(self.base.directory.as_fd());
        rustix::fs::fchmod(within, Mode::RWXU)?;
        for entry in Dir::read_from(within)? {
            let entry = entry?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                self.remove(directory, entry.file_name(), depth)?;
            }
        }
        Ok(())
    }
}

/// What one may do to a directory of one's own, also where that is closed to oneself: then it
/// is opened first. By a descriptor: a link may be there by now.
fn unlocked<T>(
    within: BorrowedFd<'_>,
    name: &CStr,
    act: impl Fn() -> Result<T, Errno>,
) -> Result<T, Errno> {
    match act() {
        Err(Errno::ACCESS) => {
            let closed = open_path(within, name)?;
            if FileType::from_raw_mode(rustix::fs::fstat(&closed)?.st_mode) != FileType::Directory {
                return Err(Errno::NOTDIR);
            }
            // fchmod(2) takes no descriptor that is but a path.
            rustix::fs::chmod(format!("/proc/self/fd/{}", closed.as_raw_fd()), Mode::RWXU)?;
            act()
        }
        result => result,
    }
}

/// Removes what dead launchers of our own user left in `parent`. What can't be removed
/// waits for the next sweep.
fn sweep(parent: &Path) {
    let own = rustix::process::geteuid();
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten().take(SWEEP_MAX) {
        if !entry.file_name().as_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let path = entry.path();
        // The living hold their lock.
        let Ok(directory) = lock(CWD, &path) else { continue };
        let ours = |stat: rustix::fs::Stat| stat.st_uid == own.as_raw();
        if !rustix::fs::fstat(&directory).is_ok_and(ours) {
            continue;
        }
        let Ok(sockets) = directory.try_clone() else { continue };
        // Names that nobody gave: whatever is moved up must find its name free.
        let mut base = Base { path, directory, sockets, next: SWEPT_NAMES };
        base.dissolve().ok();
    }
}

/// Where the names begin that a sweep gives.
const SWEPT_NAMES: u64 = 1 << 62;

fn lock(directory: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(directory, path, flags, Mode::empty())?;
    rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
    Ok(fd)
}

/// What has this name, itself, to refer to it.
fn open_path(directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::{fs, io::ErrorKind, os::unix::net::UnixStream};

    use super::*;
    use crate::sys;

    fn socket() -> OwnedFd {
        sys::stream_socket(false).unwrap()
    }

    fn own() -> (u32, u32) {
        (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
    }

    fn entries(directory: &Path) -> Vec<PathBuf> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn a_socket_listens_without_a_name_and_as_long_as_it_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let mut places = Places::below(directory.path().to_owned());
        let Listening { socket, inode } = places.listening(socket()).unwrap();
        let [base] = &entries(directory.path())[..] else { panic!() };
        assert_eq!(entries(&base.join("sockets")), Vec::<PathBuf>::new());
        let connect = || UnixStream::connect(format!("/proc/self/fd/{}", inode.as_raw_fd()));
        connect().unwrap();
        drop(socket);
        assert_eq!(connect().unwrap_err().kind(), ErrorKind::ConnectionRefused);
        places.close().unwrap();
        assert_eq!(entries(directory.path()), Vec::<PathBuf>::new());
    }

    #[test]
    fn much_is_removed_a_part_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let mut places = Places::below(directory.path().to_owned());
        let place = places.place(own()).unwrap();
        let socket = PathBuf::from(OsString::from_vec(place.socket.as_bytes().to_vec()));
        let inside = socket.parent().unwrap().to_owned();
        for number in 0..REMOVED_AT_ONCE + 10 {
            fs::write(inside.join(number.to_string()), "").unwrap();
        }
        places.give_back(place);
        assert!(places.has_left() && inside.exists());
        places.clear_away();
        assert!(!places.has_left() && !inside.exists());
        places.close().unwrap();
    }

    #[test]
    fn what_is_left_at_the_end_goes_with_the_rest() {
        let directory = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("kept"), "").unwrap();
        let mut places = Places::below(directory.path().to_owned());
        let place = places.place(own()).unwrap();
        let socket = PathBuf::from(OsString::from_vec(place.socket.as_bytes().to_vec()));
        let inside = socket.parent().unwrap();
        std::os::unix::fs::symlink(outside.path(), inside.join("link")).unwrap();
        fs::create_dir_all(inside.join("d/".repeat(3 * DEPTH_MAX))).unwrap();
        places.close().unwrap();
        assert_eq!(entries(directory.path()), Vec::<PathBuf>::new());
        assert!(outside.path().join("kept").exists());
    }

    #[test]
    fn the_dead_are_swept_and_the_living_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let mut living = Places::below(directory.path().to_owned());
        living.place(own()).unwrap();
        let mut dead = Places::below(directory.path().to_owned());
        dead.place(own()).unwrap();
        assert_eq!(entries(directory.path()).len(), 2);
        drop(dead); // and with it the lock
        sweep(directory.path());
        assert_eq!(entries(directory.path()).len(), 1);
        living.place(own()).unwrap();
        living.close().unwrap();
        assert_eq!(entries(directory.path()).len(), 0);
    }

    #[test]
    fn what_somebody_removed_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let mut places = Places::below(directory.path().to_owned());
        places.listening(socket()).unwrap();
        fs::remove_dir_all(&entries(directory.path())[0]).unwrap();
        places.listening(socket()).unwrap();
        places.place(own()).unwrap();
        places.close().unwrap();
        assert_eq!(entries(directory.path()).len(), 0);
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let long = directory.path().join("x".repeat(SOCKET_PATH_MAX));
        fs::create_dir(&long).unwrap();
        let mut places = Places::below(long.clone());
        assert_eq!(places.place(own()).unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
        // An inherited one needs none.
        places.listening(socket()).unwrap();
        places.close().unwrap();
        assert_eq!(entries(&long), Vec::<PathBuf>::new());
    }
}

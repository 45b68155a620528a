//! A container that is a gRPC service: its sockets, as they are reached from outside.
//!
//! No descriptor of the host's comes into the container, and no path of the host's leads to
//! the sockets. Both are in a small file system of the container's own, which the kernel made
//! with it: the one that the program inherits is made there by init, before the program is
//! there (`protocol`); another the program may bind by itself. We hold the directory.
//!
//! A socket, also one of the Unix family, belongs to the network namespace that it was made
//! in, and tells who has it of that one's interfaces (SIOCGIFCONF, netdevice(7)). What accept
//! gives belongs to that of who connected (`unix_stream_connect`, net/unix/af_unix.c). So we
//! connect by sockets that are made in the container's.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    thread,
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstat, fstatfs, fstatvfs, openat2},
    io::Errno,
    net::{SendFlags, send},
    process::Pid,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::protocol::{GO, LISTENER_PATH, SERVICE_DIRECTORY};
use crate::{
    jail::message::{SERVICE_SOCKET, ServiceSocket},
    sys,
};

/// Size of the directory's file system, in bytes and in inodes: it is for sockets.
pub const SIZE: u64 = 64 << 10;
/// The directory itself, the inherited socket, and what the program makes.
pub const INODES: u64 = 16;
/// Only the program's user may do anything in it.
pub const MODE: u32 = 0o700;

/// Least and most time between two looks for init's socket.
const LISTENER_STEP: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));
/// The stack of a thread that makes a socket.
const STACK: usize = 64 << 10;
/// `TMPFS_MAGIC`, include/uapi/linux/magic.h.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// What of a container's it takes to connect to its service.
#[derive(Debug)]
pub struct Service {
    init: Pid,
    /// Its [`SERVICE_DIRECTORY`], O_PATH.
    directory: OwnedFd,
    network: OwnedFd,
    /// Its pid namespace, by device and inode.
    pids: (u64, u64),
}

/// One whose program has its socket.
#[derive(Debug)]
pub struct Listening {
    /// The inode of the inherited socket, O_PATH.
    inherited: OwnedFd,
}

impl Service {
    /// That of the container in which `init` is init and nothing else runs yet. Afterwards
    /// look whether that process is still there: else this is of another.
    ///
    /// # Errors
    /// Those of openat2(2) and stat(2); in words where the directory isn't what Docker was
    /// asked for.
    pub fn of(init: Pid) -> io::Result<Self> {
        let of = |file: &str| format!("/proc/{}/{file}", init.as_raw_nonzero());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(of("root"), flags, Mode::empty())?;
        // Links are the image's, and lead nowhere but into it.
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let directory = openat2(&root, SERVICE_DIRECTORY, flags, Mode::empty(), within)?;
        if !is_as_asked(&directory)? {
            let why =
                format!("{SERVICE_DIRECTORY} isn't the file system that Docker was asked for");
            return Err(io::Error::other(why));
        }
        let network = fs::File::open(of("ns/net"))?.into();
        Ok(Self { init, directory, network, pids: identity(of("ns/pid").as_ref())? })
    }

    /// Waits until init listens, takes hold of its socket and lets it go on: then it starts
    /// the program. Cancel-safe, but that init waits for ever then.
    ///
    /// # Errors
    /// Those of openat2(2), connect(2) and send(2); EPERM where it isn't init who listens.
    pub async fn take_listener(&self) -> Result<Listening, Errno> {
        let (mut pause, longest) = LISTENER_STEP;
        loop {
            match self.reach_init() {
                // Not made yet; made, and not listening yet.
                Err(Errno::NOENT | Errno::CONNREFUSED) => {}
                reached => return reached,
            }
            tokio::time::sleep(pause).await;
            pause = longest.min(pause * 2);
        }
    }

    fn reach_init(&self) -> Result<Listening, Errno> {
        let inherited = self.socket(name_of(LISTENER_PATH.to_bytes()))?;
        let connection = self.connect_to(&inherited)?;
        if peer(&connection)? != self.init.as_raw_nonzero().get() {
            return Err(Errno::PERM);
        }
        send(&connection, &[GO], SendFlags::NOSIGNAL)?;
        Ok(Listening { inherited })
    }

    /// A new connection to one of its sockets, non-blocking. Waits for nothing.
    ///
    /// Of the inherited one it is sure: init made it. Its own one counts as the container's
    /// where who called listen(2) on it lives, and in the container's pid namespace, which
    /// nobody enters or leaves. It is asked for by number: a listener from outside that was
    /// handed in (over the host's network, where the policy shows it), and died, and whose
    /// number the container then got, would be taken for one.
    ///
    /// # Errors
    /// As `FromLauncher::Connected` has them, and ENOMEM and the like, socket(2).
    pub fn connect(&self, to: ServiceSocket, listening: &Listening) -> Result<OwnedFd, Errno> {
        if to == ServiceSocket::Inherited {
            return self.connect_to(&listening.inherited);
        }
        let socket = self.socket(name_of(SERVICE_SOCKET.as_bytes()))?;
        let connection = self.connect_to(&socket)?;
        let listener = format!("/proc/{}/ns/pid", peer(&connection)?);
        match identity(listener.as_ref()) {
            Ok(pids) if pids == self.pids => Ok(connection),
            _ => Err(Errno::PERM),
        }
    }

    /// The inode of a socket in the directory, in whose place the program can put what it
    /// likes.
    fn socket(&self, name: &Path) -> Result<OwnedFd, Errno> {
        sys::open_socket(&self.directory, name)
    }

    fn connect_to(&self, inode: &OwnedFd) -> Result<OwnedFd, Errno> {
        let socket = self.make_socket()?;
        sys::connect_to_inode(&socket, inode)?;
        Ok(socket)
    }

    /// A socket of the container's network namespace, made by a thread that goes there and
    /// never comes back.
    fn make_socket(&self) -> Result<OwnedFd, Errno> {
        let make = || {
            move_into_link_name_space(self.network.as_fd(), Some(LinkNameSpaceType::Network))?;
            sys::stream_socket(true).map_err(errno)
        };
        thread::scope(|scope| {
            let builder = thread::Builder::new().name("docker-socket".into()).stack_size(STACK);
            // No thread can be had, or it panicked.
            let maker = builder.spawn_scoped(scope, make).map_err(|_| Errno::AGAIN)?;
            maker.join().unwrap_or(Err(Errno::IO))
        })
    }
}

/// Who listens at the other end: the pid of who called listen(2), unix(7).
fn peer(connection: &OwnedFd) -> Result<i32, Errno> {
    sys::peer(connection.as_fd()).map(|(pid, _)| pid).map_err(errno)
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn is_as_asked(directory: &OwnedFd) -> Result<bool, Errno> {
    let system = fstatfs(directory)?;
    let closed = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC;
    Ok(system.f_type.cast_unsigned() == TMPFS_MAGIC
        && system.f_blocks.checked_mul(system.f_bsize.cast_unsigned()) == Some(SIZE)
        && system.f_files == INODES
        && fstatvfs(directory)?.f_flag.contains(closed)
        && fstat(directory)?.st_mode & 0o7777 == MODE)
}

fn identity(file: &Path) -> io::Result<(u64, u64)> {
    let found = fs::metadata(file)?;
    Ok((found.dev(), found.ino()))
}

/// Of a path in the directory, the last part.
fn name_of(path: &[u8]) -> &Path {
    use std::os::unix::ffi::OsStrExt as _;
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
    Path::new(std::ffi::OsStr::from_bytes(name))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        os::unix::{fs::PermissionsExt as _, net::UnixListener},
    };

    use rustix::process::{getpid, getppid};

    use super::*;

    /// As of a container that has this directory, and this process in it. Without root
    /// nobody goes into a network namespace.
    fn service(directory: &Path) -> Option<Service> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::process::geteuid().is_root().then(|| Service {
            init: getpid(),
            directory: rustix::fs::open(directory, flags, Mode::empty()).unwrap(),
            network: fs::File::open("/proc/self/ns/net").unwrap().into(),
            pids: identity("/proc/self/ns/pid".as_ref()).unwrap(),
        })
    }

    #[test]
    fn only_inits_listener_is_let_go_on() {
        let directory = tempfile::tempdir().unwrap();
        let Some(mut service) = service(directory.path()) else { return };
        assert_eq!(service.reach_init().unwrap_err(), Errno::NOENT);
        let listener = UnixListener::bind(directory.path().join("inherited.sock")).unwrap();
        let listening = service.reach_init().unwrap();
        let mut said = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut said).unwrap();
        assert_eq!(said, [GO]);
        // Whatever becomes of its name.
        fs::remove_file(directory.path().join("inherited.sock")).unwrap();
        service.connect(ServiceSocket::Inherited, &listening).unwrap();
        listener.accept().unwrap();

        let other = directory.path().join("inherited.sock");
        let other = UnixListener::bind(other).unwrap();
        service.init = getppid().unwrap();
        assert_eq!(service.reach_init().unwrap_err(), Errno::PERM);
        said.clear();
        other.accept().unwrap().0.read_to_end(&mut said).unwrap();
        assert!(said.is_empty(), "a stranger is told nothing");
        drop(listener);
        let refused = service.connect(ServiceSocket::Inherited, &listening);
        assert_eq!(refused.unwrap_err(), Errno::CONNREFUSED);
    }

    #[test]
    fn a_listener_of_another_pid_namespace_is_not_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let Some(mut service) = service(directory.path()) else { return };
        let _init = UnixListener::bind(directory.path().join("inherited.sock")).unwrap();
        let listening = service.reach_init().unwrap();
        let _own = UnixListener::bind(directory.path().join("service.sock")).unwrap();
        service.connect(ServiceSocket::Own, &listening).unwrap();
        service.pids.1 += 1;
        let refused = service.connect(ServiceSocket::Own, &listening);
        assert_eq!(refused.unwrap_err(), Errno::PERM);
    }

    #[test]
    fn a_directory_that_docker_was_not_asked_for_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("place");
        fs::create_dir(&place).unwrap();
        fs::set_permissions(&place, fs::Permissions::from_mode(MODE)).unwrap();
        let found = rustix::fs::open(&place, OFlags::PATH, Mode::empty()).unwrap();
        assert_eq!(is_as_asked(&found), Ok(false));
    }
}

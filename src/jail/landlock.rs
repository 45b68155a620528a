//! Landlock (landlock(7)): a second, independent word on files, TCP, abstract
//! sockets and signals.
//!
//! The mounts already say what can be reached; Landlock says it again in
//! another mechanism, so that a mistake in one is not an escape. Raw system
//! calls: the ruleset is built and entered in a cloned child.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::RawFd,
};

use super::{
    blueprint::{Piece, RootPlan},
    plan::Network,
};
use crate::sys::raw;

/// The newest ABI this code knows the rights of.
const NEWEST_ABI: u8 = 7;

/// A ruleset, decided for one ABI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// The ABI in force.
    pub abi: u8,
    handled_fs: u64,
    handled_net: u64,
    scoped: u64,
    /// Path beneath which, inside the new root → rights.
    rules: Vec<(CString, u64)>,
}

mod fs {
    pub const EXECUTE: u64 = 1;
    pub const WRITE_FILE: u64 = 1 << 1;
    pub const READ_FILE: u64 = 1 << 2;
    pub const READ_DIR: u64 = 1 << 3;
    pub const MAKE_CHAR: u64 = 1 << 6;
    pub const MAKE_BLOCK: u64 = 1 << 11;
    pub const TRUNCATE: u64 = 1 << 14;
    pub const IOCTL_DEV: u64 = 1 << 15;
    /// The rights of ABI 1: bits 0 to 12.
    pub const ABI1: u64 = (1 << 13) - 1;
    pub const REFER: u64 = 1 << 13;
    /// What a rule on something that isn't a directory may name.
    pub const FILE_ONLY: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;
}

mod net {
    pub const BIND_TCP: u64 = 1;
    pub const CONNECT_TCP: u64 = 1 << 1;
}

mod scope {
    pub const ABSTRACT_UNIX_SOCKET: u64 = 1;
    pub const SIGNAL: u64 = 1 << 1;
}

/// The ABI version of this kernel; 0 where there is none or it is disabled.
#[must_use]
pub fn abi_version() -> u8 {
    // SAFETY: with this flag the kernel reads no attribute, landlock_create_ruleset(2).
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, 1_u32)
    };
    u8::try_from(version.max(0)).unwrap_or(u8::MAX)
}

impl Ruleset {
    /// Decides the rules that a kernel with this ABI is to hold over a jail with
    /// this root and network; `None` for ABI 0.
    ///
    /// Rights add up along a path, so what is given to a directory holds for all
    /// below it. Everything may be read; but nothing can be executed or written
    /// because of where it lies, only beneath what is shown for that: executing
    /// is allowed beneath what the root shows read-only (and /tmp, where the
    /// policy says so), so that neither /tmp nor a writable bind has it. One
    /// exception: a writable bind inside something that is shown read-only has
    /// that one's right too, and there the mount's noexec stands alone.
    #[must_use]
    pub fn decide(kernel_abi: u8, root: &RootPlan, network: Network) -> Option<Self> {
        let abi = kernel_abi.min(NEWEST_ABI);
        if abi == 0 {
            return None;
        }
        let mut handled_fs = fs::ABI1;
        for (since, right) in [(2, fs::REFER), (3, fs::TRUNCATE), (5, fs::IOCTL_DEV)] {
            if abi >= since {
                handled_fs |= right;
            }
        }
        let writing = handled_fs & !(fs::MAKE_CHAR | fs::MAKE_BLOCK | fs::EXECUTE);
        let device = fs::READ_FILE | fs::WRITE_FILE | fs::TRUNCATE | fs::IOCTL_DEV;
        let mut rules = vec![
            (c"/".to_owned(), fs::READ_FILE | fs::READ_DIR),
            (c"/dev".to_owned(), device & handled_fs),
        ];
        if let Some(tmp) = &root.tmp {
            rules.push((c"/tmp".to_owned(), writing | if tmp.exec { fs::EXECUTE } else { 0 }));
        }
        if let Some(service) = &root.service {
            rules.push((inside(&service.target), writing));
        }
        for piece in &root.pieces {
            let Piece::Bind(bind) = piece else { continue };
            let mut rights = 0;
            if bind.attributes & libc::MOUNT_ATTR_NOEXEC == 0 {
                rights |= fs::EXECUTE;
            }
            if bind.attributes & libc::MOUNT_ATTR_RDONLY == 0 {
                rights |= writing;
            }
            if !bind.directory {
                rights &= fs::FILE_ONLY;
            }
            if rights != 0 {
                rules.push((inside(&bind.target), rights));
            }
        }
        Some(Self {
            abi,
            handled_fs,
            handled_net: match network {
                Network::None if abi >= 4 => net::BIND_TCP | net::CONNECT_TCP,
                _ => 0,
            },
            scoped: if abi >= 6 { scope::ABSTRACT_UNIX_SOCKET | scope::SIGNAL } else { 0 },
            rules,
        })
    }

    /// Makes the ruleset, in the new root. Only system calls: no allocation.
    ///
    /// # Errors
    /// Those of landlock_create_ruleset(2), open(2) and landlock_add_rule(2),
    /// with the number of the rule.
    pub fn create(&self) -> Result<RawFd, (u16, io::Error)> {
        #[repr(C)]
        struct Attr {
            handled_access_fs: u64,
            handled_access_net: u64,
            scoped: u64,
        }
        let attr = Attr {
            handled_access_fs: self.handled_fs,
            handled_access_net: self.handled_net,
            scoped: self.scoped,
        };
        // The kernel takes a longer structure only if the tail it doesn't know is zero.
        let size = match self.abi {
            0..=3 => 8_usize,
            4..=5 => 16,
            _ => 24,
        };
        // SAFETY: attr outlives the call and is at least `size` bytes long.
        let ruleset = unsafe {
            libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size, 0_u32)
        };
        let ruleset = check(ruleset).map_err(|error| (0, error))? as RawFd;
        for (index, (path, rights)) in self.rules.iter().enumerate() {
            match add_rule(ruleset, path, *rights) {
                // A piece of the root that the host no longer had: a right
                // less, on something that isn't there.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                added => added.map_err(|error| (index as u16, error))?,
            }
        }
        Ok(ruleset)
    }
}

/// The path inside the jail of something whose path is relative to its root.
fn inside(target: &CStr) -> CString {
    // No NUL in what came from a C string.
    CString::new([b"/", target.to_bytes()].concat()).unwrap_or_default()
}

fn add_rule(ruleset: RawFd, path: &CStr, rights: u64) -> io::Result<()> {
    #[repr(C, packed)]
    struct PathBeneath {
        allowed_access: u64,
        parent_fd: i32,
    }
    let parent = rustix::fs::open(
        path,
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let rule =
        PathBeneath { allowed_access: rights, parent_fd: std::os::fd::AsRawFd::as_raw_fd(&parent) };
    const RULE_PATH_BENEATH: u32 = 1;
    // SAFETY: rule outlives the call; the descriptors are open.
    let added = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset,
            RULE_PATH_BENEATH,
            &raw const rule,
            0_u32,
        )
    };
    check(added).map(drop)
}

/// Enters the domain for good; needs no_new_privs.
///
/// # Errors
/// Those of landlock_restrict_self(2).
pub fn restrict_self(ruleset: RawFd) -> io::Result<()> {
    raw::numbers(libc::SYS_landlock_restrict_self, &[ruleset as usize, 0]).map(drop)
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use std::{
        fs as files,
        os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
        path::Path,
    };

    use super::*;
    use crate::{
        jail::blueprint::{BindPiece, ServicePlan, TmpPlan},
        sys,
    };

    const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    const WRITABLE: u64 = libc::MOUNT_ATTR_NOEXEC;

    fn bind(target: &Path, directory: bool, attributes: u64) -> Piece {
        let target = target.as_os_str().as_bytes().strip_prefix(b"/").unwrap();
        Piece::Bind(BindPiece {
            source: c"/nowhere".to_owned(),
            target: CString::new(target).unwrap(),
            directory,
            attributes,
            idmap: None,
            optional: false,
        })
    }

    fn root(tmp_exec: bool, pieces: Vec<Piece>) -> RootPlan {
        let tmp = TmpPlan { size: c"4096".to_owned(), inodes: c"16".to_owned(), exec: tmp_exec };
        let service = ServicePlan { target: c"run/grpc".to_owned(), owner: c"65534".to_owned() };
        RootPlan {
            size: c"4096".to_owned(),
            make_devices: false,
            tmp: Some(tmp),
            service: Some(service),
            pieces,
        }
    }

    fn pieces() -> Vec<Piece> {
        vec![
            Piece::Directory(c"etc".to_owned()),
            bind("/usr".as_ref(), true, READ_ONLY),
            bind("/lib64/ld.so".as_ref(), false, READ_ONLY),
            bind("/srv/jobs".as_ref(), true, WRITABLE),
            bind("/srv/log".as_ref(), false, WRITABLE),
        ]
    }

    /// What the kernel comes to for a file: all that is given on the way up.
    fn rights(ruleset: &Ruleset, path: &str) -> u64 {
        let beneath = |rule: &CStr| Path::new(path).starts_with(rule.to_str().unwrap());
        let given = ruleset.rules.iter().filter(|(rule, _)| beneath(rule));
        given.fold(0, |all, (_, rights)| all | rights)
    }

    #[test]
    fn an_older_kernel_is_asked_only_for_what_it_knows() {
        let root = root(true, pieces());
        let decide = |abi| Ruleset::decide(abi, &root, Network::None);
        assert_eq!(decide(0), None);
        let first = decide(1).unwrap();
        assert_eq!((first.handled_fs, first.handled_net, first.scoped), (fs::ABI1, 0, 0));
        let newest = decide(200).unwrap();
        assert_eq!(newest.abi, NEWEST_ABI);
        assert_ne!(newest.handled_net, 0);
        for abi in 1..=NEWEST_ABI {
            let ruleset = decide(abi).unwrap();
            for (path, rights) in &ruleset.rules {
                assert_eq!(rights & !ruleset.handled_fs, 0, "{path:?} on ABI {abi}");
            }
        }
    }

    #[test]
    fn only_what_is_shown_read_only_is_executable_and_nothing_else_of_the_root_writable() {
        for tmp_exec in [false, true] {
            let root = root(tmp_exec, pieces());
            let ruleset = Ruleset::decide(NEWEST_ABI, &root, Network::None).unwrap();
            for (path, executable, writable) in [
                ("/", false, false),
                ("/run/dispatcher/service", false, false),
                ("/run/grpc/service.sock", false, true),
                ("/etc/passwd", false, false),
                ("/usr/bin/env", true, false),
                ("/lib64/ld.so", true, false),
                ("/tmp/made/inside", tmp_exec, true),
                ("/srv/jobs/made", false, true),
                ("/srv/log", false, true),
                ("/dev/null", false, true),
                ("/proc/self/mem", false, false),
            ] {
                let rights = rights(&ruleset, path);
                assert_eq!(rights & fs::EXECUTE != 0, executable, "{path}");
                assert_eq!(rights & fs::WRITE_FILE != 0, writable, "{path}");
                assert_eq!(rights & (fs::MAKE_CHAR | fs::MAKE_BLOCK), 0, "{path}");
                assert_ne!(rights & fs::READ_FILE, 0, "{path}");
            }
        }
    }

    #[test]
    fn tcp_is_refused_only_without_a_network() {
        for (network, refused) in
            [(Network::None, true), (Network::Loopback, false), (Network::Host, false)]
        {
            let ruleset = Ruleset::decide(7, &root(false, vec![]), network).unwrap();
            assert_eq!(ruleset.handled_net != 0, refused, "{network:?}");
        }
    }

    /// In a jail, noexec mounts answer the same and answer first. Here there are
    /// none, so that what is heard is Landlock's own word.
    #[test]
    fn the_kernel_executes_from_what_is_shown_read_only_alone() {
        let directory = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = directory.path().join(name);
            files::create_dir(&path).unwrap();
            // No executable's format: whoever may execute it hears ENOEXEC.
            files::write(path.join("file"), "\0").unwrap();
            let mode = files::Permissions::from_mode(0o755);
            files::set_permissions(path.join("file"), mode).unwrap();
            path
        };
        let (shown, work, other) = (make("shown"), make("work"), make("other"));
        let pieces = vec![
            bind(&shown, true, READ_ONLY),
            bind(&work, true, WRITABLE),
            bind(&directory.path().join("gone"), true, READ_ONLY),
        ];
        // The root's own /tmp is not the host's, which the directory may be in.
        let root = RootPlan { tmp: None, service: None, ..root(false, pieces) };
        let Some(ruleset) = Ruleset::decide(abi_version(), &root, Network::Host) else {
            assert!(std::env::var_os("CI").is_none(), "the kernel has no Landlock");
            eprintln!("skipped: the kernel has no Landlock");
            return;
        };
        for (place, inside) in [(shown, libc::ENOEXEC), (work, libc::EACCES), (other, libc::EACCES)]
        {
            let file = CString::new(place.join("file").as_os_str().as_bytes()).unwrap();
            assert_eq!(execution(&file, None), libc::ENOEXEC, "{file:?}, outside");
            assert_eq!(execution(&file, Some(&ruleset)), inside, "{file:?}");
        }
    }

    /// What execve(2) answers to a child, in a domain of the ruleset.
    fn execution(path: &CStr, ruleset: Option<&Ruleset>) -> i32 {
        const SETUP: i32 = 255;
        let pid = sys::fork().unwrap();
        if pid == 0 {
            // Only system calls: this is a copy of a process with many threads.
            let entered = ruleset.is_none_or(|ruleset| {
                rustix::thread::set_no_new_privs(true).is_ok()
                    && ruleset.create().is_ok_and(|ruleset| restrict_self(ruleset).is_ok())
            });
            if !entered {
                sys::exit_now(SETUP);
            }
            let argv = [path.as_ptr(), std::ptr::null()];
            // SAFETY: path and vectors are ended as execve(2) wants them.
            unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), argv[1..].as_ptr()) };
            sys::exit_now(io::Error::last_os_error().raw_os_error().unwrap_or(SETUP));
        }
        let pid = rustix::process::Pid::from_raw(pid);
        let waited = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
        waited.unwrap().unwrap().1.exit_status().unwrap()
    }
}

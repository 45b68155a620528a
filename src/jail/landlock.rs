//! Landlock (landlock(7)): a second, independent word on files, TCP, abstract
//! sockets and signals.
//!
//! The mounts already say what can be reached; Landlock says it again in
//! another mechanism, so that a mistake in one is not an escape. Raw system
//! calls: the ruleset is built and entered in a cloned child.

use std::{ffi::CStr, io, os::fd::RawFd};

use super::plan::Network;

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
    rules: Vec<(std::ffi::CString, u64)>,
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

/// What the ruleset must allow, apart from reading everything in the root.
#[derive(Clone, Debug)]
pub struct Access<'a> {
    /// Whether files of the root (not of /tmp) may be executed.
    pub execute_root: bool,
    /// Whether there is a /tmp, and whether its files may be executed.
    pub tmp: Option<bool>,
    /// Writable binds: path inside and whether it is a directory.
    pub writable: &'a [(std::ffi::CString, bool)],
    /// Network mode: in `None`, TCP is refused here too.
    pub network: Network,
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
    /// Decides the rules for a kernel with this ABI; `None` for ABI 0.
    #[must_use]
    pub fn decide(kernel_abi: u8, access: &Access<'_>) -> Option<Self> {
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
        let all_but_devices = handled_fs & !(fs::MAKE_CHAR | fs::MAKE_BLOCK);
        let read = fs::READ_FILE | fs::READ_DIR;
        let mut rules =
            vec![(c"/".to_owned(), read | if access.execute_root { fs::EXECUTE } else { 0 })];
        let device = fs::READ_FILE | fs::WRITE_FILE | fs::TRUNCATE | fs::IOCTL_DEV;
        rules.push((c"/dev".to_owned(), device & handled_fs));
        if let Some(exec) = access.tmp {
            let rights = all_but_devices & !(if exec { 0 } else { fs::EXECUTE });
            rules.push((c"/tmp".to_owned(), rights));
        }
        for (path, directory) in access.writable {
            let rights = all_but_devices & !fs::EXECUTE;
            rules.push((path.clone(), if *directory { rights } else { rights & fs::FILE_ONLY }));
        }
        Some(Self {
            abi,
            handled_fs,
            handled_net: match access.network {
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
            add_rule(ruleset, path, *rights).map_err(|error| (index as u16, error))?;
        }
        Ok(ruleset)
    }
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
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0_u32) }).map(drop)
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCESS: Access<'_> =
        Access { execute_root: false, tmp: Some(false), writable: &[], network: Network::None };

    #[test]
    fn an_older_kernel_is_asked_only_for_what_it_knows() {
        assert_eq!(Ruleset::decide(0, &ACCESS), None);
        let first = Ruleset::decide(1, &ACCESS).unwrap();
        assert_eq!((first.handled_fs, first.handled_net, first.scoped), (fs::ABI1, 0, 0));
        let newest = Ruleset::decide(200, &ACCESS).unwrap();
        assert_eq!(newest.abi, NEWEST_ABI);
        assert_ne!(newest.handled_net, 0);
        for abi in 1..=NEWEST_ABI {
            let ruleset = Ruleset::decide(abi, &ACCESS).unwrap();
            for (path, rights) in &ruleset.rules {
                assert_eq!(rights & !ruleset.handled_fs, 0, "{path:?} on ABI {abi}");
            }
        }
    }

    #[test]
    fn only_what_was_asked_for_is_executable_or_writable() {
        let ruleset = Ruleset::decide(NEWEST_ABI, &ACCESS).unwrap();
        for (path, rights) in &ruleset.rules {
            assert_eq!(rights & fs::EXECUTE, 0, "{path:?}");
            let writable = rights & fs::WRITE_FILE != 0;
            assert_eq!(writable, matches!(path.to_bytes(), b"/dev" | b"/tmp"), "{path:?}");
            assert_eq!(rights & (fs::MAKE_CHAR | fs::MAKE_BLOCK), 0, "{path:?}");
        }
        let open = Access { execute_root: true, tmp: Some(true), ..ACCESS };
        let ruleset = Ruleset::decide(NEWEST_ABI, &open).unwrap();
        assert!(ruleset.rules.iter().filter(|(_, rights)| rights & fs::EXECUTE != 0).count() == 2);
    }

    #[test]
    fn tcp_is_refused_only_without_a_network() {
        for (network, refused) in
            [(Network::None, true), (Network::Loopback, false), (Network::Host, false)]
        {
            let ruleset = Ruleset::decide(7, &Access { network, ..ACCESS }).unwrap();
            assert_eq!(ruleset.handled_net != 0, refused, "{network:?}");
        }
    }
}

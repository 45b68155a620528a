//! Memory files: filled once, then sealed against every change.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    ptr,
};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

/// A memfd holding `content`, sealed against every change, reopened read-only
/// with mode 0555 when `executable` and 0444 otherwise; close-on-exec.
///
/// No writable descriptor of it remains: execve(2) would answer ETXTBSY.
///
/// # Errors
/// Those of memfd_create(2), write(2), fcntl(2) and open(2).
pub fn sealed_memfd(name: &CStr, content: &[&[u8]], executable: bool) -> io::Result<OwnedFd> {
    let mut memfd = Unsealed::new(name, executable)?;
    for part in content {
        memfd.append(part)?;
    }
    memfd.seal()
}

/// A memfd that is still being filled, by its owner alone.
#[derive(Debug)]
pub struct Unsealed {
    file: File,
    executable: bool,
}

impl Unsealed {
    /// An empty one; close-on-exec.
    ///
    /// # Errors
    /// Those of memfd_create(2).
    pub fn new(name: &CStr, executable: bool) -> io::Result<Self> {
        let kind = if executable { MemfdFlags::EXEC } else { MemfdFlags::NOEXEC_SEAL };
        let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 know neither flag.
        let fd = rustix::fs::memfd_create(name, base | kind).or_else(|error| {
            if error == rustix::io::Errno::INVAL {
                rustix::fs::memfd_create(name, base)
            } else {
                Err(error)
            }
        })?;
        Ok(Self { file: File::from(fd), executable })
    }

    /// Adds some bytes at its end.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Ends it, as [`sealed_memfd`] says.
    ///
    /// # Errors
    /// Those of fcntl(2) and open(2).
    pub fn seal(self) -> io::Result<OwnedFd> {
        let mode = Mode::from_raw_mode(if self.executable { 0o555 } else { 0o444 });
        rustix::fs::fchmod(&self.file, mode)?;
        add_seals(&self.file)?;
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

/// The kernel waits for whoever still has a page in hand, but not for long: it may be
/// its own housekeeping, which lets go of some only when it is called upon anew.
fn add_seals(file: &File) -> io::Result<()> {
    let mut attempt = 1;
    loop {
        match rustix::fs::fcntl_add_seals(file, UNCHANGEABLE | SealFlags::SEAL) {
            Err(rustix::io::Errno::BUSY) if attempt < SEAL_ATTEMPTS => attempt += 1,
            result => return Ok(result?),
        }
    }
}

/// How often sealing is tried: each takes the kernel a sixth of a second at most.
const SEAL_ATTEMPTS: u32 = 6;

/// With these, neither its bytes nor its length change any more.
const UNCHANGEABLE: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// The bytes of a sealed memfd, in place: they are not copied, and count as this
/// process's memory only where they were looked at.
#[derive(Debug)]
pub struct SealedBytes {
    start: *mut libc::c_void,
    length: usize,
}

// SAFETY: memory that nobody can write to, read from any thread.
unsafe impl Send for SealedBytes {}
// SAFETY: as above.
unsafe impl Sync for SealedBytes {}

impl SealedBytes {
    /// All bytes of a memfd that holds some.
    ///
    /// # Errors
    /// Those of fcntl(2), fstat(2) and mmap(2); EPERM for a file that could still
    /// change.
    pub fn of(memfd: impl AsFd) -> io::Result<Self> {
        let memfd = memfd.as_fd();
        if !rustix::fs::fcntl_get_seals(memfd)?.contains(UNCHANGEABLE) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let length = usize::try_from(rustix::fs::fstat(memfd)?.st_size)
            .map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, memfd.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, length })
    }
}

impl AsRef<[u8]> for SealedBytes {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: mapped for reading until dropped, of a file that keeps its length
        // and content: its seals were looked at.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.length) }
    }
}

impl Drop for SealedBytes {
    fn drop(&mut self) {
        // SAFETY: mapped by us, once, with this length; no slice outlives us.
        let result = unsafe { libc::munmap(self.start, self.length) };
        debug_assert_eq!(result, 0, "munmap: {}", io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_is_what_is_there_and_stays() {
        let mut memfd = Unsealed::new(c"test", true).unwrap();
        let early = memfd.file.try_clone().unwrap();
        assert_eq!(SealedBytes::of(&early).unwrap_err().raw_os_error(), Some(libc::EPERM));
        memfd.append(b"some ").unwrap();
        memfd.append(b"bytes").unwrap();
        let sealed = memfd.seal().unwrap();
        let bytes = SealedBytes::of(&sealed).unwrap();
        for mut writer in [early, File::from(sealed.try_clone().unwrap())] {
            assert!(writer.write_all(b"other").is_err());
            assert!(writer.set_len(0).is_err() && writer.set_len(100).is_err());
        }
        let mode = rustix::fs::fstat(&sealed).unwrap().st_mode;
        assert_eq!(mode & 0o777, 0o555);
        drop(sealed);
        assert_eq!(bytes.as_ref(), b"some bytes");
    }

    #[test]
    fn nothing_is_not_mapped() {
        let empty = sealed_memfd(c"test", &[], false).unwrap();
        assert_eq!(SealedBytes::of(empty).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}

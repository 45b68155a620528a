//! Memory for processes that must not allocate.

use std::{io, os::fd::RawFd, ptr};

/// A private mapping, unmapped by nobody: its process execs or exits.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    length: usize,
}

impl Mapping {
    /// Maps the first `length` bytes of a sealed file for reading.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn read_only(fd: RawFd, length: usize) -> io::Result<Self> {
        Self::new(length, libc::PROT_READ, libc::MAP_PRIVATE, fd)
    }

    /// Maps zeroed memory.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn anonymous(length: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        Self::new(length, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    }

    fn new(length: usize, protection: i32, flags: i32, fd: RawFd) -> io::Result<Self> {
        // An empty mapping is an error to mmap, but not to us.
        let mapped = length.max(1);
        let arguments = [0, mapped, protection as usize, flags as usize, fd as isize as usize, 0];
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { super::raw::syscall(libc::SYS_mmap, arguments) }?;
        Ok(Self { start: ptr::with_exposed_provenance_mut(start), length })
    }

    /// Its bytes. The file must be at least as long as was said, and sealed:
    /// reading beyond its end is SIGBUS.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for reading, never unmapped, and nobody changes a sealed file.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }

    /// Its address.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.start
    }

    /// Stores bytes in an anonymous mapping, from `offset` on.
    ///
    /// # Panics
    /// Outside the mapping.
    pub fn set_bytes(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.length);
        let place = self.start.wrapping_add(offset);
        // SAFETY: inside the mapping, which is ours alone; what is copied is not of it.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) }
    }

    /// Stores an address in slot `index` of an anonymous mapping.
    ///
    /// # Panics
    /// Outside the mapping.
    pub fn set_address(&self, index: usize, address: usize) {
        assert!((index + 1) * size_of::<usize>() <= self.length);
        let slot = self.start.cast::<usize>().wrapping_add(index);
        // SAFETY: inside the mapping, aligned as mappings are, and ours alone.
        unsafe { slot.write(address) }
    }
}

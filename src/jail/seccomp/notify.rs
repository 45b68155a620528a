//! Installing a filter, and the kernel's side channel about the calls it tells of.

use std::{
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    ptr,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::filter::sock_filter;
use crate::sys::raw;

/// Installs `filter` for the calling thread and all that it starts from now on.
///
/// With `notify` the answer is the number of the new, close-on-exec listener:
/// the launcher must get it ([`Listener::new`]) and keep it for as long as any
/// process of the run lives, as without a listener the calls that the filter
/// tells of answer ENOSYS and the program goes on.
///
/// Only system calls: for a cloned child before its exec.
///
/// # Errors
/// EACCES without no_new_privs; EBUSY where a listener watches this process
/// already (a host's container runtime): fall back to a filter compiled with
/// `notify: false`; EINVAL for a program that the kernel does not take.
pub fn install(filter: &[sock_filter], notify: bool) -> io::Result<Option<RawFd>> {
    let Ok(len) = u16::try_from(filter.len()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    // The kernel only reads it.
    let filter = filter.as_ptr().cast::<libc::sock_filter>().cast_mut();
    let program = libc::sock_fprog { len, filter };
    if !notify {
        set_filter(0, &program)?;
        return Ok(None);
    }
    let listener = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    // With the second flag (Linux 5.19) only a fatal signal takes a caller out of
    // a call that the launcher has received; otherwise a program with frequent
    // signals could repeat its call for ever.
    let fd = match set_filter(listener | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &program) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => set_filter(listener, &program),
        other => other,
    }?;
    Ok(Some(fd))
}

/// The kernel's side channel of one filter: tells of calls, takes answers.
/// Readable (poll) while a call waits, hung up when no process has the filter any more.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// What [`Listener::receive`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// A call waits for its answer.
    Call(Notification),
    /// None does, or its caller has died meanwhile.
    Nothing,
    /// No process has the filter any more: there will be none.
    Closed,
}

/// A call that waits for its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// For the answer.
    pub id: u64,
    /// The calling thread, as the receiver's pid namespace knows it; 0 where it does not.
    pub pid: u32,
    /// `seccomp_data.nr`, with x32's bit.
    pub nr: i32,
    /// `seccomp_data.arch`: AUDIT_ARCH_ of the entry.
    pub arch: u32,
    /// The argument registers.
    pub args: [u64; 6],
}

impl Listener {
    /// Takes over what [`install`] made.
    ///
    /// # Errors
    /// ENOTSUP where the kernel's messages are larger than known here; those of seccomp(2).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let mut sizes =
            libc::seccomp_notif_sizes { seccomp_notif: 0, seccomp_notif_resp: 0, seccomp_data: 0 };
        let command = libc::SECCOMP_GET_NOTIF_SIZES;
        // SAFETY: the kernel writes a seccomp_notif_sizes, which `sizes` is.
        if unsafe { libc::syscall(libc::SYS_seccomp, command, 0, &raw mut sizes) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let fits = |size: u16, room| usize::from(size) <= room;
        if !fits(sizes.seccomp_notif, size_of::<Roomy<libc::seccomp_notif>>())
            || !fits(sizes.seccomp_notif_resp, size_of::<Roomy<libc::seccomp_notif_resp>>())
        {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
        }
        Ok(Self(fd))
    }

    /// The next call that waits; never blocks.
    ///
    /// # Errors
    /// Those of poll(2) and of SECCOMP_IOCTL_NOTIF_RECV, but EINTR and ENOENT.
    pub fn receive(&self) -> io::Result<Received> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut polled, Some(&now))?;
        let events = polled[0].revents();
        if !events.contains(PollFlags::IN) {
            let over = events.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
            return Ok(if over { Received::Closed } else { Received::Nothing });
        }
        let mut message = Roomy::new(libc::seccomp_notif {
            id: 0,
            pid: 0,
            flags: 0,
            data: libc::seccomp_data { nr: 0, arch: 0, instruction_pointer: 0, args: [0; 6] },
        });
        match self.ioctl(libc::SECCOMP_IOCTL_NOTIF_RECV, &mut message) {
            Ok(()) => {}
            // Its caller was killed between poll and here, or we were interrupted.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {
                return Ok(Received::Nothing);
            }
            Err(error) => return Err(error),
        }
        let libc::seccomp_notif { id, pid, data, .. } = message.value;
        let libc::seccomp_data { nr, arch, args, .. } = data;
        Ok(Received::Call(Notification { id, pid, nr, arch, args }))
    }

    /// Makes the call of notification `id` answer `errno` (1 to 4095). False
    /// where its caller is gone or has been answered already.
    ///
    /// # Errors
    /// EINVAL for another errno; those of SECCOMP_IOCTL_NOTIF_SEND but ENOENT
    /// and EINPROGRESS.
    pub fn refuse(&self, id: u64, errno: i32) -> io::Result<bool> {
        // 0 would tell the program that its call was made.
        if !(1..=4095).contains(&errno) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let answer = libc::seccomp_notif_resp { id, val: 0, error: -errno, flags: 0 };
        unless_gone(self.ioctl(libc::SECCOMP_IOCTL_NOTIF_SEND, &mut Roomy::new(answer)))
    }

    fn ioctl<T>(&self, request: libc::Ioctl, message: &mut Roomy<T>) -> io::Result<()> {
        // SAFETY: the kernel reads and writes at most the sizes it told `new`,
        // for which a Roomy has room, and only plain numbers.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), request, ptr::from_mut(message)) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A message with room behind it for fields that newer kernels append.
#[repr(C, align(8))]
struct Roomy<T> {
    value: T,
    room: [u64; 16],
}

impl<T> Roomy<T> {
    const fn new(value: T) -> Self {
        Self { value, room: [0; 16] }
    }
}

// The pointer cast in `install`.
const _: () = assert!(
    size_of::<sock_filter>() == size_of::<libc::sock_filter>()
        && align_of::<sock_filter>() == align_of::<libc::sock_filter>()
);

fn set_filter(flags: libc::c_ulong, program: &libc::sock_fprog) -> io::Result<RawFd> {
    let operation = libc::SECCOMP_SET_MODE_FILTER as usize;
    let arguments = [operation, flags as usize, ptr::from_ref(program) as usize, 0, 0, 0];
    // SAFETY: the kernel copies the program, whose length and address belong
    // together: `install` took both from one slice.
    let done = unsafe { raw::syscall(libc::SYS_seccomp, arguments) }?;
    // A descriptor, or 0.
    Ok(done as RawFd)
}

fn unless_gone(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINPROGRESS)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

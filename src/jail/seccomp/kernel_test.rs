//! The filter in the kernel: children of this test that install it and try.
//! Needs no privilege.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    ptr, slice,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    filter::{Decision, FilterOptions, compile, decide, sock_filter},
    notify::{Listener, Received, install},
    profile::default_profile,
};
use crate::{
    jail::plan::{Network, SyscallPolicy},
    sys,
};

/// What a child does under the filter.
#[derive(Clone, Copy)]
enum Probe {
    /// A call of the 64-bit entry.
    Call(libc::c_long, [usize; 5]),
    /// getpid by `int 0x80`.
    I386Getpid,
    /// Another filter with a listener.
    SecondListener,
}

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    /// Each probe's result, negative errnos included; `None`: it did not get that far.
    results: Vec<Option<i64>>,
    refused: Vec<String>,
    deadly: Option<String>,
    /// As of waitpid(2).
    status: i32,
}

const NOT_REACHED: i64 = i64::MIN;
const SETUP_FAILED: i32 = 99;

#[test]
fn answers_and_names_refused_calls() {
    let calls = [
        (Probe::Call(libc::SYS_personality, [0xffff_ffff; 5]), None),
        (Probe::Call(libc::SYS_personality, [0x4_0000, 0, 0, 0, 0]), Some(libc::EPERM)),
        (socket(libc::AF_UNIX), None),
        (socket(libc::AF_INET), Some(libc::EAFNOSUPPORT)),
        (socket(libc::AF_VSOCK), Some(libc::EAFNOSUPPORT)),
        (socket(libc::AF_NETLINK), Some(libc::EAFNOSUPPORT)),
        (Probe::Call(libc::SYS_userfaultfd, [0; 5]), Some(libc::EPERM)),
        (Probe::Call(libc::SYS_clone3, [0; 5]), Some(libc::ENOSYS)),
        (Probe::Call(libc::SYS_io_uring_setup, [0; 5]), Some(libc::ENOSYS)),
        (Probe::Call(999, [0; 5]), Some(libc::ENOSYS)),
        (Probe::Call(-1, [0; 5]), Some(libc::ENOSYS)),
        (Probe::Call(libc::SYS_getpid, [0; 5]), None),
    ];
    let probes = calls.map(|(probe, _)| probe);
    for notify in [true, false] {
        let Some(outcome) = outcome(&default_profile(), notify, &probes, -1) else { return };
        assert_eq!(outcome.status, 0, "{outcome:?}");
        for (number, ((_, errno), result)) in calls.iter().zip(&outcome.results).enumerate() {
            let refused = result.filter(|result| *result < 0);
            let expected = errno.map(|errno| -i64::from(errno));
            assert_eq!(refused, expected, "probe {number}, notify {notify}");
        }
        let told: &[&str] = if notify {
            &["personality", "socket", "socket", "socket", "userfaultfd", "io_uring_setup"]
        } else {
            &[]
        };
        assert_eq!(outcome.refused, told);
    }
}

#[test]
fn names_deadly_calls_and_kills() {
    let unshare = Probe::Call(libc::SYS_unshare, [0; 5]);
    let new_user = (libc::CLONE_NEWUSER | libc::SIGCHLD) as usize;
    let mut deadly = vec![
        (unshare, "unshare"),
        (Probe::Call(libc::SYS_mount, [0; 5]), "mount"),
        (Probe::Call(libc::SYS_ptrace, [0; 5]), "ptrace"),
        (Probe::Call(libc::SYS_clone, [new_user, 0, 0, 0, 0]), "clone"),
        (Probe::Call(0x4000_0000 | libc::SYS_getpid, [0; 5]), "x32:getpid"),
        (Probe::Call(0x4000_0000 | 520, [0; 5]), "x32:execve"),
    ];
    if has_i386_entry() {
        deadly.push((Probe::I386Getpid, "i386:getpid"));
    }
    for (probe, name) in deadly {
        let then = Probe::Call(libc::SYS_getpid, [0; 5]);
        for notify in [true, false] {
            let Some(outcome) = outcome(&default_profile(), notify, &[probe, then], -1) else {
                return;
            };
            assert_eq!(outcome.results, [None, None], "{name}: went on, notify {notify}");
            assert!(libc::WIFSIGNALED(outcome.status), "{name}: {outcome:?}");
            if notify {
                assert_eq!(outcome.deadly.as_deref(), Some(name));
            } else {
                assert_eq!(libc::WTERMSIG(outcome.status), libc::SIGSYS, "{name}");
            }
        }
    }
}

#[test]
fn launch_tail_passes_an_empty_policy() {
    // Nothing but ending is allowed; the report of the listener itself is a
    // sendmsg on the control descriptor, and the program starts by its descriptor.
    let mut policy = SyscallPolicy::default();
    let exit = libc::SYS_exit_group as u32;
    policy.allowed.insert(exit, crate::jail::plan::Allowed::Always);
    let program = std::fs::File::open("/bin/sh").unwrap();
    let by_fd = |fd| {
        let path = c"".as_ptr() as usize;
        Probe::Call(libc::SYS_execveat, [fd, path, 0, 0, libc::AT_EMPTY_PATH as usize])
    };
    let fd = program.as_raw_fd();
    let copy = program.try_clone().unwrap();
    let probes = [by_fd(copy.as_raw_fd() as usize), by_fd(fd as usize)];
    let Some(outcome) = outcome(&policy, true, &probes, fd) else { return };
    assert_eq!(outcome.results, [Some(-i64::from(libc::ENOSYS)), None], "{outcome:?}");
    // The new program, or its loader, got under way and was refused its first calls.
    assert_eq!(outcome.refused[0], "execveat");
    assert!(outcome.refused.len() > 1, "{outcome:?}");
}

#[test]
fn ordinary_programs_meet_no_refusal() {
    let script = c"set -e; ls -l / > /dev/null; echo one two | cat | (read a b; test \"$b\" = two); \
                   for i in 1 2 3; do (exit 0) & done; wait; test -n \"$(id; uname -a; date)\"; exit 7";
    let argv = [c"sh".as_ptr(), c"-c".as_ptr(), script.as_ptr(), ptr::null()];
    let envp = [c"PATH=/usr/bin:/bin".as_ptr(), ptr::null()];
    let program = std::fs::File::open("/bin/sh").unwrap();
    let fd = program.as_raw_fd();
    let (argv, envp, path) =
        (argv.as_ptr() as usize, envp.as_ptr() as usize, c"".as_ptr() as usize);
    let start = [fd as usize, path, argv, envp, libc::AT_EMPTY_PATH as usize];
    let probes = [Probe::Call(libc::SYS_execveat, start)];
    let Some(outcome) = outcome(&default_profile(), true, &probes, fd) else { return };
    // Name services may ask by an unwelcome socket family; nothing else may be refused.
    let refused: Vec<_> = outcome.refused.iter().filter(|name| *name != "socket").collect();
    assert!(refused.is_empty(), "{outcome:?}");
    assert_eq!((outcome.deadly, libc::WEXITSTATUS(outcome.status)), (None, 7));
}

#[test]
fn a_second_listener_is_busy() {
    let Some(outcome) = outcome(&default_profile(), true, &[Probe::SecondListener], -1) else {
        return;
    };
    assert_eq!(outcome.results, [Some(-i64::from(libc::EBUSY))]);
}

#[test]
fn install_reports_what_the_kernel_refuses() {
    assert_eq!(install(&[], false).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    let long = vec![sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 }; 70_000];
    assert_eq!(install(&long, true).unwrap_err().raw_os_error(), Some(libc::EINVAL));
}

fn socket(family: i32) -> Probe {
    Probe::Call(libc::SYS_socket, [family as usize, libc::SOCK_DGRAM as usize, 0, 0, 0])
}

/// Runs `probes` in a child under the filter of `policy`, answering as the
/// launcher does. `None`, said aloud, where something else on this host holds
/// the one listener there can be; under CI that is a failure.
fn outcome(
    policy: &SyscallPolicy,
    notify: bool,
    probes: &[Probe],
    exec_fd: i32,
) -> Option<Outcome> {
    let (ours, theirs) = sys::seqpacket_pair().unwrap();
    let network = Network::None;
    let control_fd = theirs.as_raw_fd();
    let options = FilterOptions {
        network,
        refuse_exec_memfd: false,
        refuse_set_id: true,
        spare_init: false,
        exec_fd,
        control_fd,
        notify,
    };
    let filter = compile(policy, &options).unwrap();
    let results = shared(probes.len());
    // SAFETY: the child makes nothing but system calls, see `child`.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", io::Error::last_os_error());
    if pid == 0 {
        child(&filter, notify, &theirs, probes, results);
    }
    drop(theirs);
    let child = Child(pid);

    let mut outcome = Outcome::default();
    if let Some((_, mut descriptors)) = sys::receive_packet(&ours, &mut [0; 8]).unwrap()
        && let Some(fd) = descriptors.pop()
    {
        supervise(&Listener::new(fd).unwrap(), pid, policy, &options, &mut outcome);
    }
    // SAFETY: `status` lives through the call.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut outcome.status, 0) }, pid);
    std::mem::forget(child);
    let reached = |result: &i64| (*result != NOT_REACHED).then_some(*result);
    outcome.results = results.iter().map(reached).collect();
    if libc::WIFEXITED(outcome.status) && libc::WEXITSTATUS(outcome.status) == SETUP_FAILED {
        let error = io::Error::from_raw_os_error(-outcome.results[0].unwrap_or(0) as i32);
        assert!(
            error.raw_os_error() == Some(libc::EBUSY) && std::env::var_os("CI").is_none(),
            "{error}"
        );
        eprintln!("skipped: another tracer of this process holds the seccomp listener: {error}");
        return None;
    }
    Some(outcome)
}

/// Killed when a test fails before it has waited for it.
struct Child(i32);

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child, not waited for yet.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        // SAFETY: no status is asked for.
        unsafe { libc::waitpid(self.0, ptr::null_mut(), 0) };
    }
}

/// Answers until the last process of the filter is gone.
fn supervise(
    listener: &Listener,
    pid: i32,
    policy: &SyscallPolicy,
    options: &FilterOptions,
    outcome: &mut Outcome,
) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "the child hangs: {outcome:?}");
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: 1 };
        poll(&mut [PollFd::new(&listener.as_fd(), PollFlags::IN)], Some(&left)).unwrap();
        let call = match listener.receive().unwrap() {
            Received::Call(call) => call,
            Received::Nothing => continue,
            Received::Closed => return,
        };
        match decide(call.nr, call.arch, &call.args, policy, options) {
            Decision::Refuse(errno, name) => {
                assert!(listener.refuse(call.id, 0).is_err(), "0 would be success");
                assert!(listener.refuse(call.id, errno).unwrap());
                assert!(!listener.refuse(call.id, errno).unwrap(), "answered twice");
                outcome.refused.push(name);
            }
            Decision::Deadly(name) => {
                assert_eq!(call.pid, pid.cast_unsigned());
                // SAFETY: our own child, not waited for yet.
                assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
                outcome.deadly = Some(name);
            }
            Decision::Continue => panic!("told of an allowed call: {call:?}"),
        }
    }
}

/// The child's part: after fork in a process of many threads, only system calls.
fn child(
    filter: &[sock_filter],
    notify: bool,
    control: impl AsFd,
    probes: &[Probe],
    results: &mut [i64],
) -> ! {
    // SAFETY: sets a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    match install(filter, notify) {
        Ok(Some(listener)) => {
            // SAFETY: just made, and nobody else's.
            let listener = unsafe { std::os::fd::BorrowedFd::borrow_raw(listener) };
            if sys::send_packet(control, b"listener", &[listener]).is_err() {
                exit(SETUP_FAILED);
            } // left open: close may be refused
        }
        Ok(None) => {}
        Err(error) => {
            results[0] = -i64::from(error.raw_os_error().unwrap_or(0));
            exit(SETUP_FAILED);
        }
    }
    for (probe, result) in probes.iter().zip(results) {
        *result = attempt(*probe, filter);
    }
    exit(0)
}

fn attempt(probe: Probe, filter: &[sock_filter]) -> i64 {
    let done = match probe {
        // SAFETY: the probes' pointers are null or live in the test that passed them.
        Probe::Call(nr, [a, b, c, d, e]) => unsafe { libc::syscall(nr, a, b, c, d, e, 0) },
        Probe::I386Getpid => return i386_getpid(),
        Probe::SecondListener => {
            return install(filter, true)
                .map_or_else(|error| -i64::from(error.raw_os_error().unwrap_or(0)), |_| 0);
        }
    };
    if done < 0 { -i64::from(io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { done }
}

fn i386_getpid() -> i64 {
    let mut eax = 20_i64;
    // SAFETY: getpid takes nothing and touches nothing; the entry may clobber r8 to r11.
    unsafe {
        std::arch::asm!("int 0x80", inout("rax") eax, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    eax
}

/// Whether `int 0x80` works here without a filter: a kernel may be built or booted without it.
fn has_i386_entry() -> bool {
    let mut status = 0;
    // SAFETY: the child makes two system calls.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        exit(i32::from(i386_getpid() <= 0));
    }
    // SAFETY: `status` lives through the call.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if status != 0 {
        eprintln!("skipped: no i386 entry on this kernel");
    }
    status == 0
}

fn exit(code: i32) -> ! {
    // SAFETY: ends the process without running anything else.
    unsafe { libc::_exit(code) }
}

/// Memory that a forked child shares with this process; for the life of the test.
fn shared(len: usize) -> &'static mut [i64] {
    let (protection, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, wherever the kernel likes.
    let memory =
        unsafe { libc::mmap(ptr::null_mut(), len * size_of::<i64>(), protection, flags, -1, 0) };
    assert_ne!(memory, libc::MAP_FAILED);
    // SAFETY: the mapping is that long, aligned to a page, zeroed and ours for good.
    let results = unsafe { slice::from_raw_parts_mut(memory.cast(), len) };
    results.fill(NOT_REACHED);
    results
}

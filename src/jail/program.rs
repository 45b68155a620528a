//! The process that becomes the program: from init's fork to exec.
//!
//! The same rule as in `init`: only system calls. In a jail it shares init's memory until
//! exec, so neither writes to what both use, `errno` included. Direct mode's memfd-exec is
//! the one exception; it allocates, which is sound here because this is the
//! only thread of a process of its own.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{BorrowedFd, RawFd},
};

use rustix::process::DumpableBehavior;

use super::{
    blueprint::Exec,
    identity,
    init::{Context, limit},
    landlock, seccomp,
    step::{Report, START_LEN, Start, Step, StepError},
};
use crate::sys::{self, Mapping};

/// Descriptors that come with [`Start`], in the order of `message::LaunchFds`.
const START_FDS: usize = 5;

/// What it begins with.
#[derive(Clone, Copy)]
pub(super) struct Beginning<'a> {
    pub context: Context<'a>,
    /// The Landlock ruleset to enter.
    pub ruleset: Option<RawFd>,
    /// A pipe's end that nobody else has: closed by exec, it tells init of that.
    pub exec_told_by: Option<RawFd>,
}

/// Never returns: execs, or reports what failed and exits.
pub(super) fn main(beginning: Beginning<'_>) -> ! {
    let mut context = beginning.context;
    match become_program(&mut context, &beginning) {
        Ok(never) => match never {},
        Err(error) => context.fail(error),
    }
}

fn become_program(
    context: &mut Context<'_>,
    beginning: &Beginning<'_>,
) -> Result<std::convert::Infallible, StepError> {
    let ruleset = beginning.ruleset;
    let blueprint = context.blueprint;
    // 1. A session of its own: no controlling terminal to push input into.
    context.at(Step::Session, rustix::process::setsid())?;
    context.at(Step::Session, sys::unblock_signals())?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));

    // 2. Identity, while it still takes capabilities to change it.
    let (uid, gid) = blueprint.program_id;
    context.at(Step::Identity, identity::become_user(uid, gid, blueprint.clear_groups))?;

    // 3. Capabilities: leaving an unmapped uid 0 behind clears none of them.
    context.at(
        Step::Capabilities,
        identity::drop_capabilities(blueprint.last_capability, blueprint.keep_capabilities),
    )?;
    context.at(Step::Attributes, rustix::thread::set_no_new_privs(true))?;
    context.at(
        Step::Attributes,
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable),
    )?;

    // 4. Ready. What follows belongs to one call.
    context.at(Step::Handshake, context.report(Report::Ready))?;
    let (start, fds) = receive_start(*context)?;

    // 5. argv and environment, mapped before their descriptor is closed.
    let call = context.at(Step::Arguments, Mapping::read_only(fds[4], start.call_len as usize))?;
    let vectors = context.at(Step::Arguments, Vectors::over(&call, start))?;

    // 6. Descriptors: 0, 1, 2; the executable and the control socket go to
    //    numbers that the program's own can never reach; all are close-on-exec but 0, 1, 2.
    context.at(Step::Descriptors, place_descriptors(*context, &fds, beginning))?;
    // From here on also a failure is told over the parked copy.
    // SAFETY: it was just put there.
    context.control = unsafe { BorrowedFd::borrow_raw(blueprint.control_fd) };

    // 7. Resource limits: after 6, which needs numbers beyond them.
    for (index, (resource, value)) in blueprint.rlimits.iter().enumerate() {
        context
            .at(Step::Rlimits, limit(*resource, *value))
            .map_err(|error| StepError { index: index as u16, ..error })?;
    }
    if start.copy_len > 0 {
        return direct(*context, start.copy_len, &vectors);
    }

    // 8. Landlock, then the filter: the filter would not let Landlock in.
    if ruleset.is_some() {
        context.at(Step::Landlock, landlock::restrict_self(blueprint.exec_fd + 2))?;
        context.at(Step::Landlock, sys::close(blueprint.exec_fd + 2))?;
    }
    let listener = match &blueprint.filter {
        Some(filter) => context
            .at(Step::Seccomp, seccomp::notify::install(&filter.instructions, filter.notify))?,
        None => None, // direct mode
    };
    context.at(Step::Listener, send_listener(*context, listener))?;

    // 9. The program. Only this descriptor's number passes the filter.
    context.at(Step::Exec, io::Result::Ok(()))?; // for an injected fault: exec doesn't come back
    // SAFETY: `Vectors::over` made both arrays, ended by null.
    let error = unsafe { sys::execveat(blueprint.exec_fd, vectors.argv(), vectors.envp()) };
    context.at(Step::Exec, Err(error))
}

fn receive_start(context: Context<'_>) -> Result<(Start, [RawFd; START_FDS]), StepError> {
    let mut bytes = [0; START_LEN];
    let mut fds = [-1; START_FDS];
    let received = sys::receive_raw(context.control, &mut bytes, &mut fds);
    let (length, count) = context.at(Step::Handshake, received)?;
    match Start::decode(&bytes[..length]) {
        Some(start) if count == START_FDS => Ok((start, fds)),
        // End of file: the run was given up before it started.
        _ => Err(StepError { step: Step::Handshake, index: 1, errno: libc::EPIPE }),
    }
}

/// `fds`: executable, stdin, stdout, stderr, call. The ruleset and the pipe's end, if
/// any, go to `exec_fd + 2` and `+ 3`, beyond everything that is closed here.
fn place_descriptors(
    context: Context<'_>,
    fds: &[RawFd; START_FDS],
    beginning: &Beginning<'_>,
) -> io::Result<()> {
    let blueprint = context.blueprint;
    let [executable, stdin, stdout, stderr, _call] = *fds;
    let executable = match &blueprint.exec {
        Exec::Interpreter(path) => open_interpreter(path)?,
        Exec::Memfd => executable,
    };
    sys::dup_to(executable, blueprint.exec_fd)?;
    sys::dup_to(std::os::fd::AsRawFd::as_raw_fd(&context.control), blueprint.control_fd)?;
    for (from, place) in [(beginning.ruleset, 2), (beginning.exec_told_by, 3)] {
        if let Some(from) = from {
            sys::dup_to(from, blueprint.exec_fd + place)?;
        }
    }
    for (from, to) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
        sys::dup_to_inherited(from, to)?;
    }
    sys::close_range(3, blueprint.exec_fd as u32 - 1)?;
    sys::close_range(blueprint.exec_fd as u32 + 4, u32::MAX)
}

fn open_interpreter(path: &CStr) -> io::Result<RawFd> {
    use rustix::fs::{CWD, Mode, OFlags};
    let fd = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    Ok(std::os::fd::IntoRawFd::into_raw_fd(fd))
}

fn send_listener(context: Context<'_>, listener: Option<RawFd>) -> io::Result<()> {
    let report = Report::Filtered.encode();
    // sendmsg(2) on this descriptor's number is one of the two calls that the
    // filter lets pass for us.
    sys::send_one_fd(context.control, &report, listener)
}

/// Direct mode: memfd-exec copies the executable into a memfd of its own.
fn direct(
    context: Context<'_>,
    copy_len: u32,
    vectors: &Vectors,
) -> Result<std::convert::Infallible, StepError> {
    let length = copy_len as usize;
    let code = context.at(Step::Exec, Mapping::read_only(context.blueprint.exec_fd, length))?;
    context.at(Step::Listener, send_listener(context, None))?;
    let strings = |list: *const *const libc::c_char| {
        // SAFETY: `list` is one of the vectors: NUL-terminated strings, then null.
        unsafe { collect(list) }
    };
    let (argv, envp) = (strings(vectors.argv()), strings(vectors.envp()));
    let text = |string: &CString| {
        <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(string.as_bytes()).to_owned()
    };
    let Some((name, arguments)) = argv.split_first() else {
        return Err(StepError { step: Step::Arguments, index: 0, errno: libc::EINVAL });
    };
    let mut command = memfd_exec::MemFdExecutable::new(text(name), code.bytes());
    command.args(arguments.iter().map(text)).env_clear();
    for entry in &envp {
        let bytes = entry.as_bytes();
        let equals = bytes.iter().position(|byte| *byte == b'=').unwrap_or(bytes.len());
        let (name, value) = bytes.split_at(equals);
        let os = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes;
        command.env(os(name), os(value.get(1..).unwrap_or_default()));
    }
    // Only `.exec()`: its `spawn` and friends fork, and panic in the fork.
    let error = command.exec(memfd_exec::Stdio::inherit());
    context.at(Step::Exec, Err(error))
}

/// # Safety
/// `list` must be a null-terminated array of NUL-terminated strings.
unsafe fn collect(list: *const *const libc::c_char) -> Vec<CString> {
    let mut strings = Vec::new();
    for index in 0.. {
        // SAFETY: within the array: we stop at its null.
        let string = unsafe { list.add(index).read() };
        if string.is_null() {
            break;
        }
        // SAFETY: the caller vouches for the strings.
        strings.push(unsafe { CStr::from_ptr(string) }.to_owned());
    }
    strings
}

/// argv and envp for execve(2), in a mapping of their own.
struct Vectors {
    pointers: Mapping,
    argc: usize,
}

impl Vectors {
    /// Points at `start.argc + start.envc` strings of `call`, each ended by a NUL.
    fn over(call: &Mapping, start: Start) -> io::Result<Self> {
        let (argc, envc) = (start.argc as usize, start.envc as usize);
        let slots = argc + envc + 2;
        let pointers = Mapping::anonymous(slots * size_of::<*const u8>())?;
        let bytes = call.bytes();
        let mut at = 0;
        let mut slot = 0;
        for index in 0..argc + envc {
            if index == argc {
                slot += 1; // the null that ends argv
            }
            let rest = bytes.get(at..).unwrap_or_default();
            let length = rest
                .iter()
                .position(|byte| *byte == 0)
                .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
            pointers.set_address(slot, rest.as_ptr() as usize);
            slot += 1;
            at += length + 1;
        }
        Ok(Self { pointers, argc })
    }

    fn argv(&self) -> *const *const libc::c_char {
        self.pointers.as_ptr().cast()
    }

    fn envp(&self) -> *const *const libc::c_char {
        self.argv().wrapping_add(self.argc + 1) // right after argv's null
    }
}

//! The process that becomes the program: from init's fork to exec.
//!
//! The same rule as in `init`: only system calls. In a jail it shares init's memory until
//! exec, so neither writes to what both use, `errno` included. Direct mode's memfd-exec is
//! the one exception; it allocates, which is sound here because this is the
//! only thread of a process of its own.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, BorrowedFd, IntoRawFd as _, OwnedFd, RawFd},
};

use rustix::{fs::OFlags, process::DumpableBehavior};

use super::{
    blueprint::{Exec, Service},
    identity,
    init::{Context, limit},
    landlock, seccomp,
    step::{Report, START_LEN, Start, Step, StepError},
};
use crate::sys::{self, Mapping};

/// Descriptors that come with [`Start`], in the order of `message::LaunchFds`.
const START_FDS: usize = 5;
/// And, where the program is a service, the socket that it listens at.
const START_FDS_MAX: usize = START_FDS + 1;
/// Where that goes: SD_LISTEN_FDS_START of sd_listen_fds(3).
const LISTENING_FD: RawFd = 3;

/// How often the listener is sent again: for less than a second.
const LISTENER_TRIES: u32 = 200_000;

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
    send_ready(*context)?;
    let (start, fds) = receive_start(*context)?;

    // 5. argv and environment, mapped before their descriptor is closed.
    let call = context.at(Step::Arguments, Mapping::read_only(fds[4], start.call_len as usize))?;
    let vectors = Vectors::over(&call, start, blueprint.service.as_ref());
    let vectors = context.at(Step::Arguments, vectors)?;

    // 6. Descriptors: 0, 1, 2 (a service's socket: 3); the executable and the control socket go to
    //    numbers that the program's own can never reach; all are close-on-exec but the former.
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

/// All is built. What the launcher reaches a service by goes along: the directory for its own
/// socket, which was made for this run, and the network namespace that we are in. Nothing
/// of the tenant's has run yet that could have put another in its place.
fn send_ready(context: Context<'_>) -> Result<(), StepError> {
    let service = context.blueprint.service.as_ref();
    let directory = match service.and_then(|service| service.directory.as_ref()) {
        Some(path) => Some(context.at(Step::ServiceDirectory, open_directory(path))?),
        None => None,
    };
    let network = match service.is_some_and(|service| service.own_network) {
        // Its own links are open to a process, whoever they belong to.
        true => Some(context.at(Step::ServiceNetwork, open(c"/proc/self/ns/net", OFlags::RDONLY))?),
        false => None,
    };
    let (mut along, mut count) = ([context.control; 2], 0);
    for descriptor in [&directory, &network].into_iter().flatten() {
        along[count] = descriptor.as_fd();
        count += 1;
    }
    let sent = sys::send_packet(context.control, &Report::Ready.encode(), &along[..count]);
    context.at(Step::Handshake, sent)?;
    for descriptor in [directory, network].into_iter().flatten() {
        context.at(Step::ServiceDirectory, sys::close(descriptor.into_raw_fd()))?;
    }
    Ok(())
}

fn receive_start(context: Context<'_>) -> Result<(Start, [RawFd; START_FDS_MAX]), StepError> {
    let mut bytes = [0; START_LEN];
    let mut fds = [-1; START_FDS_MAX];
    let expected = START_FDS + usize::from(context.blueprint.service.is_some());
    let received = sys::receive_raw(context.control, &mut bytes, &mut fds);
    let (length, count) = context.at(Step::Handshake, received)?;
    match Start::decode(&bytes[..length]) {
        Some(start) if count == expected => Ok((start, fds)),
        // End of file: the run was given up before it started.
        _ => Err(StepError { step: Step::Handshake, index: 1, errno: libc::EPIPE }),
    }
}

/// `fds`: executable, stdin, stdout, stderr, call. The ruleset and the pipe's end, if
/// any, go to `exec_fd + 2` and `+ 3`, beyond everything that is closed here.
fn place_descriptors(
    context: Context<'_>,
    fds: &[RawFd; START_FDS_MAX],
    beginning: &Beginning<'_>,
) -> io::Result<()> {
    let blueprint = context.blueprint;
    let [executable, stdin, stdout, stderr, _call, listening] = *fds;
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
    let mut first = LISTENING_FD;
    if blueprint.service.is_some() {
        // Last: whatever had this number has been put where it belongs.
        sys::dup_to_inherited(listening, LISTENING_FD)?;
        first += 1;
    }
    sys::close_range(first as u32, blueprint.exec_fd as u32 - 1)?;
    sys::close_range(blueprint.exec_fd as u32 + 4, u32::MAX)
}

fn open_directory(path: &CStr) -> io::Result<OwnedFd> {
    open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW)
}

fn open_interpreter(path: &CStr) -> io::Result<RawFd> {
    Ok(open(path, OFlags::PATH)?.into_raw_fd())
}

fn open(path: &CStr, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(rustix::fs::CWD, path, flags, rustix::fs::Mode::empty())?)
}

/// Sends the filter's listener. Where more descriptors of this user's are on their way in sockets
/// than the sender may have open, sendmsg(2) fails with ETOOMANYREFS: without root all runs have
/// one user, and a program may have as few as four open. That passes.
fn send_listener(context: Context<'_>, listener: Option<RawFd>) -> io::Result<()> {
    let report = Report::Filtered.encode();
    let mut tries = LISTENER_TRIES;
    loop {
        // On this descriptor's number it is one of the two calls that the filter lets pass for
        // us: there is none to wait by.
        match sys::send_one_fd(context.control, &report, listener) {
            Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) && tries > 0 => {
                tries -= 1;
            }
            result => return result,
        }
    }
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

/// The entry that names the program's pid: for who inherits the environment, but not the
/// descriptor, sd_listen_fds(3).
const PID_ENTRY: &[u8] = b"LISTEN_PID=";
/// Its longest text, with the digits of the greatest number and a NUL.
const PID_ENTRY_MAX: usize = PID_ENTRY.len() + 10 + 1;

/// Writes it, and a NUL.
fn pid_entry(pid: u32) -> [u8; PID_ENTRY_MAX] {
    let mut text = [0; PID_ENTRY_MAX];
    text[..PID_ENTRY.len()].copy_from_slice(PID_ENTRY);
    let digits = pid.checked_ilog10().unwrap_or(0) as usize + 1;
    let mut left = pid;
    for place in text[PID_ENTRY.len()..PID_ENTRY.len() + digits].iter_mut().rev() {
        *place = b'0' + (left % 10) as u8;
        left /= 10;
    }
    text
}

/// argv and envp for execve(2), in a mapping of their own.
struct Vectors {
    pointers: Mapping,
    argc: usize,
}

impl Vectors {
    /// Points at `start.argc + start.envc` strings of `call`, each ended by a NUL, and what
    /// a service is told besides.
    fn over(call: &Mapping, start: Start, service: Option<&Service>) -> io::Result<Self> {
        let (argc, envc) = (start.argc as usize, start.envc as usize);
        let told = service.map_or(&[][..], |service| &service.environment);
        let (entries, text) = match service {
            Some(_) => (told.len() + 1, PID_ENTRY_MAX),
            None => (0, 0),
        };
        let slots = argc + envc + entries + 2;
        let text_at = slots * size_of::<*const u8>();
        let pointers = Mapping::anonymous(text_at + text)?;
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
        if service.is_some() {
            if envc == 0 {
                slot += 1; // the null that ends argv was not passed yet
            }
            // This process is the one that becomes the program.
            let pid = rustix::process::getpid().as_raw_nonzero().get();
            pointers.set_bytes(text_at, &pid_entry(pid.unsigned_abs()));
            pointers.set_address(slot, pointers.as_ptr() as usize + text_at);
            for (index, entry) in told.iter().enumerate() {
                pointers.set_address(slot + 1 + index, entry.as_ptr() as usize);
            }
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn vectors(strings: &[&str], argc: u32, service: Option<&Service>) -> [Vec<String>; 2] {
        let call: Vec<u8> = strings.iter().flat_map(|it| [it.as_bytes(), b"\0"].concat()).collect();
        let memfd = sys::sealed_memfd(c"call", &[&call], false).unwrap();
        let mapping = Mapping::read_only(memfd.as_raw_fd(), call.len()).unwrap();
        let envc = strings.len() as u32 - argc;
        let start = Start { argc, envc, call_len: call.len() as u32, copy_len: 0 };
        let vectors = Vectors::over(&mapping, start, service).unwrap();
        [vectors.argv(), vectors.envp()].map(|list| {
            // SAFETY: both are null-terminated arrays of strings, as is to be seen.
            let strings = unsafe { collect(list) };
            strings.iter().map(|string| string.to_str().unwrap().to_owned()).collect()
        })
    }

    #[test]
    fn vectors_are_those_of_the_call_and_of_a_service() {
        let own = format!("LISTEN_PID={}", std::process::id());
        let entries = ["LISTEN_FDS=1", "LISTEN_FDNAMES=grpc", "GRPC_UNIX_SOCKET=/x"];
        let environment = entries.map(|entry| CString::new(entry).unwrap()).to_vec();
        let service = Service { environment, directory: None, own_network: false };
        let told: Vec<_> = std::iter::once(&*own).chain(entries).collect();
        for (strings, argc) in
            [(&["a"][..], 1), (&["a", "", "c"], 3), (&["a", "B=", "C=d"], 1), (&["A=1"], 0)]
        {
            let (argv, environment) = strings.split_at(argc as usize);
            assert_eq!(vectors(strings, argc, None), [argv, environment]);
            let all = [environment, &told[..]].concat();
            assert_eq!(vectors(strings, argc, Some(&service)), [argv, &all[..]]);
        }
    }

    #[test]
    fn a_call_with_fewer_strings_than_it_says_is_refused() {
        let memfd = sys::sealed_memfd(c"call", &[b"a\0b"], false).unwrap();
        let mapping = Mapping::read_only(memfd.as_raw_fd(), 3).unwrap();
        let start = Start { argc: 1, envc: 1, call_len: 3, copy_len: 0 };
        let error = Vectors::over(&mapping, start, None).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn a_pid_is_written_as_it_is() {
        for pid in [0, 2, 10, 99, 4_194_304, u32::MAX] {
            let text = pid_entry(pid);
            let text = CStr::from_bytes_until_nul(&text).unwrap();
            assert_eq!(text.to_str().unwrap(), format!("LISTEN_PID={pid}"));
        }
    }
}

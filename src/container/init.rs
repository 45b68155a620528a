//! `dispatch-init` for containers: PID 1 of each, between the dispatcher and the program.
//!
//! # Theory of operation
//!
//! Docker starts it in a container whose image is the program's, as the program's user,
//! without privilege and under the program's filter. It is told on standard input what to
//! execute (`protocol`), starts that, reaps, and in the end says how the program ended
//! where nobody else can: as the last word of both streams, with a nonce.
//!
//! Nothing of the image may be needed: so it is static, has no C library and no heap, and
//! makes its system calls itself. build.rs compiles it; of the crate it shares `protocol`.
//! The program's filter must let pass all that `sys::number` lists.
//!
//! The program has init's uid. What keeps init from it: nobody can signal PID 1 from
//! within, and an undumpable process can't be traced or read. It can be given other
//! resource limits, where the filter lets prlimit(2) pass; then it fails, and an init that
//! fails ends the container without having written a record.

#![no_std]
#![no_main]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("dispatch-init for containers knows the system calls of Linux on x86-64 only");

// It has what only the dispatcher needs as well.
#[allow(dead_code)]
#[path = "protocol.rs"]
mod protocol;
#[path = "init/sys.rs"]
mod sys;

use protocol::{
    BACKLOG, GO, HOLD_PATH, Header, LISTEN_ENTRIES, LISTEN_PID, LISTENER_PATH, Record, Verdict,
    exit,
};
use sys::{Errno, Fd, Pid, Ready, Result};

/// How many dead processes that the program left behind are looked at before the living
/// are killed.
const LEFT_BEHIND_MAX: u32 = 1024;

const STDIN: Fd = Fd::STDIN;
const STREAMS: [Fd; 2] = [Fd::STDOUT, Fd::STDERR];

/// The numbered list. The stack is as the kernel made it; nothing on it is of interest.
pub extern "C" fn main() -> ! {
    // 1. Only PID 1 may kill all that it sees. The name is for people. Undumpable, and
    //    deaf to signals, before the program is there. Children are waited for even
    //    where who started us ignores theirs.
    if sys::getpid() != 1 {
        sys::exit(exit::REFUSED);
    }
    sys::set_name(c"dispatch-init").ok();
    needed(sys::set_dumpable(false));
    needed(sys::block_all_signals());
    needed(sys::notice_children());
    needed(sys::close_from(3));

    // 2. From here on, the dispatcher's end is ours.
    let init = Init { hold: open_hold() };

    // 3. and 4. What to execute. Not a byte more is read: it would be the program's.
    let header = init.read_header();
    let program = init.read_program(&header);

    // 5. Where it listens, if it does. Still nobody else is here.
    let listener = header.listens.then(|| init.listener());

    // 6. and 7. The program's whole life.
    let record = init.run(program, listener);

    // 8. Nobody is left who could write: this is the end of both streams.
    for stream in STREAMS {
        init.write_whole(stream, &record.encode(&header.nonce));
    }

    // 9. Until we are killed, or the dispatcher is gone.
    loop {
        init.wait(None, Ready::NOTHING, false);
    }
}

/// The FIFO whose writer is the dispatcher; without it only Docker ends us.
fn open_hold() -> Option<Fd> {
    let hold = sys::open_to_read(HOLD_PATH).ok()?;
    // A writer that was gone before we came is told by no poll, only by the end of file.
    if matches!(sys::read(hold, &mut [0]), Ok(0)) {
        sys::exit(exit::DISMISSED);
    }
    Some(hold)
}

fn needed<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|_| sys::exit(exit::REFUSED))
}

fn malformed() -> ! {
    sys::exit(exit::MALFORMED)
}

/// What execve(2) takes: a path, and two vectors of pointers to strings.
struct Program {
    path: *const u8,
    strings: &'static [u8],
    /// Arguments and a null, environment and a null.
    pointers: &'static mut [*const u8],
    /// Where in them the environment begins.
    environment_at: usize,
    /// Whether the last of its entries is still to be made, by the program's own process.
    lacks_pid: bool,
}

impl Program {
    /// How many pointers one of this header has.
    fn pointers(header: &Header) -> usize {
        let added = if header.listens { LISTEN_ENTRIES.len() + 1 } else { 0 };
        header.arguments as usize + header.environment as usize + added + 2
    }

    /// Points each pointer to its string; `None` where there aren't as many of each.
    fn new(
        strings: &'static [u8],
        pointers: &'static mut [*const u8],
        header: &Header,
    ) -> Option<Self> {
        let mut rest = strings.split_inclusive(|byte| *byte == 0);
        let path = rest.next()?.as_ptr();
        let environment_at = header.arguments as usize + 1;
        let (argv, envp) = pointers.split_at_mut_checked(environment_at)?;
        // The last of each stays null.
        let (_, arguments) = argv.split_last_mut()?;
        let (sent, added) = envp.split_at_mut_checked(header.environment as usize)?;
        for pointer in arguments.iter_mut().chain(sent) {
            *pointer = rest.next()?.as_ptr();
        }
        if rest.next().is_some() || strings.last() != Some(&0) {
            return None;
        }
        if header.listens {
            for (pointer, entry) in added.iter_mut().zip(LISTEN_ENTRIES) {
                *pointer = entry.as_ptr().cast();
            }
        }
        Some(Self { path, strings, pointers, environment_at, lacks_pid: header.listens })
    }

    /// Becomes the program; comes back only with the reason why not.
    fn exec(self, listener: Option<Fd>) -> Result<()> {
        sys::setsid()?;
        prefer_for_oom_kill();
        if let Some(listener) = listener {
            // In the place of our copy of the FIFO, where there is one.
            sys::renumber(listener, Fd::LISTENER)?;
        }
        let pid = PidEntry::own();
        if self.lacks_pid
            && let Some(place) = self.pointers.iter_mut().nth_back(1)
        {
            *place = pid.text.as_ptr();
        }
        sys::unblock_all_signals()?;
        let argv = self.pointers.as_ptr();
        let envp = argv.wrapping_add(self.environment_at);
        // SAFETY: `new` made it all of strings with a NUL each, and of two vectors with a
        // null each; the text that was added is of that form as well, and still there.
        unsafe { sys::execve(self.path, argv, envp) }
    }

    /// Gives the memory back, which is charged to the container.
    fn forget(self) {
        // SAFETY: a mapping of its own, which only `exec` looks at, in the child's copy.
        unsafe { sys::unmap(self.strings) };
        // SAFETY: as above.
        unsafe { sys::unmap(self.pointers) };
    }
}

/// `LISTEN_PID=` and the pid of who makes it.
struct PidEntry {
    /// Room for the name, ten digits and a NUL.
    text: [u8; LISTEN_PID.len() + 11],
}

impl PidEntry {
    fn own() -> Self {
        let mut pid = sys::getpid().unsigned_abs();
        let mut digits = [0; 10];
        let mut count = 0;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (pid % 10) as u8;
            pid /= 10;
            count += 1;
            if pid == 0 {
                break;
            }
        }
        let mut text = [0; LISTEN_PID.len() + 11];
        let digits = digits.iter().skip(10 - count);
        for (to, from) in text.iter_mut().zip(LISTEN_PID.iter().chain(digits)) {
            *to = *from;
        }
        Self { text }
    }
}

/// Where memory is short, rather the program than init, which is to tell of it. No
/// control of anything: where there is no /proc it stays as it is.
fn prefer_for_oom_kill() {
    // An undumpable process's /proc files are root's. There is nobody yet to be kept away.
    if sys::set_dumpable(true).is_ok()
        && let Ok(score) = sys::open_to_write(c"/proc/self/oom_score_adj")
    {
        sys::write(score, b"1000").ok();
        sys::close(score);
    }
}

/// Init, as it is while it waits.
struct Init {
    hold: Option<Fd>,
}

impl Init {
    fn read_header(&self) -> Header {
        let mut bytes = [0; Header::LEN];
        match self.read_whole(STDIN, &mut bytes) {
            0 => sys::exit(exit::DISMISSED),
            Header::LEN => {}
            _ => malformed(),
        }
        // The program inherits it: where it can go back, it would read the nonce.
        if sys::can_seek(STDIN) {
            malformed();
        }
        Header::decode(&bytes).unwrap_or_else(|| malformed())
    }

    fn read_program(&self, header: &Header) -> Program {
        let strings: &mut [u8] = needed(sys::map_bytes(header.strings_len as usize));
        if self.read_whole(STDIN, strings) != strings.len() {
            malformed();
        }
        let pointers = needed(sys::map_pointers(Program::pointers(header)));
        Program::new(strings, pointers, header).unwrap_or_else(|| malformed())
    }

    /// A socket that listens, once the dispatcher has hold of it and said so. Nothing else
    /// could have connected, and nothing ever finds its name again.
    fn listener(&self) -> Fd {
        let deaf = || sys::exit(exit::DEAF);
        let listener = sys::listen(LISTENER_PATH, BACKLOG).unwrap_or_else(|_| deaf());
        self.wait(Some(listener), Ready::INPUT, false);
        let dispatcher = sys::accept(listener).unwrap_or_else(|_| deaf());
        let mut word = [0];
        if self.read_whole(dispatcher, &mut word) != word.len() {
            sys::exit(exit::DISMISSED);
        }
        if word != [GO] {
            malformed();
        }
        sys::close(dispatcher);
        if sys::unlink(LISTENER_PATH).is_err() {
            deaf();
        }
        listener
    }

    /// Starts the program and sees to its end, and to that of all it left behind.
    fn run(&self, program: Program, listener: Option<Fd>) -> Record {
        // Before the fork: from here on nothing is opened, so the program's standard
        // input is the only one to have had number 0.
        let started = sys::child_signals()
            .and_then(|signals| self.start(program, listener).map(|started| (signals, started)));
        let (signals, started) = match started {
            Ok(started) => started,
            Err(Errno(errno)) => {
                let verdict = Verdict::NotStarted(errno);
                return Record { verdict, denied: false, left_behind: false };
            }
        };
        let record = self.supervise(signals, started.pid);
        match started.failed {
            Some(errno) => Record { verdict: Verdict::NotStarted(errno), ..record },
            None => record,
        }
    }

    /// Forks, and waits until the child has become the program, or says why it can't.
    fn start(&self, program: Program, listener: Option<Fd>) -> Result<Started> {
        let (told, tell) = sys::pipe()?;
        let Some(pid) = sys::fork()? else {
            if let Err(Errno(errno)) = program.exec(listener) {
                sys::write(tell, &errno.to_ne_bytes()).ok();
            }
            sys::exit(127);
        };
        // The program alone has its input: what it doesn't read is refused to the writer
        // as soon as it has ended.
        sys::close(STDIN);
        sys::close(tell);
        if let Some(listener) = listener {
            // Or connections would wait for a program that is gone.
            sys::close(listener);
        }
        let mut errno = [0; 4];
        // Exec closes the child's end.
        let failed = self.read_whole(told, &mut errno) == errno.len();
        sys::close(told);
        program.forget();
        Ok(Started { pid, failed: failed.then(|| u32::from_ne_bytes(errno)) })
    }

    /// Reaps until the program has ended, kills what is left then, and reaps that.
    fn supervise(&self, signals: Fd, program: Pid) -> Record {
        let (mut ended, mut denied) = (None, false);
        let (mut left_dead, mut killed) = (0, false);
        loop {
            // Also where the dead come without end.
            self.wait(None, Ready::NOTHING, true);
            let none_dead = match sys::wait_any() {
                Ok(Some((pid, status))) => {
                    denied |= status & 0x7f == sys::SIGSYS;
                    if pid == program {
                        ended = Some(status);
                    } else if ended.is_some() {
                        left_dead += 1;
                    }
                    false
                }
                Ok(None) => true,
                // All of the pid namespace descends from us: nobody is left in it.
                Err(Errno::CHILD) => {
                    let status = needed(ended.ok_or(Errno::CHILD));
                    return Record { verdict: Verdict::Ended(status), denied, left_behind: killed };
                }
                Err(_) => sys::exit(exit::REFUSED),
            };
            if ended.is_some() && !killed && (none_dead || left_dead >= LEFT_BEHIND_MAX) {
                // With one call, so that none can fork ahead of it.
                match sys::kill_all_others() {
                    // The last ended by itself in this moment.
                    Ok(()) | Err(Errno::SEARCH) => killed = true,
                    Err(_) => sys::exit(exit::REFUSED),
                }
            } else if none_dead {
                self.wait(Some(signals), Ready::INPUT, false);
                sys::drain(signals);
            }
        }
    }

    /// Reads until the buffer is full or the stream ends; how many bytes came.
    fn read_whole(&self, from: Fd, buffer: &mut [u8]) -> usize {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            self.wait(Some(from), Ready::INPUT, false);
            match sys::read(from, rest) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(Errno::INTERRUPTED | Errno::AGAIN) => {}
                Err(_) => malformed(),
            }
        }
        filled
    }

    /// Writes all of it. The program may have left the stream full, and in a mode of its own.
    fn write_whole(&self, to: Fd, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let ready = self.wait(Some(to), Ready::OUTPUT, false);
            match sys::write(to, bytes) {
                Ok(count @ 1..) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTERRUPTED) => {}
                Err(Errno::AGAIN) if ready == Ready::OUTPUT => {}
                Ok(0) | Err(_) => sys::exit(exit::UNWRITTEN),
            }
        }
    }

    /// Waits until a descriptor is ready, or where it is only to `glance`, looks. The end
    /// of the dispatcher is ours, and that of the pid namespace.
    fn wait(&self, fd: Option<Fd>, wanted: Ready, glance: bool) -> Ready {
        loop {
            match sys::poll([(self.hold, Ready::NOTHING), (fd, wanted)], glance) {
                // Asked for nothing, it tells of its end alone: bytes in it wake nobody.
                Ok([hold, _]) if hold != Ready::NOTHING => sys::exit(exit::DISMISSED),
                Ok([_, ready]) => return ready,
                Err(Errno::INTERRUPTED) => {}
                Err(_) => sys::exit(exit::REFUSED),
            }
        }
    }
}

/// A child that is the program, or could not become it.
struct Started {
    pid: Pid,
    failed: Option<u32>,
}
